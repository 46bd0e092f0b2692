"""Heads of other projects, exported with a tiny model and decoded: guesses as described, and answers as without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from medusa_export.bundle.export import export_bundle
from medusa_export.check import validate
from medusa_export.cli import main
from medusa_export.command_options.export_options import ExportOptions
from medusa_runtime import Manifest, MedusaLM, open_backend
from tests.support.published_heads import FLAVOURS, MERGED, Array, Published, publish, publish_merged
from tests.support.tracing import traced_once

Make = Callable[..., Path]
VALIDATED = {"medusa-v2", "vllm of a truncated vocabulary", "vllm with a map of tokens", "hydra"}
PROMPT = list(range(20, 32))


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    with traced_once():
        yield


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def proposals(bundle: Path) -> tuple[list[int], Array, Array]:
    """After each token of a prompt: the root that the heads are given, and their candidates [T, K, M] twice: ids, log-probs."""
    backend = open_backend(bundle, Manifest.load(bundle))
    count = len(PROMPT)
    backend.resize(1, count)
    tokens, mask = np.array([PROMPT]), np.tri(count, dtype=bool)[None]
    backend.step(tokens, np.arange(count)[None], mask, np.zeros(1, np.int64), np.arange(count)[None])
    roots = [(7 * row) % 320 for row in range(count)]
    found = [backend.propose(np.array([row]), np.array([root])) for row, root in enumerate(roots)]
    return roots, np.concatenate([one.token_ids for one in found]), np.concatenate([one.log_probs for one in found])


def described(given: Published, model: Path, roots: list[int]) -> Array:
    """The heads' log-probabilities after each token of the prompt by their description. [T, K, V]"""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        hidden = loaded.base_model(torch.tensor([PROMPT]))[0][0].numpy()
    tables = [layer.weight.detach().numpy() for layer in (loaded.get_output_embeddings(), loaded.get_input_embeddings())]
    logits = torch.from_numpy(given.logits(hidden, roots, *tables))
    return np.asarray(logits.log_softmax(-1).numpy())


def check_bundle(bundle: Path, given: Published, model: Path) -> None:
    roots, token_ids, log_probs = proposals(bundle)
    expected = described(given, model, roots)
    np.testing.assert_allclose(np.take_along_axis(expected, token_ids, -1), log_probs, atol=2e-4)
    best = np.sort(expected, -1)[..., ::-1][..., : log_probs.shape[-1]]
    np.testing.assert_allclose(best, log_probs, atol=2e-4)
    lm = MedusaLM.from_bundle(bundle)
    plain, medusa = (lm.generate("a fox jumps", max_new_tokens=40, medusa=medusa) for medusa in (False, True))
    assert medusa.token_ids == plain.token_ids


@pytest.mark.parametrize("what", FLAVOURS)
def test_published_heads_guess_as_described_and_decode_as_plain(what: str, make_model: Make, tmp_path: Path) -> None:
    model, given = make_model(), publish(what, tmp_path / "heads")
    bundle = tmp_path / "bundle"
    manifest = export_bundle(ExportOptions(str(model), given.path, bundle))
    assert manifest.heads.reads_root == (what in {"hydra", "hydra of two layers"})
    check_bundle(bundle, given, model)
    if what in VALIDATED:
        assert validate(bundle, str(model), heads=given.path).status == "passed"


@pytest.mark.parametrize("what", MERGED)
def test_a_merged_checkpoint_is_model_and_heads(what: str, make_model: Make, tmp_path: Path) -> None:
    given = publish_merged(what, make_model(), tmp_path / "merged")
    is_validated = what == "medusa-1.0"
    done = run("onnx", given.path, "-o", tmp_path / "bundle", *([] if is_validated else ["--no-validate"]))
    assert done.exit_code == 0, done.stderr
    assert Manifest.load(tmp_path / "bundle").validation.status == ("passed" if is_validated else "not run")
    check_bundle(tmp_path / "bundle", given, make_model())
