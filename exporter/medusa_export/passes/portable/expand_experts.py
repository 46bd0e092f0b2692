"""Expands experts (mixture of experts) into standard operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.roles import note_role
from medusa_export.passes.common.values import add_initializer, constant, replace

EXPERTS_DOMAIN = "medusa.experts"  # of the markers
EXPERTS, EXPERT_LINEAR = "Experts", "ExpertLinear"  # its operators
EXPERTS_PART, LINEAR_PART = "experts", "expert linear"  # the kinds of part that the nodes are noted as
ROWS_PER_BLOCK = 2  # a block has this many times the rows that an expert gets on average (docs/decisions/0029-experts.md)


class ExpandExperts(GraphPass):
    """Expand the markers of `medusa_export.trace.experts_node`.

    Needs: ``Experts`` and ``ExpertLinear`` nodes whose weights [E, ., .] are initializers.
    Result: standard operators without control flow. The pairs of token and expert are sorted into blocks of rows with one
    expert each, and one MatMul multiplies each block with its expert's weight, which is gathered. The number of blocks
    follows from the number of tokens alone: at one token it is K, so only the chosen experts' weights are read, and at many
    tokens it is less than 2·E. Weights are stored as [E, out, in], those of a gated first layer with gate and up rows taking
    turns, as ONNX Runtime's ``MoE`` and ``QMoE`` read them.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        graph = model.graph
        markers = [node for node in graph if node.domain == EXPERTS_DOMAIN and node.op_type in _EXPANSIONS]
        sizes: dict[tuple[str, int, int], _Sizes] = {}
        for number, node in enumerate(markers):
            tape = ir.tape.Tape()
            result = _EXPANSIONS[node.op_type](_Expansion(graph, tape, node, number, sizes))
            graph.insert_before(node, tape.nodes)
            replace(node.outputs[0], result)
            graph.remove(node, safe=True)
        model.opset_imports.pop(EXPERTS_DOMAIN, None)
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
        return len(markers)


@dataclass(frozen=True)
class _Sizes:
    """Numbers that follow from the number of tokens. All are [1] int64, except for `ids_of_rows`."""

    pairs: ir.Value  # S, pairs of token and expert
    block: ir.Value  # rows of a block
    blocks: ir.Value  # B
    rows: ir.Value  # B times the rows of a block


@dataclass(frozen=True)
class _Grouping:
    """Where the pairs of token and expert are in the blocks."""

    sizes: _Sizes
    slots: ir.Value  # [S]: the row of each pair in the blocks
    experts: ir.Value  # [B]: the expert of each block
    sources: ir.Value  # [rows]: the row of x for each row of the blocks; 0 for padding


