"""Draft n-grams: what is counted, how it corrects heads, which trees come of it, and that it changes no token of any answer."""

from __future__ import annotations

import io
import math
import struct
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_heads.ngrams import DISCOUNT, WEIGHTS, count, fit
from medusa_heads.train.examples import Example
from medusa_heads.train.hidden import HiddenStates
from medusa_runtime import CandidateTree, DecodingEngine, DecodingStats, DynamicTree
from medusa_runtime.drafting.draft import Draft
from medusa_runtime.drafting.lookup import Continuation
from medusa_runtime.drafting.ngrams import RATIO_STEP, NGrams, Root, rest_log_prob
from medusa_runtime.drafting.proposals import CandidateSet, HeadGuesses, candidates_for
from medusa_runtime.errors import BundleError, OptionError
from tests.support import fake_backend
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend, fake_manifest, greedy, repeating_token

TEXTS = [[1, 2, 3, 1, 2, 4, 1, 2, 3], [3, 1, 5, 3, 1, 2, 2], [7]]
NGRAMS = count([Example("", (), tuple(text)) for text in TEXTS], 9)
CLOSE = RATIO_STEP / 2 + 1e-6


def chance(token: int, *before: int) -> float:
    """The definition: absolute discounting, with the remaining probability given to the shorter n-gram."""
    found = Counter(
        tuple(text[start : start + len(before) + 1])
        for text in TEXTS
        for start in range(len(text) - len(before))
        if tuple(text[start : start + len(before)]) == before
    )
    total = found.total()
    if not before:
        return (found[token,] + 0.1) / (total + 0.1 * 9)
    if not total:
        return chance(token, *before[1:])
    own = max(found[*before, token] - DISCOUNT, 0) / total
    return own + DISCOUNT * len(found) / total * chance(token, *before[1:])


@pytest.mark.parametrize("first", range(9))
@pytest.mark.parametrize("second", range(9))
def test_ratios_are_those_of_smoothed_counts(first, second) -> None:
    tokens = np.arange(9)
    pairs, triples = NGRAMS.ratios(np.array([[first, second]]), tokens)[:, 0]
    for token in range(9):
        assert pairs[token] == pytest.approx(math.log(chance(token, second) / chance(token)), abs=CLOSE)
        expected = math.log(chance(token, first, second) / chance(token, second))
        assert triples[token] == pytest.approx(expected, abs=CLOSE)


def test_what_comes_before_an_answer_counts_as_context() -> None:
    found = count([Example("", (8, 4, 5), (6, 7))], 9)
    assert (found.ratios(np.array([[4, 5]]), np.array([6])) > 0).all()
    assert found.ratios(np.array([[8, 4]]), np.array([5]))[1] == 0  # (8, 4) does not stand in the two before


def test_of_those_that_share_a_cell_the_most_frequent_is_kept() -> None:
    rng = np.random.default_rng(0)
    text = [token for _ in range(200) for token in (1, 2, 3, *rng.integers(4, 400, 3).tolist())]
    small = count([Example("", (), tuple(text))], 400, max_cells=64)
    assert len(small.cells) == 64
    assert small.ratios(np.array([[1, 2]]), np.array([3]))[0, 0, 0] > 1
    assert small.ratios(np.array([[3, 1]]), np.array([2]))[0, 0, 0] > 1


def test_what_was_never_counted_is_not_taken_for_what_has_its_cell() -> None:
    rng = np.random.default_rng(0)
    full = count([Example("", (), tuple(rng.integers(0, 100, 3000).tolist()))], 800, max_cells=64)
    assert full.cells.all()
    assert (full.ratios(rng.integers(400, 800, (100, 2)), rng.integers(400, 800, 20)) == 0).mean() > 0.95  # but for one in 256


def test_answers_without_three_tokens_are_refused() -> None:
    with pytest.raises(OptionError, match="too short"):
        count([Example("", (), (1, 2)), Example("", (), (3,))], 9)


def heads(seed: int, num_heads: int = 3, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(9)[:width] for _ in range(num_heads)])
    logits = rng.normal(0, 2, (num_heads, 9))
    log_probs = -np.sort(-(logits - np.log(np.exp(logits).sum(1, keepdims=True))), axis=1)[:, :width]
    return ids, log_probs.astype(np.float32)


