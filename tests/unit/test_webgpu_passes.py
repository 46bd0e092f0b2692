"""The graphs for WebGPU, on ONNX Runtime's CPU provider: each pass run before and after, and the graph that edits a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.bundle.write_graphs import _warn_of_large_tensors
from medusa_export.passes.common.attention_math import SINK_ATTENTION, SINK_DOMAIN
from medusa_export.passes.common.values import add_initializer
from medusa_export.passes.portable.expand_sinks import ExpandSinks
from medusa_export.passes.quantize.integer_weights import QuantizeWeights
from medusa_export.passes.webgpu.cache_graph import cache_graph
from medusa_export.passes.webgpu.device_attention import DeviceAttention
from medusa_export.passes.webgpu.flat_gains import FlatGains
from medusa_export.passes.webgpu.for_webgpu import for_webgpu
from medusa_export.passes.webgpu.read_rows import ReadRows
from medusa_export.passes.webgpu.scatter_entries import ScatterEntries
from medusa_runtime.bundle.manifest import CACHE, HEADS, STEP
from tests.support.graphs import kinds, outputs, parse, run

RANDOM = np.random.default_rng(0)

SCATTER = """g (float[B,2,S,4] past, float[B,2,T,4] new, float[B,3,S,6] past_b, float[B,3,T,6] new_b, int64[B] lengths)
    => (float[B,2,S,4] present, float[B,3,S,6] present_b, float[B,2,S,4] doubled)
{ present = TensorScatter <axis = 2> (past, new, lengths)
  present_b = TensorScatter <axis = 2> (past_b, new_b, lengths)
  doubled = Add (present, present) }"""


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype("f")


def test_entries_are_scattered_where_they_belong() -> None:
    model = parse(SCATTER)
    feeds = {"past": normal(2, 2, 9, 4), "new": normal(2, 2, 3, 4), "past_b": normal(2, 3, 9, 6), "new_b": normal(2, 3, 3, 6)}
    feeds["lengths"] = np.array([0, 6])
    before = outputs(model, **feeds)
    assert ScatterEntries()(model).modified
    assert kinds(model).count("ScatterND") == 2
    assert "TensorScatter" not in kinds(model)
    after = outputs(model, **feeds)
    assert list(before) == list(after)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize(
    ("heads", "mask", "attributes"),
    [
        (4, "bool[B,1,T,S]", ""),
        (2, "bool[B,1,T,S]", "<scale = 0.3>"),
        (4, "float[B,1,T,S]", "<softcap = 5.0>"),
        (6, "float[B,6,T,S]", "<scale = 0.2, softcap = 3.0>"),
    ],
)
def test_attention_is_spelled_out(heads: int, mask: str, attributes: str) -> None:
    text = f"""g (float[B,{heads},T,8] q, float[B,2,S,8] k, float[B,2,S,6] v, {mask} mask)
        => (float[B,{heads},T,6] first, float[B,{heads},T,6] second)
    {{ first = Attention {attributes} (q, k, v, mask)
      second = Attention {attributes} (q, k, v, mask) }}"""
    model = parse(text)
    feeds = {"q": normal(2, heads, 3, 8), "k": normal(2, 2, 5, 8), "v": normal(2, 2, 5, 6)}
    feeds["mask"] = (
        RANDOM.random((2, 6 if "6,T" in mask else 1, 3, 5)) < 0.6 if "bool" in mask else normal(2, int(mask[8]), 3, 5)
    )
    if "bool" in mask:
        feeds["mask"][..., 0] = True
    before = outputs(model, **feeds)
    assert DeviceAttention()(model).modified
    assert "Attention" not in kinds(model)
    for name, array in outputs(model, **feeds).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-5, atol=1e-6)


def test_sinks_take_their_share() -> None:
    def attention() -> ir.Model:
        model = parse(
            """g (float[B,4,T,8] q, float[B,2,S,8] k, float[B,2,S,8] v, bool[B,1,T,S] mask, float[4] sinks)
            => (float[B,4,T,8] y) { y = Attention <scale = 0.3> (q, k, v, mask) }"""
        )
        [node] = model.graph
        sunk = ir.node(SINK_ATTENTION, [*node.inputs, model.graph.inputs[4]], dict(node.attributes), domain=SINK_DOMAIN)
        model.graph.insert_before(node, sunk)
        result = sunk.outputs[0]
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        result.name = "y"
        return model

    feeds = {"q": normal(2, 4, 3, 8), "k": normal(2, 2, 5, 8), "v": normal(2, 2, 5, 8), "sinks": 3 * normal(4)}
    feeds["mask"] = np.ones((2, 1, 3, 5), np.bool_)
    right, found = attention(), attention()
    ExpandSinks()(right)
    DeviceAttention()(found)
    np.testing.assert_allclose(run(found, **feeds), run(right, **feeds), rtol=1e-5, atol=1e-6)


def test_attention_without_a_mask_is_left_with_the_reason() -> None:
    model = parse("g (float[B,4,T,8] q, float[B,2,S,8] k, float[B,2,S,8] v) => (float[B,4,T,8] y) { y = Attention (q, k, v) }")
    spell = DeviceAttention()
    assert not spell(model).modified
    assert dict(spell.declined) == {"it has other inputs or outputs than queries, keys, values and a mask": 1}


@pytest.mark.parametrize("axis", ["axis = -1", "axis = 3"])
def test_gains_of_each_head_are_multiplied_behind_the_norm(axis: str) -> None:
    text = f"""g (float[B,T,2,4] x, float[2,4] gains, float[4] flat) => (float[B,T,2,4] y, float[B,T,2,4] z)
    {{ y = RMSNormalization <{axis}, epsilon = 1e-5> (x, gains)
      z = RMSNormalization <{axis}, epsilon = 1e-5> (y, flat) }}"""
    model, feeds = parse(text, gains=normal(2, 4), flat=normal(4)), {"x": normal(2, 3, 2, 4)}
    before = outputs(model, **feeds)
    assert FlatGains()(model).modified
    assert (kinds(model).count("RMSNormalization"), kinds(model).count("Mul")) == (2, 1)
    for name, array in outputs(model, **feeds).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-5, atol=1e-6)
    over_two = FlatGains()
    assert not over_two(parse(text.replace(axis, "axis = 2"), gains=normal(2, 4), flat=normal(4))).modified
    assert over_two.declined


def test_gains_that_are_ones_of_the_inputs_shape_are_left_out() -> None:
    text = """g (float[B,T,2,4] x) => (float[B,T,2,4] y)
    { s = Shape (x)
      gains = ConstantOfShape <value = float[1] {1.0}> (s)
      y = RMSNormalization <axis = -1, epsilon = 1e-5> (x, gains) }"""
    model, feeds = parse(text), {"x": normal(2, 3, 2, 4)}
    model.graph[1].outputs[0].shape = ir.Shape([None, None, None, None])  # as the trace leaves it
    before = run(model, **feeds)
    assert FlatGains()(model).modified
    assert "Mul" not in kinds(model)
    np.testing.assert_allclose(run(model, **feeds), before, rtol=1e-5, atol=1e-6)


def test_heads_choose_their_rows() -> None:
    text = "g (float[B,4] hidden, float[4,3] w) => (float[B,3] y) { y = MatMul (hidden, w) }"
    weight, hidden = normal(4, 3), normal(2, 5, 4)
    model = parse(text, w=weight)
    assert ReadRows()(model).modified
    found = run(model, hidden=hidden, rows=np.array([3, 5]))
    np.testing.assert_allclose(found, np.stack([hidden[0, 3], hidden[1, 0]]) @ weight, rtol=1e-6)
    read = ReadRows()
    assert not read(parse("g (float[B,4] x) => (float[B,4] y) { y = Neg (x) }")).modified
    assert dict(read.declined) == {"a graph without the input hidden": 1}


def test_a_cache_is_edited_by_a_graph() -> None:
    step = parse("g (float[B,2,S,4] a, float[B,1,S,3] b) => (float[B,2,S,4] y, float[B,1,S,3] z) { y = Neg (a) z = Neg (b) }")
    for value, name in zip(step.graph.inputs, ("past.0.key", "past.1.conv"), strict=True):
        value.name = name
    model = cache_graph(step)
    past = {"0.key": normal(1, 2, 9, 4), "1.conv": normal(1, 1, 9, 3)}
    other = {"0.key": normal(1, 2, 6, 4), "1.conv": normal(1, 1, 6, 3)}
    sources, targets = np.array([5, 1]), np.array([0, 8])
    feeds = {f"past.{name}": array for name, array in past.items()} | {f"from.{name}": array for name, array in other.items()}
    found = outputs(model, sources=sources, targets=targets, **feeds)
    for name, array in past.items():
        wanted = array.copy()
        wanted[:, :, targets] = other[name][:, :, sources]
        np.testing.assert_array_equal(found[f"present.{name}"], wanted)


def test_a_tensor_larger_than_webgpu_promises_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def graphs(rows: int) -> list[ir.Model]:
        model = parse("g (int64[T] ids) => (int64[T] same) { same = Identity (ids) }")
        add_initializer(model.graph, "table", ir.LazyTensor(_never, ir.DataType.FLOAT, ir.Shape([rows, 1024]), name="table"))
        return [model]

    _warn_of_large_tensors(graphs(1 << 16))
    assert not capsys.readouterr().err
    _warn_of_large_tensors(graphs(1 << 17))
    told = "table has 537 MB; WebGPU promises buffers of 268 MB. Most GPUs take larger ones: ask `medusa-export doctor` there"
    assert told in " ".join(capsys.readouterr().err.split())


def _never() -> ir.TensorProtocol:
    raise AssertionError("the tensor need not be made")


def test_weights_in_blocks_have_graphs_and_one_scale_a_column_has_none() -> None:
    text = """g (int64[B,R] hidden_ids, float[B,64] hidden, float[64,96] w) => (float[B,96] y) { y = MatMul (hidden, w) }"""
    step = """g (float[B,2,S,4] past, float[B,64] x, float[64,96] w) => (float[B,2,S,4] present, float[B,96] y)
    { present = Identity (past) y = MatMul (x, w) }"""
    for storage, names in (("int8-blocks", {STEP, HEADS, CACHE}), ("int4", {STEP, HEADS, CACHE}), ("int8", set())):
        graphs = {STEP: parse(step, w=normal(64, 96)), HEADS: parse(text, w=normal(64, 96))}
        graphs[STEP].graph.inputs[0].name = "past.0.key"
        for model in graphs.values():
            assert QuantizeWeights(lambda _, storage=storage: storage)(model).modified
        found = for_webgpu(graphs)
        assert found.keys() == names
        assert all("MatMulNBits" in kinds(found[name]) for name in names - {CACHE})
