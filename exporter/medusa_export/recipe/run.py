"""A recipe's run: each step once, in order, and again only where its settings or what it reads have changed."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from medusa_export.errors import ValidationMismatchError
from medusa_export.progress import console, note
from medusa_export.provenance import provenance
from medusa_export.recipe.schema import STEPS
from medusa_export.recipe.state import RunState, StepRecord, opened
from medusa_export.recipe.steps import Job, Step, require_model, steps
from medusa_runtime.errors import OptionError


@dataclass(frozen=True)
class Choice:
    """Which steps of a recipe to run, and whether to run those again that are done."""

    first: str | None = None
    last: str | None = None
    force: bool = False

    def of(self, there: list[Step]) -> list[Step]:
        """The steps to run.

        Raises:
            OptionError: the recipe has no such step, or the first comes after the last.
        """
        names = [step.name for step in there]
        for name in (self.first, self.last):
            if name is not None and name not in names:
                raise OptionError(f"the recipe has no step {name}; it has: {', '.join(names)}")
        first, last = names.index(self.first or names[0]), names.index(self.last or names[-1])
        if first > last:
            raise OptionError(f"--from {self.first} comes after --to {self.last}; the order is {', '.join(STEPS)}")
        return there[first : last + 1]


@dataclass(frozen=True)
class _Outcome:
    step: Step
    seconds: float
    is_new: bool


def run_recipe(job: Job, choice: Choice) -> Path:
    """Run a recipe, or go on running it. Returns its output directory.

    Raises:
        OptionError: a step is not there, or an option of one cannot be used.
        ValidationMismatchError: the bundle's output differs from PyTorch's.
        MedusaError: a step failed; the steps before it stay done.
    """
    chosen = choice.of(steps(job))
    if chosen[0].name != "fetch":
        require_model(job)
    outcomes: list[_Outcome] = []
    with opened(job.output, job.recipe.name) as state:
        try:
            for number, step in enumerate(chosen, start=1):
                console.print(f"[bold]{step.name}[/bold] ({number} of {len(chosen)})")
                outcomes.append(_do(step, state, job.output, force=choice.force))
                gc.collect()  # models refer to themselves; the next step needs the memory
        except ValidationMismatchError:
            _summarise(outcomes)
            raise
    _summarise(outcomes)
    return job.output


def _do(step: Step, state: RunState, output: Path, *, force: bool) -> _Outcome:
    before = state.steps.get(step.name)
    changes = step.changes(before) if before else {}
    if before and not changes and not force and Path(step.output).exists():
        note("done before")
        return _Outcome(step, before.seconds, is_new=False)
    if changes:
        note(f"again, since {'; '.join(changes.values())}")
    if changes or force:  # forced, also one that was interrupted: it may be bound to other settings
        step.start_over(set(changes))
    if before:
        del state.steps[step.name]
        state.save(output)
    started = time.perf_counter()
    inputs = step.fingerprints()
    step.run()
    seconds = time.perf_counter() - started
    state.steps[step.name] = StepRecord(
        settings=step.settings, inputs=inputs, seconds=round(seconds, 1), provenance=provenance()
    )
    state.save(output)
    return _Outcome(step, seconds, is_new=True)


def _summarise(outcomes: list[_Outcome]) -> None:
    table = Table("step", "seconds", "result")
    for outcome in outcomes:
        seconds = f"{outcome.seconds:.1f}" if outcome.is_new else f"({outcome.seconds:.1f} before)"
        table.add_row(outcome.step.name, seconds, outcome.step.told())
    console.print(table)
