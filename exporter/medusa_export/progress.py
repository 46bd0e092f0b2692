"""What a long command tells while it works: on stderr, so that stdout stays for results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One line that stays."""
    console.print(f"  {text}", markup=False, soft_wrap=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A stage of unknown length: a spinner on a terminal, and a line with its seconds once it is done."""
    started = time.perf_counter()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        bar.add_task(name)
        yield
    note(f"{name}: {time.perf_counter() - started:.1f} s")


@contextmanager
def byte_stage(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A stage measured in bytes. Yields a function that is told how many more are done."""
    started = time.perf_counter()
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.advance(task, done)
    note(f"{name}: {total / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")
