"""Plots, with the `plot` extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def training_curves(log: Path, target: Path) -> None:
    """Loss of each head over the steps, and the held-out accuracies, as a PNG.

    Args:
        log: a run's JSON lines.
        target: the PNG.
    """
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, held_out = figure.subplots(1, 2)
    offset = 0
    for name in dict.fromkeys(entry["stage"] for entry in entries):
        own = [entry for entry in entries if entry["stage"] == name]
        _lines(losses, [entry for entry in own if "head_losses" in entry], "head_losses", offset, f"{name}: ")
        _lines(held_out, [entry for entry in own if "held_out_top1" in entry], "held_out_top1", offset, "", marker="o")
        offset += max(entry["step"] for entry in own)
    losses.set(title="training loss", xlabel="step", ylabel="cross-entropy")
    held_out.set(title="held-out top-1 accuracy", xlabel="step")
    for axes in (losses, held_out):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(target, dpi=120)


def accuracy_curves(evaluation: dict[str, Any], target: Path) -> None:
    """Top-1 to top-10 accuracy of each head, and tokens per step over the tree's size, as a PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    accuracy, trees = figure.subplots(1, 2)
    for k, ranks in enumerate(evaluation["accuracy"]):
        top = [sum(ranks[: n + 1]) for n in range(len(ranks))]
        accuracy.plot(range(1, len(top) + 1), top, marker="o", label=f"head {k + 1}")
    accuracy.set(title="how often the right token is among a head's best", xlabel="best tokens", ylim=(0, 1))
    ordered = sorted(evaluation["trees"], key=lambda tree: tree["nodes"])
    nodes = [tree["nodes"] for tree in ordered]
    trees.plot(nodes, [tree["tokens_per_step"] for tree in ordered], marker="o", label="replayed")
    trees.plot(nodes, [tree["expected"] for tree in ordered], marker="x", label="if heads were independent")
    trees.set(title="tokens per step", xlabel="nodes of the tree", xscale="log")
    for axes in (accuracy, trees):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=120)


def _lines(axes: Any, entries: list[dict[str, Any]], field: str, offset: int, prefix: str, **style: Any) -> None:
    if not entries:
        return
    steps = [offset + entry["step"] for entry in entries]
    for k in range(len(entries[0][field])):
        axes.plot(steps, [entry[field][k] for entry in entries], label=f"{prefix}head {k + 1}", **style)
