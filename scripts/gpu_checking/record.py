"""The report of a check: entries inside entries. It is written before and after each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import click
from gpu_checking.budget import Budget, Failed, OutOfTime

BROKEN = (OSError, ValueError, KeyError)  # raised if a command's output has not the expected form
LEAST = 10.0  # seconds: with less left, nothing is begun
Facts = dict[str, Any]


@dataclass
class Outcome:
    """What became of the check so far. Entries are named as rtx/fp16/build."""

    running: str | None = None
    failed: list[str] = field(default_factory=list)
    out_of_time: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A part of the report, or a step of a part.

    An entry that fails has `failed`, with the reason; one that had too little time has `out_of_time`; one that cannot run on
    this machine has `left_out`.
    """

    facts: Facts
    budget: Budget
    write: Callable[[], object]
    outcome: Outcome = field(default_factory=Outcome)
    path: tuple[str, ...] = ()

    def do(self, name: str, action: Callable[[Entry], object]) -> bool:
        """Make an entry by an action. Returns whether the action came to its end. Its own failure is recorded, not raised."""
        found: Facts = {}
        self.facts[name] = found
        inner = replace(self, facts=found, path=(*self.path, name))
        place = "/".join(inner.path)
        left, started = self.budget.left(), self.budget.now()
        if left < LEAST:
            found["out_of_time"] = f"not begun: {left:.0f} s are left"
            self.outcome.out_of_time.append(place)
            self.write()
            return False
        self.outcome.running = place
        self.write()
        click.echo(f"== {place} ({left:.0f} s are left)", err=True)
        try:
            action(inner)
        except OutOfTime as error:
            found["out_of_time"] = str(error)
            self.outcome.out_of_time.append(place)
        except (Failed, *BROKEN) as error:
            found["failed"] = str(error) or type(error).__name__
            self.outcome.failed.append(place)
            click.echo(f"   failed: {found['failed'].splitlines()[-1]}", err=True)
        found["seconds"] = round(self.budget.now() - started, 1)
        self.outcome.running = "/".join(self.path) or None
        self.write()
        return not {"failed", "out_of_time"} & found.keys()

    def leave_out(self, name: str, why: str) -> None:
        """Note why an entry cannot be made on this machine."""
        self.facts[name] = {"left_out": why}
        self.write()
