"""From logits to tokens: distributions, draws, penalties, random numbers and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medusa_runtime import BackendError, DecodingOptions, OptionError
from medusa_runtime.sampling.distribution import BLOCK, Distribution, Uniforms, chosen_logprob, distribution
from medusa_runtime.sampling.shaping import LogitsShaper

SIZES = [1, 2, 3, 50, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 100]
ALMOST_ONE = math.nextafter(1.0, 0.0)


def reference_probabilities(
    logits: np.ndarray, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """What the options mean, token by token in plain words. Equal tokens are taken in the order of their ids. [V]"""
    exponents = logits.astype(np.float64) / temperature
    whole = np.exp(exponents - exponents.max())
    whole /= whole.sum()
    kept = sorted(range(len(logits)), key=lambda token: (-whole[token], token))
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        needed, total = [], sum(whole[token] for token in kept)
        for token in kept:
            needed.append(token)
            if sum(whole[one] for one in needed) >= top_p * total:
                break
        kept = needed
    kept = [token for token in kept if whole[token] >= min_p * whole[kept[0]]]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = whole[kept] / whole[kept].sum()
    return probabilities


def probabilities_of(found: Distribution, vocab_size: int) -> np.ndarray:
    """A distribution over the whole vocabulary. [V]"""
    probabilities = np.zeros(vocab_size)
    tokens = np.arange(vocab_size) if found.token_ids is None else found.token_ids
    probabilities[tokens] = found.weights.astype(np.float64) / found.weights.sum(dtype=np.float64)
    return probabilities


def chi_square_p(counts: Iterable[float], probabilities: Iterable[float], least: float = 5.0) -> float:
    """How likely counts at least so far from the expected ones are, if these are the probabilities.

    Cells of which fewer than `least` are expected are taken together. By the Wilson-Hilferty approximation: the cube root of
    a chi-square variable is nearly normal.
    """
    observed, chances = np.array([*counts], np.float64), np.array([*probabilities], np.float64)
    if observed[chances == 0].any():
        return 0.0
    expected = chances / chances.sum() * observed.sum()
    is_rare = expected < least
    observed = np.append(observed[~is_rare], observed[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(observed) - 1
    assert freedom > 0, "a single cell says nothing"
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return 0.5 * math.erfc(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(2 * spread))


def random_logits(seed: int, size: int, *, with_ties: bool = False) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 3, size)
    return (np.round(logits) if with_ties else logits).astype(np.float32)


def is_on_an_edge(logits: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether rounding may decide what is kept."""
    ordered = np.sort(reference_probabilities(logits, temperature=temperature, top_k=top_k))[::-1]
    near_top_p = np.abs(np.cumsum(ordered) - top_p).min() < 1e-6 if top_p < 1 else False
    return bool(near_top_p or np.abs(ordered / ordered[0] - min_p)[1:].min(initial=1) < 1e-5)


# The chi-square helper


@pytest.mark.parametrize(
    ("statistic", "freedom", "chance"),
    [(3.841, 1, 0.05), (18.307, 10, 0.05), (29.588, 10, 0.001), (124.342, 100, 0.05), (149.449, 100, 0.001)],
)
def test_the_chi_square_helper_agrees_with_the_tables(statistic, freedom, chance) -> None:
    each = 1000.0
    counts = np.full(freedom + 1, each)
    counts[0] += math.sqrt(statistic * each / 2)
    counts[1] -= math.sqrt(statistic * each / 2)
    assert chi_square_p(counts, np.ones(freedom + 1)) == pytest.approx(chance, rel=0.15)


def test_the_chi_square_helper_takes_rare_cells_together_and_knows_the_impossible() -> None:
    assert chi_square_p([50, 50, 1, 0, 0], [0.495, 0.495, 0.004, 0.003, 0.003]) > 0.5
    assert chi_square_p([50, 30, 7, 7, 6], [0.495, 0.495, 0.004, 0.003, 0.003]) < 1e-9
    assert chi_square_p([50, 50, 1], [0.5, 0.5, 0.0]) == 0.0


