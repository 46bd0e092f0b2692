"""Each pass for ONNX Runtime's CPU provider on the smallest graph that shows it, run before and after."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from medusa_export.passes.common.values import replace
from medusa_export.passes.ort_cpu.variants import (
    GroupedAttention,
    IntegerProducts,
    LogProbs,
    MergeProjections,
    QuickSilu,
    SkipNorm,
    UsedEntries,
)
from tests.support.graphs import TREE_MASK, kinds, outputs, parse, run

Arrays = dict[str, np.ndarray]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("f")


# --- UsedEntries

CAPACITY = 61  # no other dimension of the graph is as large
STEP = """
g (int64[B,T] input_ids, int64[B] cache_lengths, bool[B,T,T] tree_mask, float[B,4,T,8] query, float[B,2,T,8] key,
   float[B,2,T,8] value, float[B,2,S,8] past_0_key, float[B,2,S,8] past_0_value)
  => (float[B,4,T,8] attended, float[B,2,S,8] present_key, float[B,2,S,8] present_value)
<int64 zero = {0}, int64 one = {1}, int64[1] ones = {1}>
{
  present_key = TensorScatter <axis = 2, mode = "linear"> (past_0_key, key, cache_lengths)
  present_value = TensorScatter <axis = 2, mode = "linear"> (past_0_value, value, cache_lengths)
  TREE_MASK
  attended = Attention <scale = 0.3> (query, present_key, present_value, mask)
}"""


def step_graph() -> ir.Model:
    model = parse(STEP.replace("TREE_MASK", TREE_MASK))
    for value in model.graph.inputs:
        value.name = (value.name or "").replace("past_0_", "past.0.")
    return model


def step_feeds(lengths: list[int], tokens: int, capacity: int = CAPACITY) -> Arrays:
    batch = len(lengths)
    rng = np.random.default_rng(1)
    mask = np.tril(rng.random((batch, tokens, tokens)) < 0.5) | np.eye(tokens, dtype=bool)
    feeds: Arrays = {
        "input_ids": np.zeros((batch, tokens), np.int64),
        "cache_lengths": np.array(lengths),
        "tree_mask": mask,
        "query": normal(batch, 4, tokens, 8, seed=2),
        "key": normal(batch, 2, tokens, 8, seed=3),
        "value": normal(batch, 2, tokens, 8, seed=4),
    }
    for seed, part in enumerate(("key", "value")):
        feeds[f"past.0.{part}"] = normal(batch, 2, capacity, 8, seed=5 + seed)
    return feeds


@pytest.mark.parametrize(
    ("lengths", "tokens"), [([5], 1), ([0], 4), ([0], 1), ([3, 7, 0], 2), ([7, 3], 5), ([CAPACITY - 4], 4)]
)
def test_attention_over_the_entries_in_use_is_that_over_the_capacity(lengths: list[int], tokens: int) -> None:
    feeds = step_feeds(lengths, tokens)
    before = outputs(step_graph(), **feeds)
    model = step_graph()
    assert UsedEntries()(model).modified
    after = outputs(model, **feeds)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-6)


def test_entries_that_are_not_in_use_may_hold_anything() -> None:
    lengths, tokens = [3, 7], 2
    feeds = step_feeds(lengths, tokens)
    model = step_graph()
    UsedEntries()(model)
    before = run(model, **feeds)
    for part in ("key", "value"):
        feeds[f"past.0.{part}"][:, :, max(lengths) + tokens :] = np.nan
        feeds[f"past.0.{part}"][0, :, lengths[0] + tokens :][:, : max(lengths) - lengths[0]] = -1e30  # finite: still read
    np.testing.assert_array_equal(run(model, **feeds), before)


def test_nothing_but_the_cache_itself_is_as_large_as_the_capacity() -> None:
    model = step_graph()
    UsedEntries()(model)
    shapes = intermediate_shapes(model, step_feeds([3, 7], 2))
    assert {name for name, shape in shapes.items() if CAPACITY in shape} == {"present_key", "present_value"}
    portable = intermediate_shapes(step_graph(), step_feeds([3, 7], 2))
    assert len({name for name, shape in portable.items() if CAPACITY in shape}) > 10  # what the check above would find


def intermediate_shapes(model: ir.Model, feeds: Arrays) -> dict[str, tuple[int, ...]]:
    """The result of every node, by running the graph with all values as outputs."""
    ShapeInferencePass()(model)
    for value in [value for node in model.graph for value in node.outputs]:
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    return {name: array.shape for name, array in outputs(model, **feeds).items()}


def test_a_graph_without_a_cache_is_left_alone() -> None:
    assert not UsedEntries()(parse(attention_text())).modified


# --- GroupedAttention


def attention_text(
    heads: int = 4,
    attributes: str = "",
    mask: str = "bool[B,1,T,S] mask",
    value_width: int = 8,
    result: str = "y",
    more: str = "",
) -> str:
    operands = "q, k, v, mask" if mask else "q, k, v"
    declared = f", {mask}" if mask else ""
    return f"""
    g (float[B,{heads},T,8] q, float[B,2,S,8] k, float[B,2,S,{value_width}] v{declared})
      => (float[B,{heads},T,{value_width}] y{more})
    {{ {result} = Attention {attributes} ({operands}) }}"""


def attention_feeds(heads: int = 4, value_width: int = 8, mask_shape: tuple[int, ...] = (3, 1, 5, 9)) -> Arrays:
    mask = np.random.default_rng(7).random(mask_shape) < 0.5
    mask[..., 0] = True  # a row sees something
    return {
        "q": normal(3, heads, 5, 8, seed=1) * 3,
        "k": normal(3, 2, 9, 8, seed=2) * 3,
        "v": normal(3, 2, 9, value_width, seed=3),
        "mask": mask,
    }


@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize("attributes", ["", "<scale = 0.7>", "<softcap = 2.0>", "<scale = 0.7, softcap = 5.0>"])
def test_query_heads_side_by_side_attend_as_each_for_itself(heads: int, attributes: str) -> None:
    feeds = attention_feeds(heads)
    model = parse(attention_text(heads, attributes))
    before = run(model, **feeds)
    assert GroupedAttention()(model).modified
    assert "Attention" not in kinds(model)
    np.testing.assert_allclose(run(model, **feeds), before, rtol=1e-5, atol=1e-5)


def test_values_may_be_of_another_width_than_keys() -> None:
    feeds = attention_feeds(6, value_width=4)
    model = parse(attention_text(6, value_width=4))
    before = run(model, **feeds)
    assert GroupedAttention()(model).modified
    np.testing.assert_allclose(run(model, **feeds), before, rtol=1e-5, atol=1e-5)


def test_what_the_mask_hides_weighs_nothing_however_large() -> None:
    feeds = attention_feeds()
    model = parse(attention_text())
    GroupedAttention()(model)
    feeds["mask"][..., 4:] = False
    before = run(model, **feeds)
    feeds["k"][:, :, 4:] *= 1e30
    feeds["v"][:, :, 4:] = -1e30
    np.testing.assert_array_equal(run(model, **feeds), before)


def test_layers_with_masks_of_their_own_keep_them() -> None:
    """Two masks, like sliding and full attention, and groups of different sizes."""
    text = """
    g (float[B,4,T,8] q, float[B,2,T,8] p, float[B,2,S,8] k, float[B,2,S,8] v, bool[B,1,T,S] mask, bool[B,1,T,S] other)
      => (float[B,4,T,8] a, float[B,4,T,8] b, float[B,2,T,8] c)
    { a = Attention (q, k, v, mask)
      b = Attention (q, k, v, other)
      c = Attention (p, k, v, mask) }"""
    feeds = attention_feeds() | {"other": attention_feeds()["mask"][:, :, ::-1].copy(), "p": normal(3, 2, 5, 8, seed=9)}
    model = parse(text)
    before = outputs(model, **feeds)
    GroupedAttention()(model)
    after = outputs(model, **feeds)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)
    assert not np.allclose(after["a"], after["b"], atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": ""},
        {"mask": "float[B,1,T,S] mask"},
        {"mask": "bool[B,4,T,S] mask"},
        {"mask": "bool[T,S] mask"},
        {"attributes": "<is_causal = 1>"},
        {"result": "y, k2, v2, scores", "more": ", float[B,4,T,S] scores"},
    ],
)
def test_attention_of_another_kind_is_left_alone(changes: dict[str, str]) -> None:
    assert not GroupedAttention()(parse(attention_text(**changes))).modified  # type: ignore[arg-type]


def test_attention_with_unknown_heads_is_left_alone() -> None:
    text = attention_text().replace("float[B,4,T,8] q", "float[B,H,T,8] q").replace("float[B,4,T,8] y", "float[B,H,T,8] y")
    assert not GroupedAttention()(parse(text)).modified


# --- MergeProjections

FLOATS = """
g (float[B,T,16] x, float[B,T,16] z, float[16,24] q, float[16,8] k, float[16,8] v, float[8] bias)
  => (float[B,T,24] qx, float[B,T,8] kx, float[B,T,8] vx, float[B,T,8] kz)
{ qx = MatMul (x, q)
  k0 = MatMul (x, k)
  kx = Add (k0, bias)
  vx = MatMul (x, v)
  kz = MatMul (z, k) }"""
INTEGERS = """
g (float[B,T,16] x, int8[16,24] q, int8[16,8] k, float[24] qs, float[8] ks, float[16,8] v)
  => (float[B,T,24] qx, float[B,T,8] kx, float[B,T,8] vx)
{ qw = DequantizeLinear <axis = 1> (q, qs)
  qx = MatMul (x, qw)
  kw = DequantizeLinear <axis = 1> (k, ks)
  kx = MatMul (x, kw)
  vx = MatMul (x, v) }"""


def int8(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, shape, np.int8)


def scales(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1e-3, 1e-2, count).astype("f")


def float_projections() -> ir.Model:
    return parse(FLOATS, q=normal(16, 24), k=normal(16, 8, seed=1), v=normal(16, 8, seed=2), bias=normal(8, seed=3))


def integer_projections() -> ir.Model:
    return parse(INTEGERS, q=int8(16, 24), k=int8(16, 8, seed=1), qs=scales(24), ks=scales(8, 1), v=normal(16, 8))


def test_products_of_one_input_become_one() -> None:
    feeds = {"x": normal(2, 3, 16, seed=4), "z": normal(2, 3, 16, seed=5)}
    model = float_projections()
    before = outputs(model, **feeds)
    assert MergeProjections()(model).modified
    assert kinds(model).count("MatMul") == 2  # that of the other input stays
    after = outputs(model, **feeds)
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sum_of_q", ["qx = Add (q0, qb)", "qx = Add (qb, q0)"])
@pytest.mark.parametrize("is_int8", [False, True])
def test_biases_of_merged_products_are_added_at_once(sum_of_q: str, is_int8: bool) -> None:
    text = """
    g (float[B,T,16] x, WEIGHTS, float[24] qb, float[8] kb) => (float[B,T,24] qx, float[B,T,8] kx)
    { q0 = MatMul (x, qw)
      SUM
      k0 = MatMul (x, kw)
      kx = Add (k0, kb) }""".replace("SUM", sum_of_q)
    biases = {"qb": normal(24, seed=6), "kb": normal(8, seed=7)}
    if is_int8:
        scaled = "{ qw = DequantizeLinear <axis = 1> (q, qs)\n kw = DequantizeLinear <axis = 1> (k, ks)\n"
        text = text.replace("WEIGHTS", "int8[16,24] q, int8[16,8] k, float[24] qs, float[8] ks").replace("{", scaled)
        model = parse(text, q=int8(16, 24), k=int8(16, 8, seed=1), qs=scales(24), ks=scales(8, 1), **biases)
    else:
        text = text.replace("WEIGHTS", "float[16,24] qw, float[16,8] kw")
        model = parse(text, qw=normal(16, 24), kw=normal(16, 8, seed=1), **biases)
    feeds = {"x": normal(2, 3, 16, seed=4)}
    before = outputs(model, **feeds)
    assert MergeProjections()(model).modified
    assert (kinds(model).count("MatMul"), kinds(model).count("Add")) == (1, 1)
    after = outputs(model, **feeds)
    assert after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sum_of_q", "more"),
    [
        ("qx = Add (q0, qb)", "q0"),  # the product is an output, too
        ("qx = Sub (q0, qb)", ""),
        ("q1 = Neg (q0)\n qx = Add (q1, qb)", ""),
        ("q1 = Add (q0, qb)\n qx = Mul (q1, q0)", ""),
        ("qx = Add (q0, wide)", ""),
    ],
)
def test_what_is_no_bias_of_a_product_alone_stays_behind_the_split(sum_of_q: str, more: str) -> None:
    text = """
    g (float[B,T,16] x, float[16,24] qw, float[16,8] kw, float[24] qb, float[8] kb, float[1] wide)
      => (float[B,T,24] qx, float[B,T,8] kxMORE)
    { q0 = MatMul (x, qw)
      SUM
      k0 = MatMul (x, kw)
      kx = Add (k0, kb) }""".replace("SUM", sum_of_q).replace("MORE", f", float[B,T,24] {more}" if more else "")
    weights = {"qw": normal(16, 24), "kw": normal(16, 8, seed=1), "qb": normal(24, seed=6), "kb": normal(8, seed=7)}
    model, feeds = parse(text, **weights, wide=normal(1, seed=8)), {"x": normal(2, 3, 16, seed=4)}
    before, sums = outputs(model, **feeds), kinds(model).count("Add")
    assert MergeProjections()(model).modified
    assert (kinds(model).count("MatMul"), kinds(model).count("Add")) == (1, sums)
    after = outputs(model, **feeds)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)


def test_int8_products_of_one_input_become_one_that_is_int8_still() -> None:
    feeds = {"x": normal(2, 3, 16, seed=4)}
    model = integer_projections()
    before = outputs(model, **feeds)
    assert MergeProjections()(model).modified
    assert kinds(model).count("MatMul") == 2  # the float one stays
    after = outputs(model, **feeds)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)
    assert IntegerProducts(8)(model).modified
    assert kinds(model).count("MatMul") == kinds(model).count("MatMulIntegerToFloat") == 1


def test_weights_are_kept_once_when_products_are_merged() -> None:
    for model in (float_projections(), integer_projections()):
        before = {name: value.const_value for name, value in model.graph.initializers.items()}
        MergeProjections()(model)
        new = {name: value for name, value in model.graph.initializers.items() if name not in before}
        assert all(value.const_value is not None and value.const_value.size <= 3 for value in new.values())


def test_a_transposed_table_among_the_products_leaves_the_graph_in_order() -> None:
    text = """
    g (float[T,16] x, int8[16,24] q, float[24] qs, int8[8,16] k, float[8] ks) => (float[T,24] qx, float[T,8] kx)
    { qw = DequantizeLinear <axis = 1> (q, qs)
      qx = MatMul (x, qw)
      kt = Transpose <perm = [1, 0]> (k)
      kw = DequantizeLinear <axis = 1> (kt, ks)
      kx = MatMul (x, kw) }"""
    model = parse(text, q=int8(16, 24), qs=scales(24), k=int8(8, 16), ks=scales(8))
    feeds = {"x": normal(3, 16)}
    before = outputs(model, **feeds)
    MergeProjections()(model)
    after = outputs(model, **feeds)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)


def test_products_of_what_is_no_weight_are_left_alone() -> None:
    text = """
    g (float[B,T,16] x, float[B,16,8] a, float[16,8] b) => (float[B,T,8] y, float[B,T,8] z)
    { y = MatMul (x, a)
      z = MatMul (x, b) }"""
    assert not MergeProjections()(parse(text)).modified
    assert not MergeProjections()(parse(text, b=normal(16, 8))).modified


# --- QuickSilu

SILU = "g (float[T,8] x, float[T,8] z) => ({out}) {{ s = Sigmoid (x)\n y = Mul ({operands})\n {more} }}"


@pytest.mark.parametrize("operands", ["x, s", "s, x"])
def test_silu_is_one_operator(operands: str) -> None:
    model = parse(SILU.format(out="float[T,8] y", operands=operands, more=""))
    feeds = {"x": np.array([[-100, -3, -0.1, 0, 0.1, 3, 20, 100]], "f"), "z": normal(1, 8)}
    before = outputs(model, **feeds)
    assert QuickSilu()(model).modified
    assert len(kinds(model)) == 1
    after = outputs(model, **feeds)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("out", "operands", "more"),
    [
        ("float[T,8] y", "z, s", ""),  # a gate, but of something else
        ("float[T,8] y, float[T,8] s", "x, s", ""),
        ("float[T,8] y, float[T,8] w", "x, s", "w = Neg (s)"),
    ],
)
def test_a_sigmoid_that_is_no_silu_is_left_alone(out: str, operands: str, more: str) -> None:
    assert not QuickSilu()(parse(SILU.format(out=out, operands=operands, more=more))).modified


# --- LogProbs

CANDIDATES = """
g (float[B,K,100] x) => ({out})
<int64[1] k = {{5}}, int64[1] last = {{{axis}}}> {{
    best, places = TopK <axis = -1> (x, k)
    sum = ReduceLogSumExp (x, last)
    y = Sub ({operands})
    {more}
}}"""


def test_candidates_have_the_same_log_probabilities() -> None:
    model = parse(CANDIDATES.format(out="float[B,K,5] y, int64[B,K,5] places", axis=-1, operands="best, sum", more=""))
    rows = normal(2, 3, 100) * np.array([1, 30, 300], "f")[:, None]
    rows[0, 0, 7:9] = rows[0, 0].max() + 1  # two are equal
    before = outputs(model, x=rows)
    assert LogProbs()(model).modified
    RemoveUnusedNodesPass()(model)
    assert sorted(kinds(model)) == ["GatherElements", "LogSoftmax", "TopK"]
    after = outputs(model, x=rows)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after["places"], before["places"])


@pytest.mark.parametrize(
    ("out", "axis", "operands", "more"),
    [
        ("float[B,K,5] y", -2, "best, sum", ""),
        ("float[B,K,100] y", -1, "x, sum", ""),
        ("float[B,K,5] y", -1, "other, sum", "other, ranks = TopK <axis = -1> (z, k)"),
    ],
)
def test_a_sum_that_is_no_log_probability_is_left_alone(out: str, axis: int, operands: str, more: str) -> None:
    text = CANDIDATES.format(out=out, axis=axis, operands=operands, more="")
    if more:  # before its reader
        text = text.replace("y = Sub", f"z = Neg (x)\n    {more}\n    y = Sub")
    assert not LogProbs()(parse(text)).modified


@pytest.mark.parametrize(("found", "other"), [("TopK <axis = -1>", "TopK <axis = 1>"), ("Exp (", "Exp <keepdims = 0> (")])
def test_candidates_along_another_axis_are_left_alone(found: str, other: str) -> None:
    text = CANDIDATES.format(out="float[B,K,5] y", axis=-1, operands="best, sum", more="").replace(found, other)
    assert not LogProbs()(parse(text)).modified


# --- SkipNorm

NORM = "g ({inputs}, float[8] w) => ({out}) {{ t = Add (a, b)\n y = RMSNormalization {attributes} (t, w)\n {more} }}"
SAME = "float[B,T,8] a, float[B,T,8] b"


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize(
    ("out", "more"),
    [
        ("float[B,T,8] y", ""),
        ("float[B,T,8] y, float[B,T,8] z", "z = Add (t, y)"),  # the residual goes on
        ("float[B,T,8] y, float[B,T,8] t", ""),
        ("float[B,T,8] t, float[B,T,8] z", "z = RMSNormalization (t, w)"),  # two norms of one sum
    ],
)
def test_a_sum_and_its_norm_are_one_operator(out: str, more: str, epsilon: float) -> None:
    model = parse(NORM.format(inputs=SAME, out=out, attributes=f"<epsilon = {epsilon}>", more=more), w=normal(8))
    feeds = {"a": normal(2, 3, 8, seed=1), "b": normal(2, 3, 8, seed=2)}
    before = outputs(model, **feeds)
    assert SkipNorm()(model).modified
    assert kinds(model).count("SkipSimplifiedLayerNormalization") == 1
    after = outputs(model, **feeds)
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)


def test_a_norm_without_an_epsilon_has_the_standards() -> None:
    model = parse(NORM.format(inputs=SAME, out="float[B,T,8] y", attributes="", more=""), w=normal(8))
    feeds = {"a": normal(2, 3, 8, seed=1) * 1e-3, "b": np.zeros((2, 3, 8), "f")}  # where the epsilon is what counts
    before = run(model, **feeds)
    assert SkipNorm()(model).modified
    np.testing.assert_allclose(run(model, **feeds), before, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "attributes", "weights"),
    [
        ("float[B,T,8] a, float[8] b", "", {"w": normal(8), "b": normal(8)}),  # a bias
        ("float[B,T,8] a, float[1,1,8] b", "", {"w": normal(8), "b": normal(1, 1, 8)}),
        ("float[B,T,8] a, float[1,T,8] b", "", {"w": normal(8)}),
        ("float[?,?,8] a, float[?,?,8] b", "", {"w": normal(8)}),  # may not be of one shape
        ("float[T,8] a, float[T,8] b", "", {"w": normal(8)}),
        ("float[B,8,8] a, float[B,8,8] b", "<axis = 1>", {"w": normal(8)}),
    ],
)
def test_a_norm_of_no_residual_is_left_alone(inputs: str, attributes: str, weights: Arrays) -> None:
    text = NORM.format(inputs=inputs.replace("?", "N"), out="float[B,T,8] y", attributes=attributes, more="")
    model = parse(text, **weights)
    if "?" in inputs:
        for value in model.graph.inputs:
            value.shape = ir.Shape([None, None, 8])
    assert not SkipNorm()(model).modified


# --- IntegerProducts

PRODUCT = """
g (float[B,T,64] x, int8[64,24] w, float[24] s) => (float[B,T,24] y)
{ f = DequantizeLinear <axis = 1> (w, s)
  y = MatMul (x, f) }"""
WEIGHT, SCALE = int8(64, 24, seed=3), scales(24, seed=4)
SIZES = np.abs(WEIGHT.astype(np.float64) * SCALE).sum(0)  # [24]: how far a column carries an error of each input
BITS = [8, 16]


def integer_product(bits: int) -> ir.Model:
    model = parse(PRODUCT, w=WEIGHT, s=SCALE)
    assert IntegerProducts(bits)(model).modified
    assert kinds(model).count("MatMulIntegerToFloat") == 1
    return model


def error_bound(x: np.ndarray, bits: int) -> np.ndarray:
    """Half a level of a row's largest value; in 16 bits of its length, and half a level of what 8 leave of that."""
    if bits == 8:
        return np.abs(x).max(-1, keepdims=True) * SIZES / 127 / 2 * 1.001
    return np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True) * SIZES / 127 / 254 / 2 * 1.02


