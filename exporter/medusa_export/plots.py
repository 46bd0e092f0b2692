"""Plots. They need the extra `plot`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from medusa_runtime.drafting.tree import CandidateTree


def training_curves(log: Path, target: Path) -> None:
    """Plot each head's loss and held-out accuracy over the steps, as a PNG.

    Args:
        log: a training run's log, in JSON lines.
        target: the PNG file.
    """
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
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
    """Plot each head's top-1 to top-10 accuracy, and tokens per step over the tree size, as a PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    accuracy, trees = figure.subplots(1, 2)
    for k, ranks in enumerate(evaluation["accuracy"]):
        top = [sum(ranks[: n + 1]) for n in range(len(ranks))]
        accuracy.plot(range(1, len(top) + 1), top, marker="o", label=f"head {k + 1}")
    accuracy.set(title="how often the right token is among a head's top k", xlabel="k", ylim=(0, 1))
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


def tree_drawing(tree: CandidateTree, chances: Sequence[float] | None, target: Path) -> None:
    """Draw a candidate tree with each node's path of ranks and acceptance probability, as a PNG or SVG by the target's name.

    Args:
        tree: the tree, drawn with the root on top.
        chances: acceptance probability of each node, or None if unknown. [N]
        target: the PNG or SVG file.
    """
    places = _tree_layout(tree)  # [N, 2]
    width = places[:, 0].max() + 1
    figure = Figure(figsize=(max(5.5, 0.55 * width), 1.2 + 1.1 * tree.depth), layout="constrained")
    axes = figure.subplots()
    for node, parent in enumerate(tree.parents):
        if node:
            axes.plot(*places[[parent, node]].T, color="0.7", linewidth=1, zorder=1)
    shades = [1.0] * tree.num_nodes if chances is None else list(chances)
    axes.scatter(places[:, 0], places[:, 1], s=420, c=shades, cmap="Blues", vmin=0, vmax=1.3, edgecolors="0.4", zorder=2)
    for node, (x, y) in enumerate(places):
        text = str(tree.ranks[node]) if node else "root"
        axes.text(
            x, y, text if chances is None or not node else f"{text}\n{chances[node]:.3f}", fontsize=6, ha="center", va="center"
        )
    axes.set(
        title=f"{tree.num_nodes} nodes: ranks{', and acceptance probability' if chances is not None else ''}",
        yticks=-np.arange(tree.depth + 1),
    )
    axes.set_yticklabels(["root", *(f"head {head}" for head in range(1, tree.depth + 1))])
    axes.set_xticks([])
    axes.margins(0.08)
    figure.savefig(target, dpi=150)


def _tree_layout(tree: CandidateTree) -> npt.NDArray[np.float64]:
    """The nodes' coordinates: leaves next to each other, each inner node above the middle of its children. [N, 2]"""
    children: dict[int, list[int]] = {node: [] for node in range(tree.num_nodes)}
    for node in sorted(range(1, tree.num_nodes), key=lambda node: tree.ranks[node]):
        children[tree.parents[node]].append(node)
    places = np.zeros((tree.num_nodes, 2))
    next_leaf = itertools.count()

    def put(node: int) -> None:
        for child in children[node]:
            put(child)
        below = places[children[node], 0]
        places[node] = (below.mean() if len(below) else next(next_leaf)), -tree.depths[node]

    put(0)
    return places


def benchmark(result: dict[str, Any], directory: Path) -> None:
    """Plot the results of `medusa-export bench` as PNGs: tokens per second, and times of steps, contexts and prompts."""
    directory.mkdir(exist_ok=True)
    _rates(result["contestants"], directory / "tokens_per_second.png")
    if "steps" in result:
        costs = {name: found["step_ms"] for name, found in result["steps"]["by_bundle"].items()}
        _costs(costs, "time of a step", "tokens in the step", directory / "step_cost.png")
    if "context" in result:
        costs = {
            f"{name}, T={width}, {kind}": {length: by_width[str(width)] for length, by_width in found.items()}
            for kind in ("used", "unused")
            for name, found in result["context"][kind].items()
            for width in result["context"]["widths"]
        }
        _costs(costs, "time of a step", "tokens of context, used or not", directory / "context.png")
    if "lengths" in result:
        _costs(result["lengths"]["first_token_ms"], "time to first token", "tokens of the prompt", directory / "prefill.png")


def _rates(contestants: list[dict[str, Any]], target: Path) -> None:
    ordered = sorted((one for one in contestants if one["tokens_per_second"]), key=lambda one: one["tokens_per_second"])
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    rates = [one["tokens_per_second"] for one in ordered]
    spread = [
        [abs(rate - one[f"tokens_per_second_{end}"]) for rate, one in zip(rates, ordered, strict=True)]
        for end in ("p10", "p90")
    ]
    colours = ["tab:blue" if one["kind"] == "own" else "tab:grey" for one in ordered]
    axes.barh([one["name"] for one in ordered], rates, xerr=spread, color=colours, ecolor="0.3")
    axes.set(title="decoding: median over prompts, 10th to 90th percentile", xlabel="tokens per second")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(target, dpi=120)


def _costs(costs: dict[str, dict[str, float]], title: str, label: str, target: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, found in costs.items():
        axes.plot([int(size) for size in found], list(found.values()), marker="o", label=name)
    axes.set(title=title, xlabel=label, ylabel="ms", ylim=(0, None))
    sizes = sorted({int(size) for found in costs.values() for size in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)
