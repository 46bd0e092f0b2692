"""Engines whose weights are rounded, and engines that share the bundle's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.bundle.export import export_bundle
from medusa_export.bundle.weights_file import write_weights
from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.engine.build import build_engines
from medusa_export.engine.design import design_engines
from medusa_export.engine.network import Network
from medusa_export.passes.common.rounding import round_symmetrically
from medusa_export.passes.tensorrt.engine_weights import QuantizeEngineWeights
from medusa_runtime.bundle.manifest import HEADS, STEP, Manifest
from medusa_runtime.bundle.plans import open_plan
from tests.support.models import VOCAB_SIZE, save_random_heads, save_tiny_model

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with a tied embedding in fp32 and fp16, wide enough for blocks of 128 inputs as well as of 64."""
    root = tmp_path_factory.mktemp("weights")
    model = save_tiny_model(root / "model", "llama", num_hidden_layers=2, intermediate_size=128, tie_word_embeddings=True)
    heads = save_random_heads(model, root / "heads")
    found = {precision: root / precision for precision in ("fp32", "fp16")}
    for precision, bundle in found.items():
        export_bundle(ExportOptions(str(model), heads, bundle, precision=precision))
    return found


def options(bundle: Path, output: Path, **changes: Any) -> EngineOptions:
    return EngineOptions(bundle, output, **({"max_seq_len": 64, "max_prefill_tokens": 32, "max_tree_nodes": 16} | changes))


