"""Experts in a graph: expanded into standard operators, and fused again for the CPU, compared with a loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medusa_export.passes.ort_cpu.moe import FuseExperts
from medusa_export.passes.portable.expand_experts import EXPERTS_DOMAIN, ExpandExperts
from medusa_export.passes.quantize.expert_weights import QuantizeExperts
from medusa_export.passes.quantize.integer_weights import Storage
from tests.support.graphs import kinds, outputs

Arrays = dict[str, np.ndarray]
SWIGLU = {"activation": "swiglu", "interleaved": 0, "alpha": 1.0, "beta": 0.0, "limit": 0.0}
CLAMPED = {"activation": "swiglu", "interleaved": 1, "alpha": 1.7, "beta": 1.0, "limit": 0.8}
ACTIVATIONS = {
    "swiglu": SWIGLU,
    "clamped": CLAMPED,
    **{name: SWIGLU | {"activation": name} for name in ("relu", "gelu", "gelu_tanh", "silu", "identity")},
}


@dataclass
class Case:
    """A layer of experts with random weights, and the tokens that it is given."""

    tokens: int
    experts: int = 6
    chosen: int = 2
    transposed: bool = False
    biased: bool = False
    activation: dict[str, object] = field(default_factory=lambda: dict(SWIGLU))
    hidden: int = 8
    inner: int = 10

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.tokens)
        first = self.inner * (2 if self.activation["activation"] == "swiglu" else 1)
        self.up = rng.normal(size=(self.experts, first, self.hidden)).astype("f")
        self.down = rng.normal(size=(self.experts, self.hidden, self.inner)).astype("f")
        self.up_bias = rng.normal(size=(self.experts, first)).astype("f")
        self.down_bias = rng.normal(size=(self.experts, self.hidden)).astype("f")
        self.feeds: Arrays = {
            "x": rng.normal(size=(self.tokens, self.hidden)).astype("f"),
            "ids": np.argsort(rng.random((self.tokens, self.experts)), 1)[:, : self.chosen],
            "weights": rng.random((self.tokens, self.chosen)).astype("f") + np.float32(0.1),
        }

    def model(self) -> ir.Model:
        layout = (lambda weight: np.ascontiguousarray(weight.swapaxes(1, 2))) if self.transposed else (lambda weight: weight)
        weights = {"up": layout(self.up), "down": layout(self.down)}
        if self.biased:
            weights |= {"up_bias": self.up_bias, "down_bias": self.down_bias}
        inputs = [value("x", ir.DataType.FLOAT, "n", self.hidden), value("ids", ir.DataType.INT64, "n", self.chosen)]
        inputs.append(value("weights", ir.DataType.FLOAT, "n", self.chosen))
        stored = {name: initializer(name, array) for name, array in weights.items()}
        node = ir.node(
            "Experts",
            [*inputs, *(stored.get(name) for name in ("up", "up_bias", "down", "down_bias"))],
            {"transposed": int(self.transposed), **self.activation},
            domain=EXPERTS_DOMAIN,
        )
        return graph(inputs, node, list(stored.values()), value("y", ir.DataType.FLOAT, "n", self.hidden))

    def expected(self) -> np.ndarray:
        result = np.zeros((self.tokens, self.hidden))
        for token, (ids, weights) in enumerate(zip(self.feeds["ids"], self.feeds["weights"], strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                inner = self.up[expert].astype("d") @ self.feeds["x"][token] + self.biased * self.up_bias[expert]
                outer = self.down[expert].astype("d") @ activate(inner, self.activation) + self.biased * self.down_bias[expert]
                result[token] += weight * outer
        return result


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def initializer(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def graph(inputs: list[ir.Value], node: ir.Node, weights: list[ir.Value], output: ir.Value) -> ir.Model:
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = output.name, output.shape, output.type
    imports = {"": 24, EXPERTS_DOMAIN: 1}
    made = ir.Graph(inputs, node.outputs, nodes=[node], initializers=weights, opset_imports=imports, name="g")
    return ir.Model(made, ir_version=10)


def show(model: ir.Model, values: list[ir.Value]) -> None:
    """Make weights that the graph gathers its outputs, too."""
    for each in values:
        each.shape, each.type = ir.Shape(["gathered", None, None]), ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(each)


def activate(inner: np.ndarray, facts: dict[str, object]) -> np.ndarray:
    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    name, limit = facts["activation"], float(str(facts["limit"])) or np.inf
    if name == "swiglu":
        gate, up = (inner[::2], inner[1::2]) if facts["interleaved"] else np.split(inner, 2)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return (up + facts["beta"]) * gate * sigmoid(facts["alpha"] * gate)
    erf = np.vectorize(__import__("math").erf)
    return {
        "relu": lambda x: np.maximum(x, 0),
        "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
        "silu": lambda x: x * sigmoid(x),
        "identity": lambda x: x,
    }[str(name)](inner)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_expanded_experts_are_those_of_a_loop_over_tokens(tokens: int, activation: str) -> None:
    case = Case(tokens, activation=ACTIVATIONS[activation], biased=activation == "clamped", transposed=tokens == 5)
    model = case.model()
    assert ExpandExperts()(model).modified
    assert {node.domain for node in model.graph} == {""}
    np.testing.assert_allclose(outputs(model, **case.feeds)["y"], case.expected(), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_any_routing_finds_its_rows_again(tokens: int, experts: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(1, experts))
    case = Case(tokens, experts, chosen)
    if data.draw(st.booleans()):  # all tokens choose the same experts: the fullest blocks
        case.feeds["ids"] = np.tile(case.feeds["ids"][:1], (tokens, 1))
    model = case.model()
    ExpandExperts()(model)
    np.testing.assert_allclose(outputs(model, **case.feeds)["y"], case.expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fuse", [False, True])
def test_one_token_reads_the_weights_of_its_experts_alone(fuse: bool) -> None:
    case = Case(1, experts=8, chosen=3)
    expected = case.expected()
    others = [expert for expert in range(8) if expert not in case.feeds["ids"]]
    case.up[others] = case.down[others] = np.nan
    model = case.model()
    ExpandExperts()(model)
    if fuse:
        FuseExperts()(model)
    else:
        gathered = [
            node.outputs[0] for node in model.graph if node.op_type == "Gather" and node.inputs[0].name in ("up", "down")
        ]
        show(model, gathered)
    found = outputs(model, **case.feeds)
    np.testing.assert_allclose(found.pop("y"), expected, rtol=1e-4, atol=1e-4)
    assert all(array.shape[0] == 3 for array in found.values())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("fuse", [False, True])
def test_one_token_reads_the_codes_of_its_experts_alone(fuse: bool, scheme: Storage) -> None:
    """The scales of the other experts are not numbers, so that all that is computed with their codes would be none either."""
    case = Case(1, experts=8, chosen=3, hidden=64, inner=128)
    expected, others = case.expected(), [expert for expert in range(8) if expert not in case.feeds["ids"]]
    model = case.model()
    ExpandExperts()(model)
    QuantizeExperts(lambda _: scheme)(model)
    scales = [value for name, value in model.graph.initializers.items() if name.endswith(".scale")]
    assert len(scales) == 2
    for value in scales:
        array = value.const_value.numpy().copy()
        array[others] = np.nan
        value.const_value = ir.tensor(array, name=value.name)
    if fuse:
        FuseExperts()(model)
        RemoveUnusedNodesPass()(model)
        assert "QMoE" in kinds(model)
    assert cosine(outputs(model, **case.feeds)["y"], expected) > (0.9999 if scheme == "int8" else 0.98)


def test_many_tokens_gather_less_than_two_weights_for_each_expert() -> None:
    case = Case(500, experts=8, chosen=2)
    model = case.model()
    ExpandExperts()(model)
    show(model, [next(node.outputs[0] for node in model.graph if node.inputs[:1] and node.inputs[0].name == "up")])
    weights = [array for name, array in outputs(model, **case.feeds).items() if name != "y"]
    assert len(weights[0]) < 16


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_the_cpu_operator_computes_the_same(tokens: int, activation: str) -> None:
    case = Case(tokens, activation=ACTIVATIONS[activation], biased=activation == "clamped")
    model = case.model()
    ExpandExperts()(model)
    fused = FuseExperts()(model).modified
    assert fused is (activation != "gelu")  # the operator's gelu is the approximation by tanh
    assert ("MoE" in kinds(model)) is fused
    np.testing.assert_allclose(outputs(model, **case.feeds)["y"], case.expected(), rtol=1e-4, atol=1e-4)


def test_weights_of_zero_are_no_experts() -> None:
    case = Case(4)
    case.feeds["weights"][1] = 0
    case.feeds["weights"][2, 0] = 0
    model = case.model()
    ExpandExperts()(model)
    FuseExperts()(model)
    np.testing.assert_allclose(outputs(model, **case.feeds)["y"], case.expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_layer_of_experts_takes_each_rows_own_weight(transposed: bool) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 7, 4)).astype("f"), rng.normal(size=(5, 7)).astype("f")
    x, ids = rng.normal(size=(30, 4)).astype("f"), rng.integers(0, 5, 30)
    stored = [initializer("weight", np.ascontiguousarray(weight.swapaxes(1, 2)) if transposed else weight)]
    stored.append(initializer("bias", bias))
    inputs = [value("x", ir.DataType.FLOAT, "s", 4), value("ids", ir.DataType.INT64, "s")]
    node = ir.node("ExpertLinear", [*inputs, *stored], {"transposed": int(transposed)}, domain=EXPERTS_DOMAIN)
    model = graph(inputs, node, stored, value("y", ir.DataType.FLOAT, "s", 7))
    ExpandExperts()(model)
    expected = np.einsum("soi,si->so", weight[ids], x) + bias[ids]
    np.testing.assert_allclose(outputs(model, x=x, ids=ids)["y"], expected, rtol=1e-4, atol=1e-4)


def test_the_cpu_operator_may_be_the_last_that_reads_its_input() -> None:
    """The kernel of ONNX Runtime 1.31 writes over such an input before it has read it."""
    case = Case(7)
    model = case.model()
    read = ir.node("Neg", [model.graph.inputs[0]])
    model.graph.insert_before(model.graph[0], read)
    model.graph[1].replace_input_with(0, read.outputs[0])
    read.outputs[0].shape, read.outputs[0].type = model.graph.inputs[0].shape, model.graph.inputs[0].type
    ExpandExperts()(model)
    FuseExperts()(model)
    RemoveUnusedNodesPass()(model)
    case.feeds["x"] = -case.feeds["x"]
    found = outputs(model, **case.feeds)["y"]
    case.feeds["x"] = -case.feeds["x"]
    np.testing.assert_allclose(found, case.expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scheme", "least"), [("int8", 0.9999), ("int8-blocks", 0.9999), ("int4", 0.98)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_quantised_experts_are_near_the_float_ones(tokens: int, scheme: Storage, least: float) -> None:
    case = Case(tokens, biased=True, hidden=64, inner=128)
    model = case.model()
    ExpandExperts()(model)
    experts = QuantizeExperts(lambda _: scheme)
    assert experts(model).modified
    assert experts.left == []
    sizes = {
        value.name: value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    }
    bits = 4 if scheme == "int4" else 8
    assert sizes[f"up.uint{bits}"] == case.up.size * bits // 8
    assert "up" not in sizes
    portable = outputs(model, **case.feeds)["y"]
    assert cosine(portable, case.expected()) > least
    assert FuseExperts()(model).modified
    assert "QMoE" in kinds(model)
    assert cosine(outputs(model, **case.feeds)["y"], portable) > 0.999  # it rounds activations to 8 bits


def test_experts_that_cannot_be_divided_into_blocks_stay_float() -> None:
    case = Case(3, hidden=100, inner=100)
    model = case.model()
    ExpandExperts()(model)
    experts = QuantizeExperts(lambda _: "int8")
    assert not experts(model).modified
    assert experts.left == ["up", "down"]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.ravel().astype("d"), other.ravel().astype("d")
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
