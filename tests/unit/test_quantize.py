"""Weights in 8 and 4 bits, smoothing, and the measured loss of quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medusa_export.check.quality import CHUNK, Quality, compare
from medusa_export.passes.common.rounding import BLOCK_SIZE, to_int8, to_int8_blocks, to_uint4
from medusa_export.passes.quantize.integer_weights import QuantizeWeights, Storage, block_size
from medusa_export.passes.quantize.smooth import Smooth, junctions, with_maxima
from medusa_export.quantize.calibration_text import MOST_PIECES, PIECE_TOKENS, answered, pieces
from medusa_runtime import DecodingEngine, OptionError
from medusa_runtime.backends.base import StepOutput
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend, fake_manifest, greedy, logits_after
from tests.support.graphs import kinds, outputs, parse

WEIGHTS = st.floats(-(2.0**40), 2.0**40, width=32)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=WEIGHTS)
BLOCKS = hnp.arrays(np.float32, st.tuples(st.sampled_from([32, 64]), st.integers(1, 3)), elements=WEIGHTS)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("f")


# --- the codes


@given(weight=MATRICES, axis=st.integers(0, 1))
@settings(deadline=None)
def test_eight_bits_are_within_half_a_step_of_the_weight(weight: np.ndarray, axis: int) -> None:
    codes, scale = to_int8(weight, axis)
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    assert codes.shape == weight.shape
    assert scale.shape == (weight.shape[1 - axis],)
    assert codes.min() >= -127
    scale = np.expand_dims(scale, axis)
    assert (np.abs(codes * scale - weight) <= scale * 0.5001).all()
    largest = np.abs(weight).max(axis, keepdims=True)
    assert (scale <= np.maximum(largest / 127 * (1 + 1e-6), 2e-38)).all()  # no step is larger than it must be


def test_eight_bits_keep_extremes_and_zeros() -> None:
    codes, scale = to_int8(np.array([[0, 0, 0], [-3, 3, 1.5], [1e-38, 0, -1e-38]], "f"), 1)
    assert codes[0].tolist() == [0, 0, 0]
    assert codes[1].tolist() == [-127, 127, 64]
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


@given(weight=BLOCKS)
@settings(deadline=None)
@pytest.mark.parametrize("size", [16, BLOCK_SIZE])
def test_eight_bits_in_blocks_are_within_half_a_step_of_the_blocks(size: int, weight: np.ndarray) -> None:
    codes, scale = to_int8_blocks(weight, size)
    assert codes.shape == weight.shape
    assert scale.shape == (weight.shape[0] // size, weight.shape[1])
    for start in range(0, len(weight), size):
        alone, of_block = to_int8(weight[start : start + size], 0)
        np.testing.assert_array_equal(codes[start : start + size], alone)
        np.testing.assert_array_equal(scale[start // size], of_block)


def test_wide_blocks_are_the_largest_that_divide_a_row() -> None:
    sizes = {576: 64, 1536: 128, 2048: 128, 96: 32, 160: 32, 64: 64}
    assert {width: block_size("int8-wide-blocks", width) for width in sizes} == sizes
    assert {block_size(storage, 128) for storage in ("int8-blocks", "int4")} == {BLOCK_SIZE}


@given(weight=BLOCKS)
@settings(deadline=None)
def test_four_bits_are_no_worse_than_an_even_grid_over_the_range(weight: np.ndarray) -> None:
    codes, scale, zero = to_uint4(weight)
    assert codes.dtype == zero.dtype == np.uint8
    assert scale.dtype == np.float32
    assert codes.shape == weight.shape
    assert scale.shape == zero.shape == (weight.shape[0] // BLOCK_SIZE, weight.shape[1])
    assert codes.max() <= 15
    assert zero.max() <= 15
    assert (scale > 0).all()
    blocks = weight.reshape(-1, BLOCK_SIZE, weight.shape[1]).astype(np.float64)
    found = (codes.reshape(blocks.shape).astype(np.float64) - zero[:, None]) * scale[:, None]
    assert ((found - blocks)[blocks == 0] == 0).all()  # a zero stays one
    even, step = even_grid(blocks)
    assert (squares(found, blocks) <= squares(even, blocks) * 1.001 + np.square(step) * 1e-4 + 1e-70).all()


def even_grid(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each block rounded to sixteen values that span its range, one of them zero; and their distance. [.., 32, N], [.., N]"""
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    step = np.maximum(high - low, 1e-300) / 15
    zero = np.rint(-low / step)
    codes = np.clip(np.rint(blocks / step[:, None]) + zero[:, None], 0, 15)
    return (codes - zero[:, None]) * step[:, None], step


