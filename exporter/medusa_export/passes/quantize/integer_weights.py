"""Stores weights in 8 or 4 bits, in standard ONNX: integers under a ``DequantizeLinear``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.values import add_initializer, replace, shape_of

Matrix = npt.NDArray[np.float32]
Storage = Literal["int8", "int8-blocks", "int4"]
BLOCK_SIZE = 32  # inputs that share a scale: the size at which ONNX Runtime's kernels are fastest and most accurate
MIN_SIZE = 4096  # elements; a smaller matrix is not worth quantising


@dataclass(frozen=True)
class Linear:
    """A matrix product with a weight: its node, the initializer, and the weight's layout."""

    node: ir.Node
    weight: ir.Value
    transposed: bool  # stored as [out, in]


def linears(model: ir.Model) -> Iterator[Linear]:
    """The graph's matrix products with weights that are initializers, in order."""
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight, transposed = node.inputs[1], node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        assert weight is not None
        producer = weight.producer()
        if producer is not None and producer.op_type == "Transpose":
            weight, transposed = producer.inputs[0], not transposed
        if _is_weight(weight):
            assert weight is not None
            yield Linear(node, weight, transposed)


def _is_weight(value: ir.Value | None) -> bool:
    tensor = None if value is None else value.const_value
    return (
        tensor is not None
        and value is not None
        and value.is_initializer()
        and len(tensor.shape) == 2
        and tensor.dtype == ir.DataType.FLOAT
        and tensor.size >= MIN_SIZE
    )


