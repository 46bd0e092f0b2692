"""Stores weights in 8 or 4 bits, in standard ONNX: integers under a ``DequantizeLinear``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.linears import Linear, gathers_rows, gemm_to_matmul, is_weight, linears
from medusa_export.passes.common.rounding import BLOCK_SIZE, to_int8, to_int8_blocks, to_uint4
from medusa_export.passes.common.values import Together, add_initializer, constant, lazy_tensor, replace, shape_of
from medusa_export.passes.quantize.given_codes import HALF_RANGE, GivenCodes, padded_inputs

Storage = Literal["int8", "int8-blocks", "int8-wide-blocks", "int4"]
WIDE_BLOCKS = (128, 64)  # inputs that share a scale in wide blocks, by preference
Rounded = tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]  # codes in a weight's layout, and one scale per output


class QuantizeWeights(GraphPass):
    """Store weights as integers.

    Needs: a float32 graph as the exporter writes it.
    Result: still only standard operators, with each weight under a ``DequantizeLinear``. Weights in blocks lie as [out, in] and
    are unsigned: so `BlockProducts` can give the same bytes to ``MatMulNBits``. Blocks have 32 inputs; wide ones have 128 or
    64, where a weight can be divided into such. A weight that cannot be divided into blocks of 32 gets one scale per output. A
    weight from which rows are also gathered (a tied embedding) stays one tensor, with at least 8 bits. An embedding that
    nothing else reads has 8 bits, too, with one scale per row or per block of it.

    Args:
        storage: how to store the weight of a name; None to leave it as it is.
        tables: where weights lie from which any graph gathers rows, see `tables`. Such a weight is rounded anew in all graphs,
            so that it is stored once.
        given: codes in blocks for the weights of these names, which the checkpoint has or which were found before. They are
            taken as they are if they have as many bits as the weight is to be stored with.
        rounded: codes and scales of weights that were rounded before, in the weights' layout, for ``int8``. All others get the
            nearest codes.
    """

    def __init__(
        self,
        storage: Callable[[str], Storage | None],
        tables: frozenset[int] = frozenset(),
        given: Mapping[str, GivenCodes] | None = None,
        rounded: Mapping[str, Rounded] | None = None,
    ) -> None:
        super().__init__()
        self.storage = storage
        self.tables = tables
        self.given = given or {}
        self.rounded = rounded or {}
        self.kept: list[str] = []  # weights whose given codes were taken

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        graph = model.graph
        matched = 0
        for node in [node for node in graph if node.op_type == "Gemm"]:
            gemm_to_matmul(graph, node)
        with_sums: dict[tuple[ir.Value, int], ir.Value] = {}
        by_weight: dict[ir.Value, list[Linear]] = {}
        for linear in linears(graph):
            if linear.node.op_type == "MatMul":
                by_weight.setdefault(linear.weight, []).append(linear)
        for weight, readers in by_weight.items():
            storage = self.storage(weight.name or "")
            gathers = [usage.node for usage in weight.uses() if gathers_rows(usage.node)]
            if storage is None:
                continue
            if not _can_store(weight, readers, gathers):
                self.decline("a weight that some node reads in another way")
                continue
            if storage == "int4" and gathers:
                storage = "int8-blocks"
            if storage != "int8" and readers[0].num_inputs % BLOCK_SIZE == 0:
                is_table = bool(gathers) or not self.tables.isdisjoint(offsets(weight))
                bits = 4 if storage == "int4" else 8
                given = self.given.get(weight.name or "")
                given = None if given is None or given.bits != bits or is_table else given
                size = block_size(storage, readers[0].num_inputs) if given is None else given.block_size
                _store_blocks(graph, weight, readers, gathers, with_sums, bits=bits, size=size, given=given)
                self.kept += [weight.name or ""] if given is not None else []
            else:
                _store_channels(graph, weight, readers, gathers, self.rounded.get(weight.name or ""))
            matched += 1
        return matched + self._embeddings(graph)

    def _embeddings(self, graph: ir.Graph) -> int:
        """Store tables that are read by the rows of `input_ids` alone."""
        ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
        found: dict[ir.Value, list[ir.Node]] = {}
        for node in [usage.node for usage in ids.uses()] if ids is not None else []:
            if gathers_rows(node) and node.inputs[1] is ids and is_weight(node.inputs[0]):
                assert node.inputs[0] is not None
                found.setdefault(node.inputs[0], []).append(node)
        whole = [weight for weight, gathers in found.items() if len(weight.uses()) == len(gathers)]
        matched = 0
        for weight in whole:
            storage = self.storage(weight.name or "")
            if storage is None:
                continue
            assert weight.const_value is not None
            inputs = shape_of(weight.const_value).numpy()[1]
            if storage != "int8" and inputs % BLOCK_SIZE == 0:
                _store_blocks(graph, weight, [], found[weight], {}, bits=8, size=block_size(storage, inputs), given=None)
            else:
                _store_channels(graph, weight, [], found[weight])
            matched += 1
        return matched


def block_size(storage: Storage, num_inputs: int) -> int:
    """How many inputs share a scale, for a storage in blocks. `num_inputs` is a multiple of 32."""
    wide = WIDE_BLOCKS if storage == "int8-wide-blocks" else ()
    return next((size for size in wide if num_inputs % size == 0), BLOCK_SIZE)


def tables(models: Iterable[ir.Model]) -> frozenset[int]:
    """Where the weights lie from which graphs gather rows: offsets in the weights file, or addresses in memory."""
    return frozenset(
        offset
        for model in models
        for weight in model.graph.initializers.values()
        if any(gathers_rows(usage.node) for usage in weight.uses())
        for offset in offsets(weight)
    )


def offsets(weight: ir.Value) -> set[int]:
    """Where a weight lies: its offset in the weights file, or the address of PyTorch's tensor; nothing if it is computed."""
    tensor = weight.const_value
    if isinstance(tensor, ir.ExternalTensor):
        return {tensor.offset or 0}
    address = getattr(getattr(tensor, "raw", None), "data_ptr", None)
    return set() if address is None else {int(address())}