def squares(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.square(found - exact).sum(1)


def test_four_bits_keep_sixteen_values_as_they_are() -> None:
    weight = np.tile(np.arange(-5, 11, dtype="f"), 2)[:, None] * 0.25  # [32, 1]
    codes, scale, zero = to_uint4(weight)
    np.testing.assert_allclose((codes.astype("f") - zero) * scale, weight, rtol=1e-6)
    for constant in (0.0, 2.0, -2.0):
        codes, scale, zero = to_uint4(np.full((32, 2), constant, "f"))
        np.testing.assert_allclose((codes.astype("f") - zero) * scale, constant, rtol=1e-6)


def test_four_bits_cut_off_outliers_where_that_is_nearer_to_the_rest() -> None:
    blocks = normal(1, 32, 500)
    codes, scale, zero = to_uint4(blocks[0])
    even, step = even_grid(blocks)
    assert (scale < step * 0.99).mean() > 0.3
    assert squares((codes.astype("f") - zero) * scale, blocks).sum() < squares(even, blocks).sum() * 0.97


# --- the pass


def standard(model: ir.Model) -> ir.Model:
    """The model, after checking that it is valid and has only standard operators."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert {node.domain for node in model.graph} == {""}
    return model


def quantized(model: ir.Model, storage: Storage = "int8") -> ir.Model:
    assert QuantizeWeights(lambda _: storage)(model).modified
    return standard(model)


def types(model: ir.Model) -> dict[str, tuple[str, list[Any]]]:
    """Types and shapes of the stored tensors, without constants of a few numbers."""
    values = [(name, value) for name, value in model.graph.initializers.items() if value.dtype and value.shape is not None]
    return {name: (value.dtype.name, list(value.shape)) for name, value in values if np.prod(list(value.shape)) > 8}


def near(storage: Storage, weight: np.ndarray, x: np.ndarray) -> float:
    """The largest error of a product with a rounded weight."""
    step = np.ptp(weight) / 15 if storage == "int4" else np.abs(weight).max() / 127 / 2
    return float(np.abs(x).sum(-1).max() * step)


STORAGES: list[Storage] = ["int8", "int8-blocks", "int8-wide-blocks", "int4"]
LINEAR = "g (float[T,64] x, float[64,96] w) => (float[T,96] y) { y = MatMul (x, w) }"
TIED = """
g (int64[T] ids, float[96,64] w) => (float[T,64] x, float[T,96] y)
{ x = Gather <axis = 0> (w, ids)
  t = Transpose <perm = [1, 0]> (w)
  y = MatMul (x, t) }"""


@pytest.mark.parametrize(
    ("storage", "stored"),
    [
        ("int8", {"w.int8": ("INT8", [64, 96]), "w.scale": ("FLOAT", [96])}),
        ("int8-blocks", {"w.uint8": ("UINT8", [96, 64]), "w.scale": ("FLOAT", [96, 2])}),
        ("int8-wide-blocks", {"w.uint8": ("UINT8", [96, 64]), "w.scale": ("FLOAT", [96, 1])}),
        ("int4", {"w.uint4": ("UINT4", [96, 64]), "w.scale": ("FLOAT", [96, 2]), "w.zero": ("UINT4", [96, 2])}),
    ],
)
def test_a_linear_layer_is_stored_in_integers(storage: Storage, stored: dict[str, tuple[str, list[int]]]) -> None:
    weight, x = normal(64, 96), normal(3, 64, seed=1)
    model = quantized(parse(LINEAR, w=weight), storage)
    assert types(model) == stored
    found = outputs(model, x=x)["y"]
    np.testing.assert_allclose(found, x @ weight, atol=near(storage, weight, x))
    assert not np.allclose(found, x @ weight, atol=1e-4)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "text",
    [
        "g (float[T,64] x, float[96,64] w) => (float[T,96] y) { t = Transpose <perm = [1, 0]> (w)\n y = MatMul (x, t) }",
        "g (float[T,64] x, float[96,64] w, float[96] b) => (float[T,96] y) { y = Gemm <transB = 1> (x, w, b) }",
        "g (float[T,64] x, float[64,96] w, float[96] b) => (float[T,96] y) { y = Gemm (x, w, b) }",
        "g (float[T,64] x, float[64,96] w) => (float[T,96] y) { y = Gemm (x, w) }",
    ],
)
def test_other_forms_of_a_linear_layer_are_stored_in_integers_too(text: str, storage: Storage) -> None:
    x = normal(3, 64, seed=1)
    weight = normal(*((96, 64) if "[96,64]" in text else (64, 96)))
    weights = {"w": weight} | ({"b": normal(96, seed=2)} if " b)" in text else {})
    exact = outputs(parse(text, **weights), x=x)["y"]
    model = quantized(parse(text, **weights), storage)
    assert "w" not in types(model)
    assert "Gemm" not in kinds(model)
    np.testing.assert_allclose(outputs(model, x=x)["y"], exact, atol=near(storage, weight, x))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_tied_table_stays_one_tensor_of_eight_bits(storage: Storage, rank: int) -> None:
    weight, ids = normal(96, 64), np.array([3, 95, 0])
    text = TIED
    if rank == 2:
        ids, text = np.stack([ids, ids[::-1]]), TIED.replace("T]", "B,T]").replace("[T,", "[B,T,")
    model = quantized(parse(text, w=weight), storage)
    in_blocks = {"w.uint8": ("UINT8", [96, 64]), "w.scale": ("FLOAT", [96, 1 if storage == "int8-wide-blocks" else 2])}
    assert types(model) == ({"w.int8": ("INT8", [96, 64]), "w.scale": ("FLOAT", [96])} if storage == "int8" else in_blocks)
    found = outputs(model, ids=ids)
    step = np.abs(weight).max(1, keepdims=True) / 127
    assert (np.abs(found["x"] - weight[ids]) <= step[ids] * 0.5001).all()
    np.testing.assert_allclose(found["y"], weight[ids] @ weight.T, atol=near("int8", weight, weight) * 2)


def test_a_table_in_blocks_is_nearer_than_one_with_a_scale_a_row() -> None:
    weight, ids = normal(96, 192), np.arange(96)
    weight[:, 0] *= 20  # an outlier, which spoils only its own block
    errors = {}
    for storage in ("int8", "int8-blocks", "int8-wide-blocks"):
        found = outputs(quantized(parse(TIED.replace(",64]", ",192]"), w=weight), storage), ids=ids)["x"]
        errors[storage] = np.abs(found - weight)[:, 64:].max()
    assert errors["int8-blocks"] < errors["int8-wide-blocks"] < errors["int8"] / 3


def test_two_readers_of_a_table_get_a_name_each() -> None:
    text = TIED.replace("float[T,96] y)", "float[T,96] y, float[T,96] z)").replace(
        "y = MatMul (x, t)", "y = MatMul (x, t)\n n = Neg (x)\n u = Transpose <perm = [1, 0]> (w)\n z = MatMul (n, u)"
    )
    model = quantized(parse(text, w=normal(96, 64)))
    found = outputs(model, ids=np.array([3, 95, 0]))
    np.testing.assert_allclose(found["z"], -found["y"], rtol=1e-5)


def test_readers_of_one_transposed_weight_share_it() -> None:
    text = """
    g (float[T,64] x, float[T,64] z, float[96,64] w) => (float[T,96] a, float[T,96] b)
    { t = Transpose <perm = [1, 0]> (w)
      a = MatMul (x, t)
      b = MatMul (z, t) }"""
    weight, x = normal(96, 64), normal(2, 64)
    model = quantized(parse(text, w=weight))
    assert types(model) == {"w.int8": ("INT8", [96, 64]), "w.scale": ("FLOAT", [96])}
    found = outputs(model, x=x, z=-x)
    np.testing.assert_allclose(found["a"], x @ weight.T, atol=near("int8", weight, x))
    np.testing.assert_allclose(found["b"], -found["a"], rtol=1e-5)


SEEN = """
g (float[T,64] x, float[64,96] w) => (float[T,96] y, float[64,96] n)
{ y = MatMul (x, w)
  n = Neg (w) }"""
COLUMNS = """
g (int64[N] ids, float[T,64] z, float[96,64] w) => (float[96,N] x, float[T,96] y)
{ x = Gather <axis = 1> (w, ids)
  t = Transpose <perm = [1, 0]> (w)
  y = MatMul (z, t) }"""
GEMM = "g (float[T,64] x, float[{shape}] w) => (float[T,96] y) {{ y = Gemm <{attributes}> (x, w) }}"


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("g (float[T,16] x, float[16,16] w) => (float[T,16] y) { y = MatMul (x, w) }", {"w": normal(16, 16)}),  # too small
        ("g (float[B,T,64] x, float[2,64,64] w) => (float[B,T,64] y) { y = MatMul (x, w) }", {"w": normal(2, 64, 64)}),
        ("g (float[T,64] x, float[64,96] w) => (float[T,96] y) { y = MatMul (x, w) }", {}),  # an input, no weight
        (SEEN, {"w": normal(64, 96)}),
        (COLUMNS, {"w": normal(96, 64)}),
        (GEMM.format(shape="64,96", attributes="alpha = 0.5"), {"w": normal(64, 96)}),
        (GEMM.format(shape="96,64", attributes="alpha = 0.5, transB = 1"), {"w": normal(96, 64)}),
        (GEMM.format(shape="64,96", attributes="transA = 1").replace("T,64] x", "64,T] x"), {"w": normal(64, 96)}),
    ],
)
def test_what_is_no_linear_layer_of_size_is_left_as_it_is(text: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(text, **weights)
    before = kinds(model)
    assert not QuantizeWeights(lambda _: "int8")(model).modified
    assert kinds(model) == before
    assert set(types(model)) == set(weights)


def test_a_weight_keeps_its_precision_on_request() -> None:
    text = """
    g (float[T,64] x, float[64,96] a, float[64,96] b) => (float[T,96] y, float[T,96] z)
    { y = MatMul (x, a)
      z = MatMul (x, b) }"""
    model = parse(text, a=normal(64, 96), b=normal(64, 96))
    storages: dict[str, Storage | None] = {"a": None, "b": "int4"}
    QuantizeWeights(storages.__getitem__)(model)
    assert set(types(standard(model))) == {"a", "b.uint4", "b.scale", "b.zero"}


@pytest.mark.parametrize("storage", ["int8-blocks", "int8-wide-blocks", "int4"])
def test_what_does_not_divide_into_blocks_gets_a_scale_an_output(storage: Storage) -> None:
    model = quantized(parse(LINEAR.replace("64", "80"), w=normal(80, 96)), storage)
    assert types(model) == {"w.int8": ("INT8", [80, 96]), "w.scale": ("FLOAT", [96])}


# --- Smooth

GATED = """
g (float[1,T,64] x, float[64] gain, float[64,96] gate, float[64,96] up, float[96,64] down) => (float[1,T,64] y)
{ n = RMSNormalization <epsilon = 1e-6> (x, gain)
  g = MatMul (n, gate)
  u = MatMul (n, up)
  s = Sigmoid (g)
  a = Mul (g, s)
  h = Mul (a, u)
  y = MatMul (h, down) }"""


def gated(text: str = GATED) -> ir.Model:
    return parse(
        text,
        gain=normal(64) * np.where(np.arange(64) == 7, 50, 1).astype("f"),  # an outlier
        gate=normal(64, 96, seed=1) / 8,
        up=normal(64, 96, seed=2) / 8,
        down=normal(96, 64, seed=3) / 8,
    )


def smoothed(model: ir.Model, feeds: dict[str, np.ndarray], strength: float = 0.5) -> dict[str, np.ndarray]:
    """Smooth a graph with the measured maxima of its activations. Returns the maxima by name."""
    found = junctions(model)
    measuring = ir.from_proto(ir.to_proto(model))
    names = with_maxima(measuring, junctions(measuring))
    values = outputs(measuring, **feeds)
    maxima = {junction.activation.name or "": values[name] for junction, name in zip(found, names, strict=True)}
    Smooth(maxima, strength)(model)
    return maxima


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_smoothing_changes_nothing_before_rounding(strength: float) -> None:
    feeds = {"x": normal(1, 5, 64, seed=4)}
    model = gated()
    before = outputs(model, **feeds)["y"]
    smoothed(model, feeds, strength)
    np.testing.assert_allclose(outputs(model, **feeds)["y"], before, rtol=1e-5, atol=1e-5)


def test_smoothing_moves_outliers_from_activations_to_weights() -> None:
    feeds = {"x": normal(1, 5, 64, seed=4)}
    model = gated()
    before = smoothed(model, feeds)
    after = smoothed(model, feeds)  # what it finds the second time
    assert set(before) == {"n", "h"}
    for name, largest in before.items():
        assert largest.max() / np.median(largest) > after[name].max() / np.median(after[name])
    assert before["n"].max() / np.median(before["n"]) > 20
    assert after["n"].max() / np.median(after["n"]) < 10


def test_the_largest_magnitudes_are_those_of_each_channel() -> None:
    model = gated()
    names = with_maxima(model, junctions(model))
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "RMSNormalization").outputs[0])
    found = outputs(model, x=normal(1, 5, 64, seed=4))
    np.testing.assert_array_equal(found[names[0]], np.abs(found["n"]).max((0, 1)))


@pytest.mark.parametrize(
    ("old", "new", "channels"),
    [
        ("y = MatMul", "o = Neg (n)\n  y = MatMul", {"h"}),  # the norm's output is read by others
        ("y = MatMul", "o = Neg (h)\n  y = MatMul", {"n"}),
        ("y = MatMul", "o = Neg (gain)\n  y = MatMul", {"h"}),  # weights that others read must not change
        ("y = MatMul", "o = Neg (down)\n  y = MatMul", {"n"}),
        ("y = MatMul", "o = Neg (gate)\n  y = MatMul", {"h"}),
        ("y = MatMul", "o = Neg (up)\n  y = MatMul", set()),  # what reads n, and the source of h
        ("y = MatMul", "o = Neg (u)\n  y = MatMul", {"n"}),
        ("=> (", "=> (float[1,T,64] n, ", {"h"}),
        ("=> (", "=> (float[1,T,96] h, ", {"n"}),
        ("=> (", "=> (float[1,T,96] u, ", {"n"}),
        ("=> (", "=> (float[1,T,96] g, ", {"n", "h"}),
    ],
)
def test_smoothing_leaves_what_others_would_see(old: str, new: str, channels: set[str]) -> None:
    text = GATED.replace(old, new)
    if "o = " in new:
        shapes = {"n": "1,T,64", "h": "1,T,96", "u": "1,T,96", "gain": "64", "down": "96,64", "gate": "64,96", "up": "64,96"}
        text = text.replace("=> (", f"=> (float[{shapes[new.split('(')[1].split(')', maxsplit=1)[0]]}] o, ")
    feeds = {"x": normal(1, 5, 64, seed=4)}
    model = gated(text)
    before = outputs(model, **feeds)
    assert set(smoothed(model, feeds)) == channels
    for name, array in outputs(model, **feeds).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", ["n", "x"])
def test_a_transposed_weight_with_two_readers_is_left(second: str) -> None:
    text = f"""
    g (float[1,T,64] x, float[64] gain, float[96,64] w) => (float[1,T,96] y, float[1,T,96] z)
    {{ n = RMSNormalization (x, gain)
      t = Transpose <perm = [1, 0]> (w)
      y = MatMul (n, t)
      z = MatMul ({second}, t) }}"""
    feeds = {"x": normal(1, 5, 64, seed=4)}
    model = parse(text, gain=normal(64), w=normal(96, 64))
    before = outputs(model, **feeds)
    smoothed(model, feeds)
    for name, array in outputs(model, **feeds).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-5, atol=1e-4)


def test_a_transposed_weight_is_smoothed_along_its_inputs() -> None:
    text = """
    g (float[1,T,64] x, float[64] gain, float[96,64] w) => (float[1,T,96] y)
    { n = RMSNormalization (x, gain)
      t = Transpose <perm = [1, 0]> (w)
      y = MatMul (n, t) }"""
    feeds = {"x": normal(1, 5, 64, seed=4)}
    model = parse(text, gain=normal(64) * 9, w=normal(96, 64))
    before = outputs(model, **feeds)["y"]
    assert set(smoothed(model, feeds)) == {"n"}
    np.testing.assert_allclose(outputs(model, **feeds)["y"], before, rtol=1e-5, atol=1e-4)


def test_dead_channels_leave_everything_finite() -> None:
    model = gated()
    gain = model.graph.initializers["gain"]
    assert gain.const_value is not None
    dead = gain.const_value.numpy().copy()
    dead[:3] = 0
    gain.const_value = ir.tensor(dead, name="gain")
    feeds = {"x": normal(1, 5, 64, seed=4)}
    before = outputs(model, **feeds)["y"]
    smoothed(model, feeds)
    np.testing.assert_allclose(outputs(model, **feeds)["y"], before, rtol=1e-5, atol=1e-5)


# --- quality


class Sharper(FakeBackend):
    """A backend with the same most likely tokens, but a sharper distribution."""

    def step(self, *inputs: Any, **options: Any) -> StepOutput:
        output = super().step(*inputs, **options)
        return StepOutput(output.greedy_ids, None if output.logits is None else output.logits * np.float32(2))


class Contrary(FakeBackend):
    """A backend whose most likely token is the other's least likely one."""

    def step(self, *inputs: Any, **options: Any) -> StepOutput:
        output = super().step(*inputs, **options)
        return StepOutput(output.greedy_ids, None if output.logits is None else -output.logits)


class Broken(FakeBackend):
    def step(self, *inputs: Any, **options: Any) -> StepOutput:
        output = super().step(*inputs, **options)
        return StepOutput(output.greedy_ids, np.full_like(output.logits, np.nan))


def fake(kind: type[FakeBackend] = FakeBackend) -> FakeBackend:
    return kind(manifest=fake_manifest(max_seq_len=2 * CHUNK + 10))


def text_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB_SIZE, length).tolist()


