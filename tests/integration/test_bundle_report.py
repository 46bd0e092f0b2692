"""`medusa-export inspect` and `medusa-export diff`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from medusa_export.cli import main
from medusa_export.report.bundle_report import report_of
from medusa_runtime import Manifest
from medusa_runtime.bundle.manifest import QuantizationFacts, ValidationFacts
from medusa_runtime.drafting.costs import StepCosts
from medusa_runtime.drafting.tuning import Check, DeviceTuning, LookupCheck, Measurement, TunedBatch, TunedTree, Tuning
from medusa_runtime.errors import BundleError

Make = Callable[..., Path]


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def bundle(make_bundle: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_bundle(), tmp_path / "bundle"))


@pytest.fixture
def judged(bundle: Path) -> Path:
    """A bundle with the facts of a quantised, validated and tuned one."""
    manifest = Manifest.load(bundle)
    quality = {
        "num_tokens": 99, "perplexity": 3.1, "perplexity_before": 3.0, "mean_kl": 0.0123, "max_kl": 0.5, "same_greedy": 0.975,
        "tokens_per_step_before": 2.5, "tokens_per_step": 2.25,
    }  # fmt: skip
    manifest.quantization = QuantizationFacts(scheme="int8", activation_bits=16, smoothing=0.0, quality=quality, max_kl=0.1)
    summary = {"max_abs": 2e-5, "max_kl": 1e-9, "greedy_tokens": 480, "failed_checks": []}
    manifest.validation = ValidationFacts(status="passed", report="validation.json", summary=summary)
    manifest.save(bundle)
    tree = manifest.tree
    plain = TunedTree(nodes=1, tokens_per_step=1, nodes_per_step=1, step_seconds=0.01, tokens_per_second=100)
    static = TunedTree(
        nodes=len(tree["parents"]), tokens_per_step=2, nodes_per_step=16, step_seconds=0.01, tokens_per_second=180, tree=tree
    )
    dynamic = TunedTree(nodes=8, tokens_per_step=2.5, nodes_per_step=8, step_seconds=0.01, tokens_per_second=210)
    check = Check(
        prompts=4,
        steps=9,
        predicted_tokens_per_second=210,
        measured_tokens_per_second=200,
        plain_predicted_tokens_per_second=100,
        plain_measured_tokens_per_second=100,
    )
    device = DeviceTuning(
        backend="ort-cpu",
        processor="a CPU",
        threads=2,
        cores=2,
        provenance=manifest.provenance,
        measurement=Measurement(rounds=5, noise=0.4, is_quiet=False),
        costs=StepCosts([1], [1, 16], [64], [[[0.01, 0.011]]], [0.001]),
        acceptance_from="built-in prompts",
        accuracy=[[0.5]],
        capacity=64,
        batches=[TunedBatch(batch_size=1, best="dynamic", plain=plain, static=static, dynamic=dynamic, check=check)],
        prompt_lookup=True,
        lookup_check=LookupCheck(prompts=8, tokens_per_second=3, tokens_per_second_without=2, ratio=1.5),
    )
    Tuning(bundle=manifest.content_digest(), devices={"ort-cpu, 2 threads": device}).save(bundle)
    return bundle


def test_a_bundle_is_described(judged: Path) -> None:
    told = run("inspect", judged)
    assert told.exit_code == 0, told.stderr
    lines = {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in told.stdout.splitlines()}
    assert lines["bundle"].startswith(f"{judged}: onnx, fp32, quantised to int8, ")
    assert "LlamaForCausalLM" in lines["model"]
    assert lines["digest"] == Manifest.load(judged).content_digest()
    assert lines["limits"] == "256 tokens of prompt and answer, batches as memory allows"
    assert lines["quantisation"] == (
        "int8 weights, 16-bit activations, KL divergence from the original 0.0123 nats on average, perplexity 3.000 → 3.100, "
        "the same greedy token at 97.5% of positions, 2.500 → 2.250 tokens a step, limit 0.1 nats"
    )
    assert lines["validation"] == (
        "passed, logits differ from PyTorch's by at most 2e-05, 480 tokens of greedy decoding compared"
    )
    assert (
        "tuning       ort-cpu, 2 threads: batch 1: dynamic tree of 8 nodes, 2.50 tokens a step, 210.0 tokens/s, "
        "2.10 times plain decoding predicted, measured 2.00\n"
        "tuning       ort-cpu, 2 threads: prompt lookup on; the machine was BUSY\n"
    ) in told.stdout
    for name in Manifest.load(judged).files:
        assert name in told.stdout
    assert "tuning.json" in told.stdout
    assert "problem" not in told.stdout


def test_the_same_facts_come_as_json(judged: Path) -> None:
    facts = json.loads(run("inspect", judged, "--check", "--json").stdout)
    manifest = Manifest.load(judged)
    assert facts["model"] == json.loads(manifest.model.model_dump_json(exclude_none=True))
    assert facts["quantization"]["quality"]["mean_kl"] == 0.0123
    assert facts["validation"]["status"] == "passed"
    assert facts["tuning"]["ort-cpu, 2 threads"]["batches"][0]["measured_speedup"] == 2.0
    assert facts["size"] == sum(found.size for found in manifest.files.values())
    assert facts["tree"]["nodes"] == len(manifest.tree["parents"])
    assert facts["problems"] == []


def test_what_is_wrong_with_files_is_told(judged: Path) -> None:
    with (judged / "step.onnx").open("ab") as file:
        file.write(b"x")
    (judged / "chat.json").unlink()
    with (judged / "weights.bin").open("r+b") as file:
        file.write(b"\x3f" * 64)
    shallow = report_of(judged).problems
    assert [problem.partition(" ")[0] for problem in shallow] == ["step.onnx", "chat.json"]
    assert "is missing" in shallow[1]
    result = run("inspect", judged, "--check")
    assert result.exit_code == 1
    assert "problem: weights.bin has sha256" in result.stdout
    assert result.stdout.count("DIFFERS") == 3
    assert result.stderr.splitlines()[-1].startswith(f"Error: {judged} does not match its manifest: ")
    assert run("inspect", judged).exit_code == 0


def test_a_tuning_of_other_files_and_a_damaged_one_are_told(judged: Path) -> None:
    tuning = Tuning.load(judged)
    assert tuning is not None
    Tuning(bundle="0" * 64, devices=tuning.devices).save(judged)
    assert report_of(judged).problems == ["tuning.json is of other files, so it is not used; tune again"]
    (judged / "tuning.json").write_text("{")
    assert "tuning.json" in report_of(judged).problems[0]
    assert run("inspect", judged.parent).stderr.startswith(f"Error: {judged.parent} is not a bundle")
    with pytest.raises(BundleError, match="is not a bundle"):
        report_of(judged.parent)


def test_two_bundles_are_compared(judged: Path, make_bundle: Make) -> None:
    found = json.loads(run("diff", make_bundle(), judged, "--json").stdout)
    assert found["same_content"] is False
    assert {change["fact"].partition(".")[0] for change in found["facts"]} == {"quantization"}
    assert {change["fact"].partition(".")[0] for change in found["records"]} == {"validation", "tuning"}
    assert found["files"] == []
    told = run("diff", make_bundle(), judged, "--exit-code")
    assert told.exit_code == 3
    assert "quantization.scheme" in told.stdout
    assert told.stdout.endswith("the content differs\n")
    assert run("diff", make_bundle(), judged).exit_code == 0


def test_a_bundle_has_the_same_content_as_its_copy_however_it_was_judged(bundle: Path, make_bundle: Make) -> None:
    manifest = Manifest.load(bundle)
    manifest.validation = ValidationFacts(status="failed")
    manifest.save(bundle)
    result = run("diff", make_bundle(), bundle, "--exit-code")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "the content is the same")
    assert "validation.status" in result.stdout


def test_files_that_differ_are_named(bundle: Path, make_bundle: Make) -> None:
    manifest = Manifest.load(bundle)
    manifest.files["step.onnx"].sha256 = "0" * 64
    manifest.files["extra.bin"] = manifest.files["step.onnx"].model_copy()
    manifest.save(bundle)
    found = json.loads(run("diff", make_bundle(), bundle, "--json").stdout)
    size = manifest.files["step.onnx"].size
    assert found["files"] == [
        {"file": "step.onnx", "first_size": size, "second_size": size},
        {"file": "extra.bin", "second_size": size},
    ]


@pytest.mark.parametrize("words", [["inspect", "{}"], ["diff", "{}", "{}"]])
def test_neither_loads_pytorch_or_a_backend(bundle: Path, words: list[str]) -> None:
    program = "import sys; from medusa_export.cli import main; main({!r}, standalone_mode=False); print(*sys.modules)"
    given = [word.format(bundle) for word in words]
    done = subprocess.run([sys.executable, "-c", program.format(given)], capture_output=True, text=True, check=True)
    assert {"torch", "onnx", "onnxruntime", "transformers", "medusa_heads"}.isdisjoint(done.stdout.split())
