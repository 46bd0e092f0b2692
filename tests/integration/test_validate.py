"""Validation finds what is wrong with a bundle, and says so in the bundle."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from medusa_export.check import record, validate
from medusa_export.check.compare import divergences, first_divergence, logits_difference
from medusa_export.check.sides import ReferenceSide
from medusa_export.check.validation_report import TOLERANCES, ValidationReport
from medusa_export.errors import ValidationMismatchError
from medusa_heads.config import HeadsConfig
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import load_heads, save_heads
from medusa_heads.modules import MedusaHeads
from medusa_runtime import BundleError, Manifest, MedusaLM, OptionError
from medusa_runtime.bundle.manifest import HEADS, STEP, FileFacts, file_facts, sha256_of

Make = Callable[..., Path]
PROMPTS = ("a small model learns",)


def validate_and_record(bundle: Path, reference: str, **options) -> ValidationReport:
    """What the command does."""
    report = validate(bundle, reference, **options)
    record(bundle, report)
    return report


@pytest.fixture
def bundle(make_bundle: Make, tmp_path: Path) -> Path:
    shutil.copytree(make_bundle(), tmp_path / "bundle")
    return tmp_path / "bundle"


def disturb_graph(bundle: Path, file: str) -> None:
    """Let one graph, whose weights others share, scale its result by 1.02, as a wrong pass might."""
    model = ir.load(bundle / file)
    [node] = [node for node in model.graph if node.op_type in ("TopK", "ArgMax")]
    logits = node.inputs[0]
    assert logits is not None
    scale = ir.node("Constant", [], {"value": ir.tensor(np.array(1.02, "f"))})
    scaled = ir.node("Mul", [logits, scale.outputs[0]])
    scaled.outputs[0].type, scaled.outputs[0].shape = logits.type, logits.shape
    if logits.is_graph_output():
        logits.name, scaled.outputs[0].name = "logits.before", logits.name
    model.graph.insert_before(node, [scale, scaled])
    logits.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
    scaled.replace_input_with(0, logits)
    ir.save(model, bundle / file)
    manifest = Manifest.load(bundle)
    manifest.files[file] = file_facts(bundle / file)
    manifest.save(bundle)


def disturb(bundle: Path, name: str, *, tell_the_manifest: bool, graph_name: str = "step") -> None:
    """Scale one weight by 1.02, as a wrong conversion might."""
    graph = onnx.load(bundle / f"{graph_name}.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if name in tensor.name)
    facts = {entry.key: entry.value for entry in tensor.external_data}
    weights = np.memmap(bundle / "weights.bin", "f", "r+", int(facts["offset"]), (int(facts["length"]) // 4,))
    weights *= 1.02
    weights.flush()
    if tell_the_manifest:
        manifest = Manifest.load(bundle)
        path = bundle / "weights.bin"
        manifest.files["weights.bin"] = FileFacts(size=path.stat().st_size, sha256=sha256_of(path))
        manifest.save(bundle)


def test_a_good_bundle_is_marked_as_passed(bundle: Path, make_model: Make, make_heads: Make) -> None:
    report = validate_and_record(bundle, str(make_model()), heads=make_heads(), prompts=PROMPTS)
    manifest = Manifest.load(bundle)
    assert report.status == manifest.validation.status == "passed"
    kept = json.loads((bundle / "validation.json").read_text())
    assert kept["targets"] == ["ort-cpu-single", "ort-cpu", "portable"]
    for rows in (kept["prompt_logits"], kept["tree_logits"]):
        assert {row["target"] for row in rows} == {"ort-cpu-single", "ort-cpu", "portable"}
    assert {row["target"] for row in kept["head_log_probs"]} == {"ort-cpu", "portable"}
    told = (None, "it has the heads graph of ort-cpu, which is compared above")
    assert report.verdicts()["head candidates (ort-cpu-single)"] == told
    assert len(kept["greedy"]) == 1
    assert kept["greedy"][0]["num_tokens"] == manifest.validation.summary["greedy_tokens"] > 0
    MedusaLM.from_bundle(bundle)


def test_disturbed_weights_fail_even_if_the_manifest_vouches_for_them(bundle: Path, make_model: Make) -> None:
    disturb(bundle, "layers.2.mlp.up_proj", tell_the_manifest=True)
    logits = "logits of prompts, whole and in chunks"
    failed = f"{logits} (ort-cpu-single), {logits} (ort-cpu), {logits} (portable), logits of tree"
    with pytest.raises(ValidationMismatchError, match=re.escape(failed)):
        validate_and_record(bundle, str(make_model()), prompts=PROMPTS)
    assert Manifest.load(bundle).validation.status == "failed"
    with pytest.raises(BundleError, match=r"failed its validation \(validation\.json\)"):
        MedusaLM.from_bundle(bundle)
    MedusaLM.from_bundle(bundle, allow_failed=True)


def test_disturbed_files_fail_by_their_digest_too(bundle: Path, make_model: Make) -> None:
    disturb(bundle, "layers.0.self_attn.q_proj", tell_the_manifest=False)
    with pytest.raises(ValidationMismatchError, match="files match the manifest, logits of prompts"):
        validate_and_record(bundle, str(make_model()), prompts=PROMPTS)


def test_disturbed_heads_fail(bundle: Path, make_model: Make, make_heads: Make) -> None:
    disturb(bundle, "heads.1.blocks.0.linear.weight", tell_the_manifest=True, graph_name="heads")
    with pytest.raises(ValidationMismatchError, match=r"failed \(head candidates \(ort-cpu\), head candidates \(portable\)\)"):
        validate_and_record(bundle, str(make_model()), heads=make_heads(), prompts=PROMPTS)


@pytest.mark.parametrize(
    ("graph", "target"),
    [(STEP, "ort-cpu-single"), (STEP, "ort-cpu"), (STEP, "portable"), (HEADS, "ort-cpu"), (HEADS, "portable")],
)
def test_a_defect_in_one_of_the_graphs_alone_fails_and_is_named(
    graph: str, target: str, bundle: Path, make_model: Make, make_heads: Make
) -> None:
    file = Manifest.load(bundle).graph(graph, target).file
    disturb_graph(bundle, file)
    report = validate(bundle, str(make_model()), heads=make_heads(), prompts=PROMPTS)
    failed = {name for name, (passed, _) in report.verdicts().items() if passed is False}
    logits = {f"logits of prompts, whole and in chunks ({target})", f"logits of tree paths ({target})"}
    assert failed == (logits if graph == STEP else {f"head candidates ({target})"})


def test_a_bundle_of_portable_graphs_alone_has_one_row_a_check(make_bundle: Make, make_model: Make) -> None:
    report = validate(make_bundle("llama", precision="fp16"), str(make_model()), prompts=PROMPTS)
    assert report.targets == ["portable"]
    assert "logits of tree paths" in report.verdicts()
    assert report.verdicts()["head candidates"] == (None, "no heads were given; use --heads")
    assert report.facts().summary["skipped_checks"] == ["head candidates"]
    assert (report.status, report.facts().summary["failed_checks"]) == ("passed", [])
    assert not any("(" in name for name in report.verdicts())


@pytest.mark.parametrize("kind", ["none", "other weights", "more heads", "another width"])
def test_heads_that_are_not_the_bundles_are_refused_and_the_bundle_is_not_marked(
    kind: str, bundle: Path, make_model: Make, make_heads: Make, tmp_path: Path
) -> None:
    heads = tmp_path / "others"
    if kind == "other weights":
        loaded = load_heads(make_heads())
        loaded.heads[1].blocks[0].linear.weight.data *= 1.05
        save_heads(loaded, heads)
    if kind == "more heads":
        heads = make_heads("llama", num_heads=5)
    if kind == "another width":
        save_heads(MedusaHeads(HeadsConfig(base_model="x", num_heads=3, hidden_size=32, vocab_size=320)), heads)
    with pytest.raises((OptionError, CheckpointError)):
        validate_and_record(bundle, str(make_model()), heads=heads, prompts=PROMPTS)
    assert Manifest.load(bundle).validation.status == "not run"


@pytest.mark.parametrize(
    ("file", "precision"),
    [
        ("heads.onnx", "fp32"), ("heads.ort-cpu.onnx", "fp32"), ("step.onnx", "fp32"), ("weights.bin", "fp32"),
        ("heads.onnx", "bf16"), ("weights.bin", "bf16"),
    ],
)  # fmt: skip
def test_a_bundle_that_does_not_run_fails(
    file: str, precision: str, make_bundle: Make, make_model: Make, tmp_path: Path
) -> None:
    shutil.copytree(make_bundle("llama", precision=precision), tmp_path / "bundle")
    (tmp_path / "bundle" / file).write_bytes(b"no graph")
    with pytest.raises(ValidationMismatchError, match="the bundle runs"):
        validate_and_record(tmp_path / "bundle", str(make_model()), prompts=PROMPTS)
    assert Manifest.load(tmp_path / "bundle").validation.status == "failed"


def test_a_reference_of_another_shape_is_refused(bundle: Path, make_model: Make) -> None:
    with pytest.raises(OptionError, match="architecture Qwen2ForCausalLM, but the bundle has LlamaForCausalLM"):
        validate_and_record(bundle, str(make_model("qwen2")), prompts=PROMPTS)
    assert Manifest.load(bundle).validation.status == "not run"


def test_a_reference_that_overflows_says_so(make_model: Make, bundle: Path) -> None:
    side = ReferenceSide.load(str(make_model()), Manifest.load(bundle))
    with torch.no_grad():
        side.backbone.model.lm_head.weight.mul_(1e38)
    with pytest.raises(CheckpointError, match=r"PyTorch gives NaN or infinite logits for .*does not fit float32"):
        side.settle()


def test_a_reference_that_is_off_at_first_is_given_time_to_settle(make_model: Make, bundle: Path, monkeypatch) -> None:
    side = ReferenceSide.load(str(make_model()), Manifest.load(bundle))
    passes = iter([0.01, 0.0, 0.0])
    monkeypatch.setattr(side, "logits", lambda _: np.full((1, 3), next(passes)))
    side.settle()
    assert list(passes) == []
    never = itertools.count()
    monkeypatch.setattr(side, "logits", lambda _: np.full((1, 3), float(next(never))))
    with pytest.raises(CheckpointError, match="so it cannot be a reference"):
        side.settle()


def test_logits_that_are_not_finite_never_pass_and_are_told() -> None:
    reference = np.zeros((1, 3))
    found = np.array([[0, np.nan, 0]])
    difference = logits_difference("", found, reference)
    assert not difference.within(TOLERANCES["fp32"])
    assert json.loads(difference.model_dump_json())["max_abs"] == "Infinity"
    assert logits_difference("", reference, reference).within(TOLERANCES["fp32"])


def test_a_divergence_tells_both_tokens_and_the_margin() -> None:
    reference = np.array([[0.0, 1.0, 3.0], [5.0, 4.75, 0.0]])
    [found] = divergences([2, 1], reference)
    assert (found.position, found.token_id, found.reference_token_id, found.margin) == (1, 1, 0, 0.25)
    assert divergences([2, 0], reference) == []
    first = first_divergence([2, 1], [2, 0], reference)
    assert first is not None
    assert (first.position, first.margin) == (1, 0.25)
    assert first_divergence([2, 0], [2, 0], reference) is None
    shorter = first_divergence([2], [2, 0], reference)
    assert shorter is not None
    assert shorter.margin == float("inf")
