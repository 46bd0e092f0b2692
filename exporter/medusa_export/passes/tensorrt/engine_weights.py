"""Quantises the weights of matrix products to 8 or 4 bits, symmetrically (without zero points) as TensorRT requires."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.values import add_initializer, shape_of
from medusa_runtime.bundle.manifest import EngineWeights

Matrix = npt.NDArray[np.float32]
MIN_SIZE = 4096  # elements; a smaller matrix is not worth quantising
BLOCK_SIZES = (128, 64)  # inputs that share a scale in 4 bits
INT8_MAX, INT4_MAX, FP8_MAX = 127, 7, 448
CUTS = (1.0, 0.95, 0.9, 0.85, 0.8)  # parts of a block's range that the 4-bit codes cover; the best one is used
_LEAST = {ir.DataType.FLOAT: 2.0**-126, ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}  # normal numbers
_STORED = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}


class QuantizeEngineWeights(ir.passes.InPlacePass):
    """Store the weights of matrix products in fewer bits. The products are still computed in the graph's dtype.

    Needs: a graph as the exporter writes it.
    Result: each large weight of a ``MatMul`` or ``Gemm`` is under a ``DequantizeLinear``, rounded to nearest. int8 and fp8
    (e4m3) have one scale per output; int4 has one per output and block of 128 or 64 inputs. A weight that cannot be divided
    into such blocks gets int8, and so does the LM head, as 4 bits hurt it most. A weight from which rows are also gathered (a
    tied embedding) is stored a second time, unquantised.

    Args:
        weights: how to store the weights.
        vocab_size: number of outputs by which the LM head is recognised.
    """

    def __init__(self, weights: EngineWeights, vocab_size: int) -> None:
        super().__init__()
        self.weights = weights
        self.vocab_size = vocab_size

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        stored: dict[ir.Value, ir.Value] = {}
        for node, weight, input_axis in list(_products(model.graph)):
            if weight not in stored:
                stored[weight] = self._store(model.graph, weight, input_axis)
            _read(node, weight, stored[weight])
        for weight in stored:
            if not weight.uses():
                del model.graph.initializers[weight.name or ""]
        return ir.passes.PassResult(model, modified=bool(stored))

    def _store(self, graph: ir.Graph, weight: ir.Value, input_axis: int) -> ir.Value:
        """Add the weight's codes and scales as initializers. Returns the dequantised weight."""
        tensor, name = weight.const_value, weight.name or ""
        assert tensor is not None
        shape = shape_of(tensor).numpy()
        inputs, outputs = shape[input_axis], shape[1 - input_axis]
        kind, block = self._form(inputs, outputs)
        groups = inputs // block

        def rounded(place: int) -> npt.NDArray[np.generic]:
            matrix = tensor.numpy().astype(np.float32)
            part = round_weight(matrix if input_axis == 0 else matrix.T, kind, tensor.dtype, groups)[place]
            return part if input_axis == 0 else part.T

        by_block = kind == "int4"
        scale_shape = [outputs]
        if by_block:
            scale_shape = [groups, outputs] if input_axis == 0 else [outputs, groups]
        codes = _lazy(f"{name}.{kind}", _STORED[kind], shape, lambda: rounded(0))
        scales = _lazy(f"{name}.scale", tensor.dtype, scale_shape, lambda: rounded(1).reshape(scale_shape))
        node = ir.node(
            "DequantizeLinear",
            [add_initializer(graph, part.name or "", part) for part in (codes, scales)],
            {"axis": input_axis, "block_size": block} if by_block else {"axis": 1 - input_axis},
            name=f"{name}.dequantize",
        )
        result = node.outputs[0]
        result.name, result.shape, result.type = f"{name}.{kind}.read", weight.shape, weight.type
        graph.insert_before(graph[0], node)
        return result

    def _form(self, inputs: int, outputs: int) -> tuple[str, int]:
        """The type that a weight is stored in, and the number of inputs that share a scale."""
        block = next((size for size in BLOCK_SIZES if inputs % size == 0), None)
        if self.weights != "int4":
            return self.weights, inputs
        return ("int8", inputs) if block is None or outputs == self.vocab_size else ("int4", block)


def round_weight(
    weight: Matrix, kind: str, dtype: ir.DataType, groups: int = 1
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Codes and scales of a weight. The scales are rounded first, then each code is the one nearest to weight / scale.

    Args:
        weight: [K, N].
        kind: ``int8``, ``int4`` or ``fp8``.
        dtype: the scales' type.
        groups: G, the number of blocks of inputs with their own scales. G divides K.

    Returns:
        codes [K, N] and scales [G, N].
    """
    blocks = weight.reshape(groups, -1, weight.shape[1])  # [G, K / G, N]
    largest = np.abs(blocks).max(1, keepdims=True)
    if kind == "fp8":
        scale = _scale(largest / FP8_MAX, dtype)
        codes = np.clip(blocks / scale, -FP8_MAX, FP8_MAX).astype(ir.DataType.FLOAT8E4M3FN.numpy())
    elif kind == "int8":
        scale = _scale(largest / INT8_MAX, dtype)
        codes = np.clip(np.rint(blocks / scale), -INT8_MAX, INT8_MAX).astype(np.int8)
    else:
        scale = _best_scale(blocks, largest, dtype)
        codes = _int4(blocks, scale).astype(ir.DataType.INT4.numpy())
    return codes.reshape(weight.shape), scale[:, 0].astype(dtype.numpy())


def _scale(scale: npt.NDArray[np.floating], dtype: ir.DataType) -> Matrix:
    """The scale rounded to the dtype, and never 0."""
    rounded: Matrix = np.maximum(scale, np.float32(_LEAST[dtype])).astype(dtype.numpy()).astype(np.float32)
    return rounded


def _int4(blocks: Matrix, scale: Matrix) -> Matrix:
    codes: Matrix = np.clip(np.rint(blocks / scale), -INT4_MAX - 1, INT4_MAX)
    return codes


def _best_scale(blocks: Matrix, largest: Matrix, dtype: ir.DataType) -> Matrix:
    """The scale with the least squared error, of several that clip the outermost values more and more."""
    scales = np.stack([_scale(largest * cut / INT4_MAX, dtype) for cut in CUTS])  # [cuts, G, 1, N]
    errors = [np.square(_int4(blocks, scale) * scale - blocks).sum(1, keepdims=True) for scale in scales]
    best: Matrix = np.take_along_axis(scales, np.argmin(errors, axis=0)[None], 0)[0]
    return best


def _products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, int]]:
    """The matrix products with a large weight: the node that reads the weight, the weight, and the axis of its inputs."""
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight, reader = node.inputs[1], node
        turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        assert weight is not None
        producer = weight.producer()
        if producer is not None and producer.op_type == "Transpose":
            weight, reader, turned = producer.inputs[0], producer, not turned
        if weight is not None and _is_large_matrix(weight):
            yield reader, weight, 1 if turned else 0


def _is_large_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and value.is_initializer() and len(tensor.shape) == 2 and tensor.size >= MIN_SIZE


def _read(node: ir.Node, before: ir.Value, after: ir.Value) -> None:
    for index, value in enumerate(node.inputs):
        if value is before:
            node.replace_input_with(index, after)


def _lazy(name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], npt.NDArray[np.generic]]) -> ir.LazyTensor:
    """A tensor that is computed when it is written, so that at most one is in memory."""

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(make()), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)
