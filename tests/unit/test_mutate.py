"""`scripts/mutate.py`: the changes that it makes, and the list of those that alter nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.mutate import EQUIVALENTS, ROOT, mutants

SOURCE = '''"""Text stays."""
LIMIT = 3

class Queue:
    size: int = 2

    def room(self, taken: int) -> int:
        """Text stays."""
        if taken < self.size and not self.closed:
            self.count += 1
            return min(self.size - taken, 9)
        raise ValueError("text stays, as 7 does")
'''


def changes(source: str) -> set[tuple[str, str, str]]:
    return {(mutant.place, mutant.before, mutant.after) for mutant, _ in mutants("queue.py", source)}


def test_each_change_is_of_one_line_and_told_with_its_place() -> None:
    room, test = "Queue.room", "if taken < self.size and (not self.closed):"
    given = "return min(self.size - taken, 9)"
    assert changes(SOURCE) == {
        ("Queue", "size: int = 2", "size: int = 3"),
        ("Queue", "size: int = 2", "size: int = 1"),
        (room, test, "if not (taken < self.size and (not self.closed)):"),
        (room, test, "if taken < self.size or not self.closed:"),
        (room, test, "if taken <= self.size and (not self.closed):"),
        (room, test, "if taken < self.size and (not not self.closed):"),
        (room, "self.count += 1", "pass"),
        (room, "self.count += 1", "self.count -= 1"),
        (room, "self.count += 1", "self.count += 2"),
        (room, "self.count += 1", "self.count += 0"),
        (room, given, "return None"),
        (room, given, "return max(self.size - taken, 9)"),
        (room, given, "return min(self.size + taken, 9)"),
        (room, given, "return min(self.size - taken, 10)"),
        (room, given, "return min(self.size - taken, 8)"),
        (room, "raise ValueError('text stays, as 7 does')", "pass"),
    }


def test_each_change_is_made_to_the_source_as_it_was() -> None:
    for mutant, changed in mutants("queue.py", SOURCE):
        compile(changed, "queue.py", "exec")
        assert mutant.after in changed
        assert changed != SOURCE
    assert len({changed for _, changed in mutants("queue.py", SOURCE)}) == len(changes(SOURCE))


def test_the_changes_that_alter_nothing_can_still_be_made_and_have_reasons() -> None:
    rows = [json.loads(line) for line in EQUIVALENTS.read_text(encoding="utf-8").splitlines()]
    modules = {row["module"] for row in rows}
    found = {module: {mutant.key for mutant, _ in mutants(module, (ROOT / module).read_text())} for module in modules}
    for row in rows:
        assert (row["module"], row["place"], row["before"], row["after"]) in found[row["module"]], row
        assert row["reason"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_it_tells_the_changes_that_no_test_sees(tmp_path: Path) -> None:
    """A test of `low` cannot see another limit of noise."""
    module, wanted = "runtime/medusa_runtime/drafting/rounds.py", {("low", "return None"), ("Rounds", "max_noise: float = 1.0")}
    found = [
        mutant.row() for mutant, _ in mutants(module, (ROOT / module).read_text()) if (mutant.place, mutant.after) in wanted
    ]
    (tmp_path / "again.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    test = "tests/unit/test_measuring.py::test_the_timing_that_counts_is_one_that_a_quarter_of_the_rounds_reach"
    words = [module, "--tests", test, "--again", str(tmp_path / "again.jsonl")]
    done = subprocess.run([sys.executable, "scripts/mutate.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert [json.loads(line)["after"] for line in done.stdout.splitlines()] == ["max_noise: float = 1.0"], done.stderr
    assert done.stderr.splitlines()[-1].endswith("1 seen, 0 ended late, 1 survived")
    assert done.returncode == 1
