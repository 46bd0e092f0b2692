"""Rounds a step graph's weights such that its products change least on texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.linears import Linear, linears
from medusa_export.passes.common.rounding import BLOCK_SIZE
from medusa_export.passes.quantize.activation_probes import with_moments
from medusa_export.passes.quantize.error_feedback import ErrorFeedback
from medusa_export.passes.quantize.given_codes import Array, GivenCodes
from medusa_export.passes.quantize.integer_weights import Rounded, Storage, block_size, offsets
from medusa_export.progress import step_stage, told
from medusa_export.quantize.run_step import run_step
from medusa_runtime.bundle.cache_layout import CacheLayout

Number = TypeVar("Number", bound=np.generic)
MOMENT_BYTES = 1 << 30  # of the second moments that are in memory at a time; the texts are read once for each such part
STAGE = "round the weights by what they are multiplied with"


@dataclass(frozen=True)
class RoundedWeights:
    """Codes of a graph's weights, by weight."""

    channels: dict[str, Rounded] = field(default_factory=dict)  # with one scale per output, in the weights' own layout
    blocks: dict[str, GivenCodes] = field(default_factory=dict)  # with one scale per output and block of inputs


def round_weights(
    model: ir.Model,
    weights: Path,
    layout: CacheLayout,
    texts: Sequence[Sequence[int]],
    place: Path,
    storage: Callable[[str], Storage],
    shared: frozenset[int] = frozenset(),
    done: frozenset[str] = frozenset(),
) -> RoundedWeights:
    """Codes and scales of the weights of linear layers. They lie on the disk.

    Weights that other nodes or graphs read as well, such as a tied embedding, are left out.

    Args:
        model: a portable float32 step graph. It is not changed.
        weights: the directory of its weights file.
        layout: its cache.
        texts: token ids of texts to run it on.
        place: a directory for the codes.
        storage: how each weight is stored, by its name.
        shared: where weights lie that another graph reads too (`stored_in`): they have to be rounded alike to be stored once.
        done: names of weights that are left out, too, since their codes are known.
    """
    found = RoundedWeights()
    groups = list(_groups(_by_input(model.graph, shared, done)))
    num_weights = sum(len(layers) for group in groups for layers in group.values())
    with step_stage(STAGE, len(groups) * len(texts) + num_weights) as one_more:
        for group in groups:
            for name, moments in _moments(model, weights, layout, told(texts, one_more), list(group)).items():
                feedback = ErrorFeedback(moments)
                for linear in group[name]:
                    _round(linear, feedback, storage(linear.weight.name or ""), place, found)
                    one_more()
    return found


def stored_in(model: ir.Model) -> frozenset[int]:
    """Where a graph's weights lie, as offsets in the weights file."""
    return frozenset(offset for weight in model.graph.initializers.values() for offset in offsets(weight))


def _by_input(graph: ir.Graph, shared: frozenset[int], done: frozenset[str]) -> dict[str, list[Linear]]:
    """The linear layers that can be rounded, by the input that they share."""
    found: dict[str, list[Linear]] = {}
    for linear in linears(graph):
        if linear.reads_alone and linear.weight.name not in done and shared.isdisjoint(offsets(linear.weight)):
            assert linear.node.inputs[0] is not None
            found.setdefault(linear.node.inputs[0].name or "", []).append(linear)
    return found


def _groups(by_input: dict[str, list[Linear]]) -> Iterator[dict[str, list[Linear]]]:
    """Parts of the inputs whose moments fit in memory together."""
    group: dict[str, list[Linear]] = {}
    used = 0
    for name, layers in by_input.items():
        size = 4 * layers[0].num_inputs ** 2
        if group and used + size > MOMENT_BYTES:
            yield group
            group, used = {}, 0
        group[name] = layers
        used += size
    if group:
        yield group


def _moments(
    model: ir.Model, weights: Path, layout: CacheLayout, texts: Iterable[Sequence[int]], inputs: list[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """Second moments [K, K] of the inputs, summed over all tokens of the texts."""
    probed = model.clone()
    probes = with_moments(probed, inputs)
    total: list[npt.NDArray[np.float32]] = []
    for measured in run_step(probed, weights, layout, texts, list(probes.values())):
        total = [one + other for one, other in zip(total, measured, strict=True)] if total else measured
    return dict(zip(probes, total, strict=True))


def _round(linear: Linear, feedback: ErrorFeedback, storage: Storage, place: Path, found: RoundedWeights) -> None:
    """Round one weight, and add it to those that were found."""
    name, weight = linear.weight.name or "", linear.numbers()
    stem = f"codes.{len(found.channels) + len(found.blocks)}"
    if storage == "int8" or linear.num_inputs % BLOCK_SIZE:
        codes, scales = feedback.to_int8(weight)
        own = np.ascontiguousarray(codes.T if linear.transposed else codes)
        found.channels[name] = (_on_disk(own, place / f"{stem}.npy"), scales)
    else:
        bits, size = 4 if storage == "int4" else 8, block_size(storage, linear.num_inputs)
        parts: Sequence[Array] = feedback.to_uint4(weight) if bits == 4 else feedback.to_int8_blocks(weight, size)
        kept = [_on_disk(part, place / f"{stem}.{number}.npy") for number, part in enumerate(parts)]
        found.blocks[name] = GivenCodes(bits, size, partial(tuple, kept))


def _on_disk(array: npt.NDArray[Number], path: Path) -> npt.NDArray[Number]:
    """The same array, in a file."""
    np.save(path, array)
    kept: npt.NDArray[Number] = np.load(path, mmap_mode="r")
    return kept
