"""What is given out: exactly the model's distribution whatever is drafted, batched or seeded; and typical acceptance."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime import CandidateTree, DecodingEngine, DecodingOptions, DynamicTree, OptionError, StepCosts
from medusa_runtime.backends.base import HeadOutput, StepOutput
from medusa_runtime.decoding.sequence import DecodingSequence as Answer
from medusa_runtime.drafting.draft import Draft
from medusa_runtime.sampling import acceptance
from medusa_runtime.sampling.acceptance import Accepted, accept_sampled, accept_typical
from medusa_runtime.sampling.distribution import Uniforms, distribution
from medusa_runtime.sampling.shaping import LogitsShaper
from tests.support.drafts import draft_of
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend, fake_manifest, greedy, logits_after, next_token
from tests.unit.test_sampling import ALMOST_ONE, chi_square_p, reference_probabilities

PROMPT = [3, 1, 4]
CHAIN = CandidateTree.from_choices([[0, 0, 0]])
WIDE = CandidateTree.from_choices([[0], [1], [2], [0, 0], [0, 1], [1, 0], [1, 2], [2, 1], [0, 0, 0], [1, 0, 2]])
BUSHY = CandidateTree.from_choices(itertools.product(range(3), repeat=2))
ROOT = CandidateTree.root_only()
TREES = {"chain": CHAIN, "wide": WIDE, "bushy": BUSHY, "dynamic3": DynamicTree(3), "dynamic9": DynamicTree(9), "root": ROOT}


# A model of five tokens, so that the distribution of an answer's first tokens can be written down

FEW = 5


def rng_of(context: Sequence[int]) -> np.random.Generator:
    return np.random.default_rng([*hashlib.sha256(bytes(token % 256 for token in context)).digest()])


@cache
def few_logits(context: tuple[int, ...]) -> np.ndarray:
    return rng_of(context).normal(0, 1, FEW).astype(np.float32)


@cache
def few_guesses(context: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What the heads say: any tokens with any probabilities, but both decided by the context. [K, M] each"""
    rng = rng_of((99, *context))
    token_ids = np.array([rng.permutation(FEW)[:3] for _ in range(3)])
    chances = np.sort(rng.dirichlet(np.ones(4), 3)[:, :3], axis=1)[:, ::-1]
    return token_ids, np.log(chances).astype(np.float32)


class FewTokens(FakeBackend):
    """The same backend with that model."""

    def __init__(self) -> None:
        manifest = fake_manifest(num_heads=3, top_k=3, tree=CHAIN)
        manifest.model.vocab_size = FEW
        super().__init__(manifest=manifest)

    def step(self, *inputs, with_logits=False, **others) -> StepOutput:
        super().step(*inputs, **others)
        logits = np.array([[few_logits(tuple(row)) for row in rows] for rows in self.contexts])  # [B, R, V]
        return StepOutput(logits.argmax(axis=-1), logits if with_logits else None)

    def propose(self, rows, root_ids) -> HeadOutput:
        guesses = [few_guesses(tuple(self.contexts[sequence][row])) for sequence, row in enumerate(rows)]
        return HeadOutput(np.array([ids for ids, _ in guesses]), np.array([log_probs for _, log_probs in guesses]))


def few_answers(tree, seeds: range, num_tokens: int = 4, **fields) -> tuple[list[tuple[int, ...]], DecodingEngine]:
    """Answers to one prompt with many seeds, decoded side by side."""
    engine = DecodingEngine(FewTokens(), tree, max_batch_size=32)
    answers = []
    for seed in seeds:
        answers.append(engine.add([3, 1], DecodingOptions.of(max_new_tokens=num_tokens, seed=seed, **fields)))
        if engine.num_waiting >= 16:
            engine.step()
    while not engine.is_idle:
        engine.step()
    return [tuple(answer.token_ids) for answer in answers], engine


def joint_probabilities(num_tokens: int = 4, **fields) -> dict[tuple[int, ...], float]:
    """The exact probability of every answer, from the model's own logits."""
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_tokens):
        joint = {
            (*answer, token): chance * float(probability)
            for answer, chance in joint.items()
            for token, probability in enumerate(reference_probabilities(few_logits((3, 1, *answer)), **fields))
        }
    return joint


