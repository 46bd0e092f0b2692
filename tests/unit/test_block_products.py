"""Products with weights in blocks: the operator that reads them as they are stored, and several of them as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.bundle.weights_file import write_weights
from medusa_export.passes.common.block_products import BlockProducts
from medusa_export.passes.ort_cpu.merge_projections import MergeProjections
from medusa_export.passes.quantize.integer_weights import QuantizeWeights, Storage
from tests.support.graphs import kinds, outputs, parse

IN_FLOAT, IN_8_BITS = 1, 4
STORAGES: list[Storage] = ["int8-blocks", "int8-wide-blocks", "int4"]
PROJECTIONS = """
g (float[B,T,{K}] x, float[{K},96] q, float[{K},48] k, float[48] bias, float[96] bias_q) => (float[B,T,96] qx, float[B,T,48] kx)
{{ q0 = MatMul (x, q)
  qx = Add (q0, bias_q)
  k0 = MatMul (x, k)
  kx = Add (k0, bias) }}"""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("f")


def quantized(storage: Storage, num_inputs: int = 128) -> ir.Model:
    weights = {"q": normal(num_inputs, 96), "k": normal(num_inputs, 48, seed=1)}
    model = parse(PROJECTIONS.format(K=num_inputs), **weights, bias=normal(48), bias_q=normal(96))
    assert QuantizeWeights(lambda _: storage)(model).modified
    return model


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("num_inputs", [128, 96])  # 96: three blocks, so a row of 4-bit zero points ends within a byte
@pytest.mark.parametrize("is_merged", [False, True])
def test_products_are_the_same(storage: Storage, num_inputs: int, is_merged: bool) -> None:
    model, feeds = quantized(storage, num_inputs), {"x": normal(2, 3, num_inputs, seed=4)}
    before = outputs(model, **feeds)
    assert BlockProducts(IN_FLOAT)(model).modified
    assert kinds(model).count("MatMulNBits") == 2
    assert "MatMul" not in kinds(model)
    if is_merged:
        assert MergeProjections()(model).modified
        assert (kinds(model).count("MatMulNBits"), kinds(model).count("Add")) == (1, 1)
    after = outputs(model, **feeds)
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("storage", STORAGES)
def test_activations_in_8_bits_are_near(storage: Storage) -> None:
    model, feeds = quantized(storage), {"x": normal(2, 3, 128, seed=4)}
    exact = outputs(model, **feeds)
    BlockProducts(IN_8_BITS)(model)
    for name, array in outputs(model, **feeds).items():
        assert 0 < np.abs(array - exact[name]).max() < 0.02 * np.abs(exact[name]).max()


def test_a_table_is_gathered_and_multiplied() -> None:
    text = """g (int64[T] ids, float[96,64] w) => (float[T,64] x, float[T,96] y)
    { x = Gather <axis = 0> (w, ids)
      t = Transpose <perm = [1, 0]> (w)
      y = MatMul (x, t) }"""
    model = parse(text, w=normal(96, 64))
    QuantizeWeights(lambda _: "int8-blocks")(model)
    ids = np.array([3, 95, 0])
    before = outputs(model, ids=ids)
    BlockProducts(IN_FLOAT)(model)
    for name, array in outputs(model, ids=ids).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_stay_where_they_are_in_the_file(storage: Storage, tmp_path: Path) -> None:
    model = quantized(storage, 512)
    size = write_weights([model], tmp_path).size
    derived = model.clone()
    BlockProducts(IN_FLOAT)(derived)
    own = {value.const_value.offset for value in model.graph.initializers.values() if _is_external(value)}
    read = {
        value.const_value.offset
        for node in derived.graph
        if node.op_type == "MatMulNBits"
        for value in node.inputs[1:]
        if value is not None and _is_external(value)
    }
    assert read <= own
    assert len(read) >= 3  # the smallest tensors stand in the graph
    (tmp_path / "again").mkdir()
    assert write_weights([model, derived], tmp_path / "again").size == size


def _is_external(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor)


def test_products_that_differ_in_bits_are_not_merged() -> None:
    weights = {"q": normal(128, 96), "k": normal(128, 48, seed=1)}
    model = parse(PROJECTIONS.format(K=128), **weights, bias=normal(48), bias_q=normal(96))
    storages: dict[str, Storage] = {"q": "int4", "k": "int8-blocks"}
    QuantizeWeights(storages.__getitem__)(model)
    BlockProducts(IN_FLOAT)(model)
    assert not MergeProjections()(model).modified


def test_codes_that_are_gathered_first_are_left_alone() -> None:
    """As those of experts are: they have no place in the file of their own."""
    text = """g (float[T,64] x, int64[1] n, uint8[2,96,64] codes, float[2,96,2] scales, uint8[96,2] zeros) => (float[T,96] y)
    { one = Gather <axis = 0> (codes, n)
      flat = Squeeze (one)
      its = Gather <axis = 0> (scales, n)
      flat_scales = Squeeze (its)
      w = DequantizeLinear <axis = 1, block_size = 32> (flat, flat_scales, zeros)
      t = Transpose <perm = [1, 0]> (w)
      y = MatMul (x, t) }"""
    codes = np.random.default_rng(0).integers(0, 256, (2, 96, 64)).astype(np.uint8)
    model = parse(text, codes=codes, scales=np.abs(normal(2, 96, 2)), zeros=np.full((96, 2), 128, np.uint8))
    assert not BlockProducts(IN_FLOAT)(model).modified


def test_other_products_are_left_alone() -> None:
    model = quantized("int8")
    assert not BlockProducts(IN_FLOAT)(model).modified
    turned = "g (float[T,64] x, float[96,64] w) => (float[T,96] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }"
    assert not BlockProducts(IN_FLOAT)(parse(turned, w=normal(96, 64))).modified
