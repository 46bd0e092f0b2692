"""Servers as processes of their own, which the benchmarks over HTTP measure."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

START_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let it run. Otherwise it is paused, so that it takes no time from others."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def memory_bytes(self) -> int:
        """Its resident memory."""
        return 4096 * int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1])

    def holds(self) -> dict[str, int]:
        """How many threads and open files it has."""
        folder = Path(f"/proc/{self.process.pid}")
        return {
            "threads": sum(1 for _ in (folder / "task").iterdir()),
            "descriptors": sum(1 for _ in (folder / "fd").iterdir()),
        }

    def metric(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        text = httpx2.get(f"{self.url}/metrics", timeout=60).text
        return sum(map(float, re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


@contextmanager
def medusa_server(bundle: Path, max_batch_size: int, *options: str) -> Iterator[Server]:
    """`medusa-export serve` on a bundle."""
    port = free_port()
    command = [sys.executable, "-m", "medusa_export", "serve", str(bundle), "--port", str(port)]
    command += ["--max-batch-size", str(max_batch_size), *options]
    with _running(command, f"http://127.0.0.1:{port}", "/ready") as server:
        yield server


@contextmanager
def llama_cpp_server(python: Path, model: Path, context: int) -> Iterator[Server]:
    """llama-cpp-python's server. It answers one request after the other; without the option, a new one would end the last."""
    port = free_port()
    threads = str(os.cpu_count())
    command = [str(python), "-m", "llama_cpp.server", "--model", str(model), "--port", str(port), "--n_ctx", str(context)]
    command += ["--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "false", "--verbose", "false"]
    with _running(command, f"http://127.0.0.1:{port}", "/v1/models") as server:
        yield server


@contextmanager
def llama_server(program: Path, model: Path, slots: int, context: int) -> Iterator[Server]:
    """llama.cpp's own server, `llama-server`, which decodes several requests side by side. context: of each slot."""
    port, threads = free_port(), str(os.cpu_count())
    command = [str(program), "--model", str(model), "--port", str(port), "--parallel", str(slots), "--threads", threads]
    command += ["--threads-batch", threads, "--ctx-size", str(slots * context), "--no-webui"]
    with _running(command, f"http://127.0.0.1:{port}", "/health") as server:
        yield server


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
    return port


@contextmanager
def _running(command: Sequence[str], url: str, probe: str) -> Iterator[Server]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(url + probe):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command[:3])} does not start: {log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield Server(url, process)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False
