"""Quantises the weights of matrix products to 8 or 4 bits, symmetrically (without zero points) as TensorRT requires."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.linears import FLOAT_TYPES, Linear, linears, lm_heads
from medusa_export.passes.common.rounding import round_symmetrically
from medusa_export.passes.common.values import Together, add_initializer, lazy_tensor
from medusa_runtime.bundle.manifest import EngineWeights

BLOCK_SIZES = (128, 64)  # inputs that share a scale in 4 bits
_STORED = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}


class QuantizeEngineWeights(GraphPass):
    """Store the weights of matrix products in fewer bits. The products are still computed in the graph's dtype.

    Needs: a graph as the exporter writes it.
    Result: each large weight of a ``MatMul`` or ``Gemm`` is under a ``DequantizeLinear``, rounded to nearest. int8 and fp8
    (e4m3) have one scale per output; int4 has one per output and block of 128 or 64 inputs. A weight that cannot be divided
    into such blocks gets int8, and so does the LM head, as 4 bits hurt it most. A weight from which rows are also gathered (a
    tied embedding) is stored a second time, unquantised.

    Args:
        weights: how to store the weights.
    """

    def __init__(self, weights: EngineWeights) -> None:
        super().__init__()
        self.weights = weights

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite in place."""
        stored: dict[ir.Value, ir.Value] = {}
        last = lm_heads(model.graph)
        for linear in list(linears(model.graph, FLOAT_TYPES)):
            if linear.weight not in stored:
                stored[linear.weight] = self._store(model.graph, linear, is_lm_head=linear.weight in last)
            place = next(place for place, value in enumerate(linear.reader.inputs) if value is linear.weight)
            linear.reader.replace_input_with(place, stored[linear.weight])
        for weight in stored:
            if not weight.uses():
                del model.graph.initializers[weight.name or ""]
        return len(stored)

    def _store(self, graph: ir.Graph, linear: Linear, *, is_lm_head: bool) -> ir.Value:
        """Add the weight's codes and scales as initializers. Returns the dequantised weight."""
        weight, tensor, name, axis = linear.weight, linear.weight.const_value, linear.weight.name or "", linear.input_axis
        assert tensor is not None
        inputs, outputs = linear.num_inputs, linear.num_outputs
        kind, block = self._form(inputs, is_lm_head=is_lm_head)
        groups = inputs // block

        def store() -> list[npt.NDArray[np.generic]]:
            matrix = tensor.numpy().astype(np.float32)
            parts = round_symmetrically(matrix.T if linear.transposed else matrix, kind, tensor.dtype, groups)
            return [part.T if linear.transposed else part for part in parts]

        rounded = Together(store)
        by_block = kind == "int4"
        scale_shape = [outputs]
        if by_block:
            scale_shape = [outputs, groups] if linear.transposed else [groups, outputs]
        whole = [outputs, inputs] if linear.transposed else [inputs, outputs]
        codes = lazy_tensor(f"{name}.{kind}", _STORED[kind], whole, lambda: rounded.part(0))
        scales = lazy_tensor(f"{name}.scale", tensor.dtype, scale_shape, lambda: rounded.part(1).reshape(scale_shape))
        node = ir.node(
            "DequantizeLinear",
            [add_initializer(graph, part.name or "", part) for part in (codes, scales)],
            {"axis": axis, "block_size": block} if by_block else {"axis": 1 - axis},
            name=f"{name}.dequantize",
        )
        result = node.outputs[0]
        result.name, result.shape, result.type = f"{name}.{kind}.read", weight.shape, weight.type
        graph.insert_before(graph[0], node)
        return result

    def _form(self, inputs: int, *, is_lm_head: bool) -> tuple[str, int]:
        """The type that a weight is stored in, and the number of inputs that share a scale."""
        block = next((size for size in BLOCK_SIZES if inputs % size == 0), None)
        if self.weights != "int4":
            return self.weights, inputs
        return ("int8", inputs) if block is None or is_lm_head else ("int4", block)