@given(seed=st.integers(0, 200), depth=st.integers(1, 6))
@settings(deadline=None)
def test_candidates_and_all_other_tokens_make_one(seed, depth) -> None:
    ids, log_probs = heads(seed)
    ngrams = NGRAMS.with_weights(np.random.default_rng(seed).normal(0, 2, (3, 5)))
    found = ngrams.log_probs(np.array([[3, 1], [1, 2]]), ids[0], log_probs[0], depth)
    assert found.shape == (2, 4)
    assert (found <= 0).all()
    of_head, of_pair, of_triple, of_rest, bias = ngrams.weights[min(depth, 3) - 1]
    ratios = ngrams.ratios(np.array([[3, 1], [1, 2]]), ids[0])
    logits = of_head * log_probs[0] + of_pair * ratios[0] + of_triple * ratios[1]
    rest = math.exp(of_rest * rest_log_prob(log_probs[0]) + bias)
    np.testing.assert_allclose(
        np.exp(found), np.exp(logits) / (np.exp(logits).sum(1, keepdims=True) + rest), rtol=1e-4, atol=1e-6
    )


def test_a_likely_pair_raises_a_candidate() -> None:
    ids, log_probs = np.array([2, 4, 5]), np.log(np.array([0.3, 0.3, 0.3], np.float32))
    after_one, after_five = NGRAMS.log_probs(np.array([[3, 1], [1, 5]]), ids, log_probs, 2)
    assert after_one.argmax() == 0
    assert after_one[0] > after_five[0]


@given(seed=st.integers(0, 300), num_nodes=st.integers(1, 20), max_depth=st.integers(0, 4))
@settings(deadline=None)
def test_the_tree_is_of_the_likeliest_of_all_paths(seed, num_nodes, max_depth) -> None:
    ids, log_probs = heads(seed)
    paths: dict[tuple[int, ...], float] = {(): 0.0}

    def extend(path: tuple[int, ...]) -> None:
        if len(path) == min(max_depth, 3):
            return
        last_two = [6, 1, *path][-2:]
        chances = NGRAMS.log_probs(np.array([last_two]), ids[len(path)], log_probs[len(path)], len(path) + 1)[0]
        for token, log_prob in zip(ids[len(path)].tolist(), chances.tolist(), strict=True):
            paths[*path, token] = paths[path] + log_prob
            extend((*path, token))

    extend(())
    places = candidates_for(DynamicTree(20), 3, 4)
    proposals = with_ngrams(places, num_nodes).proposals(1, HeadGuesses(ids, log_probs), max_depth, previous_id=6)
    draft = proposals.likeliest(num_nodes)
    best = sorted(paths.values(), reverse=True)[:num_nodes]
    assert draft.num_nodes == len(best)
    found = [path_of(draft, node) for node in range(draft.num_nodes)]
    np.testing.assert_allclose(sorted((paths[path] for path in found), reverse=True), best, atol=1e-4)
    assert (np.diff(draft.depths) >= 0).all()
    assert [len(path) for path in found] == draft.depths.tolist()


def with_ngrams(places: CandidateSet, num_nodes: int) -> CandidateSet:
    return replace(places, num_nodes=num_nodes, ngrams=NGRAMS)


def path_of(draft: Draft, node: int) -> tuple[int, ...]:
    path: list[int] = []
    while node:
        path.insert(0, int(draft.tokens[node]))
        node = int(draft.parents[node])
    return tuple(path)


def test_prompt_lookup_joins_what_n_grams_find() -> None:
    ids, log_probs = heads(3)
    places = with_ngrams(candidates_for(DynamicTree(6), 3, 4), 6)
    known, new = int(ids[0, 0]), int(next(token for token in range(9) if token not in ids[0]))
    said = [Continuation([known], [0.99]), Continuation([new, 5], [0.98, 0.97])]
    draft = places.proposals(1, HeadGuesses(ids, log_probs), 3, said, previous_id=6).likeliest(4)
    assert {path_of(draft, node) for node in range(4)} == {(), (known,), (new,), (new, 5)}


def test_without_the_heads_there_is_the_root_alone() -> None:
    places = with_ngrams(candidates_for(DynamicTree(6), 3, 4), 6)
    assert places.proposals(4, None, 3, previous_id=6).tokens.tolist() == [4]


def states(answers: list[list[int]]) -> HiddenStates:
    return HiddenStates(np.zeros((sum(map(len, answers)), 1), np.float16), [Example("", (), tuple(a)) for a in answers])


