"""The step budget, and which timings it learns from. All seconds here are made up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medusa_runtime import CandidateTree, DecodingEngine, DecodingOptions, DecodingStats, DynamicTree, StepCosts
from medusa_runtime.decoding.prefill import GAP_STEPS
from medusa_runtime.drafting.budget import LONGEST_PAUSE, PAUSE, TRIES, DraftBudget, StepPlan
from medusa_runtime.drafting.coefficients import Coefficients
from medusa_runtime.drafting.costs import LearnedCosts
from tests.support.clock import Clock
from tests.support.fake_backend import FakeBackend

CHAIN = CandidateTree.from_parents([-1, 0, 1])
HALF_A_STEP_EACH = StepCosts([1, 2], [1, 3], [64], [[[1.0, 2.0], [1.0, 2.0]]], [0.5, 0.75])
NONE = np.empty(0, np.float32)


def chances(*probabilities: float) -> np.ndarray:
    return np.array(probabilities, np.float32)


def learned(*steps: tuple[int, int, float]) -> LearnedCosts:
    """Costs after steps of one sequence with these widths, capacities and seconds, fifty times each."""
    costs = LearnedCosts()
    for width, capacity, seconds in steps * 50:
        costs.observe(1, width, capacity, seconds)
    return costs


@pytest.mark.parametrize(
    "steps",
    [
        ((8, 64, 1.0), (4, 64, 0.001)),  # by a straight line, narrower steps would take less than no time
        ((1, 64, 1.0), (16, 64, 0.05)),  # wider steps took less time
        ((8, 64, 1.0), (8, 2000, 0.2)),  # steps on a larger cache took less time
    ],
)
def test_learned_costs_are_above_zero_and_grow_with_nodes_and_cache(steps) -> None:
    costs = learned(*steps)
    small, large = costs.steps(1, 64, 16), costs.steps(1, 8000, 16)
    assert 2 * small[0] - small[1] > 0.01  # a part of each step that its nodes do not change
    assert (np.diff(small) >= 0).all()
    assert (large >= small).all()


def test_before_the_first_step_learned_costs_are_a_guess() -> None:
    costs = LearnedCosts()
    assert not costs.is_warm
    np.testing.assert_allclose(costs.steps(2, 1000, 3), [1.14, 1.28, 1.42], rtol=1e-6)  # 1 + 2 · T · (0.05 + 0.02)
    assert costs.heads(1) == pytest.approx(0.1)
    costs.observe(1, 1, 1000, 2.14)  # twice the guess
    assert costs.is_warm
    np.testing.assert_allclose(costs.steps(2, 1000, 3), [2.28, 2.56, 2.84], rtol=1e-6)
    assert costs.heads(1) == pytest.approx(0.2)


def test_the_heads_seconds_are_kept_by_batch_size() -> None:
    costs = LearnedCosts()
    costs.observe_heads(2, 0.3)
    costs.observe_heads(8, 0.9)
    assert [costs.heads(batch) for batch in (1, 4, 6, 9)] == [0.3, 0.3, 0.9, 0.9]
    costs.observe_heads(8, 1.0)
    assert costs.heads(8) == pytest.approx(0.91)
    costs.observe_heads(8, 100.0)  # a stall counts as twice the seconds
    assert costs.heads(8) == pytest.approx(1.001)


def test_drafts_cost_the_hosts_work_that_they_add() -> None:
    """Steps without drafts do not bear it, so heads that just pay for their evaluation do not pay."""
    assert SOUND.steps(2, 64, 1)[-1] == pytest.approx(1.1)
    assert (SOUND.heads(1), SOUND.heads(2)) == (pytest.approx(0.5 + 0.2), pytest.approx(0.75 + 0.4))
    assert replace(SOUND, draft_seconds=[]).heads(1) == 0.5


def test_learned_costs_tell_the_hosts_work_with_drafts_and_without_apart() -> None:
    costs = LearnedCosts()
    costs.observe(1, 1, 1000, 1.07)
    costs.observe_heads(1, 0.1)
    costs.observe_host(1, 0.3, with_heads=True)  # no step without drafts was seen: it is taken to have a third of that
    assert (costs.steps(1, 1000, 1)[0], costs.heads(1)) == (pytest.approx(1.17), pytest.approx(0.3))
    costs.observe_host(1, 0.05, with_heads=False)
    assert (costs.steps(1, 1000, 1)[0], costs.heads(1)) == (pytest.approx(1.12), pytest.approx(0.35))
    costs.observe_host(1, 100.0, with_heads=True)  # a stall counts as twice the seconds
    assert costs.heads(1) == pytest.approx(0.1 + 0.33 - 0.05)


def test_learned_costs_tell_batch_nodes_and_cache_apart() -> None:
    def truth(batch: int, width: int, capacity: int) -> float:
        return 0.02 + batch * width * (0.002 + 0.001 * capacity / 1000)

    rng, costs = np.random.default_rng(0), LearnedCosts()
    for _ in range(400):
        step = int(rng.integers(1, 9)), int(rng.integers(1, 17)), int(rng.integers(1, 9)) * 500
        costs.observe(*step, truth(*step))
    for step in ((1, 1, 500), (8, 2, 4000), (2, 16, 500), (4, 16, 3000)):
        assert costs.steps(step[0], step[2], step[1])[-1] == pytest.approx(truth(*step), rel=0.03)


def test_the_first_hundred_timings_count_and_then_every_fourth() -> None:
    coefficients = Coefficients(np.ones(1), np.eye(1))
    assert [number for number in range(1, 121) if coefficients.wants()] == [*range(1, 101), 104, 108, 112, 116, 120]


def test_a_surprise_moves_a_coefficient_by_one_at_most() -> None:
    for timing, expected in ((2.5, 2.0), (-1.5, 0.0), (1.25, 1.25), (0.75, 0.75)):
        coefficients = Coefficients(np.ones(1), np.eye(1))
        coefficients.learn(np.ones(1), timing)
        assert coefficients.mean[0] == pytest.approx(expected, abs=0.02)  # the timing itself may be off by a tenth


def test_a_table_of_one_width_says_the_same_of_all() -> None:
    np.testing.assert_allclose(StepCosts([1], [4], [64], [[[2.0]]], [0.1]).steps(1, 64, 5), [2.0] * 5)


def test_with_fewer_entries_than_were_measured_a_step_takes_less() -> None:
    """Else drafts look cheap for short prompts and many sequences, where attention is a large part of a step of one node."""
    costs = StepCosts([1], [1, 3], [100, 200], [[[1.0, 2.0]], [[1.2, 2.1]]], [0.1])
    np.testing.assert_allclose(costs.steps(1, 50, 3), [0.9, 1.425, 1.95])
    np.testing.assert_allclose(costs.steps(1, 100, 3), [1.0, 1.5, 2.0])
    np.testing.assert_allclose(costs.steps(1, 300, 3), [1.4, 1.8, 2.2])
    steep = replace(costs, step_seconds=[[[1.0, 2.0]], [[2.0, 4.0]]])
    np.testing.assert_allclose(steep.steps(1, 0, 3), [0.5, 0.75, 1.0])  # a half at least
    noisy = replace(costs, step_seconds=[[[1.0, 2.0]], [[0.9, 2.0]]])
    np.testing.assert_allclose(noisy.steps(1, 0, 3), [1.0, 1.5, 2.0])  # more entries never take less


SOUND = StepCosts([1, 2], [1, 3], [64], [[[1.0, 2.0], [1.0, 2.0]]], [0.5, 0.75], [0.0, 0.1], [0.2, 0.4])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_sizes", []),
        ("batch_sizes", [2, 1]),
        ("batch_sizes", [0, 1]),
        ("widths", [[1, 3]]),
        ("widths", [3, 3]),
        ("capacities", [64, 128]),
        ("step_seconds", [[[1.0, 2.0]]]),
        ("step_seconds", [[[1.0, 2.0], [0.0, 2.0]]]),
        ("head_seconds", [0.5]),
        ("head_seconds", [0.5, -0.1]),
        ("host_seconds", [0.1]),
        ("host_seconds", [0.1, -0.1]),
        ("draft_seconds", [0.1]),
        ("draft_seconds", [0.1, -0.1]),
    ],
)
def test_a_table_that_cannot_be_is_refused(field: str, value: object) -> None:
    SOUND.check()
    replace(SOUND, host_seconds=[], draft_seconds=[]).check()
    with pytest.raises((ValueError, TypeError)):
        replace(SOUND, **{field: value}).check()


def test_a_plan_takes_the_width_with_the_most_tokens_a_second() -> None:
    plan = DraftBudget(HALF_A_STEP_EACH).plan([chances(0.7, 0.2)], 1, 64)
    assert (plan.width, plan.expected) == (2, pytest.approx(0.7))
    assert plan.speedup == pytest.approx(1.7 / 2)  # tokens by the seconds of a step of two nodes and the heads
    assert plan.heads_worth == pytest.approx(0.2 / 0.5)  # 1.7 tokens in 1.5 s gain 0.2; without heads nothing is gained


def test_without_the_heads_their_seconds_do_not_count() -> None:
    plan = DraftBudget(HALF_A_STEP_EACH).plan([chances(0.7, 0.2)], 1, 64, [chances(0.7, 0.2)], with_heads=False)
    assert plan.speedup == pytest.approx(1.7 / 1.5)
    assert plan.heads_worth is None


def test_the_drafts_of_all_sequences_count_together() -> None:
    plan = DraftBudget(HALF_A_STEP_EACH).plan([chances(0.9), chances(0.8, 0.7), NONE], 1, 64)
    assert (plan.width, plan.expected) == (2, pytest.approx(1.7))
    plan = DraftBudget(HALF_A_STEP_EACH).plan([chances(0.9, 0.8), chances(0.8, 0.7)], 1, 64)
    assert (plan.width, plan.expected) == (3, pytest.approx(3.2))
    assert plan.heads_worth == pytest.approx((2 + 3.2 - 2 * 2) / (2 * 0.75))  # two steps' time would give 4 tokens


def test_only_as_many_lookups_count_as_a_step_may_hold() -> None:
    plan = DraftBudget(HALF_A_STEP_EACH).plan([chances(0.9)], 1, 64, [chances(0.8, 0.7, 0.6)])
    assert plan.heads_worth == pytest.approx(0.1 / 0.5)  # a draft of 0.9 instead of one of 0.8


def test_a_step_is_as_wide_as_one_sequence_needs() -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)
    assert budget.plan([chances(0.1)], 3, 64).width == 3
    nothing_to_choose = budget.plan([NONE], 3, 64)
    assert (nothing_to_choose.width, nothing_to_choose.expected, nothing_to_choose.speedup) == (3, 0.0, None)


def test_a_bad_spell_does_not_make_drafts_pay_that_cost_more_than_they_give() -> None:
    """Decoding without drafts is always possible, so time is worth at least that rate."""
    budget = DraftBudget(HALF_A_STEP_EACH)
    for _ in range(100):
        budget.learn(StepPlan(1, speedup=0.1), 1, 0)
    assert budget.plan([chances(0.4)], 1, 64).width == 1


def test_time_is_worth_what_drafts_give_on_average() -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)
    assert budget.plan([chances(0.6)], 1, 64).width == 2
    for _ in range(100):
        budget.learn(StepPlan(1, speedup=2.0), 1, 0)
    assert budget.plan([chances(0.6)], 1, 64).width == 1


@pytest.mark.parametrize(("accepted", "width"), [(0, 1), (1, 2)])
def test_the_heads_probabilities_are_corrected_by_what_was_accepted(accepted: int, width: int) -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)
    for _ in range(100):
        budget.learn(StepPlan(2, expected=0.5), 2, accepted)
    assert budget.plan([chances(0.4)], 1, 64).width == width
    assert DraftBudget(HALF_A_STEP_EACH).plan([chances(0.4)], 1, 64).width == 1


def test_a_step_without_drafts_says_nothing_of_the_heads() -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)
    for _ in range(100):
        budget.learn(StepPlan(1, expected=0.5), 1, 0)
    assert budget.plan([chances(0.7)], 1, 64).width == 2


def tries_until_they_rest(budget: DraftBudget, worth: float = 0.5) -> int:
    """Ask the heads in vain for as long as they are wanted. Returns how often."""
    tries = 0
    while budget.wants_heads(1):
        budget.note_heads(asked=True)
        budget.learn(replace(StepPlan(1), heads_worth=worth), 1, 0)
        tries += 1
    return tries


def test_one_vain_try_says_little() -> None:
    """The first tokens of an answer are hard to guess. Heads that rested after one of them were missed for a hundred steps."""
    assert tries_until_they_rest(DraftBudget(HALF_A_STEP_EACH), 0.0) > 5


def test_heads_that_do_not_pay_rest_and_are_tried_again() -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)
    tries_until_they_rest(budget)
    assert budget.wants_heads(2)  # another batch size
    assert budget.wants_heads(1, [chances(0.9, 0.2)])  # lookups find much: another situation
    assert not budget.wants_heads(1, [chances(0.9)])
    wanted = []
    for _ in range(2 * PAUSE):
        wanted.append(budget.wants_heads(1))
        budget.note_heads(asked=wanted[-1])
    assert np.flatnonzero(wanted).tolist() == [PAUSE - 1, 2 * PAUSE - 1]
    for _ in range(10):
        budget.learn(replace(StepPlan(1), heads_worth=2.0), 1, 0)
    assert budget.wants_heads(1)


def test_a_width_that_a_sequence_needs_says_nothing_of_the_heads() -> None:
    """A fixed tree may be wider than pays. The heads are worth what they are with the best width."""
    budget = DraftBudget(HALF_A_STEP_EACH)
    free, fixed = (budget.plan([chances(0.9, 0.1, 0.1)], least, 64) for least in (1, 4))
    assert (free.width, fixed.width) == (2, 4)
    assert free.heads_worth == fixed.heads_worth == pytest.approx(0.4 / 0.5)


def test_heads_are_not_asked_after_a_prompt_if_they_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, asked_rows = FakeBackend("always"), []
    propose = backend.propose
    monkeypatch.setattr(backend, "propose", lambda rows, root_ids: (asked_rows.append(rows), propose(rows, root_ids))[1])
    engine = DecodingEngine(backend, DynamicTree(4), max_batch_size=1, costs=HALF_A_STEP_EACH)
    budget = engine._proposer._budget
    assert budget is not None
    tries_until_they_rest(budget)
    for worths, asked in (((), 0), ((20.0,), 1)):
        for worth in worths:
            budget.learn(replace(StepPlan(1), heads_worth=worth), 1, 0)
        asked_rows.clear()
        engine.add([1], DecodingOptions(max_new_tokens=3))
        engine.step()
        assert len(asked_rows) == asked
        while not engine.is_idle:
            engine.step()


def test_each_time_that_tries_are_in_vain_the_heads_rest_twice_as_long() -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)

    def next_tries(worth: float) -> tuple[int, int]:
        """The steps that the heads rest, and how often they are asked then."""
        rests = 0
        while not budget.wants_heads(1):
            budget.note_heads(asked=False)
            rests += 1
        return rests, tries_until_they_rest(budget, worth)

    tries_until_they_rest(budget)
    rests = [PAUSE - 1, 2 * PAUSE - 1, 4 * PAUSE - 1, LONGEST_PAUSE - 1, LONGEST_PAUSE - 1]
    assert [next_tries(0.5) for _ in rests] == [(rest, TRIES) for rest in rests]
    for _ in range(4 * TRIES):
        budget.learn(replace(StepPlan(1), heads_worth=4.0), 1, 0)
    tries_until_they_rest(budget)
    assert next_tries(0.5) == (PAUSE - 1, TRIES)  # they paid meanwhile


def test_heads_whose_worth_differs_from_step_to_step_do_not_rest_if_they_pay_on_average() -> None:
    """Most steps gain nothing, and some gain much. The average counts, and it takes many steps to know it."""
    budget, rng = DraftBudget(HALF_A_STEP_EACH), np.random.default_rng(0)
    asked = 0
    for _ in range(2000):
        wanted = budget.wants_heads(1)
        budget.note_heads(asked=wanted)
        if wanted:
            asked += 1
            budget.learn(replace(StepPlan(1), heads_worth=rng.choice([0.0, 5.0], p=[0.7, 0.3])), 1, 0)
    assert asked > 1800


def test_an_answer_that_copies_does_not_make_drafts_of_others_seem_slow() -> None:
    """Steps that find much are fast. If others were measured by them, no draft of theirs would be fast enough."""
    budget, copied = DraftBudget(HALF_A_STEP_EACH), [chances(0.9, 0.9)]
    plan = budget.plan([chances(0.9, 0.9)], 1, 64, copied, with_heads=False)
    for _ in range(100):
        budget.learn(replace(plan, speedup=4.0), 1, 0)
    assert budget.plan([chances(0.6)], 1, 64).width == 2
    assert budget.plan([chances(0.6)], 1, 64, copied).width == 1


class Timed(FakeBackend):
    """A step takes a second, the heads a quarter. The first step of a shape takes a hundred, and is not warm."""

    def __init__(self, clock: Clock, *, compiles: bool = False) -> None:
        super().__init__("always")
        self.clock, self.cold, self.num_asked = clock, compiles, 0
        self.seen: set[tuple[int, int]] = set()

    def step(self, *args, **options):
        output = super().step(*args, **options)
        is_warm = not self.cold or self.steps[-1] in self.seen
        self.seen.add(self.steps[-1])
        self.clock.advance(1.0 if is_warm else 100.0)
        return replace(output, is_warm=is_warm)

    def propose(self, rows, root_ids):
        self.num_asked += 1
        self.clock.advance(0.25)
        return super().propose(rows, root_ids)


class Noted(LearnedCosts):
    """Costs that keep what they were told."""

    def __init__(self) -> None:
        super().__init__()
        self.step_seconds: list[float] = []
        self.head_seconds: list[float] = []

    def observe(self, batch, width, capacity, seconds) -> None:
        self.step_seconds.append(seconds)
        super().observe(batch, width, capacity, seconds)

    def observe_heads(self, batch, seconds) -> None:
        self.head_seconds.append(seconds)
        super().observe_heads(batch, seconds)


def test_nothing_is_learned_from_steps_that_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, costs, reading = Clock(), Noted(), Noted()
    clock.install(monkeypatch)
    engine = DecodingEngine(Timed(clock, compiles=True), CHAIN, costs=costs, reuse_prefixes=False)
    engine._reader.costs = reading
    for _ in range(2):
        list(engine.generate([[1, 2, 3, 4, 5]], 12, tree=CHAIN))
    assert set(costs.step_seconds) == {1.0}
    assert reading.step_seconds == [1.0]  # the first prompt's pass compiled
    assert GAP_STEPS <= engine._gap_seconds <= 1.25 * GAP_STEPS


@pytest.mark.parametrize("case", ["medusa", "plain", "resting"])
def test_only_seconds_that_the_heads_took_are_counted(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of heads that nobody uses, nor of heads that rest because they do not pay."""
    clock, stats = Clock(), DecodingStats()
    clock.install(monkeypatch)
    backend, noted = Timed(clock), Noted()
    dear = StepCosts([1, 2], [1, 3], [64], [[[1.0, 48.0], [1.0, 48.0]]], [5.0, 5.0])
    engine = DecodingEngine(backend, DynamicTree(3), costs=dear if case == "resting" else noted)
    list(engine.generate([[1, 2]], 40, tree=CHAIN if case == "medusa" else None, medusa=case != "plain", stats=stats))
    asked_by_steps = max(backend.num_asked - 1, 0)  # the first time is a part of the prefill
    assert stats.engine_seconds == pytest.approx(stats.num_passes + 0.25 * asked_by_steps)
    assert asked_by_steps <= {"medusa": stats.num_passes - 1, "plain": 0, "resting": 25}[case]  # nothing follows the last step
    assert asked_by_steps >= {"medusa": stats.num_passes - 1, "plain": 0, "resting": 1}[case]  # they are tried some times
    assert noted.head_seconds == ([0.25] * backend.num_asked if case == "medusa" else [])