@pytest.mark.parametrize("length", [2, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 1])
def test_a_bundle_is_no_further_than_nothing_from_itself(length: int) -> None:
    quality = compare(fake(), fake(), [text_of(length), text_of(3, seed=1)])
    assert (quality.mean_kl, quality.max_kl, quality.same_greedy) == (0, 0, 1)
    assert quality.perplexity == quality.perplexity_before > 1
    assert quality.num_tokens == length + 3


def test_quality_is_what_its_names_say() -> None:
    texts = [text_of(7), text_of(CHUNK + 5, seed=1)]
    quality = compare(fake(), fake(Sharper), texts)

    def log_probs(text: list[int], sharpness: float) -> np.ndarray:
        rows = np.stack([logits_after(text[: end + 1]) for end in range(len(text))]).astype(np.float64) * sharpness
        return rows - np.log(np.exp(rows).sum(-1, keepdims=True))

    old, new = ([log_probs(text, sharpness) for text in texts] for sharpness in (1.0, 2.0))
    kl = np.concatenate([(np.exp(one) * (one - other)).sum(-1) for one, other in zip(old, new, strict=True)])
    for found, rows in ((quality.perplexity_before, old), (quality.perplexity, new)):
        losses = [-one[np.arange(len(text) - 1), text[1:]] for one, text in zip(rows, texts, strict=True)]
        assert found == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-5)
    assert quality.mean_kl == pytest.approx(kl.mean(), rel=1e-5)
    assert quality.max_kl == pytest.approx(kl.max(), rel=1e-5)
    assert quality.same_greedy == 1


