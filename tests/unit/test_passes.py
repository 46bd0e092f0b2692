"""Each graph pass on the smallest graph that shows it, run before and after."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.passes.common.values import add_initializer, constant
from medusa_export.passes.portable.constant_reshapes import ConstantReshapes
from medusa_export.passes.portable.merge_attention import MergeAttention
from medusa_export.passes.portable.simplify import Simplify
from medusa_export.passes.portable.transpose_weights import TransposeWeights
from medusa_export.passes.portable.upcast import Upcast
from tests.support.graphs import HEADER, kinds, outputs, parse, run


def test_computed_reshape_targets_become_constants() -> None:
    model = parse(
        """g (float[B,T,8] x, float[B,T,2,4] like) => (float[B,T,2,4] y)
        { shape = Shape(like)
          y = Reshape <allowzero = 1> (x, shape) }"""
    )
    feeds = {"x": np.arange(48, dtype="f").reshape(2, 3, 8), "like": np.zeros((2, 3, 2, 4), "f")}
    before = run(model, **feeds)
    assert ConstantReshapes()(model).modified
    target = model.graph[-1].inputs[1].const_value
    assert target.numpy().tolist() == [0, 0, 2, 4]
    np.testing.assert_array_equal(run(model, **feeds), before)


def test_a_reshape_that_moves_a_dynamic_dimension_is_left_alone() -> None:
    model = parse("g (float[B,T,8] x, int64[3] shape) => (float[T,B,8] y) { y = Reshape (x, shape) }")
    reshapes = ConstantReshapes()
    assert not reshapes(model).modified
    assert dict(reshapes.declined) == {"a target shape with unknown sizes that are not the input's": 1}


LINEAR = """g (float[T,3] x, float[5,3] w) => (float[T,5] y)
{ wt = Transpose <perm = [1, 0]> (w)
  y = MatMul(x, wt) }"""
WEIGHT = np.arange(15, dtype="f").reshape(5, 3)


def test_a_weight_is_stored_as_the_product_reads_it() -> None:
    model = parse(LINEAR, w=WEIGHT)
    x = np.ones((2, 3), "f")
    before = run(model, x=x)
    assert TransposeWeights()(model).modified
    assert kinds(model) == ["MatMul"]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT.T)
    np.testing.assert_array_equal(run(model, x=x), before)


def test_a_weight_with_several_readers_is_stored_once_as_all_of_them_read_it() -> None:
    model = parse(
        """g (float[T,3] x, float[5,3] w) => (float[T,5] y)
        { first = Transpose <perm = [1, 0]> (w)
          second = Transpose <perm = [1, 0]> (w)
          a = MatMul(x, first)
          b = Neg(x)
          c = MatMul(b, second)
          d = Mul(c, c)
          y = Add(a, d) }""",
        w=WEIGHT,
    )
    x = np.ones((2, 3), "f")
    before = run(model, x=x)
    assert TransposeWeights()(model).modified
    assert "Transpose" not in kinds(model)
    assert list(model.graph.initializers) == ["w"]
    np.testing.assert_array_equal(run(model, x=x), before)


def test_a_tied_weight_stays_in_its_own_layout() -> None:
    tied = parse(
        """g (int64[T] ids, float[5,3] w) => (float[T,5] y)
        { x = Gather(w, ids)
          wt = Transpose <perm = [1, 0]> (w)
          y = MatMul(x, wt) }""",
        w=WEIGHT,
    )
    for transpose, model, reason in (
        (TransposeWeights(), tied, "a weight that is also read in its own layout"),
        (TransposeWeights(frozenset({"w"})), parse(LINEAR, w=WEIGHT), "a weight that another graph reads in its own layout"),
    ):
        assert not transpose(model).modified
        assert dict(transpose.declined) == {reason: 1}


DIFFERENTIAL = """g (float[B,4,T,8] q, float[B,2,S,8] k, float[B,2,S,8] v, float[B,2,S,6] w, float[B,1,T,S] mask)
    => (float[B,4,T,8] first, float[B,4,T,6] second, float[B,4,T,8] other)
{ first = Attention <scale = 0.3> (q, k, v, mask)
  second = Attention <scale = 0.3> (q, k, w, mask)
  other = Attention <scale = 0.5> (q, k, v, mask) }"""


def test_attention_that_shares_its_scores_is_computed_once() -> None:
    model = parse(DIFFERENTIAL)
    random = np.random.default_rng(0)
    sizes = {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8), "w": (2, 2, 5, 6), "mask": (2, 1, 3, 5)}
    feeds = {name: random.normal(size=shape).astype("f") for name, shape in sizes.items()}
    before = outputs(model, **feeds)
    assert MergeAttention()(model).modified
    assert kinds(model).count("Attention") == 2
    after = outputs(model, **feeds)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-6, atol=1e-6)
    assert not MergeAttention()(model).modified


def test_simplifying_folds_constants_but_no_weights() -> None:
    model = parse(
        """g (float[T,3] x, float[3] w) => (float[T,3] y)
        { one = Constant <value = float {1}> ()
          two = Add(one, one)
          scale = Add(w, two)
          y = Mul(x, scale) }""",
        w=np.ones(3, "f"),
    )
    Simplify()(model)
    assert kinds(model) == ["Add", "Mul"]
    np.testing.assert_array_equal(run(model, x=np.ones((1, 3), "f")), [[3, 3, 3]])


def test_a_bfloat16_graph_runs_in_float32() -> None:
    # the text form gives bfloat16 by its bits: 16384 is 2.0
    model = ir.from_onnx_text(
        HEADER
        + """g (bfloat16[T,3] x) => (bfloat16[T,3] y)
        { two = Constant <value = bfloat16 {16384}> ()
          wide = Cast <to = 1> (x)
          narrow = Cast <to = 16> (wide)
          y = Mul(narrow, two) }"""
    )
    Upcast()(model)
    np.testing.assert_array_equal(run(model, x=np.full((1, 3), 1.001, "f")), np.full((1, 3), 2.002, "f"))


@pytest.mark.parametrize(
    ("data", "other"),
    [(1.0, np.float32(2)), (1.0, np.int64(1)), (1.0, np.array([1], "f")), (0.0, np.float32(-0.0))],
    ids=["value", "type", "shape", "sign"],
)
def test_a_constant_is_shared_only_with_an_equal_one(data: float, other: np.generic) -> None:
    """A model may have a weight of the same name, and two passes may choose one name."""
    graph = ir.Graph([], [], nodes=[])
    theirs = add_initializer(graph, "scale", ir.tensor(other, name="scale"))
    ours = constant(graph, "scale", data)
    assert (ours.name, ours.const_value.name) == ("scale_", "scale_")
    assert ours.const_value.numpy().tobytes() == np.float32(data).tobytes()
    assert constant(graph, "scale", data) is ours
    assert constant(graph, "scale", other) is theirs
    assert list(graph.initializers) == ["scale", "scale_"]
