"""Rotations that are folded into weights: the float graph stays the same, or is left alone with the reason."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.passes.common.rounding import to_int8, to_int8_blocks, to_uint4
from medusa_export.passes.common.terms import note_terms, noted_terms
from medusa_export.passes.ort_cpu import variants
from medusa_export.passes.quantize.activation_probes import with_errors, with_moments
from medusa_export.passes.quantize.choose_terms import MOST_ERROR, ChooseTerms
from medusa_export.passes.quantize.error_feedback import ErrorFeedback
from medusa_export.passes.quantize.integer_weights import QuantizeWeights
from medusa_export.passes.quantize.orthogonal import random_rotation, rotated
from medusa_export.passes.quantize.rotate_stream import GAINS, STATE_BASIS, RotateStream
from medusa_export.passes.quantize.rotate_values import RotateValues
from tests.support.graphs import kinds, outputs, parse

C, V, WIDE = 64, 96, 80  # hidden width, vocabulary, width of the MLP


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("f") / 8


# --- the matrices


@pytest.mark.parametrize("width", [1, 2, 7, 48, 64, 96, 128])
def test_a_rotation_is_orthogonal(width: int) -> None:
    rotation = random_rotation(width, np.random.default_rng(0))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-6)


@pytest.mark.parametrize("width", [64, 96, 576])
def test_a_rotation_spreads_each_channel_and_their_mean(width: int) -> None:
    rotation = random_rotation(width, np.random.default_rng(0))
    assert np.abs(rotation).max() < 8 / np.sqrt(width)
    assert (
        np.abs(np.ones(width) @ rotation).max() < 6
    )  # a Hadamard matrix without signs puts all of it, √N · √N, in one channel


def test_vectors_along_an_axis_are_rotated() -> None:
    rotation, array = random_rotation(4, np.random.default_rng(0)), normal(3, 8)
    np.testing.assert_allclose(rotated(array.T, rotation, 0), rotated(array, rotation, 1).T)
    np.testing.assert_allclose(rotated(array, rotation, 1)[:, 4:], array[:, 4:] @ rotation, rtol=1e-5)


# --- the residual stream

STEP = """
g (int64[B,T] input_ids, float[96,64] table, float[64] gain1, float[64] gain2, float[64,64] wo, float[64] bo, float[64,80] gate,
   float[64,80] up, float[80,64] down, float[64,64] wq) => (float[B,T,96] logits, float[B,T,64] hidden)
{ x0 = Gather <axis = 0> (table, input_ids)
  two = Constant <value = float {2.0}> ()
  x1 = Mul (x0, two)
  n1 = RMSNormalization <axis = -1, epsilon = 1e-6> (x1, gain1)
  q = MatMul (n1, wq)
  a = Tanh (q)
  o = MatMul (a, wo)
  ob = Add (o, bo)
  x2 = Add (x1, ob)
  n2 = RMSNormalization <axis = -1, epsilon = 1e-6> (x2, gain2)
  g = MatMul (n2, gate)
  u = MatMul (n2, up)
  m = Mul (g, u)
  d = MatMul (m, down)
  x3 = Add (x2, d)
  hidden = RMSNormalization <axis = -1, epsilon = 1e-6> (x3, gain1)
  t = Transpose <perm = [1, 0]> (table)
  logits = MatMul (hidden, t) }"""
IDS = np.array([[3, 95, 0, 17]])


def step(text: str = STEP, **more: np.ndarray) -> ir.Model:
    weights = {
        "table": normal(V, C) * 4, "gain1": normal(C, seed=1) * 40, "gain2": normal(C, seed=2) + 1, "wo": normal(C, C, seed=3),
        "bo": normal(C, seed=4), "gate": normal(C, WIDE, seed=5), "up": normal(C, WIDE, seed=6),
        "down": normal(WIDE, C, seed=7), "wq": normal(C, C, seed=8),
    }  # fmt: skip
    return parse(text, **weights, **more)


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    found = model.graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in found if value.const_value is not None}


def test_a_rotated_stream_gives_the_same_logits_and_states() -> None:
    model = step()
    before, weights = outputs(model, input_ids=IDS), arrays(model)
    rotating = RotateStream()
    assert rotating(model).modified
    assert not rotating.declined
    after, changed = outputs(model, input_ids=IDS), arrays(model)
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-4)
    for name in ("wo", "bo", "gate", "up", "down", "wq"):
        assert not np.allclose(changed[name], weights[name], atol=0.01), name
    norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
    assert len(norms) == 3
    assert {str(node.inputs[1].name) for node in norms if node.inputs[1] is not None} == {GAINS}
    np.testing.assert_array_equal(changed[GAINS], np.ones(C))


def test_embedding_and_lm_head_of_one_table_become_two() -> None:
    model = step()
    weight, gains = arrays(model)["table"], arrays(model)["gain1"]
    RotateStream()(model)
    rotation = random_rotation(C, np.random.default_rng(0))
    changed = arrays(model)
    np.testing.assert_allclose(changed["table"], (weight * gains) @ rotation, rtol=1e-4, atol=1e-4)
    [rows] = [array for name, array in changed.items() if name.startswith("table.")]
    np.testing.assert_allclose(rows, weight @ rotation, rtol=1e-4, atol=1e-4)


def test_outliers_are_spread_over_all_channels() -> None:
    def crest(model: ir.Model) -> float:
        [norm] = [node for node in model.graph if node.op_type == "RMSNormalization" and node.outputs[0].name == "n1"]
        model.graph.outputs.append(norm.outputs[0])
        rows = outputs(model, input_ids=IDS)["n1"]
        return float(np.abs(rows).max() / np.sqrt(np.square(rows).mean()))

    spiky = np.where(np.arange(C) == 5, 60, 1).astype("f")
    models = [step(), step()]
    for model in models:
        model.graph.initializers["gain1"].const_value = ir.tensor(spiky, name="gain1")
    RotateStream()(models[1])
    assert crest(models[0]) > 7
    assert crest(models[1]) < 4


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "n2 = RMSNormalization <axis = -1, epsilon = 1e-6>",
            "n2 = LayerNormalization",
            "LayerNormalization subtracts the mean",
        ),
        ("x2 = Add (x1, ob)", "p = RMSNormalization (ob, gain2)\n  x2 = Add (x1, p)", "a norm after a block writes the stream"),
        ("x2 = Add (x1, ob)", "p = Tanh (ob)\n  x2 = Add (x1, p)", "the operator Tanh writes the stream"),
        ("x2 = Add (x1, ob)", "p = Mul (ob, gain2)\n  x2 = Add (x1, p)", "the operator Mul writes the stream"),
        ("x2 = Add (x1, ob)", "p = Tanh (x1)\n  x2 = Add (x1, ob)", "the operator Tanh reads the stream"),
        ("u = MatMul (n2, up)", "p = Tanh (n2)\n  u = MatMul (p, up)", "the operator Tanh reads the stream after a norm"),
        ("x1 = Mul (x0, two)", "x1 = Mul (x0, gain2)", "the operator Mul reads the stream"),
    ],
)
def test_what_does_not_commute_with_a_rotation_is_left_and_the_reason_told(old: str, new: str, reason: str) -> None:
    text = STEP.replace(old, new)
    assert text != STEP
    model = step(text)
    before, operators = arrays(model), kinds(model)
    rotating = RotateStream()
    assert not rotating(model).modified
    [told] = rotating.declined
    assert told.startswith(reason)
    assert kinds(model) == operators
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_graph_without_embeddings_is_left() -> None:
    rotating = RotateStream()
    assert not rotating(parse("g (int64[B,T] input_ids) => (int64[B,T] y) { y = Neg (input_ids) }")).modified
    assert "rows of one table" in next(iter(rotating.declined))


def test_rows_that_are_picked_stay_in_the_stream() -> None:
    picked = """pick = Unsqueeze (rows, minus)
  indices = Expand (pick, wide)
  picked = GatherElements <axis = 1> (n3, indices)
  t = Transpose <perm = [1, 0]> (table)
  logits = MatMul (picked, t) }"""
    text = STEP.replace("hidden = RMS", "n3 = RMS").replace(
        "  t = Transpose <perm = [1, 0]> (table)\n  logits = MatMul (hidden, t) }", "  " + picked
    )
    text = text.replace(", float[B,T,64] hidden)", ", float[B,R,64] picked)").replace(
        "float[B,T,96] logits", "float[B,R,96] logits"
    )
    text = text.replace("int64[B,T] input_ids", "int64[B,T] input_ids, int64[B,R] rows, int64[1] minus, int64[3] wide")
    model = step(text, minus=np.array([-1]), wide=np.array([1, 1, C]))
    feeds = {"input_ids": IDS, "rows": np.array([[2, 0]])}
    before = outputs(model, **feeds)
    assert RotateStream()(model).modified
    for name, array in outputs(model, **feeds).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-4, atol=1e-4)
    text = text.replace("Expand (pick, wide)", "Abs (given)").replace("int64[3] wide", "int64[B,R,64] given")
    model = step(text, minus=np.array([-1]))
    rotating = RotateStream()
    assert not rotating(model).modified  # each channel may be picked from another row
    assert "GatherElements" in next(iter(rotating.declined))


# --- the values of attention

ATTENTION = """
g (float[1,T,64] x, int64[1] lengths, float[1,2,S,16] past, float[1,2,S,16] past_key, float[64,32] wv, float[32] bv,
   float[64,64] wo, int64[4] cut, int64[3] joined) => (float[1,T,64] y, float[1,2,S,16] present)
{ v0 = MatMul (x, wv)
  v1 = Add (v0, bv)
  v2 = Reshape (v1, cut)
  v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
  present = TensorScatter <axis = 2> (past, v3, lengths)
  q0 = Reshape (x, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (q0)
  a = Attention (q, past_key, present)
  b = Transpose <perm = [0, 2, 1, 3]> (a)
  c = Reshape (b, joined)
  y = MatMul (c, wo) }""".replace("int64[4] cut", "int64[4] cut, int64[4] heads")


def attention(text: str = ATTENTION) -> ir.Model:
    return parse(
        text, wv=normal(64, 32), bv=normal(32, seed=1), wo=normal(64, 64, seed=2), cut=np.array([1, -1, 2, 16]),
        heads=np.array([1, -1, 4, 16]), joined=np.array([1, -1, 64]),
    )  # fmt: skip


def feeds() -> dict[str, np.ndarray]:
    past, key = normal(1, 2, 9, 16, seed=3) * 0, normal(1, 2, 9, 16, seed=4)
    return {"x": normal(1, 9, 64, seed=5), "lengths": np.array([0]), "past": past, "past_key": key}


def test_rotated_values_give_the_same_result() -> None:
    model = attention()
    before = outputs(model, **feeds())
    rotating = RotateValues()
    assert rotating(model).modified
    after = outputs(model, **feeds())
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(after["present"], before["present"], atol=0.01)
    energy = [np.square(found["present"]).sum(-1) for found in (before, after)]
    np.testing.assert_allclose(energy[0], energy[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("v2 = Reshape (v1, cut)", "w = Tanh (v1)\n  v2 = Reshape (w, cut)"),
        (
            "present = TensorScatter <axis = 2> (past, v3, lengths)",
            "w = Tanh (v3)\n  present = TensorScatter <axis = 2> (past, w, lengths)",
        ),
        ("y = MatMul (c, wo)", "w = Tanh (c)\n  y = MatMul (w, wo)"),
        ("y = MatMul (c, wo)", "w = MatMul (c, wo)\n  y = Add (w, c)"),
        ("q0 = Reshape (x, heads)", "k = MatMul (x, wv)\n  q0 = Reshape (x, heads)"),
        ("q0 = Reshape (x, heads)", "k = Neg (v1)\n  q0 = Reshape (x, heads)"),
    ],
)
def test_values_that_something_else_sees_are_left(old: str, new: str) -> None:
    text = ATTENTION.replace(old, new)
    assert text != ATTENTION
    model = attention(text)
    before = outputs(model, **feeds())
    rotating = RotateValues()
    assert not rotating(model).modified
    assert sum(rotating.declined.values()) == 1
    for name, array in outputs(model, **feeds()).items():
        np.testing.assert_array_equal(array, before[name])


# --- one term or two

TWO_INPUTS = """
g (float[1,T,64] x, float[1,T,64] z, float[64,96] w1, float[64,96] w2, float[64,96] w3)
  => (float[1,T,96] a, float[1,T,96] b, float[1,T,96] c)
{ a = MatMul (x, w1)
  b = MatMul (z, w2)
  c = MatMul (z, w3) }"""


def two_inputs() -> ir.Model:
    return parse(TWO_INPUTS, w1=normal(64, 96), w2=normal(64, 96, seed=1), w3=normal(64, 96, seed=2))


def with_outlier(size: float) -> np.ndarray:
    rows = normal(1, 5, 64, seed=3)
    rows[..., 7] *= size
    return rows


def test_the_error_of_one_term_is_what_rounding_leaves() -> None:
    model = two_inputs()
    names = with_errors(model)
    assert set(names) == {"x", "z"}
    x, z = with_outlier(1), with_outlier(300)
    found = outputs(model, x=x, z=z)
    for name, rows in (("x", x), ("z", z)):
        largest = np.abs(rows).max(-1, keepdims=True)
        codes = np.rint(rows / largest * 127)
        wanted = (np.square(rows - codes * largest / 127).sum(-1) / np.square(rows).sum(-1)).mean()
        assert found[names[name]] == pytest.approx(wanted, rel=0.01)


def test_second_moments_are_sums_over_rows() -> None:
    model = two_inputs()
    names = with_moments(model, ["z"])
    assert set(names) == {"z"}
    z = with_outlier(1)
    np.testing.assert_allclose(outputs(model, x=z, z=z)[names["z"]], z[0].T @ z[0], rtol=1e-4, atol=1e-5)


def rounded(errors: dict[str, float], activation_bits: int = 16) -> tuple[ir.Model, ChooseTerms]:
    model = two_inputs()
    QuantizeWeights(lambda _: "int8")(model)
    choice = ChooseTerms(errors)
    choice(model)
    variants.for_ort_cpu(model, activation_bits)
    return model, choice


@pytest.mark.parametrize(
    ("errors", "with_two", "slices"),
    [
        ({"x": MOST_ERROR / 2, "z": MOST_ERROR * 2}, 2, 1),
        ({"x": MOST_ERROR * 2, "z": MOST_ERROR / 2}, 1, 1),
        ({"x": MOST_ERROR / 2, "z": MOST_ERROR / 2}, 0, 0),
        ({"x": MOST_ERROR / 2}, 2, 1),  # what was not measured keeps two
    ],
)
def test_inputs_with_a_large_error_keep_two_terms(errors: dict[str, float], with_two: int, slices: int) -> None:
    model, choice = rounded(errors, activation_bits=8)
    assert (choice.num_products, choice.num_with_two) == (3, with_two)
    assert kinds(model).count("MatMulIntegerToFloat") == 2  # the two products of z are merged
    assert kinds(model).count("DequantizeLinear") == slices  # what the first term leaves


def test_two_terms_are_closer_where_they_are_chosen() -> None:
    x, z = with_outlier(1), with_outlier(300)
    exact = outputs(two_inputs(), x=x, z=z)
    errors = {}
    for chosen in ("x", "z"):
        model, _ = rounded({name: 1.0 if name == chosen else 0.0 for name in ("x", "z")})
        found = outputs(model, x=x, z=z)
        errors[chosen] = {name: float(np.abs(found[name] - exact[name]).max()) for name in ("a", "b", "c")}
    assert errors["z"]["b"] < errors["x"]["b"] / 2
    assert errors["x"]["a"] < errors["z"]["a"] / 1.2


def test_products_with_other_terms_are_not_merged() -> None:
    model = two_inputs()
    QuantizeWeights(lambda _: "int8")(model)
    nodes = [node for node in model.graph if node.op_type == "MatMul"]
    for node, terms in zip(nodes, (1, 1, 2), strict=True):
        note_terms(node, terms)
    assert [noted_terms(node) for node in nodes] == [1, 1, 2]
    variants.MergeProjections()(model)
    assert [noted_terms(node) for node in model.graph if node.op_type == "MatMul"] == [1, 1, 2]


# --- weights that are rounded for their inputs


def restored(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | float = 0.0) -> np.ndarray:
    """The weight [K, N] that codes stand for, with a scale per output, or per output and block of inputs."""
    blocks = codes.astype("f").reshape(1 if scales.ndim == 1 else len(scales), -1, codes.shape[1])
    zeros = zeros if isinstance(zeros, float) else zeros.astype("f")[:, None]
    return ((blocks - zeros) * scales.reshape(len(blocks), 1, -1)).reshape(codes.shape)


WAYS: list[tuple[Any, Any, int]] = [
    (partial(to_int8, axis=0), ErrorFeedback.to_int8, 127),
    (to_int8_blocks, ErrorFeedback.to_int8_blocks, 127),
    (to_uint4, ErrorFeedback.to_uint4, 15),
]


@pytest.mark.parametrize(("nearest", "fed_back", "most"), WAYS)
def test_weights_are_rounded_for_correlated_inputs(nearest: Any, fed_back: Any, most: int) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(8, 64))
    seen, unseen = ((rng.normal(size=(400, 8)) @ mixing + 0.1 * rng.normal(size=(400, 64))).astype("f") for _ in range(2))
    weight = normal(64, 96)
    near, better = nearest(weight), fed_back(ErrorFeedback(seen.T @ seen), weight)
    for one, other in zip(near[1:], better[1:], strict=True):  # scales and zero points
        np.testing.assert_array_equal(one, other)
    assert better[0].dtype == near[0].dtype
    assert -127 <= better[0].min() <= better[0].max() <= most
    errors = [np.square(unseen @ (restored(*found) - weight)).mean() for found in (near, better)]
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize(("nearest", "fed_back", "most"), WAYS)
@pytest.mark.parametrize("moments", [np.diag(np.arange(1, 65)).astype("f"), np.zeros((64, 64), "f")])
def test_without_correlations_the_nearest_codes_are_best(moments: np.ndarray, nearest: Any, fed_back: Any, most: int) -> None:
    weight = normal(64, 96)
    np.testing.assert_array_equal(fed_back(ErrorFeedback(moments), weight)[0], nearest(weight)[0])


def test_codes_that_were_found_before_are_stored() -> None:
    model = parse("g (float[T,64] x, float[64,96] w) => (float[T,96] y) { y = MatMul (x, w) }", w=normal(64, 96))
    codes, scales = np.full((64, 96), 3, np.int8), np.full(96, 0.5, np.float32)
    QuantizeWeights(lambda _: "int8", rounded={"w": (codes, scales)})(model)
    x = normal(2, 64)
    np.testing.assert_allclose(outputs(model, x=x)["y"], x @ np.full((64, 96), 1.5), rtol=1e-4, atol=1e-4)


def test_an_embedding_that_nothing_else_reads_is_stored_in_eight_bits() -> None:
    text = "g (int64[T] {}, float[96,64] w) => (float[T,64] x) {{ x = Gather <axis = 0> (w, {}) }}"
    names: dict[str, Any] = {}
    for name in ("input_ids", "places"):
        model = parse(text.format(name, name), w=normal(V, C))
        QuantizeWeights(lambda _: "int8")(model)
        names[name] = set(model.graph.initializers) & {"w", "w.int8"}
        found = outputs(model, **{name: np.array([5, 95])})["x"]
        np.testing.assert_allclose(found, normal(V, C)[[5, 95]], atol=np.abs(normal(V, C)).max() / 127)
    assert names == {"input_ids": {"w.int8"}, "places": {"w"}}


def test_the_state_is_given_back_by_one_product() -> None:
    model = step()
    RotateStream()(model)
    assert arrays(model)[STATE_BASIS].shape == (C, C)
    assert kinds(model).count("MatMul") == 6 + 1
