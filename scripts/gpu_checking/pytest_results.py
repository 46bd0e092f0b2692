"""A plugin for pytest that writes each result at once, so that they are known if the process is killed or crashes.

    GPU_CHECK_RESULTS=FILE python -m pytest -p gpu_checking.pytest_results …

One line of JSON when a test begins ("running"), and one for its outcome: passed, failed or skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = "GPU_CHECK_RESULTS"
TEXT = 2000  # characters kept of a failure


def pytest_runtest_logstart(nodeid: str) -> None:
    """See pytest."""
    _write(nodeid, "running", "")


def pytest_runtest_logreport(report: Any) -> None:
    """See pytest. Set-up and teardown are told only if they did not pass."""
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        _write(report.nodeid, report.outcome, reason.removeprefix("Skipped: ")[-TEXT:])


def _write(test: str, outcome: str, text: str) -> None:
    with Path(os.environ[RESULTS]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "text": text}) + "\n")


def counted(lines: str, crashed: Mapping[str, str]) -> dict[str, Any]:
    """Numbers of tests by outcome, the failures with their texts, the reasons of skips, and the test that has not ended.

    Args:
        lines: what this plugin has written.
        crashed: tests in which the process crashed, with the reasons: they have failed.
    """
    outcomes: dict[str, tuple[str, str]] = {}
    for line in lines.split("\n")[:-1]:  # the last one may be half written
        one = json.loads(line)
        if outcomes.get(one["test"], ("",))[0] != "failed":  # a test that fails in its teardown has passed before
            outcomes[one["test"]] = one["outcome"], one["text"]
    outcomes |= {test: ("failed", why) for test, why in crashed.items()}
    of: dict[str, dict[str, str]] = {kind: {} for kind in ("passed", "failed", "skipped", "running")}
    for test, (outcome, text) in outcomes.items():
        of[outcome][test] = text
    facts = {"passed": len(of["passed"]), "num_failed": len(of["failed"]), "failures": of["failed"], "skipped": of["skipped"]}
    return facts | ({"unfinished": next(reversed(of["running"]))} if of["running"] else {})
