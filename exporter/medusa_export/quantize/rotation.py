"""Rotates a bundle's step graph before it is rounded, if that does not change what the model computes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from medusa_export.bundle.weights_file import total_bytes, write_weights
from medusa_export.passes.quantize.activation_probes import with_errors
from medusa_export.passes.quantize.rotate_stream import RotateStream
from medusa_export.passes.quantize.rotate_values import RotateValues
from medusa_export.progress import byte_stage, step_stage, told
from medusa_export.quantize.run_step import Array, run_step
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import STEP, Manifest, RotationFacts

MOST_DIFFERENCE = 1e-3  # of the range of an output's numbers; a wrong rotation changes them by their whole range
COMPARED = ("logits", "hidden")
COMPARED_TEXTS, COMPARED_TOKENS = 4, 128


class NotRotatedError(Exception):
    """The model cannot be rotated. The message says why."""


@dataclass(frozen=True)
class Rotated:
    """Graphs after the rotation, and what was measured on them."""

    graphs: dict[str, ir.Model]
    facts: RotationFacts
    errors: Mapping[str, float]  # see `with_errors`


def rotate(
    graphs: Mapping[str, ir.Model], bundle: Path, source: Manifest, texts: Sequence[Sequence[int]], place: Path
) -> Rotated:
    """Rotate the residual stream and the values of attention, and compare the result with the original in float32.

    Args:
        graphs: the bundle's portable graphs. They are not changed.
        bundle: its directory.
        source: its manifest.
        texts: token ids of texts on which both graphs are run.
        place: an empty directory for the rotated weights.

    Raises:
        NotRotatedError: something in the graph does not commute with a rotation, or the result is another one.
    """
    changed = {name: model.clone() for name, model in graphs.items()}
    step, stream, values = changed[STEP], RotateStream(), RotateValues()
    if not stream(step).modified:
        raise NotRotatedError(next(iter(stream.declined)))
    rotates_values = values(step).modified
    with byte_stage("rotate the weights", total_bytes(changed.values())) as advance:
        write_weights(changed.values(), place, advance)
    layout = CacheLayout.of(source.graphs[STEP])
    compared = [text[:COMPARED_TOKENS] for text in texts[:COMPARED_TEXTS]]
    with step_stage("compare the rotated graph with the original", 2 * len(compared)) as one_more:
        # one after the other, so that one graph at a time is in memory
        before = list(run_step(graphs[STEP], bundle, layout, told(compared, one_more), COMPARED))
        after = list(run_step(step, place, layout, told(compared, one_more), COMPARED))
        difference = max(map(_difference, itertools.chain(*before), itertools.chain(*after)))
    if not difference <= MOST_DIFFERENCE:
        raise NotRotatedError(f"in float32, the rotated graph differs by {difference:.1e} of an output's range")
    facts = RotationFacts(values=rotates_values, difference=difference)
    return Rotated(changed, facts, _errors(step, place, layout, texts))


def _difference(one: Array, other: Array) -> float:
    """The largest difference of two arrays, over the range of the first."""
    return float(np.abs(one - other).max() / max(np.ptp(one), np.finfo(np.float32).tiny))


def _errors(step: ir.Model, place: Path, layout: CacheLayout, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """The error of one term for each input of a linear layer, on average over all tokens; see `with_errors`."""
    probed = step.clone()
    probes = with_errors(probed)
    errors = np.zeros(len(probes))
    with step_stage("measure the rounding errors of activations", len(texts)) as one_more:
        measured = run_step(probed, place, layout, told(texts, one_more), list(probes.values()))
        for text, found in zip(texts, measured, strict=True):
            errors += np.array(found) * (len(text) / sum(map(len, texts)))
    return dict(zip(probes, errors.tolist(), strict=True))
