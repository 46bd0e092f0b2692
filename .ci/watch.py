"""Runs a command and says at each line how many seconds have passed. If it takes too long, it is ended, with what it was at.

    python .ci/watch.py SECONDS COMMAND …

The command is pytest with `-v`, or calls it. What is told at the end: the tests that have begun and not ended, those that took
longest, workers that were lost, and what the machine was doing. A signal to end has the same effect as the limit.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

SHOWN = 25  # tests, and processes
GRACE = 20  # seconds to end in
TEST = r"(tests/\S+::.*?)\s*$"
BEGUN, ENDED, LOST = re.compile(TEST), re.compile(r"\[gw\d+\] \[ *\d+%\] [A-Z]+ " + TEST), re.compile(r"\[gw\d+\] node down")


class Log:
    """Prints the lines of a process and remembers when tests began and ended."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.begun: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.lost: list[str] = []

    @property
    def now(self) -> float:
        return time.monotonic() - self.start

    def add(self, line: str) -> None:
        now = self.now
        print(f"{now:7.1f} {line}", end="", flush=True)
        if ended := ENDED.match(line):
            self.took[ended[1]] = now - self.begun.pop(ended[1], now)
        elif begun := BEGUN.match(line):
            self.begun[begun[1]] = now
        elif LOST.match(line):
            self.lost.append(f"{now:7.1f} {line.strip()}")

    def summary(self) -> str:
        now, longest = self.now, sorted(self.took.items(), key=lambda pair: -pair[1])[:SHOWN]
        parts = {
            "workers that were lost": self.lost,
            "the tests that took longest": [f"{seconds:7.1f} s {name}" for name, seconds in longest],
            "what the machine does": machine().splitlines(),
            "tests that have begun and not ended": [f"{now - since:7.1f} s {name}" for name, since in self.begun.items()],
        }
        return "\n".join(f"{title}:\n" + "\n".join(f"  {line}" for line in lines or ["none"]) for title, lines in parts.items())


def machine() -> str:
    """Cores, load, memory, and the processes that used the processor most."""
    if not Path("/proc/meminfo").exists() or shutil.which("ps") is None:
        return "unknown: there is no /proc or no ps"
    memory = " ".join(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(("MemTotal", "MemAvail"))
    )
    listed = subprocess.run(
        ["ps", "-eo", "cputime,etime,rss,stat,args", "--sort=-cputime", "--width", "160"],
        capture_output=True,
        text=True,
        check=False,
    )
    top = listed.stdout.splitlines()[: SHOWN + 1]
    return "\n".join([f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()}, {memory}", *top])


def main(limit: float, command: list[str]) -> int:
    log = Log()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert process.stdout is not None
    lines = process.stdout
    reader = threading.Thread(target=lambda: [log.add(line) for line in lines], daemon=True)
    reader.start()
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    signal.signal(signal.SIGINT, lambda *_: asked.set())
    while process.poll() is None and not asked.is_set() and log.now < limit:
        asked.wait(1)
    if process.poll() is None:
        found = log.summary()
        os.killpg(process.pid, signal.SIGKILL)
        reader.join(GRACE)
        print(
            f"\nended after {log.now:.0f} s, {'as asked' if asked.is_set() else f'the limit is {limit:.0f} s'}\n{found}",
            flush=True,
        )
        return 124
    reader.join(GRACE)  # a process that was left behind may keep the pipe open
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
