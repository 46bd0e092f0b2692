"""The check of a prediction, on a backend whose clock is ours; and what becomes of a tuning that does not hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medusa_export.errors import PredictionError
from medusa_export.measure.tune.check import LEAST_ROUNDS, MOST_ROUNDS, TOLERANCE, Checker
from medusa_export.measure.tune.keep import checks_off, require_held
from medusa_export.measure.tune.others import OtherPrograms
from medusa_export.measure.tune.record import record
from medusa_export.measure.tune.search import EvaluatedAcceptance, Place, RecordedAcceptance, best_kind
from medusa_export.measure.tune.tune_report import checked, machine
from medusa_heads.replay import Evaluation
from medusa_runtime import StepCosts
from medusa_runtime.bundle.manifest import Provenance
from medusa_runtime.drafting.tuning import Check, DeviceTuning, Measurement, TunedBatch
from tests.support.clock import Clock
from tests.support.fake_backend import FakeBackend

PROMPTS = [[1, 2], [3], [5, 6, 7], [9]]
COSTS = StepCosts([1, 2], [1, 8, 16], [64], [[[1.0, 1.4, 2.2], [1.1, 2.0, 3.6]]], [0.1, 0.15])
NEW_TOKENS = 30


class Timed(FakeBackend):
    """Steps and heads take the seconds of `COSTS`, times a factor that depends on the time.

    Args:
        clock: the clock.
        factor: from seconds since the start to the factor.
    """

    def __init__(self, clock: Clock, factor: Callable[[float], float]) -> None:
        super().__init__()
        self.clock, self.factor = clock, factor

    def step(self, input_ids, *args, **kwargs):
        batch, width = input_ids.shape
        self.clock.advance(self.factor(self.clock.now) * float(COSTS.steps(batch, 64, width)[-1]))
        return super().step(input_ids, *args, **kwargs)

    def propose(self, rows, root_ids):
        self.clock.advance(self.factor(self.clock.now) * COSTS.heads(len(rows)))
        return super().propose(rows, root_ids)


@pytest.fixture(scope="module")
def acceptance() -> RecordedAcceptance:
    found = record(FakeBackend(), PROMPTS, max_new_tokens=NEW_TOKENS, end_ids=(), batch_size=2)
    return RecordedAcceptance(found, 4, 16)


@pytest.fixture
def checked_at(acceptance: RecordedAcceptance, monkeypatch: pytest.MonkeyPatch):
    """The check of the best tree of a batch size on a machine with the given factor."""

    def run(factor: Callable[[float], float], batch_size: int = 1, max_seconds: float = 1e9) -> Check:
        clock = Clock()
        clock.install(monkeypatch)
        place = Place(COSTS, batch_size, 64)
        static, dynamic, plain = acceptance.static(place), acceptance.dynamic(place), place.whole(1, 1.0)
        best = best_kind(plain, static, dynamic)
        found = TunedBatch(batch_size=batch_size, best=best, plain=plain, static=static, dynamic=dynamic)
        check = Checker(Timed(clock, factor), PROMPTS, NEW_TOKENS, max_seconds).check(place, found, acceptance)
        assert check is not None
        return check

    return run


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_prediction_that_holds_needs_one_round(checked_at, batch_size: int) -> None:
    check = checked_at(lambda _: 1.0, batch_size)
    assert check.rounds == 1
    assert abs(check.error) < 0.08  # the replay sees the ends of answers otherwise
    assert check.plain_measured_tokens_per_second == pytest.approx(check.plain_predicted_tokens_per_second, rel=0.01)


def test_a_check_that_was_too_slow_is_repeated_until_the_machine_is_quiet(checked_at) -> None:
    """Another program is busy for the first round, and all takes twice as long."""
    check = checked_at(lambda now: 2.0 if now < 250.0 else 1.0)
    assert 1 < check.rounds < MOST_ROUNDS
    assert abs(check.error) <= TOLERANCE


def test_a_check_beside_a_program_that_comes_and_goes_holds(checked_at) -> None:
    """Every second step takes twice as long, but seldom the same one in all rounds. The costs are those of quiet steps."""
    rng = np.random.default_rng(0)
    check = checked_at(lambda _: 1.0 + float(rng.random() < 0.5))
    assert 1 < check.rounds <= MOST_ROUNDS
    assert abs(check.error) <= TOLERANCE


def test_a_check_on_a_machine_that_stays_busy_is_off(checked_at) -> None:
    check = checked_at(lambda _: 2.0)
    assert check.rounds == MOST_ROUNDS
    assert check.error == pytest.approx(-0.5, abs=0.03)
    assert checked_at(lambda _: 2.0, max_seconds=0.0).rounds == LEAST_ROUNDS  # no time for more


def test_a_check_that_is_faster_than_predicted_is_off_at_once(checked_at) -> None:
    """The costs were measured while another program ran, the check was not. No further round could help."""
    check = checked_at(lambda _: 0.5)
    assert check.rounds == 1
    assert check.error == pytest.approx(1.0, abs=0.15)


def test_a_prediction_for_other_prompts_is_judged_by_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation says that all drafts are accepted; here none is. That is no fault of the costs."""
    facts = {"heads": "", "base_model": "", "data": "", "answers": 1, "tokens": 1}
    acceptance = EvaluatedAcceptance(Evaluation(**facts, accuracy=[[1.0, 0.0]] * 3, trees=[]), 4, 4)
    place = Place(COSTS, 1, 64)
    static, dynamic, plain = acceptance.static(place), acceptance.dynamic(place), place.whole(1, 1.0)
    found = TunedBatch(batch_size=1, best="dynamic", plain=plain, static=static, dynamic=dynamic)
    for factor, error in ((1.0, 0.0), (2.0, -0.5), (0.5, 1.0)):
        clock = Clock()
        clock.install(monkeypatch)
        backend = Timed(clock, lambda _, factor=factor: factor)
        backend.skill = "never"
        check = Checker(backend, PROMPTS, NEW_TOKENS, 1e9).check(place, found, acceptance)
        assert check is not None
        assert check.predicted_tokens_per_second > 2 * plain.tokens_per_second
        assert check.error == pytest.approx(error, abs=0.01)
        told = checked(found.model_copy(update={"check": check, "as_predicted": factor == 1.0}))
        assert "for the evaluation's prompts, which are others" in told
        assert f"({check.error:+.0%})" in told


