"""Exports of tiny models: what a bundle holds, and what is refused. All architectures are in test_architectures.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from medusa_export.bundle.export import export_bundle
from medusa_export.bundle.weights_file import INLINE_BYTES
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import load_backbone
from medusa_export.trace import attention_node as attention
from medusa_export.trace.cache_shapes import cached_tensors
from medusa_export.trace.layers import decoder_layers, layer_kinds
from medusa_export.trace.step_graph import step_module, trace_step
from medusa_heads.errors import CheckpointError
from medusa_runtime import Manifest, MedusaLM, OptionError
from medusa_runtime.text.codec import TextCodec

Make = Callable[..., Path]
PROMPTS = ("the lazy dog learns to speak, while the quick model jumps over many words", "a fox")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_half_precision_bundle_decodes_like_pytorch(
    precision: str, make_model: Make, make_heads: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(ExportOptions(str(make_model()), make_heads(), bundle, precision=precision))
    assert ("a bf16 bundle runs on GPUs alone" in capsys.readouterr().err) == (precision == "bf16")
    report = validate(bundle, str(make_model()), heads=make_heads(), prompts=PROMPTS, max_new_tokens=24)
    assert report.status == "passed", report.verdicts()
    assert {tensor.dtype for tensor in Manifest.load(bundle).graphs["step"].inputs[5:]} == {
        {"fp16": "float16", "bf16": "bfloat16"}[precision]
    }


@pytest.mark.parametrize("head_dim", [6, 12])
def test_a_head_size_may_be_no_multiple_of_8(head_dim: int, make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    """ONNX Runtime's attention for one sequence wants one, so such heads are attended to in another way."""
    model, heads = make_model("llama", head_dim=head_dim), make_heads()
    export_bundle(ExportOptions(str(model), heads, tmp_path / "bundle"))
    report = validate(tmp_path / "bundle", str(model), heads=heads, prompts=PROMPTS, max_new_tokens=16)
    assert report.status == "passed", report.verdicts()


