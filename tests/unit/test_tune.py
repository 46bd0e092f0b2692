"""Tuning on recorded answers: replay and search against brute force, and against the engine itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medusa_export.bundle.tree_shapes import most_likely_tree
from medusa_export.measure.prompt_files import read_prompts
from medusa_export.measure.tune.decode import TimedStep, cycled, full_steps, in_turn, lookup_check, rate, with_host_seconds
from medusa_export.measure.tune.record import Record, ranks_of, record
from medusa_export.measure.tune.search import (
    EvaluatedAcceptance,
    LikelyDrafts,
    Place,
    RecordedAcceptance,
    best_kind,
    best_static,
    node_acceptance,
    path_products,
    replay_dynamic,
    sizes,
)
from medusa_heads.replay import NOT_VALID, TOP_K, Evaluation, TreeResult, accepted_drafts, replay
from medusa_runtime import CandidateTree, DecodingEngine, DecodingOptions, DynamicTree, OptionError, StepCosts
from medusa_runtime.drafting.proposals import candidates_for
from tests.support.fake_backend import FakeBackend, fake_manifest, greedy

PROMPTS = [[1, 2], [3], [5, 6, 7], [9], [11, 12]]
CHEAP = StepCosts([1, 8], [1, 16], [64], [[[1.0, 1.001], [1.0, 1.001]]], [0.001, 0.001])
DEAR = StepCosts([1, 8], [1, 16], [64], [[[1.0, 16.0], [8.0, 128.0]]], [0.1, 0.8])
BETWEEN = StepCosts([1, 4], [1, 8, 16], [64], [[[1.0, 1.4, 2.2], [1.2, 3.0, 6.0]]], [0.1, 0.2], [0.05, 0.1])

RESTING = StepCosts([1, 4], [1, 16], [64], [[[1.0, 1.5], [1.2, 2.0]]], [2.0, 2.0])  # heads that are hardly worth asking


def recorded(num_tokens: int = 40, skill: str = "sometimes") -> Record:
    manifest = fake_manifest()
    return record(FakeBackend(skill, manifest), PROMPTS, max_new_tokens=num_tokens, end_ids=(), batch_size=2)


def small_record(seed: int, rows: int = 12, heads: int = 2, width: int = 2) -> Record:
    """Random ranks and probabilities."""
    rng = np.random.default_rng(seed)
    ranks = rng.choice([*range(width), TOP_K], (rows, heads))
    ranks = np.where(np.arange(heads) < np.arange(rows)[::-1][:, None], ranks, NOT_VALID)
    log_probs = -np.sort(rng.exponential(1.5, (rows, heads, width)), axis=2)
    return Record(ranks, log_probs.astype(np.float32), np.array([0]))


def test_a_record_holds_the_ranks_of_greedy_answers() -> None:
    """Each token of an answer is looked up among the heads' guesses made after the tokens before it."""
    backend, ends = FakeBackend("sometimes"), {17}
    found = record(backend, PROMPTS, max_new_tokens=30, end_ids=ends, batch_size=2)
    bounds = [*found.starts.tolist(), len(found.ranks)]
    for prompt, (start, end) in zip(PROMPTS, itertools.pairwise(bounds), strict=True):
        answer = greedy(prompt, 30)
        length = answer.index(17) + 1 if 17 in answer else 30
        assert end - start == length
        for row, head in itertools.product(range(length), range(3)):
            rank = found.ranks[start + row, head]
            if row + head + 1 >= length:
                assert rank == NOT_VALID
                continue
            context = [*prompt, *answer[:row]]
            offered = backend._candidates(answer[row + head + 1], context, head, 4)
            assert rank == (offered.index(answer[row + head + 1]) if answer[row + head + 1] in offered else TOP_K)
    assert {NOT_VALID, 0, TOP_K} <= set(found.ranks.ravel().tolist())
    assert any(17 in greedy(prompt, 30)[:-1] for prompt in PROMPTS)  # an answer was cut


def test_ranks_beyond_those_told_apart_are_one() -> None:
    ids = np.arange(15)[None, None].repeat(2, axis=0)  # [2, 1, 15]
    assert ranks_of([3, 12], ids).tolist() == [[TOP_K], [NOT_VALID]]
    assert ranks_of([3, 4], ids).tolist() == [[4], [NOT_VALID]]


@pytest.mark.parametrize("tree", [CandidateTree.from_choices([[0], [0, 0], [1], [2, 1]]), CandidateTree.root_only()])
def test_replaying_a_fixed_tree_gives_what_the_engine_gives(tree) -> None:
    found = recorded()
    engine = DecodingEngine(FakeBackend(), tree, max_batch_size=1)
    list(engine.generate(PROMPTS, 40))
    assert replay(found.ranks, found.starts, tree) == pytest.approx(engine.stats.tokens_per_step)


