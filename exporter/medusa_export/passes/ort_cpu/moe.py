"""Computes experts by ONNX Runtime's contributed operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.roles import Part, parts
from medusa_export.passes.common.values import constant, replace
from medusa_export.passes.portable.expand_experts import EXPERTS_PART, LINEAR_PART

TINY = 1e-30  # in place of a weight of 0, whose logarithm is not a number to calculate with
NAMES = {"swiglu": "swiglu", "relu": "relu", "gelu_tanh": "gelu", "silu": "silu", "identity": "identity"}  # as `MoE` says it


class FuseExperts(GraphPass):
    """Replace a layer of experts by ``MoE``, or by ``QMoE`` if its weights are quantised in blocks.

    Needs: a float32 graph with layers as `ExpandExperts` writes them, and an activation that the operators have.
    Result: one operator, which reads only the weights of experts that some token chose, and copies none of them.
    ``MoE`` takes the logarithm of the chosen experts' weights as router logits: its softmax gives their shares, and the sum of
    the weights restores their size. ``QMoE`` takes the weights as they are.
    """

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        matched = 0
        for layer in parts(model.graph, EXPERTS_PART):
            if (reason := _unfit(layer)) is not None:
                self.decline(reason)
                continue
            _fuse(model.graph, layer)
            matched += 1
        if matched:
            model.opset_imports["com.microsoft"] = 1
        for _ in parts(model.graph, LINEAR_PART):
            self.decline("a linear layer of experts that stands alone, for which there is no operator")
        return matched


def _unfit(layer: Part) -> str | None:
    """Why the operators cannot compute a layer; None if they can."""
    if (activation := layer.facts["activation"]) not in NAMES:
        return f"experts with the activation {activation}, which the operators do not have"
    if not layer.read("x").dtype == layer.read("weights").dtype == ir.DataType.FLOAT:
        return "experts that are not computed in float32"
    return "experts whose number is not known" if layer.read("down").shape is None else None


def _fuse(graph: ir.Graph, layer: Part) -> None:
    ids, weights, down = (layer.read(role) for role in ("ids", "weights", "down"))
    assert down.shape is not None
    tape = ir.tape.Tape()
    biases = [layer.read(role) if role in layer.nodes else None for role in ("up_bias", "down_bias")]
    routing = _routing(graph, tape, ids, weights, int(str(down.shape[0])))
    if "down_scales" in layer.nodes:
        result = _quantized(graph, tape, layer, routing, biases)
    else:
        result = _float(graph, tape, layer, routing, biases)
    node = layer.nodes["result"]
    graph.insert_before(node, tape.nodes)
    replace(layer.result, result)
    graph.remove(node, safe=True)


def _float(graph: ir.Graph, tape: ir.tape.Tape, layer: Part, routing: ir.Value, biases: list[ir.Value | None]) -> ir.Value:
    x, weights, up, down = (layer.read(role) for role in ("x", "weights", "up", "down"))
    logits = tape.op("Log", [tape.op("Max", [routing, constant(graph, "tiny", TINY)])])
    fused = tape.op("MoE", [x, logits, up, biases[0], down, biases[1]], _attributes(layer), domain="com.microsoft")
    total = tape.op("ReduceSum", [weights, constant(graph, "last_axis", [-1])], {"keepdims": 1})
    return tape.op("Mul", [_apart(graph, tape, fused, x), total])


def _quantized(graph: ir.Graph, tape: ir.tape.Tape, layer: Part, routing: ir.Value, biases: list[ir.Value | None]) -> ir.Value:
    x, up, up_scales, down, down_scales = (layer.read(role) for role in ("x", "up", "up_scales", "down", "down_scales"))
    zeros = [layer.read(role) if role in layer.nodes else None for role in ("up_zeros", "down_zeros")]
    assert x.shape is not None
    assert up_scales.shape is not None
    width, blocks = x.shape[-1], up_scales.shape[2]
    assert isinstance(width, int)
    assert isinstance(blocks, int)
    attributes = _attributes(layer) | {
        "expert_weight_bits": 8 if zeros[0] is None else 4,
        "block_size": width // blocks,
        "accuracy_level": 4,  # activations in 8 bits, with a scale for each row and block
    }
    first, second = [up, up_scales, biases[0]], [down, down_scales, biases[1]]
    inputs = [x, routing, *first, *second, None, None, None, *zeros, None, routing]
    return _apart(graph, tape, tape.op("QMoE", inputs, attributes, domain="com.microsoft"), x)


def _apart(graph: ir.Graph, tape: ir.tape.Tape, result: ir.Value, x: ir.Value) -> ir.Value:
    """The result, in memory of its own.

    The kernel of ONNX Runtime 1.31 gives zeros if its output takes the place of x, so x must be read once more after it.
    """
    return tape.op("Where", [constant(graph, "always", np.bool_(True)), result, x])


def _routing(graph: ir.Graph, tape: ir.tape.Tape, ids: ir.Value, weights: ir.Value, num_experts: int) -> ir.Value:
    """The weight of each expert for each token, 0 for those that it did not choose. [N, E]"""
    count = tape.op("Shape", [ids], {"start": 0, "end": 1})
    shape = tape.op("Concat", [count, constant(graph, f"experts_count_{num_experts}", [num_experts])], {"axis": 0})
    nothing = tape.op("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.float32))})
    return tape.op("ScatterElements", [nothing, ids, weights], {"axis": 1})


def _attributes(layer: Part) -> dict[str, int | float | str]:
    facts = layer.facts
    attributes: dict[str, int | float | str] = {"k": facts["chosen"], "activation_type": NAMES[facts["activation"]]}
    if facts["activation"] == "swiglu":
        attributes |= {"swiglu_fusion": 1, "activation_alpha": facts["alpha"], "activation_beta": facts["beta"]}
        if facts["limit"]:
            attributes["swiglu_limit"] = facts["limit"]
    return attributes
