"""Runs a recipe: each step once, in order. A step is repeated only if its settings or its inputs have changed."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from medusa_export.errors import ValidationMismatchError
from medusa_export.progress import console, note
from medusa_export.provenance import provenance
from medusa_export.recipe.recipe_state import RunState, StepRecord, opened
from medusa_export.recipe.schema import STEPS
from medusa_export.recipe.steps import Job, Step, require_model, steps
from medusa_runtime.errors import OptionError


@dataclass(frozen=True)
class Choice:
    """Which steps of a recipe to run, and whether to repeat the ones that are done."""

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
    """Run a recipe, or continue an interrupted run. Returns the output directory.

    Raises:
        OptionError: the recipe has no such step, or an option of a step cannot be used.
        ValidationMismatchError: the bundle's output differs from PyTorch's.
        MedusaError: a step failed. The steps before it count as done.
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
                gc.collect()  # models are reference cycles; the next step needs their memory
        except ValidationMismatchError:
            _summarise(outcomes)
            raise
    _summarise(outcomes)
    return job.output


def _do(step: Step, state: RunState, output: Path, *, force: bool) -> _Outcome:
    before = state.steps.get(step.name)
    changes = step.changes(before) if before else {}
    if before and not changes and not force and Path(step.output).exists():
        note("already done")
        return _Outcome(step, before.seconds, is_new=False)
    if changes:
        note(f"done again, because {'; '.join(changes.values())}")
    if changes or force:  # with force also an interrupted step: its files may belong to other settings
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
        seconds = f"{outcome.seconds:.1f}" if outcome.is_new else f"({outcome.seconds:.1f} earlier)"
        table.add_row(outcome.step.name, seconds, outcome.step.told())
    console.print(table)