@pytest.mark.parametrize("costs", [CHEAP, DEAR, BETWEEN, RESTING])
@pytest.mark.parametrize("nodes", [1, 4, 12])
def test_replaying_a_dynamic_tree_gives_what_the_engine_gives(costs, nodes) -> None:
    """One sequence at a time, so that engine and replay take the same steps, each with the width that pays most."""
    found = recorded()
    backend = FakeBackend()
    engine = DecodingEngine(backend, DynamicTree(nodes), max_batch_size=1, costs=costs, reuse_prefixes=False)
    list(engine.generate(PROMPTS, 40))
    drafts = LikelyDrafts.of(found, candidates_for(DynamicTree(16), 3, 4))
    replayed = replay_dynamic(found, drafts, Place(costs, 1, 64), nodes, range(5))
    assert replayed.tokens_per_step == pytest.approx(engine.stats.tokens_per_step, rel=0.03)  # the ends of answers differ
    assert replayed.nodes_per_step == pytest.approx(1 + engine.stats.num_draft_tokens / engine.stats.num_steps, rel=0.06)


def test_the_time_of_the_heads_counts_where_they_are_asked() -> None:
    found = recorded(skill="always")
    drafts = LikelyDrafts.of(found, candidates_for(DynamicTree(16), 3, 4))
    even = StepCosts([1, 8], [1, 16], [64], [[[1.0, 1.001], [1.0, 1.001]]], [0.5, 0.5])
    assert replay_dynamic(found, drafts, Place(even, 1, 64), 8, range(5)).step_seconds == pytest.approx(1.5, abs=0.002)
    assert replay_dynamic(found, drafts, Place(even, 1, 64), 1, range(5)).step_seconds == pytest.approx(1.0)


def test_a_steps_time_is_the_backends_the_heads_and_the_hosts() -> None:
    assert Place(BETWEEN, 1, 64).seconds(1) == pytest.approx(1.0 + 0.05)  # a root alone asks no heads
    assert Place(BETWEEN, 4, 64).seconds(8) == pytest.approx(3.0 + 0.2 + 0.1)
    assert Place(BETWEEN, 4, 64).whole(8, 1.5).tokens_per_second == pytest.approx(4 * 1.5 / 3.3)


def test_sequences_side_by_side_are_replayed_as_such() -> None:
    found = recorded()
    drafts = LikelyDrafts.of(found, candidates_for(DynamicTree(16), 3, 4))
    alone = replay_dynamic(found, drafts, Place(BETWEEN, 1, 64), 8, range(5))
    four = replay_dynamic(found, drafts, Place(BETWEEN, 4, 64), 8, range(5))
    assert 1.0 <= four.tokens_per_step < alone.tokens_per_step  # of which each node costs four
    assert four.tokens_per_second == pytest.approx(4 * four.tokens_per_step / four.step_seconds)


@pytest.mark.parametrize("seed", range(8))
def test_a_dynamic_tree_holds_the_likeliest_nodes(seed) -> None:
    """Compared with the trees themselves, with all nodes enumerated."""
    found = small_record(seed)
    drafts = LikelyDrafts.of(found, candidates_for(DynamicTree(6), 2, 2))
    paths = [path for depth in (1, 2) for path in itertools.product(range(2), repeat=depth)]
    for row, nodes in itertools.product(range(len(found.ranks)), range(1, 7)):
        scores = {path: sum(found.log_probs[row, depth, rank] for depth, rank in enumerate(path)) for path in paths}
        chosen = sorted(paths, key=lambda path: -scores[path])[: nodes - 1]
        right = tuple(found.ranks[row].tolist())
        assert drafts.accepted(row, nodes) == (right[:1] in chosen) + (right[:1] in chosen and right in chosen)
        np.testing.assert_allclose(drafts.chances[row, : nodes - 1], np.exp([scores[path] for path in chosen]), rtol=1e-5)


def all_trees(width: int, depth: int) -> list[CandidateTree]:
    paths = [path for d in range(1, depth + 1) for path in itertools.product(range(width), repeat=d)]
    sets = (set(chosen) for count in range(len(paths) + 1) for chosen in itertools.combinations(paths, count))
    return [CandidateTree.from_choices(chosen) for chosen in sets if all(path[:-1] in chosen | {()} for path in chosen)]


