"""Attention with sinks, spelled out and on the CPU, compared with a softmax of one more score."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from medusa_export.passes.common.attention_math import SINK_ATTENTION, SINK_DOMAIN
from medusa_export.passes.ort_cpu.collect_sinks import CollectSinks
from medusa_export.passes.ort_cpu.grouped_attention import GroupedAttention
from medusa_export.passes.portable.expand_sinks import ExpandSinks
from tests.support.graphs import kinds, outputs

BATCH, HEADS, KV_HEADS, TOKENS, ENTRIES, WIDTH, VALUE_WIDTH = 2, 4, 2, 3, 7, 8, 6
SCALE = 0.3


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = rng.random((BATCH, 1, TOKENS, ENTRIES)) < 0.6
    mask[..., 0] = True
    return {
        "query": rng.normal(size=(BATCH, HEADS, TOKENS, WIDTH)).astype("f"),
        "key": rng.normal(size=(BATCH, KV_HEADS, ENTRIES, WIDTH)).astype("f"),
        "value": rng.normal(size=(BATCH, KV_HEADS, ENTRIES, VALUE_WIDTH)).astype("f"),
        "mask": mask,
    }


SINKS = np.array([-2.0, 0.0, 3.0, 60.0], "f")  # from hardly any part of the softmax to all of it


def model(cap: float) -> ir.Model:
    dims = {
        "query": ("b", HEADS, "t", WIDTH),
        "key": ("b", KV_HEADS, "s", WIDTH),
        "value": ("b", KV_HEADS, "s", VALUE_WIDTH),
        "mask": ("b", 1, "t", "s"),
    }
    inputs = [
        ir.Value(
            name=name,
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.BOOL if name == "mask" else ir.DataType.FLOAT),
        )
        for name, shape in dims.items()
    ]
    tensor = ir.tensor(SINKS, name="sinks")
    sinks = ir.Value(name="sinks", shape=ir.Shape([HEADS]), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    attributes = {"scale": SCALE} | ({"softcap": cap} if cap else {})
    node = ir.node(SINK_ATTENTION, [*inputs, sinks], attributes, domain=SINK_DOMAIN)
    result = node.outputs[0]
    result.name, result.shape, result.type = "y", ir.Shape(["b", HEADS, "t", VALUE_WIDTH]), ir.TensorType(ir.DataType.FLOAT)
    imports = {"": 24, SINK_DOMAIN: 1}
    graph = ir.Graph(inputs, [result], nodes=[node], initializers=[sinks], opset_imports=imports, name="g")
    return ir.Model(graph, ir_version=10)


def expected(cap: float) -> np.ndarray:
    given = {name: array if name == "mask" else array.astype("d") for name, array in feeds().items()}
    key, value = (given[name].repeat(HEADS // KV_HEADS, 1) for name in ("key", "value"))
    scores = given["query"] @ key.swapaxes(2, 3) * SCALE
    scores = np.where(given["mask"], cap * np.tanh(scores / cap) if cap else scores, -np.inf)
    column = np.broadcast_to(SINKS.reshape(1, HEADS, 1, 1), (BATCH, HEADS, TOKENS, 1))
    scores = np.exp(np.concatenate([scores, column], -1) - scores.max(-1, keepdims=True))
    return (scores / scores.sum(-1, keepdims=True))[..., :-1] @ value


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_sinks_take_their_part_of_the_softmax(cap: float) -> None:
    made = model(cap)
    assert ExpandSinks()(made).modified
    assert {node.domain for node in made.graph} == {""}
    np.testing.assert_allclose(outputs(made, **feeds())["y"], expected(cap), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_cpu_finds_them_again(cap: float) -> None:
    made = model(cap)
    ExpandSinks()(made)
    assert CollectSinks()(made).modified
    assert kinds(made) == [SINK_ATTENTION]
    assert GroupedAttention()(made).modified
    assert SINK_ATTENTION not in kinds(made)
    np.testing.assert_allclose(outputs(made, **feeds())["y"], expected(cap), rtol=1e-4, atol=1e-5)