class _Expansion:
    """The expansion of one marker."""

    def __init__(
        self, graph: ir.Graph, tape: ir.tape.Tape, node: ir.Node, number: int, sizes: dict[tuple[str, int, int], _Sizes]
    ) -> None:
        self.graph, self.tape, self.node, self.number, self._all_sizes = graph, tape, node, number, sizes

    def inputs(self, count: int) -> list[ir.Value | None]:
        """The marker's inputs, with None for those at its end that were left out."""
        given = list(self.node.inputs)
        return given + [None] * (count - len(given))

    def constant(self, name: str, data: float | list[int] | np.generic) -> ir.Value:
        return constant(self.graph, f"experts_{name}", data)

    def mark(self, value: ir.Value, role: str, **facts: object) -> ir.Value:
        """Note a node's role, so that other passes find the layer again."""
        node = value.producer()
        assert node is not None
        note_role(node, EXPERTS_PART if self.node.op_type == EXPERTS else LINEAR_PART, self.number, role, **facts)
        return value

    def weight(self, value: ir.Value, *, transposed: bool, concatenated: bool) -> ir.Value:
        """An initializer as [E, out, in], with gate and up rows taking turns. It is computed only when it is written."""
        if value.is_initializer() and not transposed and not concatenated:
            return value
        source = value if value.is_initializer() else _reshaped(value)  # some models store all experts as one matrix
        tensor, name = source.const_value, source.name or ""
        assert tensor is not None
        assert value.shape is not None
        stored = value.shape.numpy()
        shape = list(stored)
        if transposed:
            shape[1:] = shape[:0:-1]

        def evaluate() -> ir.TensorProtocol:
            array = tensor.numpy().reshape(stored)
            if transposed:
                array = array.swapaxes(1, 2)
            if concatenated:
                half = array.shape[1] // 2
                array = np.stack([array[:, :half], array[:, half:]], 2).reshape(array.shape)
            return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=name)

        lazy = ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape(shape), name=name, cache=False)
        if source is value:
            del self.graph.initializers[name]
        else:
            name = f"{name}.by_expert"
        return add_initializer(self.graph, name, lazy)

    def sizes(self, ids: ir.Value, chosen: int, num_experts: int) -> _Sizes:
        """ids: [N, K] or [S]. Equal numbers of tokens share the computation."""
        assert ids.shape is not None
        key = str(ids.shape[0]), chosen, num_experts
        if key not in self._all_sizes or ids.shape[0] in (None, ir.SymbolicDim(None)):
            self._all_sizes[key] = self._new_sizes(ids, chosen, num_experts)
        return self._all_sizes[key]

    def _new_sizes(self, ids: ir.Value, chosen: int, num_experts: int) -> _Sizes:
        op, one = self.tape.op, self.constant("one", [1])
        count = op("Shape", [ids], {"start": 0, "end": 1})
        all_experts, most = self.constant(f"count_{num_experts}", [num_experts]), count
        pairs = op("Mul", [count, self.constant(f"chosen_{chosen}", [chosen])])
        average = op(
            "Div",
            [
                op(
                    "Add",
                    [
                        op("Mul", [pairs, self.constant("rows_per_block", [ROWS_PER_BLOCK])]),
                        self.constant(f"last_{num_experts}", [num_experts - 1]),
                    ],
                ),
                all_experts,
            ],
        )
        block = op("Min", [average, most])  # no expert gets more rows than there are tokens
        used = op("Min", [pairs, all_experts])
        # An expert with c rows takes ceil(c / block) blocks, and at most `used` experts have rows.
        blocks = op("Div", [op("Add", [pairs, op("Mul", [used, op("Sub", [block, one])])]), block])
        return _Sizes(pairs, block, blocks, op("Mul", [blocks, block]))

    def grouping(self, ids: ir.Value, chosen: int, num_experts: int) -> _Grouping:
        """Assign the pairs to blocks, in order. ids: the expert of each pair, [N, K] or [S]."""
        op, sizes = self.tape.op, self.sizes(ids, chosen, num_experts)
        axis0, axis1 = self.constant("axis_0", [0]), self.constant("axis_1", [1])
        first = self.constant("first", np.int64(0))
        step = self.constant("step", np.int64(1))
        column = self.mark(op("Reshape", [ids, self.constant("column", [-1, 1])]), "ids")  # [S, 1]
        each = constant(self.graph, f"experts_each_{num_experts}", np.arange(num_experts)[None])
        member = op("Cast", [op("Equal", [column, each])], {"to": ir.DataType.INT64})  # [S, E]
        seen = op("CumSum", [member, first])  # [S, E]: pairs of the same expert up to this one
        place = op("GatherElements", [seen, column], {"axis": 1})  # [S, 1], from 1
        load = op("ReduceSum", [member, axis0], {"keepdims": 0})  # [E]
        one = self.constant("one", [1])
        blocks = op("Div", [op("Add", [load, op("Sub", [sizes.block, one])]), sizes.block])  # [E]: ceil(load / block)
        ends = op("CumSum", [blocks, first])  # [E]: the block after each expert's last
        starts = op("Gather", [op("Sub", [ends, blocks]), column], {"axis": 0})  # [S, 1]
        slots = op("Sub", [op("Add", [op("Mul", [starts, sizes.block]), place]), one])  # [S, 1]
        numbers = op("Range", [first, op("Squeeze", [sizes.blocks, axis0]), step])  # [B]
        passed = op("GreaterOrEqual", [op("Unsqueeze", [numbers, axis1]), ends])  # [B, E]
        owner = op("ReduceSum", [op("Cast", [passed], {"to": ir.DataType.INT64}), axis1], {"keepdims": 0})
        owner = op("Min", [owner, self.constant(f"last_{num_experts}", [num_experts - 1])])  # blocks left over
        source = op("Range", [first, op("Squeeze", [sizes.pairs, axis0]), step])  # [S]
        if chosen > 1:
            source = op("Div", [source, self.constant(f"chosen_{chosen}", [chosen])])
        nothing = op("ConstantOfShape", [sizes.rows], {"value": ir.tensor(np.zeros(1, np.int64))})
        sources = op("ScatterND", [nothing, slots, source])  # [rows]
        return _Grouping(sizes, op("Reshape", [slots, self.constant("flat", [-1])]), owner, sources)

    def into_blocks(self, x: ir.Value, grouping: _Grouping) -> ir.Value:
        """The rows of x, [N, in] or [S, in], as blocks [B, rows, in]."""
        rows = self.mark(self.tape.op("Gather", [x, grouping.sources], {"axis": 0}), "x")
        shape = self.tape.op("Concat", [grouping.sizes.blocks, grouping.sizes.block, self.constant("flat", [-1])], {"axis": 0})
        return self.tape.op("Reshape", [rows, shape])

    def linear(self, blocks: ir.Value, grouping: _Grouping, weight: ir.Value, bias: ir.Value | None, role: str) -> ir.Value:
        """Multiply each block with its expert's weight: [B, rows, in] -> [B, rows, out]."""
        op = self.tape.op
        gathered = self.mark(op("Gather", [weight, grouping.experts], {"axis": 0}), role)
        gathered.type = weight.type
        result = op("MatMul", [blocks, op("Transpose", [gathered], {"perm": [0, 2, 1]})])
        if bias is None:
            return result
        terms = self.mark(op("Gather", [bias, grouping.experts], {"axis": 0}), f"{role}_bias")
        return op("Add", [result, op("Unsqueeze", [terms, self.constant("axis_1", [1])])])

    def out_of_blocks(self, blocks: ir.Value, grouping: _Grouping, width: int) -> ir.Value:
        """The row of each pair: [B, rows, out] -> [S, out]."""
        flat = self.tape.op("Reshape", [blocks, self.constant(f"rows_{width}", [-1, width])])
        return self.tape.op("Gather", [flat, grouping.slots], {"axis": 0})