def test_stamped_layers_are_the_layers_of_a_full_trace(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    attention.register()
    backbone = load_backbone(str(make_model("gemma2")), attention=attention.ATTENTION_NAME)
    _, layers = decoder_layers(backbone.model)
    kinds = layer_kinds(layers, backbone.layer_types, cached_tensors(backbone, step_module(backbone), list(layers)))
    assert kinds == [[0, 2], [1, 3]]  # sliding and full attention take turns
    stamped = trace_step(backbone, 24)
    monkeypatch.setattr("medusa_export.trace.step_graph.layer_kinds", lambda *_: [[layer] for layer in range(4)])
    full = trace_step(backbone, 24)
    assert [value.name for value in stamped.graph.inputs] == [value.name for value in full.graph.inputs]
    assert [value.name for value in stamped.graph.outputs] == [value.name for value in full.graph.outputs]
    for one, other in zip(run_step(stamped), run_step(full), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def run_step(model: ir.Model) -> list[np.ndarray]:
    """All outputs of a step with random tokens and a random cache."""
    rng = np.random.default_rng(0)
    model.opset_imports.pop("medusa.trace", None)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": rng.integers(0, 320, (2, 5)),
        "position_ids": np.arange(5)[None] + np.array([[20], [9]]),
        "tree_mask": np.tri(5, dtype=bool)[None].repeat(2, 0),
        "cache_lengths": np.array([20, 9]),
        "logit_rows": np.arange(5)[None].repeat(2, 0),
    }
    for value in session.get_inputs():
        if value.name.startswith("past."):
            feeds[value.name] = rng.normal(size=(2, value.shape[1], 32, value.shape[3])).astype("f")
    return session.run(None, feeds)


def test_layers_taken_for_alike_that_differ_are_all_traced(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    attention.register()
    backbone = load_backbone(str(make_model("gemma2")), attention=attention.ATTENTION_NAME)
    monkeypatch.setattr("medusa_export.trace.step_graph.layer_kinds", lambda *_: [[0, 1, 2, 3]])  # the first and last differ
    said: list[str] = []
    model = trace_step(backbone, 24, said.append)
    assert sum(node.op_type == "Attention" for node in model.graph) == 4
    assert "tracing all 4 layers" in said[0]


def test_a_bundle_follows_the_contract(make_bundle: Make) -> None:
    bundle = make_bundle()
    manifest = Manifest.load(bundle)
    step = onnx.load(bundle / "step.onnx", load_external_data=False)
    onnx.checker.check_model(str(bundle / "step.onnx"))
    onnx.checker.check_model(str(bundle / "heads.onnx"))
    assert [(entry.domain, entry.version) for entry in step.opset_import] == [("", 24)]
    assert {node.domain for node in step.graph.node} == {""}
    kinds = [node.op_type for node in step.graph.node]
    assert (kinds.count("Attention"), kinds.count("TensorScatter")) == (4, 8)
    assert (kinds.count("RMSNormalization"), kinds.count("RotaryEmbedding")) == (9, 8)
    cache = [f"{layer}.{part}" for layer in range(4) for part in ("key", "value")]
    assert {tensor.name: tensor.shape for tensor in manifest.graphs["step"].inputs} == {
        "input_ids": ["batch", "num_tokens"],
        "position_ids": ["batch", "num_tokens"],
        "tree_mask": ["batch", "num_tokens", "num_tokens"],
        "cache_lengths": ["batch"],
        "logit_rows": ["batch", "num_rows"],
    } | {f"past.{name}": ["batch", 2, "capacity", 16] for name in cache}
    assert {tensor.name: tensor.shape for tensor in manifest.graphs["step"].outputs} == {
        "greedy_ids": ["batch", "num_rows"],
        "hidden": ["batch", "num_rows", 64],
        "logits": ["batch", "num_rows", 320],
    } | {f"present.{name}": ["batch", 2, "capacity", 16] for name in cache}
    assert [tensor.name for tensor in manifest.graphs["heads"].outputs] == ["head_ids", "head_log_probs"]
    assert manifest.graphs["heads"].outputs[0].shape == ["batch", 3, 32]


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_stored_once(tied: bool, make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    export_bundle(ExportOptions(str(model), make_heads(), tmp_path / "bundle"))
    stored: dict[int, int] = {}  # offset -> bytes
    for name in ("step.onnx", "heads.onnx"):
        graph = onnx.load(tmp_path / "bundle" / name, load_external_data=False).graph
        for tensor in graph.initializer:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            assert facts or tensor.ByteSize() < 2 * INLINE_BYTES
            if facts:
                stored[int(facts["offset"])] = int(facts["length"])
    backbone, heads = load_backbone(str(model)).model, 3 * 3 * 64 * 64  # the first of two blocks reads the root as well
    matrices = sum(p.numel() for p in backbone.parameters() if p.dim() > 1) + heads
    assert sum(stored.values()) == 4 * matrices  # nothing twice, nothing left out


def test_an_interrupted_export_leaves_nothing_and_the_next_one_succeeds(
    make_model: Make, make_heads: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(str(make_model()), make_heads(), tmp_path / "bundle")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("medusa_export.bundle.write_graphs.write_weights", interrupt)
        export_bundle(options)
    assert list(tmp_path.iterdir()) == []
    export_bundle(options)
    assert MedusaLM.from_bundle(tmp_path / "bundle").generate("a fox", max_new_tokens=4).stats.num_generated_tokens > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"opset": 23}, OptionError, "--opset must be 24 or 25, not 23"),
        ({"max_seq_len": 257}, OptionError, "--max-seq-len is 257, but the model supports at most 256"),
        ({"head_top_k": 321}, OptionError, "--head-top-k is 321, but the vocabulary has only 320 tokens"),
        ({"model": "/nowhere"}, CheckpointError, "there is no model '/nowhere'"),
        ({"heads": Path("/nowhere")}, CheckpointError, "there are no heads at /nowhere"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    change, error, message, make_model: Make, make_heads: Make, tmp_path: Path
) -> None:
    options = {"model": str(make_model()), "heads": make_heads(), "output": tmp_path / "bundle"} | change
    with pytest.raises(error, match=message):
        export_bundle(ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_heads_for_another_model_are_refused(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=32)
    with pytest.raises(CheckpointError, match=r"hidden_size 64, .* has 32"):
        export_bundle(ExportOptions(str(model), make_heads(), tmp_path / "bundle"))


def test_rotary_embeddings_that_a_cache_cannot_follow_are_refused(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ExportError, match="rope_type dynamic"):
        export_bundle(ExportOptions(str(make_model("llama", rope_parameters=rope)), make_heads(), tmp_path / "bundle"))


def test_a_longrope_model_serves_as_far_as_its_keys_keep_their_rotation(
    make_model: Make, make_heads: Make, tmp_path: Path
) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 64, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    }  # fmt: skip
    model = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    options = ExportOptions(str(model), make_heads(), tmp_path / "bundle")
    assert export_bundle(options).limits.max_seq_len == 64
    with pytest.raises(OptionError, match="--max-seq-len is 65, but the model supports at most 64"):
        export_bundle(replace(options, output=tmp_path / "other", max_seq_len=65))
    report = validate(tmp_path / "bundle", str(model), prompts=["a fox " * 9], max_new_tokens=24)
    assert report.status == "passed", report.verdicts()


@pytest.mark.parametrize(
    "damage", ["truncate", "garbage", "remove", "drop a weight", "reshape a weight", "bad config", "bad tokenizer"]
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: str, make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_model(), model)
    weights = model / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 5000)
    elif damage == "remove":
        weights.unlink()
    elif damage == "bad config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    elif damage == "bad tokenizer":
        (model / "tokenizer.json").write_text("{")
    else:
        tensors = load_file(weights)
        name = "model.layers.2.mlp.down_proj.weight"
        tensors[name] = tensors[name][:3].clone()
        if damage == "drop a weight":
            del tensors[name]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.2.mlp.down_proj.weight" if "weight" in damage else None) as caught:
        export_bundle(ExportOptions(str(model), make_heads(), tmp_path / "bundle"))
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)