def fit(answers: Sequence[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How likely answers so far from the expected ones are; as many of their tokens are compared as these have."""
    length = len(next(iter(expected)))
    place = {answer: index for index, answer in enumerate(expected)}
    counts = np.bincount([place[answer[:length]] for answer in answers], minlength=len(expected))
    return chi_square_p(counts, expected.values())


SAMPLED = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.3, "top_p": 0.75},
    "min_p": {"temperature": 1.0, "min_p": 0.25},
    "all": {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
}
CASES = [
    *((tree, "plain") for tree in TREES if tree != "root"),
    *(("wide", name) for name in SAMPLED if name != "plain"),
    ("dynamic9", "all"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_first_tokens_have_exactly_the_models_joint_distribution(case) -> None:
    """Losslessness: the first token comes with the prompt, the other three from drafts of up to two tokens and their bonus."""
    begin = 4000 * CASES.index(case)  # a case has samples of its own
    tree, fields = TREES[case[0]], SAMPLED[case[1]]
    answers, engine = few_answers(tree, range(begin, begin + 4000), **fields)
    for num_tokens in (2, 3, 4):
        assert fit(answers, joint_probabilities(num_tokens, **fields)) > 1e-4
    assert engine.stats.num_accepted_tokens > 0.08 * engine.stats.num_decoded_tokens  # or this would be about the bonus alone
    assert engine.stats.num_accepted_tokens < engine.stats.num_draft_tokens


def twice(draft: Draft, target, options: DecodingOptions) -> Accepted:
    """A rule that is biased: if the drawn token is no draft, it draws once more from the same distribution."""
    path = [0]
    while True:
        chances, uniform = distribution(target.logits(path), options), target.uniform(len(path) - 1)
        token_id = chances.draw(uniform)
        if draft.child(path[-1], token_id) is None:
            token_id = chances.draw(7919 * uniform % 1)
        if (child := draft.child(path[-1], token_id)) is None:
            return Accepted(path, token_id)
        path.append(child)


def test_a_rule_that_prefers_drafts_would_be_found_out(monkeypatch) -> None:
    monkeypatch.setattr(acceptance, "accept_sampled", twice)
    answers, _ = few_answers(WIDE, range(2500), **SAMPLED["plain"])
    assert fit(answers, joint_probabilities(2, **SAMPLED["plain"])) < 1e-6
    assert fit(answers, joint_probabilities(4, **SAMPLED["plain"])) < 1e-6


def test_tokens_that_are_right_alone_and_wrong_together_would_be_found_out(monkeypatch) -> None:
    monkeypatch.setattr(Answer, "uniform", lambda self, depth: self._uniforms[0])  # the first token's number for all
    answers, _ = few_answers(WIDE, range(2500), **SAMPLED["plain"])
    assert fit(answers, joint_probabilities(1, **SAMPLED["plain"])) > 1e-4
    assert fit(answers, joint_probabilities(2, **SAMPLED["plain"])) < 1e-6


def test_a_temperature_that_is_a_little_off_would_be_found_out() -> None:
    answers, _ = few_answers(WIDE, range(2500), temperature=1.2)
    assert fit(answers, joint_probabilities(4, temperature=1.2)) > 1e-4
    assert fit(answers, joint_probabilities(4, temperature=1.0)) < 1e-4


def test_typical_acceptance_is_not_distributed_as_the_model() -> None:
    answers, _ = few_answers(WIDE, range(2500), acceptance="typical", **SAMPLED["plain"])
    assert fit(answers, joint_probabilities(4, **SAMPLED["plain"])) < 1e-6


# One draw, and the rejection sampler that it stands for


@dataclass
class KnownTarget:
    """What a model says, given by hand."""

    rows: Sequence[Sequence[float]]  # [N][V] probabilities after each node, or logits
    uniforms: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    end_ids: frozenset[int] = frozenset()

    def logits(self, path: Sequence[int]) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(np.array(self.rows[path[-1]], np.float64)).astype(np.float32)

    def uniform(self, depth: int) -> float:
        return self.uniforms[depth]

    def ends_at(self, token_id: int) -> bool:
        return token_id in self.end_ids


def rejection_sampler(p: Sequence[Fraction], candidates: Sequence[int]) -> tuple[dict[int, Fraction], list[Fraction]]:
    """Speculative sampling without replacement over candidates that are each drawn from a point, from the definition.

    Accept x with min(1, p(x) / q(x)), else go on with what is left of p, max(0, p - q) normalised; draw from it when no
    candidate is left. Returns how likely each candidate is accepted, and how likely each token is given out in the end.
    """
    residual, reached = list(p), Fraction(1)
    accepted: dict[int, Fraction] = {}
    for candidate in candidates:
        q = [Fraction(token == candidate) for token in range(len(p))]
        chance = min(Fraction(1), residual[candidate] / q[candidate])
        accepted[candidate] = reached * chance
        reached *= 1 - chance
        left = [max(Fraction(0), a - b) for a, b in zip(residual, q, strict=True)]
        residual = [part / sum(left) for part in left] if any(left) else left
    given_out = [reached * part for part in residual]
    for candidate, chance in accepted.items():
        given_out[candidate] += chance
    return accepted, given_out


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.integers(0, 30), min_size=2, max_size=7).filter(any),
    order=st.randoms(use_true_random=False),
    num_candidates=st.integers(1, 7),
)
def test_one_draw_accepts_as_often_as_rejection_sampling_over_all_candidates(parts, order, num_candidates) -> None:
    p = [Fraction(part, sum(parts)) for part in parts]
    candidates = order.sample(range(len(p)), min(num_candidates, len(p)))
    accepted, given_out = rejection_sampler(p, candidates)
    assert given_out == p  # the sampler that is compared with is lossless itself
    assert accepted == {candidate: p[candidate] for candidate in candidates}

    draft = draft_of(CandidateTree.from_choices([[rank] for rank in range(len(candidates))]), [0, *candidates])
    options, grid = DecodingOptions.of(temperature=1.0), 500
    rows = [[float(chance) for chance in p]] + [[1.0] * len(p)] * len(candidates)
    verdicts = [accept_sampled(draft, KnownTarget(rows, [(place + 0.5) / grid, 0.5]), options) for place in range(grid)]
    for node, candidate in enumerate(candidates, start=1):
        share = sum(verdict.nodes == [0, node] for verdict in verdicts) / grid
        assert abs(share - accepted[candidate]) <= 1.5 / grid
    for token in set(range(len(p))) - set(candidates):
        share = sum((verdict.nodes, verdict.bonus_id) == ([0], token) for verdict in verdicts) / grid
        assert abs(share - p[token]) <= 1.5 / grid


def test_each_depth_is_drawn_with_the_number_of_its_place_and_after_its_own_path() -> None:
    draft = draft_of(CandidateTree.from_choices([[0], [1], [1, 0]]), [9, 0, 1, 2])
    rows = [[0.5, 0.5, 0], [1, 0, 0], [0.25, 0.25, 0.5], [0, 0.1, 0.9]]
    options = DecodingOptions.of(temperature=1.0)

    def accept(*uniforms: float, end_ids: frozenset[int] = frozenset()) -> Accepted:
        return accept_sampled(draft, KnownTarget(rows, uniforms, end_ids), options)

    assert accept(0.49, 0.9) == Accepted([0, 1], 0)
    assert accept(0.51, 0.49) == Accepted([0, 2], 1)
    assert accept(0.51, 0.51, 0.09) == Accepted([0, 2, 3], 1)
    assert accept(0.51, ALMOST_ONE, 0.11) == Accepted([0, 2, 3], 2)
    assert accept(0.51, 0.51, 0.09, end_ids=frozenset([2])) == Accepted([0, 2], 2)  # nothing follows an end: it is the bonus


# The same seed gives the same tokens

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.8, "presence_penalty": 0.7, "logit_bias": {7: 2.5, 9: -100}, "min_new_tokens": 6, "stop_token_ids": [7]},
    {"repetition_penalty": 1.5, "logit_bias": {7: 1.5}, "min_new_tokens": 6, "stop_token_ids": [7]},
]
TYPICAL = {"temperature": 0.8, "acceptance": "typical"}
COSTS = StepCosts([1, 4], [1, 8], [256], [[[1.0, 1.2], [1.5, 5.0]]], [0.1, 0.2])


def plain_loop(prompt: Sequence[int], options: DecodingOptions, stream: int = 0) -> list[int]:
    """Token by token, each a function of the seed and of the tokens before it."""
    shaper = LogitsShaper(options, prompt, frozenset(options.stop_token_ids))
    uniforms = Uniforms(options.seed or 0, stream)
    token_ids: list[int] = []
    while len(token_ids) < (options.max_new_tokens or 0) and not set(token_ids) & set(options.stop_token_ids):
        logits = shaper.shape(logits_after([*prompt, *token_ids]), token_ids)
        drawn = distribution(logits, options).draw(uniforms[len(token_ids)]) if options.is_sampled else int(logits.argmax())
        token_ids.append(drawn)
    return token_ids


def answer_of(engine: DecodingEngine, prompt: Sequence[int], options: DecodingOptions, **others) -> Answer:
    """An answer that is decoded alone, to its end."""
    answer = engine.add(prompt, options, **others)
    while not answer.is_finished:
        engine.step()
    assert answer.error is None
    return answer


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("fields", OPTIONS, ids=range(len(OPTIONS)))
def test_the_tree_changes_no_token(tree, fields) -> None:
    for seed in range(3):
        options = DecodingOptions.of(max_new_tokens=25, seed=seed, **fields)
        expected = plain_loop(PROMPT, options)
        engine = DecodingEngine(FakeBackend("sometimes"), TREES[tree])
        assert answer_of(engine, PROMPT, options).token_ids == expected
        assert answer_of(engine, PROMPT, DecodingOptions.of(options, medusa=False)).token_ids == expected
        assert answer_of(engine, PROMPT, DecodingOptions.of(options, tree=WIDE)).token_ids == expected


requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
        "seed": st.integers(0, (1 << 64) - 1),
        "fields": st.sampled_from([*OPTIONS, TYPICAL]),
        "tree": st.sampled_from([None, *TREES.values()]),
        "num_tokens": st.integers(1, 20),
        "stream": st.integers(0, 3),
        "joins": st.integers(0, 8),  # before this step
        "leaves": st.one_of(st.none(), st.integers(1, 12)),  # cancelled before this one
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    asked=st.lists(requests, min_size=1, max_size=5),
    skill=st.sampled_from(["never", "always", "sometimes"]),
    max_batch_size=st.integers(1, 4),
    chunk=st.integers(1, 8),
    is_measured=st.booleans(),
    reuses=st.booleans(),
)
def test_others_that_join_and_leave_change_no_token(asked, skill, max_batch_size, chunk, is_measured, reuses) -> None:
    def options_of(request) -> DecodingOptions:
        fields = request["fields"]
        num_tokens = max(request["num_tokens"], fields.get("min_new_tokens", 1))
        return DecodingOptions.of(max_new_tokens=num_tokens, seed=request["seed"], tree=request["tree"], **fields)

    def alone(request) -> list[int]:
        if request["fields"] is not TYPICAL:
            return plain_loop(request["prompt"], options_of(request), request["stream"])
        engine = DecodingEngine(FakeBackend(skill))  # here the tree is part of the answer
        return answer_of(engine, request["prompt"], options_of(request), stream=request["stream"]).token_ids

    backend = FakeBackend(skill, fake_manifest(max_prefill_tokens=chunk))
    costs = COSTS if is_measured else None
    engine = DecodingEngine(backend, max_batch_size=max_batch_size, costs=costs, reuse_prefixes=reuses)
    answers: dict[int, Answer] = {}
    for number in itertools.count():
        for index, request in enumerate(asked):
            if request["joins"] == number:
                answers[index] = engine.add(request["prompt"], options_of(request), stream=request["stream"])
            if index in answers and request["leaves"] == number:
                engine.end(answers[index])
        if engine.is_idle and len(answers) == len(asked):
            break
        engine.step()
    for index, answer in answers.items():
        expected = alone(asked[index])
        assert answer.error is None
        assert answer.token_ids == expected[: len(answer.token_ids)]
        assert answer.finish_reason == "cancelled" or len(answer.token_ids) == len(expected)


def test_answers_to_one_request_have_random_numbers_of_their_own() -> None:
    engine = DecodingEngine(FakeBackend())
    options = DecodingOptions.of(max_new_tokens=20, temperature=1.0, seed=5)
    answers = [answer_of(engine, PROMPT, options, stream=stream).token_ids for stream in range(4)]
    assert len(set(map(tuple, answers))) == 4
    assert answers == [plain_loop(PROMPT, options, stream) for stream in range(4)]


def test_a_seed_that_was_not_given_is_random_and_told() -> None:
    engine = DecodingEngine(FakeBackend())
    options = DecodingOptions.of(max_new_tokens=30, temperature=1.0)
    first, second = answer_of(engine, PROMPT, options), answer_of(engine, PROMPT, options)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    assert answer_of(engine, PROMPT, DecodingOptions.of(options, seed=first.seed)).token_ids == first.token_ids


# Typical acceptance

FOUR = [0.5, 0.3, 0.15, 0.05]  # its entropy H is 1.1421, exp(-H) is 0.3191


def typical(draft: Draft, target: KnownTarget, **fields) -> Accepted:
    return accept_typical(draft, target, DecodingOptions.of(**({"temperature": 1.0, "acceptance": "typical"} | fields)))


def accepted_tokens(p: Sequence[float], **fields) -> list[int]:
    """Which drafts of one token are accepted."""
    draft = draft_of(CandidateTree.from_choices([[0]]), [0, 0])
    accepted = []
    for token in range(len(p)):
        draft.tokens[1] = token
        if typical(draft, KnownTarget([p, p]), **fields).nodes == [0, 1]:
            accepted.append(token)
    return accepted


@pytest.mark.parametrize(
    ("epsilon", "delta", "accepted"),
    [
        (0.09, 0.3, [0, 1, 2]),  # min(0.09, 0.0957)
        (0.2, 0.3, [0, 1, 2]),  # min(0.2, 0.0957)
        (0.2, 0.48, [0, 1]),  # min(0.2, 0.1532)
        (0.2, 1.0, [0, 1]),  # min(0.2, 0.3191)
        (0.31, 1.0, [0]),  # min(0.31, 0.3191)
        (0.29, 1.0, [0, 1]),
        (1.0, 0.93, [0, 1]),  # min(1, 0.2967)
        (1.0, 0.95, [0]),  # min(1, 0.3031)
        (1.0, 0.15, [0, 1, 2, 3]),  # min(1, 0.0479)
        (1.0, 0.16, [0, 1, 2]),  # min(1, 0.0511)
        (0.04, 1.0, [0, 1, 2, 3]),
    ],
)
def test_a_draft_is_typical_above_the_smaller_of_two_thresholds(epsilon, delta, accepted) -> None:
    assert accepted_tokens(FOUR, posterior_threshold=epsilon, posterior_alpha=delta) == accepted


def test_what_is_typical_is_told_from_the_distribution_at_the_requests_options() -> None:
    assert accepted_tokens(FOUR, posterior_threshold=0.04) == [0, 1, 2, 3]
    assert accepted_tokens(FOUR, posterior_threshold=0.04, top_k=3) == [0, 1, 2]
    assert accepted_tokens(FOUR, posterior_threshold=0.04, top_p=0.6) == [0, 1]
    assert accepted_tokens(FOUR, posterior_threshold=0.04, min_p=0.9) == [0]
    colder = [chance**5 / sum(other**5 for other in FOUR) for chance in FOUR]  # 0.93, 0.07, 0.002, 0.00001
    assert accepted_tokens(FOUR, temperature=0.2) == accepted_tokens(colder) == [0]
    assert accepted_tokens(FOUR, temperature=0.2, posterior_threshold=0.06) == [0, 1]


def test_the_longest_typical_path_is_given_out() -> None:
    draft = draft_of(CandidateTree.from_choices([[0], [1], [1, 0]]), [9, 0, 1, 2])
    [path] = {tuple(typical(draft, KnownTarget([FOUR] * 4, [u, u, u])).nodes) for u in (0.0, 0.4, 0.99)}
    assert path == (0, 2, 3)  # though token 0 is likelier than token 1
    draft.tokens[3] = 3  # not typical
    assert typical(draft, KnownTarget([FOUR] * 4)).nodes == [0, 1]


def test_of_equally_long_paths_the_likeliest_is_given_out() -> None:
    draft = draft_of(CandidateTree.from_choices([[0], [1], [0, 0], [1, 0], [1, 1]]), [9, 0, 1, 0, 0, 1])
    even = [0.4, 0.3, 0.3, 0]
    sure = [0.2, 0.8, 0, 0]
    assert typical(draft, KnownTarget([FOUR, even, sure, FOUR, FOUR, FOUR])).nodes == [0, 2, 5]  # 0.3·0.8 > 0.5·0.4
    assert typical(draft, KnownTarget([FOUR, FOUR, even, FOUR, FOUR, FOUR])).nodes == [0, 1, 3]  # 0.5·0.5 > 0.3·0.4


def test_the_token_after_a_typical_path_is_drawn_from_the_typical_ones() -> None:
    draft = draft_of(CandidateTree.from_choices([[0]]), [9, 0])
    grid = 2000
    verdicts = [typical(draft, KnownTarget([FOUR, FOUR], [0.99, (place + 0.5) / grid])) for place in range(grid)]
    assert all(verdict.nodes == [0, 1] for verdict in verdicts)
    shares = np.bincount([verdict.bonus_id for verdict in verdicts], minlength=4) / grid
    assert shares.tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=2 / grid)


def test_where_nothing_is_typical_the_most_likely_token_follows() -> None:
    draft = draft_of(CandidateTree.from_choices([[0], [1]]), [9, 0, 1])
    nothing = {"top_k": 1, "posterior_threshold": 1.0, "posterior_alpha": 1.0}  # the threshold is 1, and p is not above it
    for uniform in (0.0, 0.5, ALMOST_ONE):
        later = typical(draft, KnownTarget([[0.2, 0.1, 0.7]] + [FOUR] * 2, [uniform] * 3), **nothing)
        assert later == Accepted([0], 2)
    options = DecodingOptions.of(temperature=1.0, posterior_threshold=1.0)
    options = options.model_copy(update={"posterior_alpha": 9.0})  # more than a request may ask for
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert accept_typical(draft, KnownTarget([[0.2, 0.1, 0.7]] * 3, [uniform] * 3), options) == Accepted([0], 2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(size=st.integers(1, 60), temperature=st.sampled_from([0.5, 1.0, 2.0]), uniform=st.floats(0, 1, exclude_max=True))
def test_a_model_without_any_preference_is_answered_all_the_same(size, temperature, uniform) -> None:
    """Every token is right at the threshold: rounding says whether none or all are typical."""
    options = {"temperature": temperature, "posterior_threshold": 1.0, "posterior_alpha": 1.0}
    draft = draft_of(CandidateTree.from_choices([[0]]), [0, size - 1])
    verdict = typical(draft, KnownTarget([[1 / size] * size] * 2, [uniform, uniform]), **options)
    assert 0 <= verdict.bonus_id < size


def test_nothing_follows_an_end_in_a_typical_path() -> None:
    draft = draft_of(CandidateTree.from_choices([[0], [1], [0, 0]]), [9, 0, 1, 1])
    assert typical(draft, KnownTarget([FOUR] * 4)).nodes == [0, 1, 3]
    assert typical(draft, KnownTarget([FOUR] * 4, end_ids=frozenset([0]))) == Accepted([0, 2], 0)


@pytest.mark.parametrize(
    ("fields", "nodes"),
    [({}, [0, 1]), ({"acceptance": "typical"}, [0, 1]), ({"temperature": 1.0}, [0]), ({**TYPICAL, "temperature": 1.0}, [0, 1])],
)
def test_the_options_choose_the_rule(fields, nodes) -> None:
    """Token 0 is the likeliest and typical, and the random number draws another one."""
    draft = draft_of(CandidateTree.from_choices([[0]]), [9, 0])
    target = KnownTarget([FOUR, FOUR], [0.9, 0.9])
    assert acceptance.accept(draft, target, DecodingOptions.of(**fields)).nodes == nodes


@pytest.mark.parametrize("skill", ["never", "always", "sometimes"])
def test_typical_acceptance_without_temperature_is_greedy(skill) -> None:
    options = DecodingOptions.of(max_new_tokens=30, acceptance="typical")
    assert answer_of(DecodingEngine(FakeBackend(skill)), PROMPT, options).token_ids == greedy(PROMPT, 30)


def likely_draft(tree: CandidateTree, context: list[int]) -> tuple[Draft, list[np.ndarray]]:
    """A draft as good heads make it, each node's token the likeliest of its rank, and what the model says after each node."""
    tokens, rows = [context[-1]], [reference_probabilities(logits_after(context), temperature=1.0)]
    for node in range(1, tree.num_nodes):
        order = np.argsort(-rows[tree.parents[node]], kind="stable")
        tokens.append(int(order[tree.ranks[node]]))
        path = [tokens[above] for above in np.flatnonzero(tree.mask[node])[1:]]
        rows.append(reference_probabilities(logits_after([*context, *path]), temperature=1.0))
    return draft_of(tree, tokens), rows


def test_typical_acceptance_goes_further_than_exact_acceptance_on_the_same_drafts() -> None:
    exact = DecodingOptions.of(temperature=1.0)
    typical_length = exact_length = 0.0
    for number in range(60):
        draft, rows = likely_draft(WIDE, [number % VOCAB_SIZE, 5, 7])
        target = KnownTarget(rows)
        typical_length += len(typical(draft, target).nodes)
        for seed in range(20):
            target.uniforms = [Uniforms(seed)[place] for place in range(4)]
            exact_length += len(accept_sampled(draft, target, exact).nodes) / 20
    assert typical_length > 1.1 * exact_length > 1.1 * 60 * 1.1


def test_typical_acceptance_comes_again_with_its_seed() -> None:
    options = DecodingOptions.of(max_new_tokens=30, seed=3, **TYPICAL)
    first, again, other = (
        answer_of(DecodingEngine(FakeBackend(), WIDE), PROMPT, DecodingOptions.of(options, seed=seed)) for seed in (3, 3, 4)
    )
    assert first.token_ids == again.token_ids != other.token_ids


def test_typical_acceptance_is_the_same_under_load() -> None:
    options = DecodingOptions.of(max_new_tokens=20, seed=3, **TYPICAL)
    alone = answer_of(DecodingEngine(FakeBackend(), DynamicTree(9)), PROMPT, options).token_ids
    engine = DecodingEngine(FakeBackend(), DynamicTree(9), max_batch_size=4, costs=COSTS)
    others = [engine.add([9, number], DecodingOptions.of(max_new_tokens=30)) for number in range(3)]
    assert answer_of(engine, PROMPT, options).token_ids == alone
    while not engine.is_idle:
        engine.step()
    assert [other.token_ids for other in others] == [greedy([9, number], 30) for number in range(3)]


# Options through the engine


def reference_greedy(prompt: list[int], num_tokens: int, end_ids: Sequence[int] = (), **fields) -> list[int]:
    """Greedy decoding with penalties in plain words."""
    options = DecodingOptions.of(**fields)
    answer: list[int] = []
    while len(answer) < num_tokens:
        logits = logits_after([*prompt, *answer]).astype(np.float64)
        for token in range(VOCAB_SIZE):
            if token in prompt or token in answer:
                logits[token] *= options.repetition_penalty if logits[token] < 0 else 1 / options.repetition_penalty
            if token in answer:
                logits[token] -= options.presence_penalty + options.frequency_penalty * answer.count(token)
            logits[token] += options.logit_bias.get(token, 0)
            if token in end_ids and len(answer) < options.min_new_tokens:
                logits[token] = -np.inf
        answer.append(int(logits.argmax()))
        if answer[-1] in end_ids:
            break
    return answer


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.6},
        {"logit_bias": {3: 4.0, 8: 3.5, 20: -5.0}},
        {"min_new_tokens": 9},
        {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "logit_bias": {11: 3},
            "min_new_tokens": 9,
        },
    ],
    ids="-".join,
)
@pytest.mark.parametrize("prompt", [PROMPT, [10] * 4, [40, 11]], ids=str)
def test_greedy_decoding_with_penalties_is_a_plain_loop(tree, fields, prompt) -> None:
    end_ids = list(range(0, VOCAB_SIZE, 5)) if "min_new_tokens" in fields else []
    expected = reference_greedy(prompt, 25, end_ids, **fields)
    options = DecodingOptions.of(max_new_tokens=25, stop_token_ids=end_ids, **fields)
    assert answer_of(DecodingEngine(FakeBackend("sometimes"), TREES[tree]), prompt, options).token_ids == expected
    assert expected != greedy(prompt, 25)[: len(expected)]  # or the options would say nothing


