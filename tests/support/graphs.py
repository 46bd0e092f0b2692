"""Small graphs from text, and what ONNX Runtime computes with them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from medusa_runtime.bundle.cpu import has_exact_products

# As portable graphs make it, [B, 1, T, S]: needs the constants zero, one and ones, and the inputs of a step.
TREE_MASK = """capacity = Shape <start = 2, end = 3> (past_0_key)
  size = Squeeze (capacity)
  tokens = Shape <start = 1, end = 2> (input_ids)
  count = Squeeze (tokens)
  entries = Range (zero, size, one)
  starts = Unsqueeze (cache_lengths, ones)
  offsets = Sub (entries, starts)
  is_cached = Less (offsets, zero)
  not_before = GreaterOrEqual (offsets, zero)
  not_after = Less (offsets, count)
  is_new = And (not_before, not_after)
  last = Sub (count, one)
  clipped = Clip (offsets, zero, last)
  index = Unsqueeze (clipped, ones)
  sizes = Concat <axis = 0> (ones, tokens, ones)
  indices = Expand (index, sizes)
  named = GatherElements <axis = 2> (tree_mask, indices)
  is_new_3 = Unsqueeze (is_new, ones)
  seen_new = And (named, is_new_3)
  is_cached_3 = Unsqueeze (is_cached, ones)
  either = Or (is_cached_3, seen_new)
  mask = Unsqueeze (either, ones)"""
HEADER = '<ir_version: 10, opset_import: ["" : 24]>\n'


def parse(text: str, **weights: np.ndarray) -> ir.Model:
    """A graph in ONNX's text form, with all types known. Inputs with a weight of their name become initializers."""
    model = ir.from_onnx_text(HEADER + text)
    for name, array in weights.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


def outputs(model: ir.Model, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Every output of a graph, by name. Its nodes must be in order, and the checker find it valid where it is standard."""
    require_order(model)
    proto = ir.to_proto(model)
    if all(node.domain == "" for node in model.graph):
        onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # or it rounds what int8 is multiplied with
    if "MatMulIntegerToFloat" in kinds(model) and not has_exact_products():  # as the runtime opens such graphs
        options.add_session_config_entry("session.x64quantprecision", "1")
        proto = _used(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _used(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without nodes that nothing reads, as bundles are: with that setting, ONNX Runtime stores a weight for one reader."""
    model = ir.from_proto(proto)
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    """The first output."""
    return next(iter(outputs(model, **feeds).values()))


def require_order(model: ir.Model) -> None:
    """Every node reads only what is there before it; ONNX Runtime would sort them, others would not."""
    known: set[ir.Value | None] = {None, *model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        assert known.issuperset(node.inputs), node
        known.update(node.outputs)


def kinds(model: ir.Model) -> list[str]:
    """The operators, in order."""
    return [node.op_type for node in model.graph]
