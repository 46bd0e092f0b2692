"""Progress of long commands. It goes to stderr, so that stdout has only results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

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
LEAST_SECONDS = 0.5  # from which on a rate says something
Item = TypeVar("Item")


def note(text: str) -> None:
    """Print one line."""
    console.print(f"  {text}", markup=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line about a result, such as its statistics. Unlike a note, it is not indented."""
    console.print(text, markup=False, soft_wrap=True)


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
def waiting(name: str) -> Iterator[None]:
    """A spinner on a terminal while something of unknown length is done. Nothing is left of it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(name)
        yield


@contextmanager
def byte_stage(name: str, total: int, result: Callable[[], int] | None = None) -> Iterator[Callable[[int], None]]:
    """A stage measured in bytes. Yields a function that takes the number of bytes done since its last call.

    result: gives the bytes of what was made, if they are fewer than those that were done.
    """
    started = time.perf_counter()
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.advance(task, done)
    made = total if result is None else result()
    note(f"{name}: {made / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")


@contextmanager
def count_stage(name: str, total: int = 0, unit: str = "tokens") -> Iterator[Callable[..., None]]:
    """A stage of countable items, with the remaining time, and a rate once there is one.

    Yields a function that takes four numbers: items done, items that were done before this run, amount made in this run (in
    `unit`; 0 if it is not counted), and the total if `total` is 0. Time counts from its first call. A terminal shows a bar, a
    log gets a line a minute.
    """
    pace, last = Pace(), 0.0
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total or None, news="")

        def tell(done: int, before: int, made: int, whole: int = total) -> None:
            nonlocal last
            now = time.perf_counter()
            pace.count(now, done - before, made, whole)
            last = last or now
            parts = (pace.rate(unit), pace.left(whole - done))
            news = ", ".join(part for part in parts if part)
            bar.update(task, completed=done, total=whole or None, news=news)
            if not console.is_terminal and now - last > NEWS_SECONDS:
                last = now
                note(f"{name}: {done} of {whole}{', ' if news else ''}{news}")

        yield tell
    if pace.seconds is not None:
        note(f"{name}: {_duration(pace.seconds)}")


@contextmanager
def step_stage(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A stage of so many steps, with the remaining time. Yields a function to call after each step."""
    done = 0
    with count_stage(name, total) as tell:
        tell(0, 0, 0)

        def one_more() -> None:
            nonlocal done
            done += 1
            tell(done, 0, 0)

        yield one_more


def told(items: Iterable[Item], one_more: Callable[[], None]) -> Iterator[Item]:
    """The items, with a report after each of them is done with."""
    for item in items:
        yield item
        one_more()


class Pace:
    """How fast the items of a stage are done, from its first report on. What the first report counts took unknown time.

    If another part of the stage begins, with another total, the pace is measured anew.
    """

    def __init__(self) -> None:
        self._begun: float | None = None  # when the first report of all came
        self._first: tuple[float, int, int, int] | None = None  # time, items, amount and total of this part's first report
        self._last = (0.0, 0, 0)

    def count(self, now: float, done: int, made: int, total: int) -> None:
        """Take a report: the time, items done and amount made in this run, and the total."""
        if self._first is None or self._first[3] != total or done < self._last[1]:
            self._first = (now, done, made, total)
        self._begun = now if self._begun is None else self._begun
        self._last = (now, done, made)

    @property
    def seconds(self) -> float | None:
        """The time between the first and the last report; None if there was none."""
        return None if self._begun is None else self._last[0] - self._begun

    def rate(self, unit: str) -> str:
        """The amount made a second, in words; empty until enough time has passed to tell."""
        assert self._first is not None
        seconds, made = self._last[0] - self._first[0], self._last[2] - self._first[2]
        if made <= 0 or seconds < LEAST_SECONDS:
            return ""
        rate = made / seconds
        return f"{rate:.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"

    def left(self, items: int) -> str:
        """The time that so many more items take, in words; empty until it can be told."""
        assert self._first is not None
        seconds, done = self._last[0] - self._first[0], self._last[1] - self._first[1]
        if done <= 0 or seconds < LEAST_SECONDS:
            return ""
        return f"{_duration(seconds * items / done)} left"


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
