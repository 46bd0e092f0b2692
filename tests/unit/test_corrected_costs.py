"""Costs from a tuning are corrected by the seconds of real steps. All seconds here are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from medusa_runtime import DecodingEngine, DynamicTree, StepCosts
from medusa_runtime.drafting.corrected import CorrectedCosts
from medusa_runtime.drafting.costs import Costs, LearnedCosts
from tests.support.clock import Clock
from tests.support.fake_backend import FakeBackend

TABLE = StepCosts(
    [1, 4],
    [1, 4, 16],
    [64, 256],
    [[[1.0, 1.3, 2.5], [1.6, 2.8, 7.6]], [[1.2, 1.6, 3.0], [2.0, 3.4, 9.0]]],
    [0.2, 0.4],
    [0.1, 0.2],
)


def observe(costs: CorrectedCosts, truth: Callable[[int, int, int], float], widths: tuple[int, ...], steps: int = 80) -> None:
    """Steps with the given widths in turn, whose timings are off by up to 5%."""
    rng = np.random.default_rng(0)
    for number in range(steps):
        batch, width, capacity = int(rng.integers(1, 5)), widths[number % len(widths)], int(rng.integers(64, 257))
        costs.observe(batch, width, capacity, truth(batch, width, capacity) * rng.uniform(0.95, 1.05))


def measured(batch: int, width: int, capacity: int) -> float:
    return float(TABLE.backend_steps(batch, capacity, width)[-1])


def test_before_any_step_costs_are_those_of_the_table() -> None:
    costs = CorrectedCosts(TABLE)
    assert costs.is_warm
    for batch, capacity in ((1, 64), (3, 100), (8, 300)):
        np.testing.assert_allclose(costs.steps(batch, capacity, 20), TABLE.steps(batch, capacity, 20), rtol=1e-6)
        assert costs.heads(batch) == TABLE.heads(batch)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_table_that_is_wrong_by_one_factor_is_put_right_by_narrow_steps_alone(factor: float) -> None:
    """As after a tuning while something else used the machine. Wide steps were never tried, and are corrected as well."""
    costs = CorrectedCosts(TABLE)
    observe(costs, lambda *step: factor * measured(*step), (1, 2))
    np.testing.assert_allclose(costs.steps(2, 128, 16), factor * TABLE.steps(2, 128, 16), rtol=0.15)


def test_what_further_nodes_cost_is_corrected_apart() -> None:
    """A busy machine slows steps of many nodes more: they need all cores. Once it is quiet, the table is too steep."""
    costs = CorrectedCosts(TABLE)
    observe(
        costs, lambda batch, width, capacity: (measured(batch, 1, capacity) + measured(batch, width, capacity)) / 2, (1, 6, 12)
    )
    found, table = costs.steps(2, 128, 16), TABLE.steps(2, 128, 16)
    assert found[0] == pytest.approx(table[0], rel=0.05)
    assert found[15] - found[0] == pytest.approx((table[15] - table[0]) / 2, rel=0.1)


def test_costs_follow_a_machine_that_becomes_busy_and_quiet_again() -> None:
    costs = CorrectedCosts(TABLE)
    for factor in (1.0, 2.0, 1.0):
        observe(costs, lambda *step, factor=factor: factor * measured(*step), (1, 4, 8), steps=300)
        np.testing.assert_allclose(costs.steps(1, 64, 8), factor * TABLE.steps(1, 64, 8), rtol=0.1)


def test_a_stall_is_no_lesson() -> None:
    costs = CorrectedCosts(TABLE)
    observe(costs, measured, (1, 4, 8))
    before = costs.steps(1, 64, 8)
    costs.observe(1, 4, 64, 100.0)
    np.testing.assert_allclose(costs.steps(1, 64, 8), before, rtol=0.25)


def test_one_wide_step_that_takes_twice_as_long_is_believed_for_the_most_part() -> None:
    costs = CorrectedCosts(TABLE)
    costs.observe(1, 16, 64, 2 * measured(1, 16, 64))
    assert costs.steps(1, 64, 16)[-1] > 1.7 * TABLE.steps(1, 64, 16)[-1]


def test_the_heads_have_a_factor_of_their_own() -> None:
    costs = CorrectedCosts(TABLE)
    for _ in range(60):
        costs.observe_heads(1, 0.1)
    assert costs.heads(1) == pytest.approx(0.1, rel=0.02)
    assert costs.heads(4) == pytest.approx(0.2, rel=0.02)
    np.testing.assert_allclose(costs.steps(1, 64, 8), TABLE.steps(1, 64, 8), rtol=1e-6)
    before = costs.heads(1)
    costs.observe_heads(1, 100.0)
    assert costs.heads(1) < 1.2 * before


def test_the_hosts_work_with_drafts_has_the_factor_of_a_step_of_one_node() -> None:
    costs = CorrectedCosts(replace(TABLE, draft_seconds=[0.03] * len(TABLE.batch_sizes)))
    assert costs.heads(1) == pytest.approx(TABLE.heads(1) + 0.03)
    for _ in range(200):
        costs.observe(1, 1, 64, 2 * measured(1, 1, 64))
    assert costs.heads(1) == pytest.approx(TABLE.heads(1) + 0.06, rel=0.02)


def test_the_hosts_work_is_learned_whether_the_table_has_it_or_not() -> None:
    """Sampling makes it several times what a tuning measured, and `StepCosts.measure` measures none."""
    for table in (TABLE, replace(TABLE, host_seconds=[0.01, 0.02], draft_seconds=[0.03, 0.04])):
        costs = CorrectedCosts(table)
        for _ in range(60):
            costs.observe_host(4, 0.5, with_heads=False)
            costs.observe_host(4, 0.9, with_heads=True)
        assert costs.steps(4, 64, 1)[0] == pytest.approx(table.backend_steps(4, 64, 1)[0] + 0.5)
        assert costs.heads(4) == pytest.approx(table.evaluation(4) + 0.4)


@pytest.mark.parametrize("costs", [CorrectedCosts(TABLE), LearnedCosts()])
def test_what_drafts_add_is_told_by_steps_of_as_many_sequences(costs: Costs) -> None:
    """Sixteen sequences without drafts are more work than one with them. That does not make drafts free."""
    before = costs.heads(16)
    costs.observe_host(1, 0.1, with_heads=False)
    costs.observe_host(1, 0.3, with_heads=True)
    costs.observe_host(16, 1.0, with_heads=False)
    assert costs.heads(16) == pytest.approx(before + 0.2)


def test_costs_stay_positive_whatever_is_seen() -> None:
    uneven = StepCosts([1], [1, 2, 4], [64], [[[1.0, 0.9, 1.1]]], [0.1])  # a table in which two nodes cost less than one
    costs = CorrectedCosts(uneven)
    for _ in range(200):
        costs.observe(1, 4, 64, 1e-9)
        costs.observe_heads(1, 0.0)
    found = costs.steps(1, 64, 8)
    assert (found > 0).all()
    assert (np.diff(found) >= 0).all()
    assert costs.heads(1) > 0


def test_an_engine_widens_its_trees_once_steps_were_cheaper_than_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table, each node adds a fifth of a step. By the clock, it adds nothing, as two requests with trees show."""
    table = StepCosts([1], [1, 16], [64], [[[1.0, 4.0]]], [0.001])
    widths = {}
    for costs in (table, CorrectedCosts(table)):
        backend, clock = FakeBackend("always"), Clock()
        clock.install(monkeypatch)
        backend.fails = lambda _, clock=clock: clock.advance(0.5)  # each step takes half a second
        engine = DecodingEngine(backend, DynamicTree(16), max_batch_size=1, costs=costs)
        for nodes in (2, 16):
            list(engine.generate([[1]], 40, tree=DynamicTree(nodes)))
        backend.steps.clear()
        list(engine.generate([[1]], 60))
        widths[type(costs)] = [tokens for _, tokens in backend.steps[1:-5]]  # the last steps need no more
    assert 1 < np.mean(widths[StepCosts]) < 6
    assert np.mean(widths[CorrectedCosts]) > 10
