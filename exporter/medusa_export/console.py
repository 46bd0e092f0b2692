"""Consoles for tables and text, made with Rich."""

from __future__ import annotations

from rich.console import Console as RichConsole


class Console(RichConsole):
    """A console that leaves a broken pipe to the command line. Rich itself would end the program with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Raise the `BrokenPipeError` that is being handled."""
        raise  # noqa: PLE0704 - Rich calls this while it handles the error


def stdout_console() -> Console:
    """A console for results, on stdout."""
    return Console(highlight=False)