@pytest.mark.parametrize("costs", [CHEAP, DEAR, BETWEEN])
@pytest.mark.parametrize("seed", range(5))
def test_no_fixed_tree_gives_more_tokens_a_second(costs, seed) -> None:
    """The best of all trees, by the accepted drafts of steps that start at any row."""
    found, place = small_record(seed, rows=60), Place(costs, 2, 64)

    def seconds(nodes: int) -> float:
        return float(costs.steps(2, 64, nodes)[-1]) + (costs.heads(2) if nodes > 1 else 0.0)

    def given(tree: CandidateTree) -> float:
        return 1 + float(accepted_drafts(found.ranks, tree).mean())

    best = max(2 * given(tree) / seconds(tree.num_nodes) for tree in all_trees(2, 2))
    acceptance = RecordedAcceptance(found, 2, 7)
    chosen = best_static(acceptance._trees, [given(tree) for tree in acceptance._trees], place)
    assert chosen.tokens_per_second == pytest.approx(best)


def test_dear_steps_have_small_trees_and_cheap_ones_large() -> None:
    acceptance = RecordedAcceptance(recorded(), 4, 16)
    for costs, least, most in ((CHEAP, 8, 16), (DEAR, 1, 1)):
        place = Place(costs, 1, 64)
        for tree in (acceptance.static(place), acceptance.dynamic(place)):
            assert least <= tree.nodes <= most
    static = acceptance.static(Place(CHEAP, 1, 64))
    assert CandidateTree.from_json(static.tree).num_nodes == static.nodes == len(static.acceptance)
    plain = Place(DEAR, 1, 64).whole(1, 1.0)
    assert plain.tokens_per_second == pytest.approx(1.0)  # without heads
    assert best_kind(plain, acceptance.static(Place(DEAR, 1, 64)), acceptance.dynamic(Place(DEAR, 1, 64))) == "plain"


def test_how_often_a_node_is_accepted() -> None:
    tree = CandidateTree.from_choices([[0], [1], [0, 2]])
    ranks = np.array([[0, 2], [0, 1], [1, 2], [5, NOT_VALID]])
    assert node_acceptance(ranks, tree) == [1.0, 0.5, 0.25, 1 / 3]
    assert path_products(np.array([[0.5, 0.2, 0.1], [0.4, 0.2, 0.1]]), tree) == pytest.approx([1.0, 0.5, 0.2, 0.05])
    assert path_products(np.array([[0.5]]), tree) == [1.0, 0.5, 0.0, 0.0]  # heads and ranks nobody judged


def test_an_evaluation_gives_trees_without_decoding() -> None:
    accuracy = np.array([[0.5, 0.2, 0.1], [0.3, 0.1, 0.05]])
    tree = most_likely_tree(accuracy.astype(np.float32), 4)
    judged = TreeResult(nodes=4, tokens_per_step=1.45, expected=1.9, tree=tree.to_json())
    facts = {"heads": "", "base_model": "", "data": "", "answers": 1, "tokens": 1}
    evaluation = Evaluation(**facts, accuracy=accuracy.tolist(), trees=[judged])
    acceptance = EvaluatedAcceptance(evaluation, 3, 8)
    assert acceptance._tokens[0] == 1.0
    expected = 1 + 0.5 + 0.2 + 0.15  # the root, two tokens of the first head, one of the second
    assert acceptance._tokens[3] == pytest.approx(1 + 0.5 * (expected - 1))  # heads are right together half as often
    assert acceptance._tokens[1] == pytest.approx(1 + 0.5 * 0.5)  # below the smallest judged tree, too
    static, dynamic = acceptance.static(Place(CHEAP, 1, 64)), acceptance.dynamic(Place(CHEAP, 1, 64))
    assert (static.nodes, dynamic.nodes, dynamic.tree) == (8, 8, None)
    narrow = EvaluatedAcceptance(evaluation, 1, 8)
    assert max(CandidateTree.from_json(narrow.static(Place(CHEAP, 1, 64)).tree).ranks) == 0  # as the bundle's heads give