@pytest.mark.parametrize("skill", ["never", "always", "sometimes"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 1.0, "seed": 1}, {"seed": 1, **TYPICAL}, {"repetition_penalty": 1.4, "logit_bias": {5: 3}}],
    ids=["greedy", "sampled", "typical", "penalties"],
)
def test_each_token_comes_with_the_models_own_log_probabilities(skill, fields) -> None:
    engine = DecodingEngine(FakeBackend(skill), WIDE)
    answer = answer_of(engine, PROMPT, DecodingOptions.of(max_new_tokens=20, logprobs=3, **fields))
    steps = answer.take_steps()
    context = list(PROMPT)
    for step in steps:
        assert step.logprobs is not None
        assert [one.token_id for one in step.logprobs] == step.token_ids
        for one in step.logprobs:
            chances = reference_probabilities(logits_after(context), temperature=1.0)  # before any option
            assert one.logprob == pytest.approx(math.log(chances[one.token_id]), abs=1e-4)
            likeliest = np.argsort(-chances)[:3]
            assert [token for token, _ in one.top] == likeliest.tolist()
            assert [logprob for _, logprob in one.top] == pytest.approx(np.log(chances[likeliest]).tolist(), abs=1e-4)
            context.append(one.token_id)
    assert context == [*PROMPT, *answer.token_ids]
    assert len(answer.token_ids) == 20
    if skill == "always" and not fields:
        assert max(len(step.token_ids) for step in steps) == 4  # some of them are of accepted drafts


