"""The time of a check: commands end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAIL = 2000  # characters quoted from the output of a failed command
WAIT = 5.0  # seconds between two calls of `meanwhile`


class Failed(Exception):  # noqa: N818 - the end of a step, not an error in this program
    """A step failed; with the reason, and the exit code if a command ended by itself."""

    def __init__(self, why: str, code: int | None = None) -> None:
        super().__init__(why)
        self.code = code


class OutOfTime(Exception):  # noqa: N818 - as above
    """The time was over before a step began or ended; with the reason."""


class Overrun(Exception):  # noqa: N818 - becomes one of those above
    """A command took too long and was ended; with the end of its output."""


class Budget:
    """The seconds that a check may take.

    Args:
        seconds: for everything together.
        timeout: for each command.
        now: the clock.
    """

    def __init__(self, seconds: float, timeout: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self._timeout, self._end = now, timeout, now() + seconds

    def left(self) -> float:
        """Seconds until the end."""
        return max(0.0, self._end - self.now())

    def run(
        self,
        *words: object,
        ends_with: tuple[int, ...] = (0,),
        most: float | None = None,
        environment: Mapping[str, str] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> str:
        """Run a command and return its stdout.

        Args:
            words: the command.
            ends_with: exit codes that are no failure.
            most: seconds; if they are over, that is no failure of the command.
            environment: variables in addition to ours.
            meanwhile: called every few seconds.

        Raises:
            Failed: its exit code is not in `ends_with`, or it took longer than a command may.
            OutOfTime: the check's time is over, or `most`.
        """
        left = self.left() if most is None else min(self.left(), most)
        if left <= 0:
            raise OutOfTime("not begun: the time is over")
        seconds = min(left, self._timeout)
        try:
            out, err, code = run_command(words, seconds, environment or {}, meanwhile)
        except Overrun as error:
            if seconds < left:
                raise Failed(f"not finished after {seconds:g} s: {error}") from error
            raise OutOfTime(f"not finished after {seconds:.0f} s, when its time was over: {error}") from error
        if code not in ends_with:
            raise Failed(f"exit code {code}: {_tail(out, err)}", code)
        return out


def run_command(
    words: tuple[object, ...], seconds: float, environment: Mapping[str, str], meanwhile: Callable[[], object] | None
) -> tuple[str, str, int]:
    """Run a command; returns stdout, stderr and the exit code. If it is ended, so are the processes of its group.

    Raises:
        Overrun: it took longer than `seconds`.
    """
    with subprocess.Popen(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        cwd=ROOT,
        env=os.environ | dict(environment),
        start_new_session=True,
    ) as process:
        try:
            out, err = _ended(process, seconds, meanwhile)
        except BaseException as error:
            _kill(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise Overrun(_tail(*process.communicate())) from error
    return out, err, process.returncode


def _ended(process: subprocess.Popen[str], seconds: float, meanwhile: Callable[[], object] | None) -> tuple[str, str]:
    """The output of a process, when it has ended."""
    end = time.monotonic() + seconds
    while meanwhile is not None and (left := end - time.monotonic()) > WAIT:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=min(WAIT, left))
        meanwhile()
    return process.communicate(timeout=max(0.0, end - time.monotonic()))


def _kill(process: subprocess.Popen[str]) -> None:
    if sys.platform == "win32":
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(out: str, err: str) -> str:
    return (err or out).strip()[-TAIL:] or "no output"
