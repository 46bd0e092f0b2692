"""Architectures by mechanism: experts, sinks, chunks, and attention code of the model's own.

What becomes of them in the graphs. That they decode like PyTorch is in test_architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.check.validation import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import load_backbone
from medusa_export.quantize.quantized_bundle import quantize_bundle
from medusa_export.trace import attention_node
from medusa_export.trace.step_graph import trace_step
from medusa_runtime import Manifest
from tests.support.models import save_random_heads
from tests.support.zoo import save_zoo_model

PROMPTS = ("the lazy dog learns to speak, while the quick model jumps over many words", "a fox")
Export = Callable[[str], tuple[Path, Path, Path]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a tiny model of a type, once. Returns model, heads and bundle."""
    root = tmp_path_factory.mktemp("mechanisms")

    def get(model_type: str) -> tuple[Path, Path, Path]:
        model, heads, bundle = (root / f"{model_type}{suffix}" for suffix in ("", "-heads", "-bundle"))
        if not bundle.exists():
            save_random_heads(save_zoo_model(model, model_type), heads)
            export_bundle(ExportOptions(str(model), heads, bundle))
        return model, heads, bundle

    return get


def test_attention_of_the_models_own_decodes_like_pytorch_and_is_quantised(export: Export, tmp_path: Path) -> None:
    """GPT-Neo's attention is in none of the forms that Transformers shares. Other mechanisms are in test_architectures.py."""
    model, heads, bundle = export("gpt_neo")
    report = validate(bundle, str(model), heads=heads, prompts=PROMPTS, max_new_tokens=24)
    assert report.status == "passed", report.verdicts()
    manifest = quantize_bundle(QuantizeOptions(bundle, tmp_path / "int8"))
    assert manifest.quantization is not None
    assert manifest.quantization.quality["mean_kl"] < 0.05


def operators(bundle: Path, graph: str) -> list[str]:
    return [node.op_type for node in onnx.load(bundle / f"{graph}.onnx", load_external_data=False).graph.node]


def test_portable_experts_are_standard_and_the_cpus_are_one_operator_a_layer(export: Export) -> None:
    _, _, bundle = export("mixtral")
    step = onnx.load(bundle / "step.onnx", load_external_data=False)
    onnx.checker.check_model(str(bundle / "step.onnx"))
    assert {node.domain for node in step.graph.node} == {""}
    assert not {"If", "Loop", "Scan"} & set(operators(bundle, "step"))
    layers = Manifest.load(bundle).model.num_layers
    assert operators(bundle, "step.ort-cpu").count("MoE") == layers
    assert "NonZero" not in operators(bundle, "step")  # no shape depends on data: GPUs can capture the step


def test_sinks_move_into_the_cpus_attention(export: Export) -> None:
    _, _, bundle = export("gpt_oss")
    step = onnx.load(bundle / "step.onnx", load_external_data=False)
    assert {node.domain for node in step.graph.node} == {""}
    single = onnx.load(bundle / "step.ort-cpu-single.onnx", load_external_data=False)
    attentions = [node for node in single.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == Manifest.load(bundle).model.num_layers
    assert all(node.input[11].endswith("sinks") for node in attentions)


@pytest.mark.parametrize(("model_type", "reason"), [("openai-gpt", "no KV cache"), ("mpt", "bias by position")])
def test_attention_that_cannot_be_traced_is_refused_before_tracing(
    model_type: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention_node.register()
    model = save_zoo_model(tmp_path / "model", model_type)
    monkeypatch.setattr("medusa_export.trace.step_graph.export_module", None)  # not reached
    with pytest.raises(ExportError, match=reason):
        trace_step(load_backbone(str(model), attention=attention_node.ATTENTION_NAME), 24)


def test_tensorrt_builds_a_step_with_experts(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    from medusa_export.command_options.engine_options import EngineOptions
    from medusa_export.engine import build
    from medusa_export.engine.design import design_engines

    model, heads, _ = export("gpt_oss")
    export_bundle(ExportOptions(str(model), heads, tmp_path / "fp16", precision="fp16"))
    limits = {"max_seq_len": 64, "max_prefill_tokens": 32, "max_tree_nodes": 16, "max_batch_size": 2}
    manifest = build.build_engines(EngineOptions(tmp_path / "fp16", tmp_path / "engine", opt_level=0, **limits))
    assert (tmp_path / "engine" / manifest.graphs["step"].file).stat().st_size > 0
    assert "leaves the experts" not in capsys.readouterr().err
    design_engines(EngineOptions(tmp_path / "fp16", tmp_path / "int8", weights="int8", **limits))
    assert "--weights int8 leaves the experts of 4 layers in fp16" in capsys.readouterr().err