def device(*errors: float | None) -> DeviceTuning:
    """A tuning whose checks for batch sizes 1, 2 … were off by so much; None for a batch size that was not checked."""
    place = Place(COSTS, 1, 64)
    plain = place.whole(1, 1.0)
    static = plain.model_copy(update={"tree": {"parents": [-1], "ranks": [0]}})
    batches = []
    for size, error in enumerate(errors, start=1):
        check = error if error is None else Check(
            prompts=1, steps=1, predicted_tokens_per_second=10.0, measured_tokens_per_second=10.0 * (1 + error),
            plain_predicted_tokens_per_second=10.0, plain_measured_tokens_per_second=10.0,
        )  # fmt: skip
        as_predicted = None if check is None else abs(check.error) <= TOLERANCE
        batches.append(
            TunedBatch(
                batch_size=size, best="plain", plain=plain, static=static, dynamic=plain, check=check, as_predicted=as_predicted
            )
        )
    return DeviceTuning(
        backend="x", processor="y", threads=1, cores=1, provenance=Provenance(command=[], versions={}, created=""),
        costs=COSTS, acceptance_from="nowhere", accuracy=[[0.5]], capacity=64, batches=batches,
    )  # fmt: skip


def test_a_tuning_holds_if_no_check_was_off(tmp_path: Path) -> None:
    assert not checks_off(device(0.1, -0.14).batches)
    assert not checks_off(device(None, 0.0).batches)  # what could not be checked is told, and is no reason against the rest
    require_held(tmp_path, device(0.0))


def test_one_check_that_was_off_is_enough(tmp_path: Path) -> None:
    found = device(0.0, -0.5, 1.25)
    assert checks_off(found.batches) == "2 (-50%), 3 (+125%)"
    with pytest.raises(PredictionError) as caught:
        require_held(tmp_path, found)
    assert caught.value.exit_code == 3
    assert "at batch size 2 (-50%), 3 (+125%)" in str(caught.value)
    assert f"{tmp_path / 'tuning.json'} is not written" in str(caught.value)
    (tmp_path / "tuning.json").write_text("{}")
    with pytest.raises(PredictionError, match="stays as it was"):
        require_held(tmp_path, found)


def test_the_result_says_how_noisy_the_machine_was() -> None:
    quiet = machine(Measurement(rounds=5, noise=0.021, is_quiet=True))
    assert quiet == "machine: quiet; steps took 2% longer in the median than in the fastest quarter of 5 rounds"
    busy = machine(Measurement(rounds=23, noise=0.4, is_quiet=False))
    assert busy.startswith("machine: BUSY; steps took 40% longer in the median")
    assert "of 23 rounds" in busy
    off = device(0.5).batches[0]
    assert "NOT AS PREDICTED" in checked(off)
    assert "rounds" not in checked(off)
    again = off.model_copy(update={"check": off.check.model_copy(update={"rounds": 4})})
    assert "measured 15.0 tokens/s (steps as in the fastest quarter of 4 rounds), predicted 10.0" in checked(again)
    beside = machine(Measurement(rounds=5, noise=0.02, other_cores=1.04, is_quiet=False))
    assert "machine: BUSY; steps took 2% longer in the median" in beside
    assert "other programs used 1.0 cores" in beside
    assert "NOT AS PREDICTED" not in checked(device(0.1).batches[0])


def test_other_programs_are_what_the_cores_did_beyond_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ten seconds of two cores, fourteen are used, five of them by this process, and the cores of others do not count."""
    stat, seconds = tmp_path / "stat", [1.0, 6.0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    stat.write_text("cpu  9 9\ncpu0 100 0 0 500 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0 0 0\nintr 5\n")
    others = OtherPrograms(stat, lambda: seconds.pop(0))
    stat.write_text(
        "cpu  9 9\ncpu0 900 50 100 540 10 0 0 0 700 0\ncpu1 999 0 0 0 0 0 0 0 0 0\ncpu2 100 0 200 550 0 10 20 120 0 0\nintr 5\n"
    )
    assert others.cores() == pytest.approx((14.0 - 5.0) / 20.0 * 2)
    assert OtherPrograms(tmp_path / "none").cores() is None