def test_another_favourite_is_counted() -> None:
    assert compare(fake(), fake(Contrary), [text_of(9)]).same_greedy == 0


def test_what_is_not_finite_is_never_within_a_limit() -> None:
    quality = compare(fake(), fake(Broken), [text_of(9)])
    assert not quality.mean_kl <= 1e9


def test_quality_reads_as_one_line() -> None:
    quality = Quality(
        num_tokens=200, perplexity=4.4, perplexity_before=4.0, mean_kl=0.0123, max_kl=1.5, same_greedy=0.975,
        tokens_per_step_before=2.5, tokens_per_step=2.25,
    )  # fmt: skip
    assert quality.line() == (
        "KL 0.0123 nats on average and 1.5000 at the worst position, perplexity 4.000 → 4.400 (+10.00%), "
        "the same greedy token at 97.5% of 200 positions, "
        "2.500 → 2.250 tokens per step"
    )


# --- text


class Bytes:
    """A codec whose tokens are bytes."""

    def encode(self, text: str, *, raw: bool = False) -> list[int]:
        return [1 + byte % (VOCAB_SIZE - 1) for byte in text.encode()]


def test_a_text_is_cut_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * (2 * PIECE_TOKENS + 1))
    assert [len(piece) for piece in pieces(path, Bytes(), 10**6)] == [PIECE_TOKENS] * 2  # one token alone expects nothing
    assert [len(piece) for piece in pieces(path, Bytes(), 400)] == [400, 400, 225]
    path.write_text("x" * 100)
    assert len(pieces(path, Bytes(), 2)) == MOST_PIECES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the text"),
        (b"\xff\xfe", "cannot read the text"),
        (b"", "has 0 tokens; give a text with at least 2"),
        (b"x", "has 1 tokens; give a text with at least 2"),
    ],
)
def test_a_text_that_cannot_be_used_gets_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message) as caught:
        pieces(path, Bytes(), 100)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_are_followed_by_their_answers() -> None:
    backend = FakeBackend(manifest=fake_manifest(max_seq_len=40))
    codec = Bytes()
    texts, stats = answered(DecodingEngine(backend), codec, ["a fox", "y" * 100])
    for text, prompt in zip(texts, ["a fox", "y" * 100], strict=True):
        start = codec.encode(prompt)[:20]  # a long prompt leaves half of the limit
        assert text == [*start, *greedy(start, 20)]
    assert stats.num_generated_tokens == 40