def test_log_probabilities_are_cut_with_their_tokens_and_given_where_they_are_asked_for() -> None:
    end_id = greedy(PROMPT, 7)[6]
    engine = DecodingEngine(FakeBackend("always"), CHAIN)
    asked = answer_of(engine, PROMPT, DecodingOptions.of(max_new_tokens=20, logprobs=0, stop_token_ids=[end_id]))
    cut = answer_of(engine, PROMPT, DecodingOptions.of(max_new_tokens=6, logprobs=0))
    for answer, num_tokens in ((asked, greedy(PROMPT, 7).index(end_id) + 1), (cut, 6)):
        steps = answer.take_steps()
        logprobs = [one for step in steps for one in step.logprobs or []]
        assert [one.token_id for one in logprobs] == answer.token_ids == greedy(PROMPT, num_tokens)
        assert all(one.top == [] and one.logprob < 0 for one in logprobs)
    silent = answer_of(engine, PROMPT, DecodingOptions.of(max_new_tokens=6))
    assert [step.logprobs for step in silent.take_steps()] == [None] * silent.stats.num_steps + [None]


@pytest.mark.parametrize("skill", ["never", "always"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_answer_does_not_end_before_its_least_number_of_tokens(skill, temperature) -> None:
    end_ids = list(range(0, VOCAB_SIZE, 3))  # a third of all tokens
    for least in (0, 1, 5, 12):
        options = DecodingOptions.of(
            max_new_tokens=60, min_new_tokens=least, stop_token_ids=end_ids, temperature=temperature, seed=least
        )
        answer = answer_of(DecodingEngine(FakeBackend(skill), WIDE), PROMPT, options)
        assert not set(answer.token_ids[:least]) & set(end_ids)
        assert (answer.finish_reason, answer.token_ids[-1] in end_ids) == ("stop", True)
        assert len(answer.token_ids) > least
        assert not set(answer.token_ids[:-1]) & set(end_ids)


@pytest.mark.parametrize("skill", ["never", "always"])
@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.3, "seed": 2}, {"temperature": 0.3, "seed": 2, "acceptance": "typical"}]
)
def test_end_of_sequence_tokens_end_the_answer_unless_they_are_ignored(skill, fields) -> None:
    manifest = fake_manifest()
    engine = DecodingEngine(FakeBackend(skill, manifest), WIDE)

    def ask(**more) -> Answer:
        return answer_of(engine, PROMPT, DecodingOptions.of(max_new_tokens=30, **fields, **more))

    whole = ask().token_ids
    assert len(whole) == 30
    eos, other = whole[9], whole[4]
    manifest.model.eos_token_ids = [eos]
    ended = ask()
    assert (ended.token_ids, ended.finish_reason) == (whole[: whole.index(eos) + 1], "stop")
    ignoring = ask(ignore_eos=True)
    assert (ignoring.token_ids, ignoring.finish_reason) == (whole, "length")
    stopped = ask(ignore_eos=True, stop_token_ids=[other])  # this one was asked for
    assert (stopped.token_ids, stopped.finish_reason) == (whole[: whole.index(other) + 1], "stop")