def run(model: ir.Model, directory: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of a graph as TensorRT gets it."""
    for node in model.graph:
        node.attributes.pop("TRT_decomposable", None)  # ONNX Runtime does not know it
    directory.mkdir()
    write_weights([model], directory)
    ir.save(model, directory / "graph.onnx")
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(directory / "graph.onnx", settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def step_feeds(bundle: Path, capacity: int, dtype: type) -> dict[str, np.ndarray]:
    facts, count = Manifest.load(bundle).model, 12
    cache = (1, facts.num_kv_heads, capacity, facts.head_dim)
    return {
        "input_ids": np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, count)),
        "position_ids": np.arange(count)[None],
        "tree_mask": np.tri(count, dtype=bool)[None],
        "cache_lengths": np.zeros(1, np.int64),
        "logit_rows": np.arange(count)[None],
        **{f"past.{layer}.{part}": np.zeros(cache, dtype) for layer in range(facts.num_layers) for part in ("key", "value")},
    }


def log_probs(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("precision", "weights", "most"),
    [("fp32", "int8", 1e-3), ("fp32", "fp8", 2e-2), ("fp32", "int4", 0.15), ("fp16", "int8", 1e-3)],
)
def test_rounded_weights_compute_nearly_the_same(
    bundles: dict[str, Path], tmp_path: Path, precision: str, weights: Any, most: float
) -> None:
    bundle = bundles[precision]
    float_design = design_engines(options(bundle, tmp_path / "engine"))
    design = design_engines(options(bundle, tmp_path / "engine", weights=weights))
    feeds = step_feeds(bundle, design.capacity, np.float32 if precision == "fp32" else np.float16)
    want = log_probs(run(float_design.graph(STEP), tmp_path / "float", feeds)["logits"])
    found = log_probs(run(design.graph(STEP), tmp_path / weights, feeds)["logits"])
    kl = (np.exp(want) * (want - found)).sum(-1)
    assert 1e-7 < kl.mean() < most


def test_products_read_rounded_weights_and_gathers_the_table_as_it_was(bundles: dict[str, Path], tmp_path: Path) -> None:
    model = design_engines(options(bundles["fp16"], tmp_path / "engine", weights="int4")).graph(STEP)
    initializers = model.graph.initializers
    kinds = {}
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            codes, scales = node.inputs
            assert codes is not None
            assert scales is not None
            assert scales.dtype == ir.DataType.FLOAT16
            assert codes.name is not None
            kinds[codes.name.removeprefix("model.")] = (codes.dtype, node.attributes.get_int("block_size", 0))
    assert kinds["model.layers.0.self_attn.q_proj.weight.int4"] == (ir.DataType.INT4, 64)
    assert kinds["model.layers.1.mlp.down_proj.weight.int4"] == (ir.DataType.INT4, 128)
    assert kinds["lm_head.weight.int8"] == (ir.DataType.INT8, 0)
    assert len(kinds) == 2 * 5 + 1  # k and v are small
    [gather] = [node for node in model.graph if node.op_type == "Gather"]
    assert gather.inputs[0] is initializers["model.lm_head.weight"]
    assert not QuantizeEngineWeights("int8")(model).modified
    heads = design_engines(options(bundles["fp16"], tmp_path / "engine", weights="int4")).graph(HEADS)
    stored = {node.inputs[0].dtype for node in heads.graph if node.op_type == "DequantizeLinear" and node.inputs[0]}
    assert stored == {ir.DataType.INT8}


@given(st.integers(0, 2**32 - 1), st.sampled_from(["int8", "int4", "fp8"]), st.sampled_from([1, 4]), st.floats(1e-6, 1e3))
def test_codes_are_nearest_to_the_weight(seed: int, kind: str, groups: int, size: float) -> None:
    weight = (np.random.default_rng(seed).standard_normal((64, 8)) * size).astype(np.float32)
    weight[:, 3] = 0
    codes, scales = round_symmetrically(weight, kind, ir.DataType.FLOAT, groups)
    assert scales.shape == (groups, 8)
    scale = np.repeat(scales.astype(np.float32), 64 // groups, axis=0)
    error = np.abs(codes.astype(np.float32) * scale - weight)
    if kind == "fp8":  # 3 bits behind the first, and as far as 2⁻¹⁰ scales for the smallest
        assert (error <= np.maximum(np.abs(weight) / 16, scale * 2**-10) * 1.001).all()
    else:
        inside = np.abs(codes.astype(np.int32)) < (127 if kind == "int8" else 7)
        assert (error[inside] <= scale[inside] * 0.5001).all()
    assert not codes[:, 3].astype(np.float32).any()


def test_four_bits_cut_off_what_is_far_out() -> None:
    weight = np.full((64, 1), 0.5, np.float32)
    weight[0] = 1.0
    codes, scales = round_symmetrically(weight, "int4", ir.DataType.FLOAT)
    assert float(scales[0, 0]) < 1 / 7
    error = np.square(codes.astype(np.float32) * scales.astype(np.float32) - weight).sum()
    assert error < np.square(np.rint(weight * 7) / 7 - weight).sum()


def test_a_stripped_plan_leaves_the_bundles_weights_to_the_bundle(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle, output = bundles["fp16"], tmp_path / "engine"
    manifest = build_engines(options(bundle, output, strip_weights=True))
    manifest.require_intact(output)
    assert manifest.engine is not None
    shared = manifest.engine.shared_weights
    assert shared is not None
    assert (output / shared.source).resolve() == bundle
    assert shared.file == Manifest.load(bundle).files["weights.bin"]
    for name, graph in manifest.graphs.items():
        model = ir.load(bundle / f"{name}.onnx")
        tensors = [
            value.const_value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)
        ]
        regions = shared.plans[graph.file].regions
        left_out = {(part.source, region.rows * part.row_bytes) for region in regions for part in region.parts}
        assert left_out == {(tensor.offset, tensor.length) for tensor in tensors}
        num_bytes = sum(region.num_bytes for region in regions)
        assert manifest.files[graph.file].size == shared.plans[graph.file].size - num_bytes
        with open_plan(manifest, output, name) as plan:
            assert len(plan) == shared.plans[graph.file].size
            for tensor in tensors:
                assert tensor.tobytes()[:64] in bytes(plan)


def test_what_a_network_holds_is_what_weights_bin_holds(bundles: dict[str, Path], tmp_path: Path) -> None:
    design = design_engines(options(bundles["fp16"], tmp_path / "engine"))
    model = design.graph(STEP)
    parsed = Network.parse(design.tensorrt, STEP, model, bundles["fp16"])
    held = {}
    for layer in (parsed.network.get_layer(index) for index in range(parsed.network.num_layers)):
        if layer.type.name == "CONSTANT":
            layer.__class__ = design.tensorrt.api.IConstantLayer
            held[layer.name] = np.array(layer.weights).tobytes()
    assert parsed.weights.tensors.keys() <= held.keys()
    assert all(held[name] == tensor.tobytes() for name, tensor in parsed.weights.tensors.items())
