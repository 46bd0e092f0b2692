"""What a command's failure must look like."""

from __future__ import annotations

from click.testing import Result


def fails(result: Result, exit_code: int, message: str) -> None:
    """One line of ours, or Click's usage and one line; before it only what stages tell."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    *before, last = result.stderr.splitlines()
    assert last.startswith("Error: ")
    assert message in last
    assert [line for line in before if line and not line.startswith(("  ", "Usage: ", "Try "))] == []
