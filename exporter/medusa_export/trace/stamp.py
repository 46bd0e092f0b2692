"""Copies the traced layers of each kind to all layers of the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.values import add_initializer
from medusa_export.trace.layers import MARKER_DOMAIN
from medusa_runtime.bundle.cache_layout import CacheTensor

WeightLookup = Callable[[str], ir.TensorProtocol]


class UnlikeLayersError(Exception):
    """Two layers of one kind have different traces, or a value inside a layer is used outside of it."""


@dataclass
class LayerBlock:
    """One traced layer: the nodes between its two markers that depend on its input or its weights."""

    layer: int
    entry: ir.Node  # LayerInput
    exit: ir.Node  # LayerOutput
    past: tuple[ir.Value, ...]  # what it caches, in the order of its layer's tensors
    present: tuple[ir.Value, ...]
    nodes: list[ir.Node] = field(default_factory=list)  # in topological order


class StampLayers(GraphPass):
    """Replace the traced layers by all layers of the model, each a copy of the first layer of its kind.

    Needs: a trace made under `only_layers`, with a past and a present value for each tensor that a traced layer caches. A
    layer that reads another layer's cache reads it of a traced one.
    Result: no markers; past inputs and present outputs for every layer, in order; the weights of layers that were not traced,
    looked up by name.

    Args:
        kinds: layer indices grouped by kind. The first and the last of each kind were traced.
        cached: the tensors that each layer caches; those of layers of one kind correspond by their order.
        prefix: the start of a layer's weight names, such as ``model.layers.{layer}.``.
        weights: finds a weight by name.

    Raises:
        UnlikeLayersError: the first and the last layer of a kind have different traces. All layers must then be traced.
    """

    def __init__(
        self, kinds: list[list[int]], cached: Sequence[Sequence[CacheTensor]], prefix: str, weights: WeightLookup
    ) -> None:
        super().__init__()
        self.kinds, self.cached, self.prefix, self.weights = kinds, cached, prefix, weights

    def rewrite(self, model: ir.Model) -> int:
        """Copy the layers in place."""
        graph = model.graph
        blocks = {block.layer: block for block in self._blocks(graph)}
        for kind in self.kinds:
            if self._fingerprint(blocks[kind[0]]) != self._fingerprint(blocks[kind[-1]]):
                raise UnlikeLayersError(f"layers {kind[0]} and {kind[-1]}")
        representative = {layer: blocks[kind[0]] for kind in self.kinds for layer in kind}

        ordered = sorted(blocks.values(), key=lambda block: block.layer)
        hidden, result = ordered[0].entry.inputs[0], ordered[-1].exit.outputs[0]
        assert hidden is not None  # a marker always has an input
        pasts: list[ir.Value] = []
        presents: list[ir.Value] = []
        stamped: dict[ir.Value, ir.Value] = {}  # cache values of the trace -> those of the same layer's copy
        for layer in sorted(representative):
            hidden, past, present = self._copy(graph, representative[layer], layer, hidden, stamped)
            pasts += past
            presents += present
            if layer in blocks:
                stamped |= zip((*blocks[layer].past, *blocks[layer].present), (*past, *present), strict=True)
        result.replace_all_uses_with(hidden, replace_graph_outputs=True)

        traced_pasts = {value for block in ordered for value in block.past}
        traced_presents = {value for block in ordered for value in block.present}
        graph.inputs[:] = [*(value for value in graph.inputs if value not in traced_pasts), *pasts]
        graph.outputs[:] = [*(value for value in graph.outputs if value not in traced_presents), *presents]
        for block in reversed(ordered):
            graph.remove([block.entry, *block.nodes, block.exit], safe=True)
            for value in block.past:
                value.replace_all_uses_with(stamped[value])
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
        graph.sort()
        return len(representative)

    def _blocks(self, graph: ir.Graph) -> Iterator[LayerBlock]:
        markers: dict[tuple[str, int], ir.Node] = {
            (node.op_type, node.attributes["layer"].as_int()): node for node in graph if node.domain == MARKER_DOMAIN
        }
        inputs = {value.name: value for value in graph.inputs}
        outputs = {value.name: value for value in graph.outputs}
        for kind, layer in markers:
            if kind == "LayerInput":
                block = LayerBlock(
                    layer,
                    markers["LayerInput", layer],
                    markers["LayerOutput", layer],
                    tuple(inputs[tensor.past] for tensor in self.cached[layer]),
                    tuple(outputs[tensor.present] for tensor in self.cached[layer]),
                )
                block.nodes = self._private_nodes(graph, block)
                yield block

    def _private_nodes(self, graph: ir.Graph, block: LayerBlock) -> list[ir.Node]:
        prefix = self.prefix.format(layer=block.layer)
        own: set[ir.Value] = {block.entry.outputs[0]}  # not the cache: the mask takes the capacity from one layer's cache
        own |= {value for name, value in graph.initializers.items() if name.startswith(prefix)}
        wanted = self._ancestors(block)
        nodes = []
        for node in graph:
            if node in wanted and any(value in own for value in node.inputs if value is not None):
                nodes.append(node)
                own.update(node.outputs)
        inside = {*nodes, block.exit}
        for node in nodes:
            for output in node.outputs:
                if output in block.present:  # later layers may read it
                    continue
                if output.is_graph_output() or any(usage.node not in inside for usage in output.uses()):
                    raise UnlikeLayersError(f"{output.name} of layer {block.layer} is used outside it")
        return nodes

    @staticmethod
    def _ancestors(block: LayerBlock) -> set[ir.Node]:
        """Every node that the layer's results depend on, back to its entry."""
        found: set[ir.Node] = set()
        pending = [block.exit.inputs[0], *block.present]
        while pending:
            value = pending.pop()
            node = value.producer() if value is not None else None
            if node is None or node is block.entry or node in found:
                continue
            found.add(node)
            pending += node.inputs
        return found

    def _fingerprint(self, block: LayerBlock) -> list[object]:
        """A description of a block's computation without its layer index. It is equal for two layers of one kind."""
        prefix = self.prefix.format(layer=block.layer)
        names: dict[ir.Value, object] = {
            block.entry.outputs[0]: "hidden",
            **{value: ("past", place) for place, value in enumerate(block.past)},
        }

        def describe(value: ir.Value | None) -> object:
            if value is None or value in names:
                return None if value is None else names[value]
            if value.is_initializer() and (value.name or "").startswith(prefix):
                return (value.name or "").removeprefix(prefix)
            return value.name  # shared by all layers

        described: list[object] = []
        for position, node in enumerate(block.nodes):
            described.append(
                (
                    node.domain,
                    node.op_type,
                    tuple(describe(value) for value in node.inputs),
                    tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())),
                )
            )
            names.update({output: (position, index) for index, output in enumerate(node.outputs)})
        described.append(tuple(describe(value) for value in (block.exit.inputs[0], *block.present)))
        return described

    def _copy(
        self, graph: ir.Graph, block: LayerBlock, layer: int, hidden: ir.Value, stamped: Mapping[ir.Value, ir.Value]
    ) -> tuple[ir.Value, list[ir.Value], list[ir.Value]]:
        """Append a copy of the block as the given layer. Returns its result, its past inputs and its present outputs."""
        past = [_like(value, tensor.past) for value, tensor in zip(block.past, self.cached[layer], strict=True)]
        values = {**stamped, block.entry.outputs[0]: hidden, **dict(zip(block.past, past, strict=True))}
        old, new = self.prefix.format(layer=block.layer), self.prefix.format(layer=layer)

        def mapped(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in values:
                return None if value is None else values[value]
            if value.is_initializer() and (value.name or "").startswith(old):
                name = new + (value.name or "").removeprefix(old)
                if name not in graph.initializers:
                    add_initializer(graph, name, self.weights(name))
                return graph.initializers[name]
            return value

        sizes = {name for value in graph.inputs for name in _symbols(value.shape)}
        for node in block.nodes:
            copy = ir.Node(
                node.domain,
                node.op_type,
                [mapped(value) for value in node.inputs],
                node.attributes.values(),
                num_outputs=len(node.outputs),
                name=f"layers.{layer}.{node.name}",
            )
            for before, after in zip(node.outputs, copy.outputs, strict=True):
                after.name, after.shape, after.type = (
                    f"layers.{layer}.{before.name}",
                    known_sizes(before.shape, sizes),
                    before.type,
                )
                values[before] = after
            graph.append(copy)
        present = [values[value] for value in block.present]
        for value, tensor in zip(present, self.cached[layer], strict=True):
            value.name = tensor.present
        result = mapped(block.exit.inputs[0])
        assert result is not None
        return result, past, present


def known_sizes(shape: ir.Shape | None, sizes: set[str]) -> ir.Shape | None:
    """A shape without the names of sizes that depend on data, such as an expert's number of tokens.

    In each layer they are others, and ONNX Runtime takes sizes of one name for equal.

    Args:
        shape: a value's shape, in which a size may be an expression.
        sizes: the names of the inputs' sizes.
    """
    if shape is None:
        return None
    return ir.Shape([size if isinstance(size, int) or _symbols([size]) <= sizes else None for size in shape])


def _symbols(shape: Iterable[int | ir.SymbolicDim] | None) -> set[str]:
    return {
        name for size in shape or () if not isinstance(size, int) for name in re.findall(r"[A-Za-z_]\w*", size.value or "?")
    }


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)