def test_a_request_whose_options_leave_nothing_fails_alone() -> None:
    manifest = fake_manifest()
    engine = DecodingEngine(FakeBackend("always", manifest))
    everything = list(range(VOCAB_SIZE))
    failing = engine.add(PROMPT, DecodingOptions.of(max_new_tokens=9, min_new_tokens=1, stop_token_ids=everything))
    answer = answer_of(engine, PROMPT, DecodingOptions.of(max_new_tokens=9))
    assert (failing.finish_reason, failing.token_ids) == ("error", [])
    assert isinstance(failing.error, OptionError)
    assert answer.token_ids == greedy(PROMPT, 9)


def test_a_token_that_is_biased_away_or_forced_is_so_in_drafts_too() -> None:
    favourite = next_token(PROMPT)
    engine = DecodingEngine(FakeBackend("always"), WIDE)
    for temperature in (0.0, 1.0):
        fields = {"max_new_tokens": 20, "temperature": temperature, "seed": 0}
        banned = answer_of(engine, PROMPT, DecodingOptions.of(logit_bias={favourite: -100}, **fields))
        assert favourite not in banned.token_ids
        forced = answer_of(engine, PROMPT, DecodingOptions.of(logit_bias={favourite: 100}, **fields))
        assert forced.token_ids == [favourite] * 20
