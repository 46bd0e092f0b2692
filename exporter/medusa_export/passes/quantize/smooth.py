"""Moves outliers of activations into the weights, where they cause less error (SmoothQuant, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.linears import Linear, linears
from medusa_export.passes.common.values import shape_of

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Junction:
    """An activation that only MatMuls read, and the weight before it that can absorb one scale per channel."""

    activation: ir.Value  # [.., K]
    source: ir.Value  # a norm's weight [K], or the weight of the projection that computes the channels
    source_axis: int  # the axis of the source along which the channels lie
    readers: tuple[Linear, ...]


def junctions(model: ir.Model) -> list[Junction]:
    """The activations of a step graph that can be smoothed: outputs of norms, and of gated activations before a MatMul."""
    by_input: dict[ir.Value, list[Linear]] = {}
    for linear in linears(model.graph):
        assert linear.node.inputs[0] is not None
        by_input.setdefault(linear.node.inputs[0], []).append(linear)
    found = []
    for activation, readers in by_input.items():
        own = [reader for reader in readers if reader.reads_alone]  # no other reader sees the change
        if activation.is_graph_output() or len(own) < len(activation.uses()):
            continue
        if (source := _source(activation)) is not None and len(source[0].uses()) == 1:
            found.append(Junction(activation, *source, tuple(own)))
    return found


def _source(activation: ir.Value) -> tuple[ir.Value, int] | None:
    node = activation.producer()
    if node is None:
        return None
    if node.op_type == "RMSNormalization" and (gain := node.inputs[1]) is not None and gain.const_value is not None:
        return gain, 0
    if node.op_type == "Mul":  # activation(gate) times up projection: the second is linear
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
    """Add an output [K] with each junction's largest magnitude per channel. Returns the outputs' names, in order."""
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


class Smooth(GraphPass):
    """Divide each channel of an activation by a scale, and multiply the weights after it by the same scale.

    Needs: the largest magnitude of each channel of each junction, by its activation's name.
    Result: the same graph except for rounding, with ``scale = activation^a / weight^(1 - a)``. With a = 0.5, activations and
    weights have channels of similar size.

    Args:
        maxima: name → [K].
        strength: a; 0 leaves all outliers in the activations, 1 moves them completely into the weights.
    """

    def __init__(self, maxima: Mapping[str, Vector], strength: float = 0.5) -> None:
        super().__init__()
        self.maxima, self.strength = maxima, strength

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        matched = 0
        for junction in junctions(model):
            largest = self.maxima.get(junction.activation.name or "")
            if largest is None:
                self.decline("an activation that was not measured")
                continue
            scale = self._scale(largest, junction.readers)
            _multiply(junction.source, np.float32(1) / scale, junction.source_axis)
            for reader in junction.readers:
                _multiply(reader.weight, scale, reader.input_axis)
            matched += 1
        return matched

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
    """Multiply an initializer by a scale along an axis. The product is computed when it is written."""
    tensor = weight.const_value
    assert tensor is not None

    def evaluate() -> ir.TensorProtocol:
        array = tensor.numpy()
        return ir.tensor(array * (scale if array.ndim == 1 or axis == 1 else scale[:, None]), name=weight.name)

    weight.const_value = ir.LazyTensor(
        evaluate, dtype=tensor.dtype, shape=shape_of(tensor), name=weight.name or "", cache=False
    )