def _reshaped(value: ir.Value) -> ir.Value:
    """The initializer that a value is a Reshape of."""
    node = value.producer()
    assert node is not None
    assert node.op_type == "Reshape"
    assert node.inputs[0] is not None
    return node.inputs[0]


def _expert_linear(expansion: _Expansion) -> ir.Value:
    x, ids, weight, bias = expansion.inputs(4)
    assert x is not None
    assert ids is not None
    assert weight is not None
    weight = expansion.weight(weight, transposed=bool(expansion.node.attributes.get_int("transposed")), concatenated=False)
    num_experts, width = _sizes_of(weight)
    grouping = expansion.grouping(ids, 1, num_experts)
    result = expansion.linear(expansion.into_blocks(x, grouping), grouping, weight, bias, "linear")
    return expansion.mark(expansion.out_of_blocks(result, grouping, width), "result")


def _experts(expansion: _Expansion) -> ir.Value:
    x, ids, weights, up, up_bias, down, down_bias = expansion.inputs(7)
    assert x is not None
    assert ids is not None
    assert ids.shape is not None
    assert weights is not None
    assert up is not None
    assert down is not None
    attributes = expansion.node.attributes
    facts = {name: attribute.value for name, attribute in attributes.items() if name not in ("transposed", "interleaved")}
    transposed = bool(attributes.get_int("transposed"))
    concatenated = facts["activation"] == "swiglu" and not attributes.get_int("interleaved")
    up = expansion.weight(up, transposed=transposed, concatenated=concatenated)
    down = expansion.weight(down, transposed=transposed, concatenated=False)
    if up_bias is not None and concatenated:
        up_bias = expansion.weight(up_bias, transposed=False, concatenated=True)
    chosen, op = ids.shape[1], expansion.tape.op
    assert isinstance(chosen, int)
    num_experts, width = _sizes_of(down)
    grouping = expansion.grouping(ids, chosen, num_experts)
    inner = expansion.linear(expansion.into_blocks(x, grouping), grouping, up, up_bias, "up")
    inner = _activate(expansion, inner, facts, x.dtype)
    result = expansion.out_of_blocks(expansion.linear(inner, grouping, down, down_bias, "down"), grouping, width)
    result = op("Reshape", [result, expansion.constant(f"by_token_{chosen}_{width}", [-1, chosen, width])])
    shares = expansion.mark(op("Unsqueeze", [weights, expansion.constant("axis_2", [2])]), "weights")
    if weights.dtype != x.dtype:
        result = op("Cast", [result], {"to": weights.dtype})
    total = op("ReduceSum", [op("Mul", [result, shares]), expansion.constant("axis_1", [1])], {"keepdims": 0})
    if weights.dtype != x.dtype:
        total = op("Cast", [total], {"to": x.dtype})
    return expansion.mark(total, "result", chosen=chosen, **facts)


def _sizes_of(weight: ir.Value) -> tuple[int, int]:
    """E and out of a weight [E, out, in]."""
    assert weight.shape is not None
    num_experts, width = weight.shape[0], weight.shape[1]
    assert isinstance(num_experts, int)
    assert isinstance(width, int)
    return num_experts, width


def _activate(expansion: _Expansion, inner: ir.Value, facts: dict[str, object], dtype: ir.DataType | None) -> ir.Value:
    op, name = expansion.tape.op, str(facts["activation"])
    assert dtype is not None

    def number(value: float) -> ir.Value:
        return constant(expansion.graph, f"experts_number_{value}_{dtype.name}", np.array(value, dtype.numpy()))

    if name != "swiglu":
        if name == "silu":
            return op("Mul", [inner, op("Sigmoid", [inner])])
        if name == "gelu_tanh":
            return op("Gelu", [inner], {"approximate": "tanh"})
        return op({"relu": "Relu", "gelu": "Gelu", "identity": "Identity"}[name], [inner])
    alpha, beta, limit = (float(str(facts[key])) for key in ("alpha", "beta", "limit"))
    starts = [expansion.constant(f"start_{place}", [place]) for place in (0, 1)]
    end, axis, step = (expansion.constant(key, [value]) for key, value in (("end", 2**31 - 1), ("flat", -1), ("two", 2)))
    gate, up = (op("Slice", [inner, start, end, axis, step]) for start in starts)
    if limit:
        gate, up = op("Min", [gate, number(limit)]), op("Min", [op("Max", [up, number(-limit)]), number(limit)])
    scaled = gate if alpha == 1 else op("Mul", [gate, number(alpha)])
    activated = op("Mul", [gate, op("Sigmoid", [scaled])])
    return op("Mul", [activated, up if beta == 0 else op("Add", [up, number(beta)])])


_EXPANSIONS: dict[str, Callable[[_Expansion], ir.Value]] = {EXPERTS: _experts, EXPERT_LINEAR: _expert_linear}
