"""`medusa-export ray` in a process of its own, with the Ray cluster that it starts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS, STOP_SECONDS = 240, 120
MARK = "MEDUSA_TEST_CLUSTER"


@dataclass
class RayCluster:
    """Replicas that run, and the command that runs them."""

    process: subprocess.Popen[bytes]
    output: Path
    mark: str
    url: str
    client: httpx2.Client

    def pids(self, name: str = "") -> list[int]:
        """The cluster's processes whose command line has this word. Ray names a replica's ray::ServeReplica:…"""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if folder.name.isdecimal() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes()
                    if name.encode() in command and command:
                        found.append(int(folder.name))
        return found

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """A metric's values by replica, of the series that have these labels."""
        found = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    found[sample.labels["replica"]] = sample.value
        return found


@contextmanager
def ray_cluster(bundle: Path, output: Path, *options: str) -> Iterator[RayCluster]:
    """Start replicas of a bundle, and wait until they take requests."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "medusa_export", "ray", str(bundle), "--port", "0", *options]
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": "local", MARK: mark}, start_new_session=True
        )
    try:
        url = _url(process, output)
        with httpx2.Client(base_url=url, timeout=120) as client:
            yield RayCluster(process, output, mark, url, client)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _url(process: subprocess.Popen[bytes], output: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while (found := re.search(r"listening on (http://\S+)", output.read_text(encoding="utf-8"))) is None:
        assert process.poll() is None, output.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
        time.sleep(0.1)
    return found[1]