# distribution


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from(SIZES),
    with_ties=st.booleans(),
    temperature=st.sampled_from([0.01, 0.3, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 5000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.02, 0.3, 1.0]),
)
def test_a_distribution_is_what_its_options_mean(seed, size, with_ties, temperature, top_k, top_p, min_p) -> None:
    logits = random_logits(seed, size, with_ties=with_ties)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    assume(not is_on_an_edge(logits, **asked))
    found = probabilities_of(distribution(logits, DecodingOptions.of(**asked)), size)
    expected = reference_probabilities(logits, **asked)
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-4, atol=1e-12)  # of equal ones, any
    kept = found > 1e-12
    whole = reference_probabilities(logits, temperature=temperature)[kept]
    np.testing.assert_allclose(found[kept], whole / whole.sum(), rtol=1e-4, atol=1e-12)
    if not with_ties:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-12)


def test_an_option_alone_keeps_what_can_be_told_by_hand() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))

    def kept(**fields) -> list[int]:
        found = distribution(logits, DecodingOptions.of(temperature=1.0, **fields))
        return list(range(5)) if found.token_ids is None else found.token_ids.tolist()

    assert kept() == kept(top_k=5) == kept(top_k=100) == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.39) == kept(top_p=1e-9) == kept(top_k=1) == kept(min_p=1.0) == [1]
    assert kept(top_p=0.41) == kept(top_p=0.69) == [1, 3]
    assert kept(top_p=0.71) == [1, 3, 4]
    assert kept(min_p=0.24) == [0, 1, 3, 4]
    assert kept(top_k=3, top_p=0.8) == [1, 3]  # 0.7 of the 0.85 that top-k leaves
    assert kept(top_p=0.9, min_p=0.5) == [1, 3]
    assert kept(top_k=2, min_p=0.9) == [1]


def test_of_equal_tokens_as_many_are_kept_as_are_asked_for() -> None:
    logits = np.zeros(8, np.float32)
    for fields, count in (({"top_k": 3}, 3), ({"top_p": 0.5}, 4), ({"top_p": 0.51}, 5), ({"min_p": 1.0}, 8)):
        found = distribution(logits, DecodingOptions.of(temperature=1.0, **fields))
        assert found.probabilities().tolist() == pytest.approx([1 / count] * count)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-46, 5e-324])
@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature, fields) -> None:
    logits = random_logits(0, 300)
    found = distribution(logits, DecodingOptions.of(temperature=temperature, **fields))
    assert {found.draw(uniform) for uniform in (0.0, 0.5, ALMOST_ONE)} == {int(logits.argmax())}


def test_a_huge_temperature_makes_all_tokens_alike() -> None:
    found = distribution(np.array([1, 2, 3], np.float32), DecodingOptions.of(temperature=100.0))
    assert found.probabilities().tolist() == pytest.approx([1 / 3] * 3, rel=0.02)


def test_a_banned_token_has_no_weight() -> None:
    logits = np.array([1, -np.inf, 2, -np.inf], np.float32)
    for fields in ({}, {"top_k": 3}, {"top_p": 0.999}, {"min_p": 1e-9}):
        found = distribution(logits, DecodingOptions.of(temperature=1.0, **fields))
        assert found.weight(1) == found.weight(3) == 0
        assert found.weight(2) > found.weight(0) > 0
        assert {found.draw(uniform) for uniform in (0.0, 0.3, 0.9, ALMOST_ONE)} == {0, 2}


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_no_logits_are_refused(number) -> None:
    logits = np.array([0, number, 1], np.float32)
    for fields in ({}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 2, "top_p": 0.5, "min_p": 0.5}):
        with pytest.raises(BackendError, match=f"largest logit is {number}"):
            distribution(logits, DecodingOptions.of(temperature=1.0, **fields))
    for count in (0, 2):
        with pytest.raises(BackendError, match=f"largest logit is {number}"):
            chosen_logprob(logits.astype(np.float16), 0, count)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"logit_bias": {0: 1}},
        {"logit_bias": {1: -100}}, {"min_new_tokens": 9}, {"suppress_tokens": [1]}, {"begin_suppress_tokens": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_are_no_logits_are_refused_before_options_hide_them(number, fields) -> None:
    for precision in (np.float16, np.float32):
        shaper = LogitsShaper(DecodingOptions.of(**fields), [0], frozenset([1]))
        for token_ids in ([], [1, 0]):
            with pytest.raises(BackendError, match=f"largest logit is {number}"):
                shaper.shape(np.array([0, number, 1], precision), token_ids)


def test_logits_that_are_all_minus_infinite_are_the_models_fault_and_not_the_options() -> None:
    nothing = np.full(3, -np.inf, np.float32)
    with pytest.raises(BackendError, match="largest logit is -inf"):
        shaped(nothing.tolist(), [], logit_bias={0: 1})
    with pytest.raises(BackendError, match="largest logit is -inf"):
        distribution(nothing, DecodingOptions.of(temperature=1.0))
    with pytest.raises(BackendError, match="largest logit is -inf"):
        chosen_logprob(nothing, 0, 1)


@pytest.mark.parametrize("logits", [[1, 2], [-np.inf, 2], [1e38, -1]])
def test_a_penalty_that_makes_logits_infinite_is_refused_and_not_obeyed(logits) -> None:
    with pytest.raises(OptionError, match=r"the options make a logit (inf|nan); choose a repetition_penalty nearer to 1"):
        shaped(logits, [1], prompt_ids=[0, 1], repetition_penalty=5e-324)


# Distribution


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from(SIZES),
    top_k=st.sampled_from([0, 1, 5, 300]),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1e-300, 0.5, ALMOST_ONE])),
)
def test_a_draw_is_where_the_cumulative_probability_passes_the_number(seed, size, top_k, uniform) -> None:
    logits = random_logits(seed, size)
    probabilities = reference_probabilities(logits, temperature=1.0, top_k=top_k)
    ends = np.cumsum(probabilities)
    token = distribution(logits, DecodingOptions.of(temperature=1.0, top_k=top_k)).draw(uniform)
    assert probabilities[token] > 0
    assert ends[token] - probabilities[token] - 1e-6 <= uniform <= ends[token] + 1e-6


