"""The passes for one sequence, on the smallest graphs that show them, run before and after."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.passes.ort_cpu.variants import (
    CachedAttention,
    MergeProjections,
    PackedAttention,
    UsedEntries,
    for_one_sequence,
)
from tests.support.graphs import TREE_MASK, kinds, outputs, parse

Arrays = dict[str, np.ndarray]
CAPACITY, HIDDEN_SIZE, HEADS, KV_HEADS = 23, 24, 4, 2
LENGTHS_AND_TOKENS = [(5, 1), (0, 6), (0, 1), (7, 5), (CAPACITY - 4, 4)]

LAYER = """
g (int64[B,T] input_ids, int64[B] cache_lengths, bool[B,T,T] tree_mask, float[B,T,24] x, float[B,T,HALF] cos,
   float[B,T,HALF] sin, float[B,T,HALF] other, float[24,QUERY] wq, float[24,KEY] wk, float[24,KEY] wv,
   float[B,2,S,WIDTH] past_0_key, float[B,2,S,WIDTH] past_0_value)
  => (float[B,T,QUERY] y, float[B,2,S,WIDTH] present_key, float[B,2,S,WIDTH] present_value)
<int64 zero = {0}, int64 one = {1}, int64[1] ones = {1}, int64[4] q_parts = {0, 0, 4, WIDTH},
 int64[4] kv_parts = {0, 0, 2, WIDTH}, int64[3] whole = {0, 0, QUERY}>
{
  q0 = MatMul (x, wq)
  q1 = Reshape (q0, q_parts)
  q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
  q = RotaryEmbedding <num_heads = 4> (q2, cos, sin)
  k0 = MatMul (x, wk)
  k1 = Reshape (k0, kv_parts)
  k2 = Transpose <perm = [0, 2, 1, 3]> (k1)
  k = RotaryEmbedding <num_heads = 2> (k2, cos, sin)
  v0 = MatMul (x, wv)
  v1 = Reshape (v0, kv_parts)
  v = Transpose <perm = [0, 2, 1, 3]> (v1)
  present_key = TensorScatter <axis = 2, mode = "linear"> (past_0_key, k, cache_lengths)
  present_value = TensorScatter <axis = 2, mode = "linear"> (past_0_value, v, cache_lengths)
  TREE_MASK
  a = Attention <scale = 0.3> (q, present_key, present_value, mask)
  a1 = Transpose <perm = [0, 2, 1, 3]> (a)
  y = Reshape (a1, whole)
}"""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("f")


def layer(width: int = 16, changes: dict[str, str] | None = None, value_width: int | None = None) -> ir.Model:
    """A layer's attention with its projections, as portable graphs have it but for what is changed in its text."""
    text = LAYER.replace("TREE_MASK", TREE_MASK)
    for old, new in (changes or {}).items():
        assert old in text
        text = text.replace(old, new)
    for name, size in (("QUERY", HEADS * width), ("KEY", KV_HEADS * width), ("HALF", width // 2), ("WIDTH", width)):
        text = text.replace(name, str(size))
    sizes = {"wq": HEADS * width, "wk": KV_HEADS * width, "wv": KV_HEADS * (value_width or width)}
    weights = {name: normal(HIDDEN_SIZE, size, seed=seed) / 5 for seed, (name, size) in enumerate(sizes.items())}
    model = parse(text, **weights)
    for value in model.graph.inputs:
        value.name = (value.name or "").replace("past_0_", "past.0.")
    return model


def feeds(length: int, tokens: int, width: int = 16) -> Arrays:
    """Of one sequence: tokens of a tree behind so many entries."""
    rng = np.random.default_rng(1)
    mask = np.tril(rng.random((1, tokens, tokens)) < 0.5) | np.eye(tokens, dtype=bool)
    depths = mask.sum(-1) - 1
    angles = (length + depths)[..., None] * 10.0 ** -np.arange(width // 2)
    found: Arrays = {
        "input_ids": np.zeros((1, tokens), np.int64),
        "cache_lengths": np.array([length]),
        "tree_mask": mask,
        "x": normal(1, tokens, HIDDEN_SIZE, seed=2),
        "cos": np.cos(angles).astype("f"),
        "sin": np.sin(angles).astype("f"),
        "other": np.cos(angles / 3).astype("f"),
    }
    for seed, part in enumerate(("key", "value")):
        found[f"past.0.{part}"] = normal(1, KV_HEADS, CAPACITY, width, seed=5 + seed)
    return found


def given(model: ir.Model, arrays: Arrays) -> Arrays:
    names = {value.name for value in model.graph.inputs}
    return {name: array for name, array in arrays.items() if name in names}


def require_same(before: Arrays, after: Arrays, used: int) -> None:
    """The same results, and the same entries in the cache as far as it is used."""
    assert after.keys() == before.keys()
    for name, array in before.items():
        entries = slice(used) if name.startswith("present") else slice(None)
        np.testing.assert_allclose(after[name][:, :, entries], array[:, :, entries], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("length", "tokens"), LENGTHS_AND_TOKENS)
@pytest.mark.parametrize("packed", [False, True])
def test_one_operator_does_what_the_layer_did(length: int, tokens: int, packed: bool) -> None:
    model, arrays = layer(), feeds(length, tokens)
    before = outputs(model, **given(model, arrays))
    UsedEntries()(model)
    assert CachedAttention()(model).modified
    if packed:
        MergeProjections()(model)
        assert PackedAttention()(model).modified
    require_same(before, outputs(model, **given(model, arrays)), length + tokens)


def test_nothing_else_is_left_between_the_projections() -> None:
    model = layer()
    assert for_one_sequence(model)
    assert kinds(model).count("GroupQueryAttention") == 1
    gone = {"Attention", "TensorScatter", "RotaryEmbedding", "Transpose", "Reshape", "Split"}
    assert gone.isdisjoint(kinds(model))
    require_same(outputs(layer(), **feeds(5, 4)), outputs(model, **given(model, feeds(5, 4))), 9)


def test_what_is_cached_is_read_where_it_lies() -> None:
    model, arrays = layer(), feeds(5, 4)
    for_one_sequence(model)
    before = outputs(model, **given(model, arrays))["y"]
    for part in ("key", "value"):
        arrays[f"past.0.{part}"][:, :, 9:] = np.nan  # behind what is used
    np.testing.assert_array_equal(outputs(model, **given(model, arrays))["y"], before)
    arrays["past.0.key"][:, :, 2] += 1
    assert not np.allclose(outputs(model, **given(model, arrays))["y"], before, atol=1e-3)


@pytest.mark.parametrize("attributes", ["softcap = 2.0", "scale = 0.7, softcap = 5.0"])
def test_caps_and_scales_are_kept(attributes: str) -> None:
    changes = {"<scale = 0.3>": f"<{attributes}>"}
    model, arrays = layer(changes=changes), feeds(5, 4)
    before = outputs(model, **given(model, arrays))
    assert for_one_sequence(model)
    require_same(before, outputs(model, **given(model, arrays)), 9)


UNPACKED: list[tuple[int, dict[str, str]]] = [
    (8, {}),  # half a head is narrower than the operator takes
    (16, {"(k2, cos, sin)": "(k2, other, sin)"}),
    (16, {"<num_heads = 4>": "<num_heads = 4, interleaved = 1>"}),
    (16, {"q = RotaryEmbedding <num_heads = 4> (q2, cos, sin)": "q = Neg (q2)"}),
    (16, {"k0 = MatMul (x, wk)": "k3 = MatMul (x, wk)\n  k0 = Neg (k3)"}),
    (16, {"v1 = Reshape (v0, kv_parts)": "v3 = Neg (v0)\n  v1 = Reshape (v3, kv_parts)"}),
    (16, {"q = RotaryEmbedding": "q3 = Neg (q2)\n  q = RotaryEmbedding", "(q2, cos": "(q3, cos"}),
]


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("parts", [1, 2])
def test_interleaved_and_partial_rotations_are_packed_too(width: int, interleaved: int, parts: int) -> None:
    rotated = width // parts
    attributes = f"interleaved = {interleaved}, rotary_embedding_dim = {0 if parts == 1 else rotated}, num_heads = "
    model = layer(width, {"num_heads = ": attributes, "HALF": str(rotated // 2)})
    arrays = feeds(5, 4, width)
    arrays |= {name: arrays[name][..., : rotated // 2] for name in ("cos", "sin", "other")}
    before = outputs(model, **given(model, arrays))
    UsedEntries()(model)
    assert CachedAttention()(model).modified
    MergeProjections()(model)
    assert PackedAttention()(model).modified
    require_same(before, outputs(model, **given(model, arrays)), 9)


@pytest.mark.parametrize(("width", "changes"), UNPACKED)
def test_what_the_operator_would_rotate_otherwise_is_rotated_before_it(width: int, changes: dict[str, str]) -> None:
    model, arrays = layer(width, changes), feeds(5, 4, width)
    before = outputs(model, **given(model, arrays))
    UsedEntries()(model)
    assert CachedAttention()(model).modified
    MergeProjections()(model)
    assert not PackedAttention()(model).modified
    require_same(before, outputs(model, **given(model, arrays)), 9)


@pytest.mark.parametrize(
    "changes",
    [
        {'mode = "linear"': 'mode = "circular"'},
        {"present_value = TensorScatter": "more = Add (cache_lengths, ones)\n  present_value = TensorScatter",
         "(past_0_value, v, cache_lengths)": "(past_0_value, v, more)"},
        {"<scale = 0.3> (q, present_key": "<scale = 0.3> (q, past_0_key"},
        {"<scale = 0.3>": "<scale = 0.3, is_causal = 1>"},
    ],
)  # fmt: skip
def test_a_layer_of_another_kind_is_left_alone(changes: dict[str, str]) -> None:
    model = layer(changes=changes)
    UsedEntries()(model)
    assert not CachedAttention()(model).modified
    assert not for_one_sequence(layer(changes=changes))


def test_values_of_another_width_than_the_keys_are_left_alone() -> None:
    changes = {
        "float[24,KEY] wv": "float[24,16] wv",
        "float[B,2,S,WIDTH] past_0_value": "float[B,2,S,8] past_0_value",
        "float[B,2,S,WIDTH] present_value": "float[B,2,S,8] present_value",
        "float[B,T,QUERY] y": "float[B,T,32] y",
        "int64[3] whole = {0, 0, QUERY}": "int64[3] whole = {0, 0, 32}, int64[4] v_parts = {0, 0, 2, 8}",
        "Reshape (v0, kv_parts)": "Reshape (v0, v_parts)",
    }
    model = layer(changes=changes, value_width=8)
    UsedEntries()(model)
    fused = CachedAttention()
    assert not fused(model).modified
    assert dict(fused.declined) == {"its values have another size than its keys": 1}