@pytest.mark.parametrize("bits", BITS)
@given(seed=st.integers(0, 1000), exponents=st.lists(st.integers(-10, 10), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None)
def test_an_integer_product_is_within_its_rounding_of_the_float_one(bits: int, seed: int, exponents: list[int]) -> None:
    x = normal(2, 3, 64, seed=seed) * np.array([10.0**power for power in exponents], "f").reshape(2, 3, 1)
    exact = x.astype(np.float64) @ (WEIGHT.astype(np.float64) * SCALE)
    found = run(integer_product(bits), x=x)
    assert (np.abs(found - exact) <= error_bound(x, bits)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("width", "columns"), [(64, 24), (72, 40), (96, 320), (576, 192)])
def test_a_row_is_rounded_by_itself_whatever_the_others_are(bits: int, width: int, columns: int) -> None:
    text = PRODUCT.replace("64", str(width)).replace("24", str(columns))
    model = parse(text, w=int8(width, columns), s=scales(columns))
    IntegerProducts(bits)(model)
    x = normal(1, 1, width)
    alone = run(model, x=x)[0, 0]
    for batch, tokens in ((1, 2), (3, 5), (2, 17)):
        together = np.tile(x, (batch, tokens, 1))
        together[:, 1::2] = normal(batch, tokens // 2, width, seed=1) * 1e6
        found = run(model, x=together)[:, ::2]
        np.testing.assert_array_equal(found, np.broadcast_to(alone, found.shape))


NORMED = """
g (float[B,T,64] a, float[B,T,64] b, float[64] gain, int8[64,24] w, float[24] s) => (float[B,T,24] y)
{ x = Add (a, b)
  n = RMSNormalization <epsilon = 1e-5> (x, gain)
  f = DequantizeLinear <axis = 1> (w, s)
  y = MatMul (n, f) }"""


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("skip", [False, True])
def test_what_comes_from_a_norm_is_rounded_as_well(bits: int, skip: bool) -> None:
    gain = normal(64, seed=8)
    model = parse(NORMED, gain=gain, w=WEIGHT, s=SCALE)
    one_hot = np.zeros((2, 4, 64), "f")
    one_hot[0, 1, np.abs(gain).argmax()] = -3  # as large as a norm's output can be
    one_hot[0, 2:] = normal(2, 64) * 100
    feeds = {"a": one_hot, "b": np.zeros_like(one_hot)}
    exact = run(model, **feeds)
    if skip:
        assert SkipNorm()(model).modified
    assert IntegerProducts(bits)(model).modified
    bound = np.abs(gain).max() * 8 * SIZES.max() / 127 / 2 / (1 if bits == 8 else 254)  # 8: the root of the width
    np.testing.assert_allclose(run(model, **feeds), exact, rtol=0, atol=bound * 1.02)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros_give_zeros(bits: int) -> None:
    x = np.zeros((1, 3, 64), "f")
    x[0, 1] = normal(64)
    result = run(integer_product(bits), x=x)
    np.testing.assert_array_equal(result[0, [0, 2]], 0)
    assert np.isfinite(result).all()
    assert np.abs(result[0, 1]).max() > 0


@pytest.mark.parametrize("bits", BITS)
def test_products_do_not_saturate_where_everything_is_extreme(bits: int) -> None:
    """Sums of pairs beyond int16, where some kernels would saturate."""
    weight = np.where(np.arange(24) % 2, 127, -127).astype(np.int8)[None].repeat(64, 0)
    model = parse(PRODUCT, w=weight, s=SCALE)
    IntegerProducts(bits)(model)
    for x in (np.ones((1, 1, 64), "f"), -np.ones((1, 1, 64), "f")):
        np.testing.assert_allclose(run(model, x=x)[0, 0], x[0, 0] @ (weight * SCALE), rtol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_each_value_is_within_half_a_level(bits: int) -> None:
    text = PRODUCT.replace("24", "64")  # a weight that gives back what it is multiplied with
    model = parse(text, w=np.eye(64, dtype=np.int8) * np.int8(127), s=np.full(64, 1 / 127, "f"))
    IntegerProducts(bits)(model)
    x = normal(2, 4, 64)
    whole = np.abs(x).max(-1, keepdims=True) if bits == 8 else np.linalg.norm(x, axis=-1, keepdims=True) / 254
    assert (np.abs(run(model, x=x) - x) <= whole / 127 / 2 * 1.02).all()


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_weight_of_two_products_opens_where_products_would_saturate(is_turned: bool) -> None:
    weight, shape = (WEIGHT.T.copy(), "24,64") if is_turned else (WEIGHT, "64,24")
    turned = "t = Transpose <perm = [1, 0]> (w)\n f = DequantizeLinear <axis = 1> (t, s)"
    text = f"""
    g (float[T,64] x, float[T,64] z, int8[{shape}] w, float[24] s) => (float[T,24] xw, float[T,24] zw)
    {{ {turned if is_turned else "f = DequantizeLinear <axis = 1> (w, s)"}
      xw = MatMul (x, f)
      zw = MatMul (z, f) }}"""
    model = parse(text, w=weight, s=SCALE)
    IntegerProducts(8)(model)
    RemoveUnusedNodesPass()(model)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, z = normal(3, 64), normal(3, 64, seed=1)
    for found, one in zip(session.run(["xw", "zw"], {"x": x, "z": z}), (x, z), strict=True):
        assert (np.abs(found - one @ (WEIGHT * SCALE)) <= np.abs(one).max(-1, keepdims=True) * SIZES / 127 / 2 * 1.01).all()


def test_sixteen_bits_are_better_than_eight() -> None:
    x = normal(2, 4, 64)
    exact = x.astype(np.float64) @ (WEIGHT.astype(np.float64) * SCALE)
    eight, sixteen = (np.abs(run(integer_product(bits), x=x) - exact).max() for bits in BITS)
    assert sixteen < eight / 50


@pytest.mark.parametrize("bits", BITS)
def test_two_products_of_one_input_round_it_once(bits: int) -> None:
    text = """
    g (float[T,16] x, int8[16,24] q, float[24] qs, int8[16,8] k, float[8] ks) => (float[T,24] qx, float[T,8] kx)
    { qw = DequantizeLinear <axis = 1> (q, qs)
      qx = MatMul (x, qw)
      kw = DequantizeLinear <axis = 1> (k, ks)
      kx = MatMul (x, kw) }"""
    model = parse(text, q=int8(16, 24), qs=scales(24), k=int8(16, 8), ks=scales(8))
    feeds = {"x": normal(3, 16)}
    before = outputs(model, **feeds)
    IntegerProducts(bits)(model)
    assert kinds(model).count("QuantizeLinear") == bits // 8
    after = outputs(model, **feeds)
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=0.1 if bits == 8 else 1e-3)


@pytest.mark.parametrize(
    "change",
    [
        ("float[24] s", "float s"),  # one scale for all
        ("(w, s)", "(w, s, o)"),  # zero points
        ("axis = 1> (w, s)", "axis = 0> (w, s)"),  # a scale for each input
    ],
)
def test_integers_of_another_kind_stay_a_float_product(change: tuple[str, str]) -> None:
    text = PRODUCT.replace(*change)
    if "o)" in text:
        text = text.replace("float[24] s)", "float[24] s, int8[24] o)")
    assert not IntegerProducts()(parse(text)).modified


# --- replace


def test_a_value_that_replaces_an_output_takes_its_name() -> None:
    model = parse("g (float[T,8] x) => (float[T,8] y, float[T,8] z) { y = Neg (x)\n z = Abs (y) }")
    old = model.graph.outputs[0]
    node = ir.node("Relu", [model.graph.inputs[0]])
    model.graph.insert_before(model.graph[0], node)
    replace(old, node.outputs[0])
    model.graph.remove(old.producer(), safe=True)
    x = normal(2, 8)
    result = outputs(model, x=x)
    np.testing.assert_array_equal(result["y"], np.maximum(x, 0))
    np.testing.assert_array_equal(result["z"], np.maximum(x, 0))
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    names = [value.name for node in model.graph for value in node.outputs]
    assert all(one != other for one, other in pairwise(sorted(map(str, names))))
