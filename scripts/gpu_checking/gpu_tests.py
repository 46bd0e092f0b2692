"""The part that runs tests/gpu. Each result is kept as it comes, so that a crash or the end of the time loses none."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from gpu_checking.budget import ROOT, Failed, OutOfTime
from gpu_checking.parts import Check
from gpu_checking.pytest_results import RESULTS, counted
from gpu_checking.record import Entry

SHARE = 0.5  # of the time that is left: the most that the tests may take
MAX_PROCESSES = 5  # if the tests' process crashes, the tests that are left run in a new one
OPTIONS = ("-q", "-W", "default", "-p", "gpu_checking.pytest_results")  # warnings of libraries on this machine are no failures
NONE_LEFT = 5  # pytest's exit code if it is to run no test


def run_tests(check: Check, entry: Entry) -> None:
    """Run the tests."""
    end = check.budget.now() + check.budget.left() * SHARE
    crashed: dict[str, str] = {}  # test -> how its process ended
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "results"
        log.touch()
        for _ in range(MAX_PROCESSES):
            try:
                _run_pytest(check, entry, log, crashed, end - check.budget.now())
                break
            except Failed as error:
                if (test := entry.facts.get("unfinished")) is None:
                    raise  # not begun at all
                crashed[test] = str(error)
                _note(entry, log, crashed)
            except OutOfTime as error:
                if entry.facts["num_failed"]:
                    raise Failed(f"{_numbers(entry)}; {error}") from error
                raise
        else:
            raise Failed(f"{_numbers(entry)}; the process crashed {MAX_PROCESSES} times, and the rest did not run")
    if entry.facts["num_failed"] or not entry.facts["passed"]:
        raise Failed(_numbers(entry))


def _run_pytest(check: Check, entry: Entry, log: Path, crashed: dict[str, str], seconds: float) -> None:
    """Run the tests that have no result yet."""
    done = dict.fromkeys(json.loads(line)["test"] for line in log.read_text(encoding="utf-8").splitlines())
    left_out = [word for test in done for word in ("--deselect", test)]
    path = os.pathsep.join(filter(None, (str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))))
    try:
        check.budget.run(
            *(sys.executable, "-m", "pytest", *check.tests, *OPTIONS, *left_out),
            ends_with=(0, 1, NONE_LEFT) if done else (0, 1),
            most=seconds,
            environment={RESULTS: str(log), "PYTHONPATH": path},
            meanwhile=lambda: _note(entry, log, crashed),
        )
    finally:
        _note(entry, log, crashed)


def _note(entry: Entry, log: Path, crashed: dict[str, str]) -> None:
    """Put the results so far into the report."""
    entry.facts.pop("unfinished", None)
    entry.facts.update(counted(log.read_text(encoding="utf-8"), crashed))
    entry.write()


def _numbers(entry: Entry) -> str:
    return f"{entry.facts['num_failed']} tests failed, {entry.facts['passed']} passed"
