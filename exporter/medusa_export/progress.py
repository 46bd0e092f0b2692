"""Progress of long commands. It goes to stderr, so that stdout has only results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from medusa_export.console import Console

console = Console(stderr=True, highlight=False)
NEWS_SECONDS = 60  # between two lines of progress if stderr is not a terminal


def note(text: str) -> None:
    """Print one line."""
    console.print(f"  {text}", markup=False, soft_wrap=True)


@contextmanager
def stage(name: str) -> Iterator[Callable[[str], None]]:
    """A stage of unknown length: a spinner on a terminal, and a line with its duration at the end.

    Yields a function that reports the current step of the stage. A terminal shows each report, a log gets a line a minute.
    """
    started = last = time.perf_counter()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(name)

        def tell(what: str) -> None:
            nonlocal last
            bar.update(task, description=f"{name}: {what}")
            if not console.is_terminal and time.perf_counter() - last > NEWS_SECONDS:
                last = time.perf_counter()
                note(f"{name}: {what}")

        yield tell
    note(f"{name}: {time.perf_counter() - started:.1f} s")


@contextmanager
def byte_stage(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A stage measured in bytes. Yields a function that takes the number of bytes done since its last call."""
    started = time.perf_counter()
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.advance(task, done)
    note(f"{name}: {total / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")


@contextmanager
def count_stage(name: str, total: int = 0, unit: str = "tokens") -> Iterator[Callable[..., None]]:
    """A stage of countable items, with a rate and the remaining time.

    Yields a function that takes four numbers: items done, items that were done before this run, amount made in this run (in
    `unit`; 0 if it is not counted), and the total if `total` is 0. A terminal shows a bar, a log gets a line a minute.
    """
    started = last = ended = 0.0
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[news]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, news="")

        def tell(done: int, before: int, made: int, whole: int = total) -> None:
            nonlocal started, last, ended
            ended = now = time.perf_counter()
            started, last = started or now, last or now
            seconds, new = max(1e-9, now - started), done - before
            rate = f"{made / seconds:.0f} {unit}/s, " if made else ""
            news = f"{rate}{_duration(seconds * (whole - done) / new) if new else '?'} left"
            bar.update(task, completed=done, total=whole, news=news)
            if not console.is_terminal and now - last > NEWS_SECONDS:
                last = now
                note(f"{name}: {done} of {whole}, {news}")

        yield tell
    if started:
        note(f"{name}: {_duration(ended - started)}")


@contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Print nothing, for processes other than the main one."""
    before, console.quiet = console.quiet, silent
    try:
        yield
    finally:
        console.quiet = before


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