def test_sizes() -> None:
    assert sizes(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert sizes(10) == [1, 2, 3, 4, 6, 8, 10]
    assert sizes(2) == [1, 2]


def test_only_steps_of_a_full_batch_are_timed() -> None:
    backend = FakeBackend("sometimes")  # so that answers end one after the other
    engine = DecodingEngine(backend, CandidateTree.from_choices([[0], [1], [0, 0]]), max_batch_size=3, reuse_prefixes=False)
    prompts = [[*prompt, *range(1, 49), *range(1, 49)] for prompt in PROMPTS]  # a slot that is free stays so for a step
    steps = full_steps(engine, prompts, DecodingOptions(max_new_tokens=20))
    assert engine.is_idle
    verified = [batch for batch, tokens in backend.steps if tokens <= 4]  # the other steps read prompts
    assert 5 < len(steps) == verified.count(3) < engine.stats.num_steps / 3
    last_full = len(verified) - 1 - verified[::-1].index(3)
    assert set(verified[last_full + 1 :]) <= {2}  # beside the last prompt; once no step can be full any more, all end
    assert all(step.tokens >= 3 for step in steps)
    assert all(0 < step.engine_seconds < step.seconds for step in steps)
    assert rate(steps) == pytest.approx(sum(step.tokens for step in steps) / sum(step.seconds for step in steps))
    assert len(full_steps(engine, PROMPTS, DecodingOptions(max_new_tokens=20), 2)) == 2
    assert full_steps(engine, PROMPTS[:2], DecodingOptions(max_new_tokens=20)) == []  # which never fill it
    assert engine.is_idle


def test_a_step_that_fails_is_told() -> None:
    backend = FakeBackend()

    def fail(_: FakeBackend) -> None:
        raise RuntimeError("no luck")

    backend.fails = fail
    with pytest.raises(RuntimeError, match="no luck"):
        full_steps(DecodingEngine(backend, max_batch_size=1), PROMPTS[:1], DecodingOptions(max_new_tokens=4))


def test_the_hosts_share_is_on_a_line_between_the_smallest_and_the_largest_batch() -> None:
    costs = StepCosts([1, 2, 3], [1, 8], [64], [[[1.0, 2.0]] * 3], [0.1] * 3)
    measured = with_host_seconds(FakeBackend(), costs, PROMPTS[:2])
    for found in (measured.host_seconds, measured.draft_seconds):
        assert found[1] == pytest.approx((found[0] + found[2]) / 2)
        assert min(found) > 0


def test_two_engines_decode_the_same_prompts_in_turn() -> None:
    """On one backend: the engines alternate in going first."""
    backend, told = FakeBackend("sometimes"), []
    turns: list[str] = []

    class Named(DecodingEngine):
        def add(self, *args, **kwargs):
            turns.append("b" if self.prompt_lookup else "a")
            return super().add(*args, **kwargs)

    engines = tuple(
        Named(backend, DynamicTree(8), max_batch_size=1, costs=BETWEEN, reuse_prefixes=False, prompt_lookup=wanted)
        for wanted in (False, True)
    )
    pairs = in_turn(engines, PROMPTS, DecodingOptions(max_new_tokens=20), told.append)
    assert "".join(turns) == "abbaabbaab"
    assert told == [1, 2, 3, 4, 5]
    for pair, prompt in zip(pairs, PROMPTS, strict=True):
        assert [sum(step.tokens for step in steps) for steps in pair] == [len(ended(prompt, 20)) - 1] * 2


def ended(prompt: list[int], most: int) -> list[int]:
    """A greedy answer up to its end."""
    answer, ends = greedy(prompt, most), fake_manifest().model.eos_token_ids
    return answer[: next((place for place, token in enumerate(answer, start=1) if token in ends), most)]


def test_groups_fill_the_batch_of_both_engines() -> None:
    backend = FakeBackend()
    engines = tuple(DecodingEngine(backend, DynamicTree(8), max_batch_size=2, prompt_lookup=wanted) for wanted in (False, True))
    pairs = in_turn(engines, PROMPTS[:4], DecodingOptions(max_new_tokens=20, ignore_eos=True))
    assert len(pairs) == 2
    assert lookup_check(pairs, 2).prompts == 4


def test_the_time_of_all_answers_says_what_prompt_lookup_gives() -> None:
    def pair(without: float, with_it: float) -> tuple[list[TimedStep], list[TimedStep]]:
        return [TimedStep(10, without / 2, 0.9)] * 2, [TimedStep(20, with_it, 0.9)]

    # two answers that lose a little, and one that repeats itself
    found = lookup_check([pair(2.0, 2.2), pair(2.0, 0.5), pair(2.0, 2.1), ([], [TimedStep(5, 1.0, 0.9)])], 4)
    assert found.ratio == pytest.approx(6.0 / 4.8)
    assert found.tokens_per_second == pytest.approx(60 / 4.8)
    assert found.tokens_per_second_without == pytest.approx(10)
    assert found.prompts == 12
    assert lookup_check([([], [])], 1) is None


def test_prompts_are_read_from_lines_and_json_lines(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"turns": ["two", "three"]}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one", "two"]
    assert cycled([1, 2, 3], 5) == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "has no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', "row 2 has no prompt"),
        ("a.jsonl", "plain", "row 1 is not JSON"),
        ("a.jsonl", '{"turns": []}', "row 1 has no prompt"),
        ("a.jsonl", '{"prompt": 3}', "row 1: a user's turn is 3"),
        ("b/a.txt", None, "cannot be read"),
    ],
)
def test_what_holds_no_prompts_is_refused(tmp_path, name, text, message) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=message):
        read_prompts(tmp_path / name)
