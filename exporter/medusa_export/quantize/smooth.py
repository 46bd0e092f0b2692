"""Moving the outliers of activations into the weights, where they cost less (SmoothQuant, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.graph.values import shape_of
from medusa_export.quantize.weights import Linear, linears

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Junction:
    """An activation that products alone read, and the weight before it that can take over a scale for each channel."""

    activation: ir.Value  # [.., K]
    source: ir.Value  # a norm's weight [K], or a projection's, whose outputs are the channels
    source_axis: int  # which axis of the source the channels lie along
    readers: tuple[Linear, ...]


def junctions(model: ir.Model) -> list[Junction]:
    """Where a step graph can be smoothed: after norms, and before the product that follows a gated activation."""
    by_input: dict[ir.Value, list[Linear]] = {}
    for linear in linears(model):
        assert linear.node.inputs[0] is not None
        by_input.setdefault(linear.node.inputs[0], []).append(linear)
    found = []
    for activation, readers in by_input.items():
        own = [reader for reader in readers if _reads_alone(reader)]  # nobody else would see the change
        if activation.is_graph_output() or len(own) < len(activation.uses()):
            continue
        if (source := _source(activation)) is not None and len(source[0].uses()) == 1:
            found.append(Junction(activation, *source, tuple(own)))
    return found


def _reads_alone(reader: Linear) -> bool:
    stored = reader.node.inputs[1]  # the weight, or what it is transposed to
    return stored is not None and len(stored.uses()) == len(reader.weight.uses()) == 1


def _source(activation: ir.Value) -> tuple[ir.Value, int] | None:
    node = activation.producer()
    if node is None:
        return None
    if node.op_type == "RMSNormalization" and (gain := node.inputs[1]) is not None and gain.const_value is not None:
        return gain, 0
    if node.op_type == "Mul":  # the gate's activation times what is gated: the second is linear
        for value in node.inputs:
            product = None if value is None else value.producer()
            if product is None or value is None or len(value.uses()) != 1 or value.is_graph_output():
                continue
            if product.op_type == "MatMul":
                weight = product.inputs[1]
                if weight is not None and weight.is_initializer() and weight.const_value is not None:
                    return weight, 1
    return None


def with_maxima(model: ir.Model, found: Iterable[Junction]) -> list[str]:
    """Add an output with each junction's largest magnitude a channel. Returns their names, in order; each is [K]."""
    names = []
    for index, junction in enumerate(found):
        tape = ir.tape.Tape()
        axes = tape.op("Constant", [], {"value": ir.tensor(np.array([0, 1], np.int64))})
        largest = tape.op("ReduceMax", [tape.op("Abs", [junction.activation]), axes], {"keepdims": 0})
        largest.name, largest.type = f"largest.{index}", ir.TensorType(ir.DataType.FLOAT)
        channels = junction.activation.shape[-1] if junction.activation.shape is not None else None
        largest.shape = ir.Shape([channels])
        model.graph.extend(tape.nodes)
        model.graph.outputs.append(largest)
        names.append(largest.name)
    return names


class Smooth(ir.passes.InPlacePass):
    """Divide the channels of activations by scales that the weights after them are multiplied by.

    Needs: the largest magnitudes of the channels of each junction, by its activation's name. Leaves: a graph that computes the
    same but for rounding, whose activations and weights spread alike: ``scale = activation^a / weight^(1 - a)`` with a 0.5.

    Args:
        maxima: name → [K].
        strength: a; 0 leaves all outliers in the activations, 1 moves them to the weights altogether.
    """

    def __init__(self, maxima: Mapping[str, Vector], strength: float = 0.5) -> None:
        super().__init__()
        self.maxima, self.strength = maxima, strength

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for junction in junctions(model):
            largest = self.maxima.get(junction.activation.name or "")
            if largest is None:
                continue
            scale = self._scale(largest, junction.readers)
            _multiply(junction.source, np.float32(1) / scale, junction.source_axis)
            for reader in junction.readers:
                _multiply(reader.weight, scale, 1 if reader.transposed else 0)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _scale(self, largest: Vector, readers: tuple[Linear, ...]) -> Vector:
        heaviest = np.zeros_like(largest)
        for reader in readers:
            assert reader.weight.const_value is not None
            weight = np.abs(reader.weight.const_value.numpy())
            heaviest = np.maximum(heaviest, weight.max(0 if reader.transposed else 1))
        floor = np.float32(1e-5)
        scale = np.maximum(largest, floor) ** self.strength / np.maximum(heaviest, floor) ** (1 - self.strength)
        return np.clip(scale, 1e-3, 1e3).astype(np.float32)


def _multiply(weight: ir.Value, scale: Vector, axis: int) -> None:
    """Multiply an initializer along an axis, when it is written."""
    tensor = weight.const_value
    assert tensor is not None

    def evaluate() -> ir.TensorProtocol:
        array = tensor.numpy()
        return ir.tensor(array * (scale if array.ndim == 1 or axis == 1 else scale[:, None]), name=weight.name)

    weight.const_value = ir.LazyTensor(
        evaluate, dtype=tensor.dtype, shape=shape_of(tensor), name=weight.name or "", cache=False
    )
