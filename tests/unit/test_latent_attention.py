"""Graph passes on attention whose values are of another width than its keys, and on entries that are read in other ways."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.passes.ort_cpu.slice_used import UsedEntries
from medusa_export.passes.tensorrt.pad_heads import PadHeads
from medusa_export.passes.tensorrt.static_capacity import StaticCapacity
from tests.support.graphs import kinds, outputs, parse, run

ATTENTION = """agraph (float[batch, 4, tokens, {key}] q, float[batch, 2, entries, {key}] k, float[batch, 2, entries, {value}] v,
               bool[batch, 1, tokens, entries] mask) => (float[batch, 4, tokens, {value}] result)
{{
  attended = Attention <scale: float = 0.25> (q, k, v, mask)
  result = Identity (attended)
}}"""

LATENT = """agraph (int64[batch, tokens] input_ids, int64[batch] cache_lengths, float[batch, 1, capacity, 4] past_0_key,
               float[batch, 1, capacity, 3] past_0_conv, float[batch, 1, tokens, 4] new, float[batch, 1, tokens, 3] rows,
               int64[batch, tokens, 2] places, float[4, 6] weight)
               => (float[batch, 1, made, 6] keys, float[batch, tokens, 3] gathered, float[batch, 1, capacity, 4] present_0_key,
                   float[batch, 1, capacity, 3] present_0_conv)
{
  present_0_key = TensorScatter <axis: int = 2> (past_0_key, new, cache_lengths)
  present_0_conv = TensorScatter <axis: int = 2> (past_0_conv, rows, cache_lengths)
  keys = MatMul (present_0_key, weight)
  gathered = GatherND <batch_dims: int = 1> (present_0_conv, places)
}"""


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("key", "value"), [(12, 8), (8, 12), (8, 8)])
def test_heads_of_values_are_padded_to_those_of_keys(key: int, value: int) -> None:
    feeds = {
        "q": normal(2, 4, 3, key, seed=1),
        "k": normal(2, 2, 5, key, seed=2),
        "v": normal(2, 2, 5, value, seed=3),
        "mask": np.tri(3, 5, 2, dtype=bool)[None, None].repeat(2, 0),
    }
    model = parse(ATTENTION.format(key=key, value=value))
    wanted = run(model, **feeds)
    assert PadHeads()(model).modified == (key != value)
    [attention] = [node for node in model.graph if node.op_type == "Attention"]
    assert {value.shape[3] for value in attention.inputs[:3]} == {max(key, value)}
    np.testing.assert_allclose(run(model, **feeds), wanted, atol=1e-6)


def latent() -> ir.Model:
    model = parse(LATENT, weight=normal(4, 6, seed=4))
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = value.name.replace("_0_", ".0.")
    return model


def test_entries_from_which_keys_are_made_are_sliced_and_gathered_ones_are_not() -> None:
    model = latent()
    feeds = {
        "input_ids": np.zeros((2, 2), np.int64),
        "cache_lengths": np.array([3, 1]),
        "past.0.key": normal(2, 1, 16, 4, seed=5),
        "past.0.conv": normal(2, 1, 16, 3, seed=6),
        "new": normal(2, 1, 2, 4, seed=7),
        "rows": normal(2, 1, 2, 3, seed=8),
        "places": np.array([[[0, 3], [0, 2]], [[0, 1], [0, 0]]]),
    }
    wanted = outputs(model, **feeds)
    assert UsedEntries()(model).modified
    assert kinds(model).count("Slice") == 1
    found = outputs(model, **feeds)
    assert found["keys"].shape == (2, 1, 5, 6)  # 3 cached entries and 2 new ones
    np.testing.assert_array_equal(found["keys"], wanted["keys"][:, :, :5])
    for name in ("gathered", "present.0.key", "present.0.conv"):
        np.testing.assert_array_equal(found[name], wanted[name])


def test_a_static_capacity_is_put_into_products_of_dimensions_too() -> None:
    model = latent()
    made = next(value for value in model.graph.outputs if value.name == "keys")
    made.shape = ir.Shape(["batch", 1, ir.SymbolicDim("batch*capacity"), 6])
    StaticCapacity(64)(model)
    assert str(made.shape[2]) == "64*batch"
    assert [value.shape[2] for value in model.graph.inputs if value.name.startswith("past.")] == [64, 64]