@pytest.mark.parametrize("spread", [0.5, 3, 12], ids=["alike", "as models have it", "as far apart as numbers are"])
def test_a_token_without_weight_is_never_drawn(spread) -> None:
    """Even where sums are rounded: the last tokens have no weight here, and numbers on the edges between tokens are tried."""
    for seed in range(400):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(2, 3 * BLOCK))
        weights = np.exp(np.clip(rng.normal(0, spread, size), -80, 0)).astype(np.float32)
        weights[rng.random(size) < 0.5] = 0
        weights[-int(rng.integers(1, 5)) :] = 0
        weights[int(rng.integers(size))] = 1
        drawn, ends = Distribution(weights), np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
        for uniform in [0.0, *ends[ends < 1][::10].tolist(), *rng.random(5).tolist(), ALMOST_ONE]:
            assert weights[drawn.draw(uniform)] > 0


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token_there_is() -> None:
    for first, last in ((0, 999), (3, 998), (255, 256), (256, 257), (300, 300), (511, 767)):
        weights = np.zeros(1000, np.float32)
        weights[[first, last]] = 0.1
        assert (Distribution(weights).draw(0.0), Distribution(weights).draw(ALMOST_ONE)) == (first, last)
    chosen = Distribution(np.array([1, 1, 1], np.float32), np.array([5, 70, 900]))
    assert [chosen.draw(uniform) for uniform in (0.0, 0.34, ALMOST_ONE)] == [5, 70, 900]


@pytest.mark.parametrize("fields", [{}, {"top_k": 300}, {"top_p": 0.95, "min_p": 0.001}])
def test_many_draws_have_the_probabilities_of_the_distribution(fields) -> None:
    logits = np.random.default_rng(1).normal(0, 1.5, 1000).astype(np.float32)
    found = distribution(logits, DecodingOptions.of(temperature=0.8, **fields))
    uniforms = np.random.default_rng(2).random(60_000).tolist()
    counts = np.bincount([found.draw(uniform) for uniform in uniforms], minlength=1000)
    expected = reference_probabilities(logits, temperature=0.8, **fields)
    assert chi_square_p(counts, expected) > 1e-4
    # and the helper would have noticed a temperature that is a little off
    warmer = reference_probabilities(logits, temperature=0.84, **fields)
    assert chi_square_p(counts, warmer) < 1e-4


def test_weights_are_found_by_token() -> None:
    some = Distribution(np.array([0.5, 0.25], np.float32), np.array([3, 9]))
    assert [some.weight(token) for token in (0, 3, 4, 9, 10)] == [0, 0.5, 0, 0.25, 0]
    assert some.probabilities().tolist() == pytest.approx([2 / 3, 1 / 3])
    assert Distribution(np.array([0.5, 0.25], np.float32)).weight(1) == 0.25


# LogitsShaper