def _can_store(weight: ir.Value, readers: list[Linear], gathers: list[ir.Node]) -> bool:
    """Whether all readers of a weight can read integers: matrix products that agree on its layout, and gathers of rows."""
    by_rows = readers[0].transposed
    known = {reader.node for reader in readers} | set(gathers)
    return (
        all(reader.transposed == by_rows for reader in readers)
        and (by_rows or not gathers)
        and all(usage.node in known or usage.node.op_type == "Transpose" for usage in weight.uses())
    )


def _store_channels(
    graph: ir.Graph, weight: ir.Value, readers: list[Linear], gathers: list[ir.Node], given: Rounded | None = None
) -> None:
    """Store as int8, with one scale per output."""
    name, tensor, by_rows = weight.name or "", weight.const_value, not readers or readers[0].transposed
    assert tensor is not None
    rows, columns = shape_of(tensor)
    axis = 1 if by_rows else 0  # the axis of the inputs; they share a scale
    rounded = Together(lambda: to_int8(tensor.numpy(), axis) if given is None else given)
    parts = [
        lazy_tensor(f"{name}.int8", ir.DataType.INT8, [rows, columns], lambda: rounded.part(0)),
        lazy_tensor(f"{name}.scale", ir.DataType.FLOAT, [rows if by_rows else columns], lambda: rounded.part(1)),
    ]
    data, scales = (add_initializer(graph, part.name or "", part) for part in parts)
    stored = _turned(graph, readers[0].node, data) if by_rows and readers else data
    for reader in readers:
        _read(graph, reader, _dequantized(graph, reader.node, [stored, scales], {"axis": 1}))
    for gather in gathers:
        _gather(graph, gather, data, scales, blocks=None)
    _forget(graph, weight)


