"""Prints the result of `medusa-export tune`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from medusa_export.measure.tune.check import TOLERANCE
from medusa_runtime.drafting.tuning import DeviceTuning, Measurement, TunedBatch


def show(device: str, found: DeviceTuning, console: Console) -> None:
    """Print trees and predictions as a table, then one line for the machine, one for each check, and one for prompt lookup."""
    console.print(f"{device}; acceptance from {found.acceptance_from}", markup=False, soft_wrap=True)
    table = Table("batch", "tree", "nodes", "tokens/step", "ms", "tokens/s", "plain", "ratio", title="predicted")
    for batch in found.batches:
        for kind in ("static", "dynamic"):
            tree = getattr(batch, kind)
            table.add_row(
                str(batch.batch_size),
                f"{kind}{' *' if batch.best == kind else ''}",
                f"{tree.nodes}" if tree.nodes_per_step == tree.nodes else f"{tree.nodes} ({tree.nodes_per_step:.1f})",
                f"{tree.tokens_per_step:.2f}",
                f"{1e3 * tree.step_seconds:.1f}",
                f"{tree.tokens_per_second:.1f}",
                f"{batch.plain.tokens_per_second:.1f}",
                f"{tree.tokens_per_second / batch.plain.tokens_per_second:.2f}",
            )
    console.print(table)
    console.print(
        "*: best for its batch size; nodes in brackets: average verified; ms: time of a step; plain: tokens/s without Medusa",
        soft_wrap=True,
    )
    if found.measurement is not None:
        console.print(machine(found.measurement), markup=False, soft_wrap=True)
    for batch in found.batches:
        console.print(checked(batch), markup=False, soft_wrap=True)
    console.print(looked_up(found), markup=False, soft_wrap=True)


def machine(measurement: Measurement) -> str:
    """How noisy the machine was, in one line."""
    took = f"steps took {measurement.noise:.0%} longer in the median than in the fastest quarter of {measurement.rounds} rounds"
    if measurement.other_cores is not None:
        took += f"; other programs used {measurement.other_cores:.1f} cores"
    if measurement.is_quiet:
        return f"machine: quiet; {took}"
    return f"machine: BUSY; {took}. Trees are better if nothing else runs on the machine during tuning"


def checked(batch: TunedBatch) -> str:
    """The measured speed compared with the prediction, in one line."""
    check, name = batch.check, f"batch {batch.batch_size}, {batch.best}"
    if check is None:
        return f"{name}: NOT CHECKED, since the answers are too short to fill the batch; give prompts with longer answers"
    measured, plain = check.measured_tokens_per_second, check.plain_measured_tokens_per_second
    often = f" (steps as in the fastest quarter of {check.rounds} rounds)" if check.rounds > 1 else ""
    predicted = f"predicted {check.predicted_tokens_per_second:.1f}"
    if check.same_prompts:
        line = f"{name}: measured {measured:.1f} tokens/s{often}, {predicted} for the same prompts ({check.error:+.0%})"
        line += f"; plain measured {plain:.1f}, ratio {measured / plain:.2f}"
    else:
        line = f"{name}: measured {measured:.1f} tokens/s{often}, {predicted} for the evaluation's prompts, which are others"
        line += f"; plain measured {plain:.1f}, predicted {check.plain_predicted_tokens_per_second:.1f} ({check.error:+.0%})"
        line += f", ratio {measured / plain:.2f}"
    if not batch.as_predicted:
        line += f"; NOT AS PREDICTED: more than {TOLERANCE:.0%} off"
    return line


def looked_up(found: DeviceTuning) -> str:
    """Whether prompt lookup is used, and the measurement behind it, in one line."""
    check = found.lookup_check
    if check is None:
        return "prompt lookup: off, NOT MEASURED, since the answers are too short"
    return (
        f"prompt lookup: {'on' if found.prompt_lookup else 'off'}; measured {check.tokens_per_second:.1f} tokens/s with it, "
        f"{check.tokens_per_second_without:.1f} without, ratio {check.ratio:.2f} (over {check.prompts} prompts)"
    )
