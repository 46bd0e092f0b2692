"""Tables and lines for people, by Rich."""

from __future__ import annotations

from rich.console import Console as RichConsole


class Console(RichConsole):
    """A console that leaves it to the command line what a closed pipe means: Rich would end the program with 1."""

    def on_broken_pipe(self) -> None:
        """Raise the `BrokenPipeError` that is being handled."""
        raise  # noqa: PLE0704 - Rich calls this where it handles the error


def stdout_console() -> Console:
    """A console for results, on stdout."""
    return Console(highlight=False)
