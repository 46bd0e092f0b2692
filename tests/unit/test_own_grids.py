"""Weights that lie on grids of 4 bits already: they are found, and 4 bits keep them."""

from __future__ import annotations

import gguf
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.passes.common.block_products import BlockProducts
from medusa_export.passes.common.values import constant
from medusa_export.passes.ort_cpu.merge_projections import MergeProjections
from medusa_export.passes.quantize.integer_weights import QuantizeWeights
from medusa_export.passes.quantize.own_grids import find_grid, own_grids
from tests.support.graphs import kinds, outputs, parse

IN_FLOAT = 1


def on_grid(codes: np.ndarray, seed: int = 0, shift: bool = True) -> np.ndarray:
    """Weights [K, N] in the form of GGUF's Q4_1, or of Q4_0: a step of float16 for 32 codes, and the value of code 0."""
    rng = np.random.default_rng(seed)
    blocks = codes.reshape(-1, 32, codes.shape[1]).astype("f")
    steps = rng.uniform(0.01, 0.2, (len(blocks), 1, codes.shape[1])).astype(np.float16).astype("f")
    low = -rng.uniform(2, 12, steps.shape).astype("f") * steps if shift else -8 * steps
    return (blocks * steps + low.astype(np.float16).astype("f")).reshape(codes.shape).astype("f")


def random_codes(num_inputs: int, num_outputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (num_inputs, num_outputs))


def values(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight that a grid gives, and each weight's step."""
    grid = find_grid(weight)
    assert grid is not None
    assert grid.codes.max() <= 15
    assert grid.zeros.max() <= 15
    steps, zeros, rests = (np.repeat(part.astype("f"), 32, axis=0) for part in (grid.steps, grid.zeros, grid.rests))
    assert (steps > 0).all()
    return (grid.codes - zeros) * steps + rests, steps


@given(
    levels=st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True),
    seed=st.integers(0, 1000),
    shift=st.booleans(),
)
@settings(deadline=None)
def test_a_grid_is_found_whatever_places_of_it_are_used(levels: list[int], seed: int, shift: bool) -> None:
    codes = np.random.default_rng(seed).choice(levels, (96, 3))
    weight = on_grid(codes, seed, shift)
    found, steps = values(weight)
    assert (np.abs(found - weight) <= 1e-3 * steps + 1e-6 * np.abs(weight)).all()


@pytest.mark.parametrize("constant", [0.0, 0.7, -0.7])
def test_blocks_of_one_value_have_a_grid(constant: float) -> None:
    weight = on_grid(random_codes(96, 3))
    weight[32:64] = constant
    found, _ = values(weight)
    np.testing.assert_allclose(found, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stored", "near"), [(np.float32, 1e-3), (np.float16, 0.02)])
def test_weights_in_half_precision_have_a_grid(stored: type, near: float) -> None:
    weight = on_grid(random_codes(96, 3)).astype(stored).astype("f")
    found, steps = values(weight)
    assert (np.abs(found - weight) <= near * steps).all()


def test_zero_points_are_enough_for_symmetric_blocks() -> None:
    symmetric, shifted = (find_grid(on_grid(random_codes(96, 3), shift=shift)) for shift in (False, True))
    assert symmetric is not None
    assert shifted is not None
    assert not symmetric.has_rests
    assert shifted.has_rests


def test_many_weights_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = on_grid(random_codes(96, 50))
    whole = find_grid(weight)
    monkeypatch.setattr("medusa_export.passes.quantize.own_grids.CHUNK", 96 * 7)
    parts = find_grid(weight)
    assert whole is not None
    assert parts is not None
    for name in ("codes", "steps", "zeros", "rests"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("kind", "has_grid"), [("Q4_0", True), ("Q4_1", True), ("Q4_K", True), ("Q5_0", False), ("Q5_1", False), ("Q8_0", False)]
)
def test_gguf_files_of_4_bits_have_grids(kind: str, has_grid: bool) -> None:
    """As the `gguf` package reads them."""
    form = gguf.GGMLQuantizationType[kind]
    if kind == "Q4_K":  # which the package does not write: a step and a minimum in float16, then 6 bits each for 32 weights
        data = np.random.default_rng(0).integers(0, 256, (8, 2, gguf.GGML_QUANT_SIZES[form][1]), np.uint8)
        data[..., :4] = np.array([0.01, 0.012], np.float16).view(np.uint8)
        data = data.reshape(8, -1)
    else:
        data = gguf.quantize(np.random.default_rng(0).normal(size=(8, 512)).astype("f"), form)
    weight = gguf.dequantize(data, form).astype("f").T
    assert weight.shape == (512, 8)
    if has_grid:
        found, steps = values(weight)
        assert (np.abs(found - weight) <= 1e-3 * steps).all()
    else:
        assert find_grid(weight) is None


def seventeen_values() -> np.ndarray:
    codes = random_codes(96, 20)
    codes[:2, -1] = 0, 16
    return on_grid(codes)


def one_weight_beside_its_place() -> np.ndarray:
    weight = on_grid(random_codes(96, 20))
    weight[70, 15] += 0.002
    return weight


def not_a_number(value: float) -> np.ndarray:
    weight = on_grid(random_codes(96, 8))
    weight[40, 7] = value
    return weight


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "weight",
    [
        np.random.default_rng(0).normal(size=(96, 8)).astype("f"),
        on_grid(random_codes(64, 8))[:48],  # no whole number of blocks
        seventeen_values(),
        one_weight_beside_its_place(),
        not_a_number(np.nan),
        not_a_number(np.inf),
    ],
)
def test_other_weights_have_no_grid(weight: np.ndarray) -> None:
    assert find_grid(weight) is None