def shaped(logits: Sequence[float], token_ids: Sequence[int], prompt_ids=(0,), end_ids=(), guide=None, **fields) -> list[float]:
    shaper = LogitsShaper(DecodingOptions.of(**fields), prompt_ids, frozenset(end_ids), guide)
    given_logits = np.array(logits, np.float32)
    result = shaper.shape(given_logits, token_ids)
    assert given_logits.tolist() == np.array(logits, np.float32).tolist()  # the argument stays as it is
    return result.tolist()


def test_a_repetition_penalty_divides_positive_logits_of_prompt_and_answer_and_multiplies_the_others() -> None:
    found = shaped([2, -2, 3, -3, 4], [2, 3, 3], prompt_ids=[0, 1, 1], repetition_penalty=2.0)
    assert found == [1, -4, 1.5, -6, 4]  # once, however often a token is there
    assert shaped([2, -2], [], prompt_ids=[0, 1], repetition_penalty=0.5) == [4, -1]


def test_a_presence_penalty_is_taken_once_of_tokens_in_the_answer() -> None:
    assert shaped([1, 1, 1, -1], [2, 3, 3], prompt_ids=[0], presence_penalty=0.5) == [1, 1, 0.5, -1.5]
    assert shaped([1, 1], [1], presence_penalty=-2.0) == [1, 3]


def test_a_frequency_penalty_is_taken_for_each_time() -> None:
    assert shaped([1, 1, 1, -1], [2, 3, 3], prompt_ids=[0, 0], frequency_penalty=0.25) == [1, 1, 0.75, -1.5]


def test_penalties_biases_and_bans_are_applied_in_this_order() -> None:
    found = shaped(
        [4, 4, 4, 4], [1, 1, 2], prompt_ids=[0], end_ids=[3], repetition_penalty=2.0, presence_penalty=0.5,
        frequency_penalty=0.25, logit_bias={1: 10, 3: 100}, min_new_tokens=4,
    )  # fmt: skip
    assert found == [2, 2 - 0.5 - 0.5 + 10, 2 - 0.5 - 0.25, -np.inf]


def test_a_bias_is_added_to_its_token_alone() -> None:
    assert shaped([1, 2, 3], [0], logit_bias={2: -100, 0: 1.5}) == [2.5, 2, -97]


def test_the_answer_cannot_end_before_its_least_number_of_tokens() -> None:
    for count in range(5):
        banned = [-np.inf if count < 3 else value for value in (1.0, 3.0)]
        assert shaped([1, 2, 3], [1] * count, end_ids=[0, 2], min_new_tokens=3) == [banned[0], 2, banned[1]]


def test_a_guide_leaves_what_it_allows_after_a_path() -> None:
    class Even:
        def allowed(self, path):
            return (np.arange(4) + len(path)) % 2 == 0

    logits = np.array([1, 2, 3, 4], np.float32)
    shaper = LogitsShaper(DecodingOptions.of(logit_bias={0: 9}), [0], frozenset(), Even())
    assert shaper.shape(logits, [3]).tolist() == [10, -np.inf, 3, -np.inf]
    assert shaper.shape(logits, [3, 0], [0]).tolist() == [-np.inf, 2, -np.inf, 4]


def test_suppressed_tokens_never_come() -> None:
    for token_ids in ([], [0], [0, 1]):
        assert shaped([1, 2, 3, 4], token_ids, suppress_tokens=[1, 3], logit_bias={3: 100}) == [1, -np.inf, 3, -np.inf]


def test_tokens_that_are_suppressed_at_the_beginning_may_come_later() -> None:
    assert shaped([1, 2, 3, 4], [], begin_suppress_tokens=[1, 3]) == [1, -np.inf, 3, -np.inf]
    for token_ids in ([0], [0, 1]):
        assert shaped([1, 2, 3, 4], token_ids, begin_suppress_tokens=[1, 3]) == [1, 2, 3, 4]
    assert shaped([1, 2, 3], [], begin_suppress_tokens=[1], suppress_tokens=[2]) == [1, -np.inf, -np.inf]


def test_where_nothing_may_follow_it_says_so() -> None:
    with pytest.raises(OptionError, match="leave no token that may come next"):
        shaped([1, 2], [], suppress_tokens=[0, 1])
    with pytest.raises(OptionError, match="leave no token that may come next"):
        shaped([1, 2], [], end_ids=[0, 1], min_new_tokens=1)