def cycle_answers(seed: int, chaos: float) -> list[list[int]]:
    """A token is followed by its successor, or by any other."""
    rng = np.random.default_rng(seed)
    answers = []
    for _ in range(60):
        answer = [int(rng.integers(8))]
        while len(answer) < 50:
            answer.append((answer[-1] + 1) % 8 if rng.random() > chaos else int(rng.integers(8)))
        answers.append(answer)
    return answers


@pytest.mark.parametrize(("chaos", "least", "most"), [(0.1, 0.6, 2.0), (1.0, -0.2, 0.2)])
def test_n_grams_are_trusted_as_far_as_they_are_right(chaos, least, most) -> None:
    """The heads know nothing; where the held-out answers follow the rule of the others, that is all there is to know."""
    ngrams = count([Example("", (), tuple(answer)) for answer in cycle_answers(0, 0.1)], 8)
    held = states(cycle_answers(1, chaos))
    ids = np.tile(np.arange(6), (len(held.next_ids), 2, 1))
    log_probs = np.full(ids.shape, math.log(1 / 8), np.float32)
    weights = fit(ngrams, held, ids, log_probs)
    assert weights.shape == (2, 5)
    assert (least < weights[:, 1]).all()
    assert (weights[:, 1] < most).all()


def test_all_other_tokens_are_as_likely_as_they_were() -> None:
    ngrams = count([Example("", (), tuple(answer)) for answer in cycle_answers(0, 1.0)], 8)
    held = states(cycle_answers(1, 1.0))
    ids = np.tile(np.arange(6), (len(held.next_ids), 1, 1))
    log_probs = np.full(ids.shape, math.log(0.99 / 6), np.float32)  # too sure of themselves: a quarter are others
    fitted = ngrams.with_weights(fit(ngrams, held, ids, log_probs))
    chances = np.exp(fitted.log_probs(np.array([[1, 2], [5, 5]]), ids[0, 0], log_probs[0, 0], 1))
    assert chances.sum(1) == pytest.approx(0.75, abs=0.08)


def test_where_no_answer_is_long_enough_weights_stay_what_they_were() -> None:
    """At an answer's first row, the token before the root is the prompt's, which is not known."""
    held = states([[1, 2], [3, 4]])
    ids, log_probs = np.zeros((4, 4, 3), np.int64), np.zeros((4, 4, 3), np.float32)
    np.testing.assert_allclose(fit(NGRAMS, held, ids, log_probs), WEIGHTS)


def test_a_file_holds_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        NGRAMS.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = NGrams.load(tmp_path / "a")
    np.testing.assert_array_equal(found.cells, NGRAMS.cells)
    np.testing.assert_array_equal(found.weights, NGRAMS.weights)