def test_the_budget_learns_how_many_drafts_were_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, learn = [], DraftBudget.learn

    def note(self: DraftBudget, plan: StepPlan, width: int, num_accepted: int) -> None:
        learned.append(num_accepted)
        learn(self, plan, width, num_accepted)

    monkeypatch.setattr(DraftBudget, "learn", note)
    cheap, stats = StepCosts([1, 2], [1, 3], [64], [[[1.0, 1.001], [1.0, 1.001]]], [0.001, 0.001]), DecodingStats()
    list(DecodingEngine(FakeBackend("always"), CHAIN, costs=cheap).generate([[1], [2]], 13, stats=stats))
    assert learned == [4, 4, 4, 4]  # of two sequences; a step gives each two drafts and a bonus token
    assert stats.num_accepted_tokens == sum(learned)


@pytest.mark.parametrize(("seconds", "pause"), [(0.004, 1), (0.01, 2), (0.04, 8), (0.3, PAUSE)])
def test_lookups_rest_where_drafts_are_too_expensive_for_them(seconds, pause) -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)  # one draft more takes half a step more
    budget.note_lookup(seconds)
    for found in (chances(0.3), NONE):  # three in ten are right, and such a draft never pays; then nothing is found
        plan = budget.plan([found], 1, 64, [found], with_heads=False, with_lookup=True)
        assert (plan.width, plan.lookup_worth) == (1, 0.0)
        for _ in range(4):
            budget.learn(plan, 1, 0)
    assert budget.wants_lookup(2)  # another batch size
    wanted = []
    for _ in range(2 * pause):
        wanted.append(budget.wants_lookup(1))
        budget.note_lookup(seconds if wanted[-1] else None)
    assert wanted == ([False] * (pause - 1) + [True]) * 2  # at even intervals: any sequence may begin to copy
    plan = budget.plan([chances(0.95)], 1, 64, [chances(0.95)], with_heads=False, with_lookup=True)
    assert plan.lookup_worth == pytest.approx((1.95 - 1.5) / seconds, rel=1e-4)
    for _ in range(20):
        budget.learn(plan, 2, 1)
    assert budget.wants_lookup(1)


