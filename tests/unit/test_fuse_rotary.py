"""Rotary embeddings in each way that decoders spell them, fused into the standard operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.passes.portable.fuse_rotary import FuseRotary
from medusa_export.passes.portable.simplify import Simplify
from tests.support.graphs import kinds, parse, run

CONSTANTS = """<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] four = {4},
   int64[1] eight = {8}, int64[1] end = {9223372036854775807}, int64[1] neg1 = {-1}, float scale = {0.5},
   int64[4] pair_of_f = {1, 1, 1, 2}, int64[3] flat_f = {0, 0, 8}, int64[5] pair_of_c = {1, 1, 1, 1, 2},
   int64[4] flat = {0, 0, 0, 8}>"""
# cos and sin, [B, 1, T, 8], of f [B, T, 4]
HALVES = """c = Concat <axis = -1> (f, f)
  cos0 = Cos (c)
  cos1 = Mul (cos0, scale)
  sin1 = Sin (c)
  cos = Unsqueeze (cos1, one)
  sin = Unsqueeze (sin1, one)"""
PAIRS = """f4 = Unsqueeze (f, three)
  f2 = Expand (f4, pair_of_f)
  c = Reshape (f2, flat_f)
  cos1 = Cos (c)
  sin1 = Sin (c)
  cos = Unsqueeze (cos1, one)
  sin = Unsqueeze (sin1, one)"""
LATE_PAIRS = """c = Concat <axis = -1> (f, f)
  cos1 = Cos (c)
  sin1 = Sin (c)
  cos2 = Unsqueeze (cos1, one)
  sin2 = Unsqueeze (sin1, one)
  cos3 = Slice (cos2, zero, four, three, one)
  sin3 = Slice (sin2, zero, four, three, one)
  cos4 = Unsqueeze (cos3, four)
  sin4 = Unsqueeze (sin3, four)
  cos5 = Expand (cos4, pair_of_c)
  sin5 = Expand (sin4, pair_of_c)
  cos = Reshape (cos5, flat)
  sin = Reshape (sin5, flat)"""
# x, rotated by a quarter turn
IN_HALVES = """x1 = Slice (x, zero, four, three, one)
  x2 = Slice (x, four, end, three, one)
  n = Neg (x2)
  r = Concat <axis = -1> (n, x1)"""
INTERLEAVED = """x1 = Slice (x, zero, end, three, two)
  x2 = Slice (x, one, end, three, two)
  n = Neg (x2)
  u1 = Unsqueeze (n, neg1)
  u2 = Unsqueeze (x1, neg1)
  s = Concat <axis = -1> (u1, u2)
  r = Reshape (s, flat)"""


def rotary(angles: str, rotated: str, *, partial: bool = False) -> ir.Model:
    """The graph of one rotation, of whole heads of 8 or of the first 8 of 12."""
    first = "x = Slice (whole, zero, eight, three, one)" if partial else "x = Identity (whole)"
    last = "rest = Slice (whole, eight, end, three, one)\n  y = Concat <axis = -1> (z, rest)" if partial else "y = Identity (z)"
    width = 12 if partial else 8
    return parse(
        f"""g (float[B,2,T,{width}] whole, float[B,T,4] f) => (float[B,2,T,{width}] y) {CONSTANTS}
        {{
          {angles}
          {first}
          {rotated}
          a = Mul (x, cos)
          b = Mul (sin, r)
          z = Add (b, a)
          {last}
        }}"""
    )


def feeds(width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"whole": rng.normal(size=(2, 2, 3, width)).astype("f"), "f": rng.normal(size=(2, 3, 4)).astype("f")}


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("angles", "rotated", "interleaved"),
    [(HALVES, IN_HALVES, 0), (PAIRS, INTERLEAVED, 1), (LATE_PAIRS, INTERLEAVED, 1)],
    ids=["halves", "interleaved", "interleaved, angles by layer"],
)
def test_each_spelling_becomes_one_operator(angles: str, rotated: str, interleaved: int, partial: bool) -> None:
    model = rotary(angles, rotated, partial=partial)
    Simplify()(model)
    before = run(model, **feeds(12 if partial else 8))
    fuse = FuseRotary()
    assert fuse(model).modified
    assert not fuse.declined
    Simplify()(model)
    [node] = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert node.attributes.get_int("interleaved", 0) == interleaved
    assert node.attributes.get_int("rotary_embedding_dim", 0) == (8 if partial else 0)
    assert not {"Neg", "Add"} & set(kinds(model))
    np.testing.assert_allclose(run(model, **feeds(12 if partial else 8)), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("angles", "rotated", "reason"),
    [
        (HALVES.replace("(f, f)", "(f, g)").replace("c =", "g = Neg (f)\n  c =", 1), IN_HALVES, "halves of cos or sin"),
        (HALVES.replace("axis = -1", "axis = 2").replace("(f, f)", "(f, f)"), INTERLEAVED, "parts of each pair"),
        (PAIRS, IN_HALVES, "halves of cos or sin"),
    ],
)
def test_unequal_angles_are_left_alone_with_the_reason(angles: str, rotated: str, reason: str) -> None:
    model, fuse = rotary(angles, rotated), FuseRotary()
    Simplify()(model)
    assert not fuse(model).modified
    [(found, count)] = fuse.declined.items()
    assert reason in found
    assert count == 1


@pytest.mark.parametrize(
    "change",
    [
        ("Slice (x, zero, four, three, one)", "Slice (x, one, five, three, one)"),  # not the first half
        ("n = Neg (x2)", "n = Abs (x2)"),
        ("Concat <axis = -1> (n, x1)", "Concat <axis = -1> (x1, n)"),
    ],
)
def test_other_sums_of_products_are_no_rotations(change: tuple[str, str]) -> None:
    text = IN_HALVES.replace(*change).replace("x1 =", "five = Add (four, one)\n  x1 =", 1)
    model, fuse = rotary(HALVES, text), FuseRotary()
    Simplify()(model)
    assert not fuse(model).modified
    assert not fuse.declined
