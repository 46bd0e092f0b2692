"""`.ci/watch.py`: a run that takes too long is ended, and says what it was at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.patience import PATIENCE

WATCH = Path(__file__).resolve().parents[2] / ".ci" / "watch.py"


def watch(limit: float, script: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(WATCH), str(limit), sys.executable, "-u", "-c", script]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_a_run_that_ends_in_time_has_its_own_exit_code_and_each_line_its_seconds() -> None:
    done = watch(50, "print('one line'); raise SystemExit(3)")
    assert done.returncode == 3
    seconds, *words = done.stdout.split()
    assert float(seconds) < 50
    assert words == ["one", "line"]


def test_a_run_that_takes_too_long_is_ended_and_names_the_tests_that_ran() -> None:
    script = """import time
print("tests/unit/test_a.py::test_done[x y] ")
print("[gw0] [ 50%] PASSED tests/unit/test_a.py::test_done[x y] ")
print("[gw1] node down: Not properly terminated")
print("tests/unit/test_b.py::test_hangs ")
time.sleep(600)"""
    done = watch(3, script)
    assert done.returncode == 124
    _, summary = done.stdout.split("ended after")
    lost, rest = summary.split("the tests that took longest:")
    longest, running = rest.split("tests that have begun and not ended:")
    assert "[gw1] node down" in lost
    assert "tests/unit/test_a.py::test_done[x y]" in longest
    assert "test_hangs" in running
    assert "test_done" not in running