# --- products with them

PROJECTIONS = """
g ({X} x, float[{I},96] q, float[{I},48] k) => ({Q} qx, {K} kx)
{{ qx = MatMul (x, q)
  kx = MatMul (x, k) }}"""


def projections(shape: str, **weights: np.ndarray) -> ir.Model:
    width = shape.rstrip("]").rpartition(",")[2]
    heads = shape.removesuffix(f"{width}]")
    return parse(PROJECTIONS.format(X=shape, Q=f"{heads}96]", K=f"{heads}48]", I=width), **weights)


def kept(shape: str, shift: bool) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Two products whose weights lie on grids, in 4 bits; and the weights."""
    width = int(shape.rstrip("]").rpartition(",")[2])
    weights = {name: on_grid(random_codes(width, size, size), size, shift) for name, size in (("q", 96), ("k", 48))}
    model = projections(shape, **weights)
    grids = own_grids(model.graph, lambda _: "int4")
    assert grids.keys() == weights.keys()
    assert QuantizeWeights(lambda _: "int4", given=grids)(model).modified
    return model, weights


@pytest.mark.parametrize(("shape", "sizes"), [("float[T,160]", (3,)), ("float[B,T,160]", (2, 3))])
def test_products_lose_next_to_nothing(shape: str, sizes: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(0.1, 1, (*sizes, 160)).astype("f")
    for shift, least_gain in ((False, 1000), (True, 8)):
        model, weights = kept(shape, shift)
        rounded = projections(shape, **weights)
        QuantizeWeights(lambda _: "int4")(rounded)
        lost = {name: rms(found - x @ weights[name[0]]) for name, found in outputs(rounded, x=x).items()}
        for merged in (False, True):
            if merged:
                assert BlockProducts(IN_FLOAT)(model).modified
                assert MergeProjections()(model).modified
            for name, found in outputs(model, x=x).items():
                assert rms(found - x @ weights[name[0]]) * least_gain < lost[name]


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array).mean()))


def test_the_sums_of_an_input_are_made_once_and_only_where_they_are_read() -> None:
    model, _ = kept("float[B,T,160]", shift=True)
    assert [kinds(model).count(kind) for kind in ("ReduceSum", "Concat", "Pad")] == [1, 1, 1]
    assert "ReduceSum" not in kinds(kept("float[B,T,160]", shift=False)[0])


@pytest.mark.parametrize(
    ("num_inputs", "width", "joined"),
    [
        (96, 99, 2),  # with the sums of three blocks; the operator itself fills the last block
        (160, 256, 3),  # with zeros up to a whole run of 128, which are appended together with the sums
    ],
)
def test_the_operator_for_blocks_needs_no_padding(num_inputs: int, width: int, joined: int) -> None:
    model, _ = kept("float[B,T,160]".replace("160", str(num_inputs)), shift=True)
    BlockProducts(IN_FLOAT)(model)
    RemoveUnusedNodesPass()(model)
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert [node.attributes.get_int("K") for node in products] == [width, width]
    [join] = {node.inputs[0].producer() for node in products if node.inputs[0] is not None}
    assert join is not None
    assert (join.op_type, len(join.inputs)) == ("Concat", joined)
    assert "Pad" not in kinds(model)
    assert kinds(model).count("Expand") == joined - 2


@pytest.mark.parametrize("change", ["mode", "value", "front", "cut", "not joined"])
def test_other_padding_stays(change: str) -> None:
    model, _ = kept("float[B,T,160]", shift=True)
    pad = next(node for node in model.graph if node.op_type == "Pad")
    ends = pad.inputs[1]
    assert ends is not None
    if change == "mode":
        pad.attributes["mode"] = ir.AttrString("mode", "edge")
    elif change == "value":
        pad.resize_inputs(3)
        pad.replace_input_with(2, constant(model.graph, "one", 1.0))
    elif change == "not joined":
        turn = ir.node("Neg", [pad.inputs[0]])
        model.graph.insert_before(pad, turn)
        pad.replace_input_with(0, turn.outputs[0])
    else:
        amounts = {"front": [0, 0, 1, 0, 0, 90], "cut": [0, 0, 0, 0, 0, -1]}
        ends.const_value = ir.tensor(np.array(amounts[change]), name="ends")
    BlockProducts(IN_FLOAT)(model)
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert {node.inputs[0].producer() for node in products if node.inputs[0] is not None} == {pad}


def test_only_weights_of_4_bits_are_looked_at() -> None:
    weights = {name: on_grid(random_codes(160, size, size)) for name, size in (("q", 96), ("k", 48))}
    model = projections("float[T,160]", **weights)
    assert own_grids(model.graph, lambda name: "int4" if name == "k" else "int8-blocks").keys() == {"k"}
    assert own_grids(model.graph, lambda _: "int8") == {}