def test_without_such_options_logits_are_passed_on_as_they_are() -> None:
    logits = np.array([1, 2], np.float16)
    plain = LogitsShaper(DecodingOptions.of(temperature=0.7, top_k=3), [0], frozenset([1]))
    assert plain.is_identity
    assert plain.shape(logits, [1, 1]) is logits
    for fields in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {0: 1}},
        {"min_new_tokens": 1},
        {"suppress_tokens": [0]},
        {"begin_suppress_tokens": [0]},
    ):
        assert not LogitsShaper(DecodingOptions.of(**fields), [0], frozenset()).is_identity


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    prompt_ids=st.lists(st.integers(0, 19), min_size=1, max_size=10),
    token_ids=st.lists(st.integers(0, 19), max_size=20),
    repetition=st.sampled_from([0.7, 1.0, 1.3]),
    presence=st.sampled_from([-0.5, 0.0, 1.5]),
    frequency=st.sampled_from([-0.25, 0.0, 0.5]),
)
def test_penalties_are_those_of_a_plain_loop(seed, prompt_ids, token_ids, repetition, presence, frequency) -> None:
    logits = random_logits(seed, 20)
    expected = logits.astype(np.float64)
    for token in range(20):
        if token in prompt_ids or token in token_ids:
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        if token in token_ids:
            expected[token] -= presence + frequency * token_ids.count(token)
    fields = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    found = shaped(logits.tolist(), token_ids, prompt_ids=prompt_ids, **fields)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# Uniforms


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, (1 << 64) - 1), stream=st.integers(0, 127), places=st.lists(st.integers(0, 300), max_size=20))
def test_a_random_number_depends_on_the_seed_and_its_place_alone(seed, stream, places) -> None:
    in_order = [Uniforms(seed, stream)[place] for place in range(301)]
    jumping = Uniforms(seed, stream)
    for place in [*places, *reversed(places)]:
        assert jumping[place] == in_order[place]
    assert all(0 <= number < 1 for number in in_order)


def test_seeds_and_streams_have_numbers_of_their_own() -> None:
    pairs = [(seed, stream) for seed in (0, 1, 2, 1 << 32, (1 << 64) - 1) for stream in (0, 1, 2)]
    drawn = {number for pair in pairs for number in [Uniforms(*pair)[place] for place in range(100)]}
    assert len(drawn) == 100 * len(pairs)
    assert Uniforms(7)[0] == Uniforms(7, 0)[0]


def test_the_numbers_of_one_seed_and_those_of_one_place_are_uniform() -> None:
    one_seed, numbers = Uniforms(3), np.zeros(5000)
    for place in range(5000):
        numbers[place] = one_seed[place]
    one_place = np.array([Uniforms(seed)[0] for seed in range(5000)])
    for drawn in (numbers, one_place):
        assert chi_square_p(np.histogram(drawn, 100, (0, 1))[0], np.ones(100)) > 1e-4
    pairs = np.histogram2d(one_place, [Uniforms(seed)[1] for seed in range(5000)], 10, [(0, 1), (0, 1)])[0]
    assert chi_square_p(pairs.ravel(), np.ones(100)) > 1e-4


# chosen_logprob


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from(SIZES),
    count=st.integers(0, 100),
    shift=st.sampled_from([-300, 0, 300]),
    precision=st.sampled_from([np.float16, np.float32]),
)
def test_log_probabilities_are_those_of_a_log_softmax(seed, size, count, shift, precision) -> None:
    logits = (random_logits(seed, size) + shift).astype(precision)
    exact = logits.astype(np.float64)
    expected = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    token = seed % size
    logprob, top = chosen_logprob(logits, token, count)
    assert logprob == pytest.approx(expected[token], abs=1e-4)
    assert [value for _, value in top] == pytest.approx(np.sort(expected)[::-1][:count].tolist(), abs=1e-4)
    assert [value for _, value in top] == pytest.approx([expected[one] for one, _ in top], abs=1e-4)
    assert len({one for one, _ in top}) == len(top) == min(count, size)


def test_a_token_that_cannot_be_has_no_finite_log_probability() -> None:
    logprob, top = chosen_logprob(np.array([0, -np.inf, 0], np.float32), 1, 2)
    assert logprob == -np.inf
    assert sorted(token for token, _ in top) == [0, 2]
    assert [value for _, value in top] == pytest.approx([math.log(0.5)] * 2)
