"""A contestant's process. Requests and answers are lines of JSON; between requests the process is paused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from medusa_runtime.errors import MedusaError

WORKERS = Path(__file__).parent / "workers"
REQUEST_LOOP = WORKERS / "request_loop.py"
GRACE_SECONDS = 5.0


class WorkerError(MedusaError):
    """A contestant's process failed at a request, or died."""


class WorkerProcess:
    """Starts a process with the protocol of `workers/request_loop.py`, and waits until it is ready. Use it in a `with`.

    Between requests the whole process is paused (SIGSTOP, if the system has signals), since an engine's idle threads may spin
    on the cores that another one is measured on.

    Args:
        name: its name in errors.
        command: the command to run.
        environment: environment variables in addition to ours.

    Raises:
        WorkerError: it did not start.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # its own process group: Ctrl-C only reaches us, and if we are killed, the system wakes the paused processes in it
        group: dict[str, Any] = {} if sys.platform == "win32" else {"process_group": 0}
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | dict(environment or {}),
            **group,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self._stop()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._child.pid

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a request and wait for the result.

        Raises:
            WorkerError: the request failed, or the process died.
        """
        assert self._child.stdin is not None
        self._go_on()
        try:
            self._child.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            pass  # it died; reading the answer will report it
        result = self._answer()
        self._stop()
        return result

    def close(self) -> None:
        """End the process, even in the middle of a request."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait(GRACE_SECONDS)
        for stream in (self._child.stdin, self._child.stdout, self._log):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # an unread request is still in the pipe
                    continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name} ended with exit code {self._child.wait()}{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""

    def _stop(self) -> None:
        """Pause the process, and wait until it has stopped."""
        if sys.platform == "win32" or self._child.poll() is not None:
            return
        self._child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _go_on(self) -> None:
        if sys.platform != "win32":
            self._child.send_signal(signal.SIGCONT)