CELLS, GOOD = np.zeros(8, np.uint16), np.ones((1, 5), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"cells": CELLS}, "weights"),
        ({"cells": CELLS[:7], "weights": GOOD}, "16 bits each"),
        ({"cells": CELLS.astype(np.int64), "weights": GOOD}, "cells holds int64, not uint16"),
        ({"cells": CELLS.reshape(2, 4), "weights": GOOD}, r"cells has the shape \[2, 4\]"),
        ({"cells": CELLS, "weights": GOOD.repeat(65, 0)}, r"weights has the shape \[65, 5\], the most is \[64, 5\]"),
        ({"cells": CELLS, "weights": GOOD[:, :4]}, "5 numbers"),
        ({"cells": CELLS, "weights": GOOD[:0]}, "missing or not finite"),
        ({"cells": CELLS, "weights": GOOD * np.nan}, "missing"),
        ({"cells": np.array([{}] * 8), "weights": GOOD}, "cells holds object"),
    ],
)
def test_another_file_is_refused(arrays, message, tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(BundleError, match=message):
        NGrams.load(tmp_path / "file.npz")


def packed(path: Path, cells: bytes, shape: str, length: int | None = None) -> Path:
    """A file whose cells say that they have a shape, and hold other bytes. length: of the header, as it says."""
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    size = struct.pack("<H" if length is None else "<I", len(header) if length is None else length)
    weights = io.BytesIO()
    np.save(weights, GOOD)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("cells.npy", b"\x93NUMPY" + bytes([1 if length is None else 2, 0]) + size + header + cells)
        file.writestr("weights.npy", weights.getvalue())
    return path


@pytest.mark.parametrize(
    ("shape", "length", "message"),
    [
        (f"({1 << 28},)", None, "cells has the shape .268435456., the most is .16777216."),
        ("(-1,)", None, "cells has the shape"),
        ("(8,)", None, "more or fewer bytes than its header says"),
        ("(8,)", 1 << 29, "header of another version"),
        ("(8, 1)", None, "cells has the shape"),
    ],
)
def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused_before(
    shape: str, length: int | None, message: str, tmp_path: Path
) -> None:
    path = packed(tmp_path / "file.npz", bytes(1 << 29), shape, length)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=message):
            NGrams.load(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_weights_in_columns_read_back(tmp_path: Path) -> None:
    weights = np.asfortranarray(np.arange(10, dtype=np.float32).reshape(2, 5))
    NGrams(CELLS, weights).save(tmp_path / "a")
    np.testing.assert_array_equal(NGrams.load(tmp_path / "a").weights, weights)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(BundleError, match=r"holds no draft n-grams .*medusa-export heads ngrams"):
        NGrams.load(tmp_path / "file.npz")


def decode(tree: CandidateTree | DynamicTree, ngrams: NGrams | None, skill) -> tuple[list[list[int]], DecodingStats]:
    engine = DecodingEngine(FakeBackend(skill, fake_manifest(3, 4)), tree, ngrams=ngrams)
    stats = DecodingStats()
    answers: list[list[int]] = [[], []]
    for steps in engine.generate([[3, 1, 4], [9]], 60, stats=stats):
        for step in steps:
            answers[step.sequence] += step.token_ids
    return answers, stats


def counted(follow: Callable[[list[int]], int]) -> NGrams:
    """What a model says that looks at two tokens alone."""
    texts = [(first, second, follow([first, second])) for first, second in np.ndindex(VOCAB_SIZE, VOCAB_SIZE)]
    return count([Example("", (), text) for text in texts * 3], VOCAB_SIZE)


@pytest.mark.parametrize("skill", ["never", "always", "sometimes"])
@pytest.mark.parametrize("tree", [DynamicTree(1), DynamicTree(8), CandidateTree.from_choices([[0], [1], [0, 0]])])
def test_no_token_of_any_answer_changes(tree, skill) -> None:
    ngrams = count([Example("", (), tuple(greedy([n], 30))) for n in range(9)], VOCAB_SIZE)
    answers, _ = decode(tree, ngrams, skill)
    assert answers == [greedy([3, 1, 4], 60), greedy([9], 60)]


def test_more_is_accepted_where_the_model_does_what_was_counted() -> None:
    with patch.object(fake_backend, "next_token", repeating_token):
        ngrams = counted(repeating_token)
        plain, without = decode(DynamicTree(6), None, "sometimes")
        corrected, with_them = decode(DynamicTree(6), ngrams, "sometimes")
    assert plain == corrected
    assert with_them.num_steps < 0.8 * without.num_steps


@pytest.mark.parametrize("seed", range(10))
def test_trees_that_grow_together_are_those_that_grow_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    roots = [
        Root(
            (int(rng.integers(8)), int(rng.integers(8))), rng.integers(0, 8, (3, 4)),
            np.log(rng.dirichlet(np.full(6, 0.3), 3)[:, :4] + 1e-9).astype(np.float32), int(rng.integers(1, 20)),
            int(rng.integers(4)),
        )
        for _ in range(seed)
    ]  # fmt: skip
    for together, alone in zip(NGRAMS.grow(roots), [NGRAMS.grow([root])[0] for root in roots], strict=True):
        for one, other in zip(together[:3], alone[:3], strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(together.log_probs, alone.log_probs, rtol=1e-6)


def test_a_fixed_tree_stays_as_it_is() -> None:
    tree = CandidateTree.from_choices([[0], [1], [0, 0]])
    with patch.object(fake_backend, "next_token", repeating_token):
        ngrams = counted(repeating_token)
        steps = [decode(tree, one, "sometimes")[1].num_steps for one in (None, ngrams)]
    assert steps[0] == steps[1]


def test_the_token_before_the_root_is_known_from_the_prompt_on() -> None:
    """Each first draft after a prompt sees the prompt's last token, each later one what was decided."""
    seen: list[tuple[int, int]] = []
    original = NGrams.grow

    def grow(self, roots):
        seen.extend(root.last_ids for root in roots)
        return original(self, roots)

    with patch.object(NGrams, "grow", grow):
        engine = DecodingEngine(FakeBackend("always", fake_manifest(3, 4)), DynamicTree(4), ngrams=NGRAMS)
        answer = [token for steps in engine.generate([[3, 1, 4]], 30) for step in steps for token in step.token_ids]
    text = [4, *answer]
    assert seen[0] == (4, answer[0])
    assert set(seen) <= set(pairwise(text))
