"""What steps cost, measured on a backend whose clock is ours."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from medusa_runtime.drafting import measuring
from medusa_runtime.drafting.rounds import Rounds, low, noise
from tests.support.fake_backend import FakeBackend, fake_manifest


class Slow(FakeBackend):
    """A step of B sequences with T nodes takes 1 + B·T·`per_token` seconds; some stall."""

    def __init__(self, per_token: float, stalls: frozenset[int] = frozenset()) -> None:
        super().__init__(manifest=fake_manifest(num_heads=3, max_seq_len=400))
        self.per_token, self.stalls, self.now = per_token, stalls, 0.0
        self.lengths: list[int] = []
        self.left = self.entries  # before the cache was resized last

    def resize(self, *args, **kwargs):
        self.left = self.entries.copy()
        super().resize(*args, **kwargs)

    def step(self, input_ids, *args, **kwargs):
        result = super().step(input_ids, *args, **kwargs)
        self.lengths.append(int(args[2][0]))
        self.now += (100.0 if len(self.steps) in self.stalls else 1.0) + self.per_token * input_ids.size
        return result

    def propose(self, rows, root_ids):
        self.now += 0.25 * len(rows)
        return super().propose(rows, root_ids)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch):
    def run(backend: Slow, **settings):
        monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: backend.now))
        given = {"batch_sizes": [1, 4], "widths": [1, 2, 4, 8, 16], "capacities": [64, 192], "rounds": Rounds(3)} | settings
        return measuring.measure_grid(backend, **given)

    return run


def test_each_point_has_its_own_seconds(measure) -> None:
    backend, told = Slow(0.01), []
    found = measure(backend, tell=told.append)
    expected = [[[1 + 0.01 * batch * width for width in (1, 2, 4, 8, 16)] for batch in (1, 4)]] * 2
    np.testing.assert_allclose(found.step_seconds, expected)
    assert found.head_seconds == pytest.approx([0.25, 1.0])
    assert (found.rounds, found.noise) == (3, pytest.approx(0.0, abs=1e-9))
    assert told == [1, 2, 3, 4] * 2  # one sequence, then several


def test_the_cache_is_full_of_real_entries_but_for_the_widest_step(measure) -> None:
    backend = Slow(0.01)
    measure(backend)
    assert len(backend.left) == 4
    assert (backend.left[:, :176] >= 0).all()
    assert len(backend.entries) == 1  # ready for one sequence again
    assert {48, 176} <= set(backend.lengths)
    assert max(backend.lengths) == 176


def test_what_can_never_pay_is_not_measured_but_goes_on_as_steeply(measure) -> None:
    """Three heads give four tokens at most."""
    backend = Slow(1.0)
    found = measure(backend, capacities=[64])
    np.testing.assert_allclose(found.step_seconds[0], [[2.0, 3.0, 5.0, 9.0, 17.0], [5.0, 9.0, 17.0, 33.0, 65.0]])
    assert backend.steps.count((1, 16)) == 2 + 3  # 17 seconds where one node takes 2 is the first that is too dear: asked twice
    assert backend.steps.count((4, 8)) == 2 + 3
    assert (4, 16) not in backend.steps


def test_a_stall_in_the_first_round_hides_no_width(measure) -> None:
    backend = Slow(0.01, frozenset({6}))  # the first step of four nodes
    measure(backend, capacities=[64])
    assert backend.steps.count((1, 16)) == 1 + 3


def test_a_stall_changes_nothing(measure) -> None:
    quiet = measure(Slow(0.01)).step_seconds
    for stall in (5, 20, 41, 60):
        stalled = measure(Slow(0.01, frozenset({stall}))).step_seconds
        np.testing.assert_allclose(stalled, quiet)


class Busy(Slow):
    """While another program is busy, from one second to another, a step takes longer by a factor that depends on the step."""

    def __init__(self, busy_until: float) -> None:
        super().__init__(0.01)
        self.busy_until = busy_until

    def step(self, input_ids, *args, **kwargs):
        before = self.now
        result = super().step(input_ids, *args, **kwargs)
        if before < self.busy_until:
            self.now += (self.now - before) * (1.0 + 0.5 * (len(self.steps) % 3))
        return result


def test_a_busy_machine_is_measured_until_half_of_the_rounds_were_quiet(measure) -> None:
    """Other programs run until second 500: for the first rounds of one sequence. Then all is quiet."""
    quiet, busy = measure(Slow(0.01)), measure(Busy(500.0), rounds=Rounds(3, 0.05, 10_000.0))
    np.testing.assert_allclose(busy.step_seconds, quiet.step_seconds, rtol=0.01)
    assert busy.noise <= 0.05


def test_a_machine_that_stays_busy_is_given_up_after_the_time_limit(measure) -> None:
    backend, told = Busy(1e9), []
    found = measure(backend, rounds=Rounds(3, 0.05, 1000.0), tell=told.append)
    assert found.noise > 0.2
    assert found.rounds > 3
    assert backend.now < 2000.0
    few = measure(Busy(1e9), rounds=Rounds(3, 0.05, 0.0))  # without time for more, there are the least rounds
    assert few.rounds == 3
    assert few.noise > 0.05
    assert told.index(1, 1) > 4  # the first group took no more than its half of the time, and more rounds than it had to


def test_the_timing_that_counts_is_one_that_a_quarter_of_the_rounds_reach() -> None:
    table = [[1.0, 20.0], [9.0, 10.0], [8.0, 30.0], [1.0, 40.0], [7.0, 10.0]]
    assert low(table).tolist() == [1.0, 10.0]
    assert noise([table]) == pytest.approx(((7.0 / 1.0 - 1) + (20.0 / 10.0 - 1)) / 2)
    assert noise([[[2.0, 2.0]], [[3.0], [3.0]]]) == 0.0
    assert float(low([5.0, 1.0, 3.0])) == 2.0