def _store_blocks(
    graph: ir.Graph,
    weight: ir.Value,
    readers: list[Linear],
    gathers: list[ir.Node],
    with_sums: dict[tuple[ir.Value, int], ir.Value],
    *,
    bits: int,
    size: int,
    given: GivenCodes | None,
) -> None:
    """Store [out, in] as uint8 or uint4, with one scale per output and `size` inputs. uint4 has zero points as well."""
    name, tensor, by_rows = weight.name or "", weight.const_value, not readers or readers[0].transposed
    assert tensor is not None
    rows, columns = shape_of(tensor).numpy()
    outputs, inputs = (rows, columns) if by_rows else (columns, rows)

    def store() -> Sequence[npt.NDArray[np.generic]]:
        array = tensor.numpy()
        return (to_uint4 if bits == 4 else to_int8_blocks)(array.T if by_rows else array, size)

    def turned() -> list[npt.NDArray[np.generic]]:
        codes, *others = store() if given is None else given.parts()
        codes = codes if bits == 4 else (codes.astype(np.int16) + HALF_RANGE).astype(np.uint8)
        return [part.T for part in (codes, *others)]

    rounded = Together(turned)
    if given is not None and given.reads_sums:
        inputs = padded_inputs(inputs, size)
        for reader in readers:
            _read_sums(graph, reader, size, with_sums)
    dtype = ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8
    whole, blocks = [outputs, inputs], [outputs, inputs // size]
    parts = [
        lazy_tensor(f"{name}.{dtype.name.lower()}", dtype, whole, lambda: rounded.part(0)),
        lazy_tensor(f"{name}.scale", ir.DataType.FLOAT, blocks, lambda: rounded.part(1)),
    ]
    if bits == 4:
        parts.append(lazy_tensor(f"{name}.zero", dtype, blocks, lambda: rounded.part(2)))
    stored = [add_initializer(graph, part.name or "", part) for part in parts]
    for reader in readers:
        zeros = [] if bits == 4 else [_halves(graph, reader.node, blocks)]
        result = _dequantized(graph, reader.node, [*stored, *zeros], {"axis": 1, "block_size": size})
        _read(graph, reader, _turned(graph, reader.node, result))
    for gather in gathers:
        _gather(graph, gather, stored[0], stored[1], blocks=inputs // size)
    _forget(graph, weight)


def _read_sums(graph: ir.Graph, reader: Linear, size: int, made: dict[tuple[ir.Value, int], ir.Value]) -> None:
    """Let a product read its input, then the sum of each block of it, then zeros (see `padded_inputs`).

    Args:
        graph: the graph.
        reader: the product.
        size: the inputs of a block.
        made: such values by what they are made of, so that each is made once. New ones are added.
    """
    x, inputs = reader.node.inputs[0], reader.num_inputs
    assert x is not None
    assert x.shape is not None
    if (x, size) not in made:
        blocks, width = inputs // size, padded_inputs(inputs, size)
        cut = [*[0] * (len(x.shape) - 1), blocks, size]  # 0: a size stays as it is
        ends = [*[0] * (2 * len(x.shape) - 1), width - inputs - blocks]
        tape = ir.tape.Tape()
        parts = tape.op("Reshape", [x, constant(graph, _named(cut), cut)])
        sums = tape.op("ReduceSum", [parts, constant(graph, "last_axis", [-1])], {"keepdims": 0})
        whole = tape.op("Concat", [x, sums], {"axis": -1})
        result = tape.op("Pad", [whole, constant(graph, "ends_" + "_".join(map(str, ends)), ends)])
        result.shape, result.type = ir.Shape([*x.shape[:-1], width]), x.type
        source = x.producer()
        if source is None:
            graph.insert_before(graph[0], tape.nodes)
        else:
            graph.insert_after(source, tape.nodes)
        made[x, size] = result
    reader.node.replace_input_with(0, made[x, size])


def _halves(graph: ir.Graph, before: ir.Node, shape: Sequence[int]) -> ir.Value:
    """Zero points of 8-bit codes, all the same."""
    node = ir.node("Expand", [constant(graph, "half_range", np.uint8(HALF_RANGE)), constant(graph, _named(shape), shape)])
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), ir.TensorType(ir.DataType.UINT8)
    graph.insert_before(before, node)
    return node.outputs[0]


def _named(shape: Sequence[int]) -> str:
    return "shape_" + "_".join(map(str, shape))


def _turned(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """The value, transposed. A runtime does that once, when it loads the graph."""
    turn = ir.node("Transpose", [value], {"perm": [1, 0]})
    result = turn.outputs[0]
    assert value.shape is not None
    result.shape, result.type = ir.Shape(list(value.shape)[::-1]), value.type
    graph.insert_before(before, turn)
    return result


def _dequantized(graph: ir.Graph, before: ir.Node, inputs: Sequence[ir.Value], attributes: Mapping[str, int]) -> ir.Value:
    node = ir.node("DequantizeLinear", inputs, attributes)
    node.outputs[0].shape, node.outputs[0].type = inputs[0].shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(before, node)
    return node.outputs[0]


def _read(graph: ir.Graph, reader: Linear, weight: ir.Value) -> None:
    before = reader.node.inputs[1]
    reader.node.replace_input_with(1, weight)
    assert before is not None
    if (transpose := before.producer()) is not None and not before.uses():
        graph.remove(transpose, safe=True)


def _gather(graph: ir.Graph, gather: ir.Node, data: ir.Value, scales: ir.Value, *, blocks: int | None) -> None:
    """Gather rows as integers, then scale them, each row as a whole or by blocks."""
    ids = gather.inputs[1]
    tape = ir.tape.Tape()
    rows = tape.op("Cast", [tape.op("Gather", [data, ids], {"axis": 0})], {"to": ir.DataType.FLOAT})
    sizes = tape.op("Unsqueeze", [tape.op("Gather", [scales, ids], {"axis": 0}), constant(graph, "last_axis", [-1])])
    if blocks is None:
        result = tape.op("Mul", [rows, sizes])
    else:
        assert ids is not None
        assert data.shape is not None
        rank = len(ids.shape) if ids.shape is not None else 2
        whole, size = tape.op("Shape", [rows]), int(str(data.shape[1])) // blocks
        rows = tape.op("Sub", [rows, constant(graph, "half_range_float", float(HALF_RANGE))])
        cut = constant(graph, f"in_blocks_{rank}_{blocks}_{size}", [0] * rank + [blocks, size])
        result = tape.op("Reshape", [tape.op("Mul", [tape.op("Reshape", [rows, cut]), sizes]), whole])
    graph.insert_before(gather, tape.nodes)
    replace(gather.outputs[0], result)
    graph.remove(gather, safe=True)


def _forget(graph: ir.Graph, weight: ir.Value) -> None:
    if not weight.uses():
        del graph.initializers[weight.name or ""]
