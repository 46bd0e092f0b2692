"""A contestant's process: asked in lines of JSON, and stopped whenever it is not asked."""

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
SERVE = WORKERS / "serve.py"
GRACE_SECONDS = 5.0


class WorkerError(MedusaError):
    """A contestant's process failed at what it was asked, or died."""


class WorkerProcess:
    """Starts a process that talks as `workers/serve.py` does, and waits until it is ready. Use it in a `with`.

    Between requests it is stopped as a whole (SIGSTOP, where there are signals): an engine's idle threads may spin on the cores
    that another one is measured on.

    Args:
        name: what errors call it.
        command: what to run.
        environment: variables besides our own.

    Raises:
        WorkerError: it did not start.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # a group of its own: Ctrl-C is for us, and the system wakes what is stopped in it should we be killed
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
        """The process's number."""
        return self._child.pid

    def ask(self, do: str, **arguments: Any) -> Any:
        """Have it do something, and wait for the result.

        Raises:
            WorkerError: it failed, or died.
        """
        assert self._child.stdin is not None
        self._go_on()
        try:
            self._child.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            pass  # it died; the answer that does not come says so
        result = self._answer()
        self._stop()
        return result

    def close(self) -> None:
        """End it, at once where it is at work."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait(GRACE_SECONDS)
        for stream in (self._child.stdin, self._child.stdout, self._log):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # a request that it never read
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
        """Stop it, and wait until it stands still."""
        if sys.platform == "win32" or self._child.poll() is not None:
            return
        self._child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _go_on(self) -> None:
        if sys.platform != "win32":
            self._child.send_signal(signal.SIGCONT)
