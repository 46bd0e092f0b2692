"""Stores the weights of experts in 8 or 4 bits, in standard ONNX: integers that are scaled once they are gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.linears import MIN_SIZE
from medusa_export.passes.common.roles import Part, note_role, parts
from medusa_export.passes.common.rounding import to_int8, to_uint4
from medusa_export.passes.common.values import add_initializer, constant, lazy_tensor, replace, shape_of
from medusa_export.passes.portable.expand_experts import EXPERTS_PART, LINEAR_PART
from medusa_export.passes.quantize.integer_weights import Storage

BLOCK_SIZES = (32, 16)  # inputs that share a scale; 16 is the least that ``QMoE`` takes
ZERO = 128  # the code of 0 in 8 bits, which ``QMoE`` takes for granted
Codes = npt.NDArray[np.uint8]
Rounded = tuple[Codes, npt.NDArray[np.float32], Codes | None]


class QuantizeExperts(GraphPass):
    """Store experts' weights as integers.

    Needs: a float32 graph with layers of experts as `ExpandExperts` writes them.
    Result: still only standard operators. Each weight [E, out, in] is uint8 with one scale per output and block of 32 or 16
    inputs; 4-bit codes are two in a byte, as ``QMoE`` reads them, and have zero points. Only the gathered codes are scaled. A
    weight that cannot be divided into blocks stays as it is; `left` names it.

    Args:
        storage: how to store the weight of a name; None to leave it as it is.
    """

    def __init__(self, storage: Callable[[str], Storage | None]) -> None:
        super().__init__()
        self.storage = storage
        self.left: list[str] = []

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        matched = 0
        for kind, roles in ((EXPERTS_PART, ("up", "down")), (LINEAR_PART, ("linear",))):
            for number, part in enumerate(parts(model.graph, kind)):
                matched += self._store(model.graph, kind, number, part, roles)
        return matched

    def _store(self, graph: ir.Graph, kind: str, number: int, part: Part, roles: tuple[str, ...]) -> bool:
        weights = [part.read(role) for role in roles]
        wanted = {self.storage(weight.name or "") for weight in weights}
        tensors = [weight.const_value for weight in weights]
        if None in wanted or any(tensor is None or tensor.dtype != ir.DataType.FLOAT for tensor in tensors):
            return False
        widths = [int(str(weight.shape[2])) for weight in weights if weight.shape is not None]
        block = next((size for size in BLOCK_SIZES if all(width % size == 0 for width in widths)), None)
        if block is None or all(tensor is not None and tensor.size < MIN_SIZE for tensor in tensors):
            self.left += [weight.name or "" for weight in weights]
            self.decline("experts that are small, or whose inputs cannot be divided into blocks")
            return False
        # Zero points are two in a byte as well.
        bits: Literal[4, 8] = 4 if wanted == {"int4"} and all(width // block % 2 == 0 for width in widths) else 8
        for role, weight in zip(roles, weights, strict=True):
            _quantize(graph, part.nodes[role], (kind, number, role), weight, bits, block)
        return True


def _quantize(
    graph: ir.Graph, gather: ir.Node, role: tuple[str, int, str], weight: ir.Value, bits: Literal[4, 8], block: int
) -> None:
    name, tensor, experts = weight.name or "", weight.const_value, gather.inputs[1]
    assert tensor is not None
    count, outputs, inputs = (int(str(size)) for size in shape_of(tensor))

    waiting: dict[int, npt.NDArray[np.generic]] = {}  # parts that were rounded with another one and are not yet written

    def rounded(place: int) -> npt.NDArray[np.generic]:
        if place not in waiting:
            found = [round_expert(matrix, bits, block) for matrix in tensor.numpy()]
            parts_of_all = zip(*found, strict=True)
            waiting.update({index: np.stack(part) for index, part in enumerate(parts_of_all) if part[0] is not None})
        return waiting.pop(place)

    packed = 8 // bits
    stored = [
        lazy_tensor(f"{name}.uint{bits}", ir.DataType.UINT8, [count, outputs, inputs // packed], lambda: rounded(0)),
        lazy_tensor(f"{name}.scale", ir.DataType.FLOAT, [count, outputs, inputs // block], lambda: rounded(1)),
    ]
    if bits == 4:
        shape = [count, outputs, inputs // block // 2]
        stored.append(lazy_tensor(f"{name}.zero", ir.DataType.UINT8, shape, lambda: rounded(2)))
    tape = ir.tape.Tape()
    gathered = []
    for part, suffix in zip(stored, ("", "_scales", "_zeros"), strict=False):
        found = tape.op("Gather", [add_initializer(graph, part.name or "", part), experts], {"axis": 0})
        node = found.producer()
        assert node is not None
        note_role(node, role[0], role[1], f"{role[2]}{suffix}")
        gathered.append(found)
    if bits == 4:
        codes, zeros = (_unpacked(graph, tape, value) for value in (gathered[0], gathered[2]))
    else:
        codes = gathered[0]
        zeros = tape.op("ConstantOfShape", [tape.op("Shape", [gathered[1]])], {"value": ir.tensor(np.array([ZERO], np.uint8))})
    result = tape.op("DequantizeLinear", [codes, gathered[1], zeros], {"axis": 2, "block_size": block})
    graph.insert_before(gather, tape.nodes)
    replace(gather.outputs[0], result)
    graph.remove(gather, safe=True)
    if not weight.uses():
        del graph.initializers[name]


def _unpacked(graph: ir.Graph, tape: ir.tape.Tape, packed: ir.Value) -> ir.Value:
    """The codes of four bits, two in a byte, as one in a byte. [B, out, n / 2] -> [B, out, n]"""
    low = tape.op("BitwiseAnd", [packed, constant(graph, "low_bits", np.uint8(15))])
    high = tape.op("BitShift", [packed, constant(graph, "four_bits", np.uint8(4))], {"direction": "RIGHT"})
    axis = constant(graph, "pair_axis", [3])
    pairs = tape.op("Concat", [tape.op("Unsqueeze", [half, axis]) for half in (low, high)], {"axis": 3})
    return tape.op("Reshape", [pairs, constant(graph, "pairs_in_row", [0, 0, -1])])


def round_expert(weight: npt.NDArray[np.float32], bits: Literal[4, 8], block: int) -> Rounded:
    """Codes [out, in · bits / 8], scales [out, in / block] and zero points [out, in / block / 2] or None, of one [out, in]."""
    outputs, inputs = weight.shape
    if bits == 8:
        codes, scales = to_int8(weight.reshape(outputs, -1, block), 2)
        return (codes.reshape(outputs, inputs).astype(np.int16) + ZERO).astype(np.uint8), scales, None
    found, scales, zeros = to_uint4(weight.T, block)
    return _two_in_a_byte(found.T), scales.T, _two_in_a_byte(zeros.T)


def _two_in_a_byte(codes: Codes) -> Codes:
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
