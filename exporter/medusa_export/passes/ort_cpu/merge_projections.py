"""Merges matrix products of one input with several weights into one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.terms import note_terms, noted_terms
from medusa_export.passes.common.values import constant, replace


class MergeProjections(GraphPass):
    """Merge the query, key and value projections into one product, and likewise gate and up.

    Needs: ``MatMul`` nodes with a common input and weights [K, N] that are initializers: all float, or all int8 under a
    ``DequantizeLinear`` with one scale per column and the same terms noted on the products. Or ``MatMulNBits`` nodes with a
    common input, bits and block size.
    Result: one product for each such group, one ``Add`` if all have a bias, and a ``Split``. Weights and biases are
    concatenated in the graph. A runtime does that once when it loads the graph, so they are stored only once.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        groups: dict[tuple[ir.Value, str, int | None], list[ir.Node]] = {}
        for node in model.graph:
            if node.op_type not in ("MatMul", "MatMulNBits"):
                continue
            kind = _kind(node.inputs[1]) if node.op_type == "MatMul" else _kind_of_blocks(node)
            if kind is not None:
                assert node.inputs[0] is not None
                groups.setdefault((node.inputs[0], kind, noted_terms(node)), []).append(node)
            elif _is_weight(node.inputs[1]):
                self.decline("a weight that no runtime can join to others when it loads the graph")
        merged = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in merged:
            _merge(model.graph, nodes)
        return sum(len(nodes) for nodes in merged)


def _kind(weight: ir.Value | None) -> str | None:
    """How a weight [K, N] is stored; None if the value is not a weight, or if a runtime cannot concatenate such weights."""
    if weight is None:
        return None
    source = weight.producer()
    if source is None:
        is_matrix = weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2
        return "float" if is_matrix and not weight.is_graph_input() else None
    # not so for an embedding that is transposed first, for example
    if not all(value is not None and value.is_initializer() for value in source.inputs):
        return None
    return "channels" if is_int8_weight(source) else None


def _kind_of_blocks(node: ir.Node) -> str | None:
    """How the weight of a ``MatMulNBits`` is stored; None if it is not only initializers."""
    if not all(value is not None and value.is_initializer() for value in node.inputs[1:]):
        return None
    bits, size = (node.attributes.get_int(name) for name in ("bits", "block_size"))
    return f"{bits} bits in blocks of {size}, {len(node.inputs)} inputs"


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, or computed from initializers alone."""
    source = None if value is None else value.producer()
    if value is None or source is None:
        return value is not None and value.is_initializer()
    return all(each is not None and each.is_initializer() for each in source.inputs)


def is_int8_weight(node: ir.Node) -> bool:
    """Whether a node is ``DequantizeLinear`` of an int8 matrix with one scale per column and no zero point."""
    data, scale = (*node.inputs, None, None)[:2]
    return (
        node.op_type == "DequantizeLinear"
        and data is not None
        and data.dtype == ir.DataType.INT8
        and scale is not None
        and scale.shape is not None
        and len(scale.shape) == 1
        and len(node.inputs) == 2
        and node.attributes.get_int("axis", 1) == 1
    )


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = nodes[0]
    sizes = [_num_outputs(node) for node in nodes]
    tape = ir.tape.Tape()
    if first.op_type == "MatMulNBits":
        parts = [_joined(tape, values, axis=0) for values in zip(*(node.inputs[1:] for node in nodes), strict=True)]
        attributes = dict(first.attributes) | {"N": sum(sizes)}
        whole = tape.op("MatMulNBits", [first.inputs[0], *parts], attributes, domain=first.domain)
    else:
        whole = tape.op("MatMul", [first.inputs[0], _joined_weight(tape, [node.inputs[1] for node in nodes])])
        if (terms := noted_terms(first)) is not None:
            note_terms(tape.nodes[-1], terms)
    sums = [found for node in nodes if (found := _sum_with_bias(node)) is not None]
    if len(sums) == len(nodes):
        whole = tape.op("Add", [whole, _joined(tape, [bias for _, bias in sums])])
        for node, (added, _) in zip(nodes, sums, strict=True):
            replace(added.outputs[0], node.outputs[0])
            graph.remove(added, safe=True)
    split = ir.node(
        "Split",
        [whole, constant(graph, "split_" + "_".join(map(str, sizes)), sizes)],
        {"axis": -1},
        num_outputs=len(nodes),
    )
    graph.insert_before(first, [*tape.nodes, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        replace(node.outputs[0], part)
        graph.remove(node, safe=True)


def _joined_weight(tape: ir.tape.Tape, weights: Sequence[ir.Value | None]) -> ir.Value:
    """The weights of products, float or int8 under a ``DequantizeLinear``, side by side. [K, sum of N]"""
    sources = [source for weight in weights if weight is not None and (source := weight.producer()) is not None]
    if not sources:
        return _joined(tape, weights)
    parts = [_joined(tape, values) for values in zip(*(source.inputs for source in sources), strict=True)]
    weight = tape.op("DequantizeLinear", parts, dict(sources[0].attributes))
    assert weights[0] is not None
    weight.shape, weight.type = parts[0].shape, weights[0].type
    return weight


def _num_outputs(node: ir.Node) -> int:
    """N of a product."""
    return node.attributes.get_int("N") if node.op_type == "MatMulNBits" else _size(node.inputs[1], -1)


def _sum_with_bias(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The ``Add`` that is the product's only reader, and its bias, an initializer [N]."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    bias = uses[0].node.inputs[1 - uses[0].idx]
    is_vector = bias is not None and bias.is_initializer() and bias.shape is not None and len(bias.shape) == 1
    return (uses[0].node, bias) if bias is not None and is_vector and bias.shape == [_num_outputs(node)] else None


def _joined(tape: ir.tape.Tape, values: Sequence[ir.Value | None], axis: int = -1) -> ir.Value:
    """Values of one type, concatenated along an axis."""
    first = values[0]
    assert first is not None
    assert first.shape is not None
    result = tape.op("Concat", values, {"axis": axis})
    sizes = list(first.shape)
    sizes[axis] = sum(_size(value, axis) for value in values)
    result.shape, result.type = ir.Shape(sizes), first.type
    return result


def _size(value: ir.Value | None, axis: int) -> int:
    assert value is not None
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size
