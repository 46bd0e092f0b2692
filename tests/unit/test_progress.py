"""Progress: a rate and an end, once they can be told, and one line where there is no terminal."""

from __future__ import annotations

import io
import re

import pytest

from medusa_export import progress
from medusa_export.console import Console
from medusa_export.progress import Pace, byte_stage, count_stage, stage, step_stage, told, waiting


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("medusa_export.progress.time.perf_counter", found)
    return found


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    found = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=found, highlight=False, width=100))
    return found


def test_a_first_report_says_nothing_of_the_pace() -> None:
    """What it counts took unknown time: by dividing, one got 8,000,000,000 answers/s."""
    pace = Pace()
    pace.count(100.0, 8, 1024, 24)
    assert (pace.rate("answers"), pace.left(16)) == ("", "")
    pace.count(100.0, 9, 1100, 24)  # no time has passed
    assert (pace.rate("answers"), pace.left(15)) == ("", "")
    pace.count(110.0, 16, 1224, 24)
    assert pace.rate("answers") == "20 answers/s"
    assert pace.left(8) == "0:00:10 left"


def test_a_slow_rate_keeps_two_digits_and_none_is_shown_for_what_is_not_counted() -> None:
    pace = Pace()
    pace.count(0.0, 0, 0, 9)
    pace.count(8.0, 1, 2, 9)
    assert pace.rate("answers") == "0.25 answers/s"
    pace.count(9.0, 2, 0, 9)
    assert pace.rate("answers") == ""


def test_another_part_of_a_stage_has_a_pace_of_its_own() -> None:
    pace = Pace()
    pace.count(0.0, 0, 0, 10)
    pace.count(10.0, 10, 100, 10)
    pace.count(12.0, 1, 5, 50)
    assert (pace.rate("tokens"), pace.left(49)) == ("", "")
    pace.count(14.0, 2, 25, 50)
    assert (pace.rate("tokens"), pace.left(48)) == ("10 tokens/s", "0:01:36 left")
    assert pace.seconds == 14.0


def test_a_log_gets_a_line_a_minute_and_one_at_the_end(clock: Clock, log: io.StringIO) -> None:
    with count_stage("answers", 10) as tell:
        tell(2, 2, 0)
        for done in range(3, 11):
            clock.now += 50
            tell(done, 2, 100 * (done - 2))
    lines = log.getvalue().splitlines()
    assert lines[0] == "  answers: 4 of 10, 2 tokens/s, 0:05:00 left"
    assert lines[-1] == "  answers: 0:06:40"
    assert len(lines) == 5


def test_a_stage_without_a_report_prints_nothing(log: io.StringIO) -> None:
    with count_stage("answers"):
        pass
    assert log.getvalue() == ""


def test_steps_are_counted_by_themselves(clock: Clock, log: io.StringIO) -> None:
    seen = []
    with step_stage("read", 3) as one_more:
        for item in told("abc", one_more):
            clock.now += 61
            seen.append(item)
    assert seen == ["a", "b", "c"]
    assert log.getvalue().splitlines() == [
        "  read: 1 of 3, 0:02:02 left",
        "  read: 2 of 3, 0:01:01 left",
        "  read: 3 of 3, 0:00:00 left",
        "  read: 0:03:03",
    ]


def test_a_terminal_shows_a_bar_with_an_end(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(progress, "console", terminal)
    with count_stage("answers", 8, "answers") as tell:
        tell(0, 0, 0)
        clock.now += 10
        tell(4, 0, 4)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert re.search(r"answers ━+.* 4/8 0\.4 answers/s, 0:00:10 left", shown)
    assert shown.rstrip().endswith("answers: 0:00:10")


def test_bytes_that_were_made_are_told_and_not_those_that_were_read(clock: Clock, log: io.StringIO) -> None:
    with byte_stage("write the weights", 30_000_000, lambda: 12_000_000) as advance:
        advance(30_000_000)
        clock.now += 2
    with byte_stage("rotate", 5_000_000):
        clock.now += 1
    assert log.getvalue().splitlines() == ["  write the weights: 12 MB in 2.0 s", "  rotate: 5 MB in 1.0 s"]


def test_nothing_is_left_of_waiting(log: io.StringIO) -> None:
    with waiting("open the bundle"):
        pass
    assert log.getvalue() == ""


def test_quiet_prints_nothing(log: io.StringIO) -> None:
    with progress.quiet(), stage("a"), step_stage("b", 1) as one_more:
        one_more()
        progress.note("a note")
    assert log.getvalue() == ""