def with_templates(model: Path, directory: Path, templates: dict[str, str] | str | None) -> Path:
    """A copy of a checkpoint with other chat templates."""
    shutil.copytree(model, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = templates
    (directory / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("templates", "line"),
    [
        (
            {"default": "d {{ messages[0].content }}", "rag": "r"},
            "templates: default, rag; default is used if a request names none",
        ),
        ({"tool_use": "t", "rag": "r"}, "templates: rag, tool_use; none is called default, so each request has to name one"),
        ("d {{ messages[0].content }}", ""),
        (None, ""),
    ],
    ids=["default", "no default", "one", "none"],
)
def test_all_chat_templates_are_kept(templates, line, make_model: Make, make_heads: Make, tmp_path: Path, capsys) -> None:
    model = with_templates(make_model(), tmp_path / "model", templates)
    export_bundle(ExportOptions(str(model), make_heads(), tmp_path / "bundle"))
    told = capsys.readouterr().err
    assert line in told
    assert bool(line) == ("chat template" in told)
    sources = {"default": templates} if isinstance(templates, str) else templates or {}
    codec = TextCodec(tmp_path / "bundle")
    assert codec.chat.sources == sources
    if "default" in sources:
        assert codec.render("x") == "d x"
    if "rag" in sources:
        assert codec.render("x", template="rag") == "r"


def test_a_chat_template_that_is_no_template_is_told_at_export(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    model = with_templates(make_model(), tmp_path / "model", {"default": "d", "rag": "\n{% for %}"})
    with pytest.raises(CheckpointError, match=r"the chat template rag is not valid Jinja \(line 2: ") as caught:
        export_bundle(ExportOptions(str(model), make_heads(), tmp_path / "bundle"))
    assert str(model) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "bundle").exists()