class QuantizeWeights(ir.passes.InPlacePass):
    """Store weights as integers.

    Needs: a float32 graph as the exporter writes it.
    Result: still only standard operators, with each weight under a ``DequantizeLinear``. A weight that cannot be divided into
    blocks of 32 inputs gets one scale per output. A weight from which rows are also gathered (a tied embedding) stays one
    tensor, with at least 8 bits.

    Args:
        storage: how to store the weight of a name; None to leave it as it is.
        tables: offsets, in the weights file, of weights from which any graph gathers rows. All graphs keep their layout
        [out, in], so that they are stored once.
    """

    def __init__(self, storage: Callable[[str], Storage | None], tables: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.storage = storage
        self.tables = tables

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        graph = model.graph
        modified = False
        for node in [node for node in graph if node.op_type == "Gemm"]:
            modified |= _as_matmul(graph, node)
        by_weight: dict[ir.Value, list[Linear]] = {}
        for linear in linears(model):
            if linear.node.op_type == "MatMul":
                by_weight.setdefault(linear.weight, []).append(linear)
        for weight, readers in by_weight.items():
            storage = self.storage(weight.name or "")
            gathers = [usage.node for usage in weight.uses() if _gathers_rows(usage.node)]
            if storage is None or not _can_store(weight, readers, gathers):
                continue
            if storage == "int4" and gathers:
                storage = "int8-blocks"
            if storage != "int8" and _inputs(weight, readers[0].transposed) % BLOCK_SIZE == 0:
                is_table = bool(gathers) or (readers[0].transposed and not self.tables.isdisjoint(_offsets(weight)))
                _store_blocks(graph, weight, readers, gathers, bits=4 if storage == "int4" else 8, as_table=is_table)
            else:
                _store_channels(graph, weight, readers, gathers)
            modified = True
        return ir.passes.PassResult(model, modified)


def tables(models: Iterable[ir.Model]) -> frozenset[int]:
    """Offsets, in the weights file, of the weights from which graphs gather rows."""
    return frozenset(
        offset
        for model in models
        for weight in model.graph.initializers.values()
        if any(_gathers_rows(usage.node) for usage in weight.uses())
        for offset in _offsets(weight)
    )


def _offsets(weight: ir.Value) -> set[int]:
    """The offset of a weight in the weights file, if it is in one."""
    tensor = weight.const_value
    return {tensor.offset or 0} if isinstance(tensor, ir.ExternalTensor) else set()


def _can_store(weight: ir.Value, readers: list[Linear], gathers: list[ir.Node]) -> bool:
    """Whether all readers of a weight can read integers: matrix products that agree on its layout, and gathers of rows."""
    by_rows = readers[0].transposed
    known = {reader.node for reader in readers} | set(gathers)
    return (
        all(reader.transposed == by_rows for reader in readers)
        and (by_rows or not gathers)
        and all(usage.node in known or usage.node.op_type == "Transpose" for usage in weight.uses())
    )


def _gathers_rows(node: ir.Node) -> bool:
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0


def _inputs(weight: ir.Value, by_rows: bool) -> int:
    assert weight.const_value is not None
    return int(weight.const_value.shape[1 if by_rows else 0])  # type: ignore[arg-type]


def _store_channels(graph: ir.Graph, weight: ir.Value, readers: list[Linear], gathers: list[ir.Node]) -> None:
    """Store as int8, with one scale per output."""
    name, tensor, by_rows = weight.name or "", weight.const_value, readers[0].transposed
    assert tensor is not None
    rows, columns = shape_of(tensor)
    axis = 1 if by_rows else 0  # the axis of the inputs; they share a scale
    parts = [
        _lazy(f"{name}.int8", ir.DataType.INT8, [rows, columns], lambda: to_int8(tensor.numpy(), axis)[0]),
        _lazy(f"{name}.scale", ir.DataType.FLOAT, [rows if by_rows else columns], lambda: to_int8(tensor.numpy(), axis)[1]),
    ]
    data, scales = (add_initializer(graph, part.name or "", part) for part in parts)
    stored = _turned(graph, readers[0].node, data) if by_rows else data
    for reader in readers:
        _read(graph, reader, ir.node("DequantizeLinear", [stored, scales], {"axis": 1}))
    for gather in gathers:
        _gather(graph, gather, data, scales, blocks=None)
    _forget(graph, weight)


def _store_blocks(
    graph: ir.Graph, weight: ir.Value, readers: list[Linear], gathers: list[ir.Node], *, bits: int, as_table: bool
) -> None:
    """Store as int8 or uint4, with one scale per output and block of 32 inputs; uint4 has zero points as well.

    If `as_table`, the layout stays [out, in], so that rows can be gathered.
    """
    name, tensor, by_rows = weight.name or "", weight.const_value, readers[0].transposed
    assert tensor is not None
    inputs, outputs = _inputs(weight, by_rows), _inputs(weight, not by_rows)

    def store(place: int) -> npt.NDArray[np.generic]:
        array = tensor.numpy()
        parts = (to_uint4 if bits == 4 else to_int8_blocks)(array.T if by_rows else array)
        return parts[place].T if as_table else parts[place]

    dtype = ir.DataType.UINT4 if bits == 4 else ir.DataType.INT8
    whole: list[int | ir.SymbolicDim] = [inputs, outputs]
    blocks: list[int | ir.SymbolicDim] = [inputs // BLOCK_SIZE, outputs]
    if as_table:
        whole, blocks = whole[::-1], blocks[::-1]
    parts = [
        _lazy(f"{name}.{'uint4' if bits == 4 else 'int8'}", dtype, whole, lambda: store(0)),
        _lazy(f"{name}.scale", ir.DataType.FLOAT, blocks, lambda: store(1)),
    ]
    if bits == 4:
        parts.append(_lazy(f"{name}.zero", dtype, blocks, lambda: store(2)))
    values = [add_initializer(graph, part.name or "", part) for part in parts]
    stored = [_turned(graph, readers[0].node, value) for value in values] if as_table else values
    for reader in readers:
        _read(graph, reader, ir.node("DequantizeLinear", stored, {"axis": 0, "block_size": BLOCK_SIZE}))
    for gather in gathers:
        _gather(graph, gather, values[0], values[1], blocks=inputs // BLOCK_SIZE)
    _forget(graph, weight)


def _turned(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """The value, transposed. A runtime does that once, when it loads the graph."""
    turn = ir.node("Transpose", [value], {"perm": [1, 0]})
    result = turn.outputs[0]
    assert value.shape is not None
    result.name, result.shape, result.type = f"{value.name}.T", ir.Shape(list(value.shape)[::-1]), value.type
    graph.insert_before(before, turn)
    return result


def _read(graph: ir.Graph, reader: Linear, dequantize: ir.Node) -> None:
    data = dequantize.inputs[0]
    assert data is not None
    dequantize.outputs[0].shape, dequantize.outputs[0].type = data.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(reader.node, dequantize)
    before = reader.node.inputs[1]
    reader.node.replace_input_with(1, dequantize.outputs[0])
    assert before is not None
    if (transpose := before.producer()) is not None and not before.uses():
        graph.remove(transpose, safe=True)


def _gather(graph: ir.Graph, gather: ir.Node, data: ir.Value, scales: ir.Value, *, blocks: int | None) -> None:
    """Gather rows as integers, then scale them, each row as a whole or by blocks."""
    ids = gather.inputs[1]
    tape = ir.tape.Tape()
    rows = tape.op("Cast", [tape.op("Gather", [data, ids], {"axis": 0})], {"to": ir.DataType.FLOAT})
    sizes = tape.op(
        "Unsqueeze", [tape.op("Gather", [scales, ids], {"axis": 0}), tape.op("Constant", [], {"value": ir.tensor([-1])})]
    )
    if blocks is None:
        result = tape.op("Mul", [rows, sizes])
    else:
        assert ids is not None
        rank = len(ids.shape) if ids.shape is not None else 2
        whole = tape.op("Shape", [rows])
        cut = tape.op("Constant", [], {"value": ir.tensor([0] * rank + [blocks, BLOCK_SIZE])})
        result = tape.op("Reshape", [tape.op("Mul", [tape.op("Reshape", [rows, cut]), sizes]), whole])
    graph.insert_before(gather, tape.nodes)
    replace(gather.outputs[0], result)
    graph.remove(gather, safe=True)


def _as_matmul(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace ``Gemm(x, weight, bias)`` by a MatMul and an Add, if it does nothing else."""
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    weight = node.inputs[1]
    if not plain or node.attributes.get_int("transA", 0) != 0 or not _is_weight(weight):
        return False
    tape = ir.tape.Tape()
    if node.attributes.get_int("transB", 0):
        assert weight is not None
        weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
    result = tape.op("MatMul", [node.inputs[0], weight])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = tape.op("Add", [result, node.inputs[2]])
    graph.insert_before(node, tape.nodes)
    replace(node.outputs[0], result)
    graph.remove(node, safe=True)
    return True


def _forget(graph: ir.Graph, weight: ir.Value) -> None:
    if not weight.uses():
        del graph.initializers[weight.name or ""]


def _lazy(
    name: str, dtype: ir.DataType, shape: list[int | ir.SymbolicDim], make: Callable[[], npt.NDArray[np.generic]]
) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(make()).view(dtype.numpy()), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)


def to_int8(weight: Matrix, axis: int) -> tuple[npt.NDArray[np.int8], Matrix]:
    """Codes in -127…127, and scales that the weights along `axis` share; the weight is about code x scale."""
    scale = np.maximum(np.abs(weight).max(axis, keepdims=True), np.finfo(np.float32).tiny * 127) / np.float32(127)
    codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return codes, scale.squeeze(axis).astype(np.float32)


def to_int8_blocks(weight: Matrix) -> tuple[npt.NDArray[np.int8], Matrix]:
    """Like `to_int8`, with one scale per output and block of 32 inputs. weight: [K, N]; scales: [K / 32, N]."""
    codes, scale = to_int8(weight.reshape(-1, BLOCK_SIZE, weight.shape[1]), 1)
    return codes.reshape(weight.shape), scale


def to_uint4(weight: Matrix) -> tuple[npt.NDArray[np.uint8], Matrix, npt.NDArray[np.uint8]]:
    """Codes in 0…15 [K, N], and scales and zero points [K / 32, N]; the weight [K, N] is about (code - zero) x scale.

    Several ranges are tried, each clipping the outermost values more. Each block uses the one with the least squared error.
    """
    blocks = weight.reshape(-1, BLOCK_SIZE, weight.shape[1])  # [K / 32, 32, N]
    low, high = np.minimum(blocks.min(1, keepdims=True), 0), np.maximum(blocks.max(1, keepdims=True), 0)
    best: tuple[Matrix, Matrix, Matrix] | None = None
    least = np.full(low.shape, np.inf, np.float32)
    for part in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = np.maximum((high - low) * part, np.finfo(np.float32).tiny * 15).astype(np.float32) / np.float32(15)
        zero = np.clip(np.rint(-low * part / scale), 0, 15)
        codes = np.clip(np.rint(blocks / scale) + zero, 0, 15)
        error = np.square((codes - zero) * scale - blocks).sum(1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        found = (codes, scale, zero)
        best = found if best is None else tuple(np.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    codes, scale, zero = best
    return codes.reshape(weight.shape).astype(np.uint8), scale[:, 0], zero[:, 0].astype(np.uint8)