def test_lookups_are_weighed_only_where_they_were_made_and_timed() -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)
    found = [chances(0.9)]
    assert budget.plan(found, 1, 64, found, with_lookup=True).lookup_worth is None  # their time is not known yet
    budget.note_lookup(0.01)
    assert budget.plan(found, 1, 64, found).lookup_worth is None
    assert budget.plan([chances(0.9, 0.9)], 1, 64, found, with_lookup=True).lookup_worth == pytest.approx(40.0, rel=1e-4)


def test_a_stall_does_not_make_lookups_expensive() -> None:
    budget = DraftBudget(HALF_A_STEP_EACH)
    for seconds in (0.01, 10.0):
        budget.note_lookup(seconds)
    plan = budget.plan([chances(0.95)], 1, 64, [chances(0.95)], with_heads=False, with_lookup=True)
    assert plan.lookup_worth == pytest.approx((1.95 - 1.5) / 0.011, rel=1e-4)


def test_what_is_learned_of_one_number_of_callers_holds_for_numbers_near_it() -> None:
    """With many callers the number of sequences changes from step to step. Heads that do not pay were tried anew with each."""
    budget = DraftBudget(HALF_A_STEP_EACH)
    asked = 0
    for batch in [9, 12, 16, 11, 14, 10, 15, 13] * 40:
        wanted = budget.wants_heads(batch)
        budget.note_heads(asked=wanted)
        if wanted:
            asked += 1
            plan = budget.plan([chances(0.1)] * batch, 1, 64)
            budget.learn(plan, plan.width, 0)
    assert 0 < asked < 80
    assert budget.wants_heads(1)
