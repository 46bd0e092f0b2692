"""Draft n-grams from end to end: from training answers to the heads' directory, the bundle, and the drafts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from click.testing import CliRunner, Result

from medusa_export.bundle.export import export_bundle
from medusa_export.cli import main
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.model.checkpoint import load_backbone
from medusa_heads.formats import load_heads, native, save_heads
from medusa_heads.ngrams import head_candidates
from medusa_runtime import BundleError, Manifest, MedusaLM, open_backend
from medusa_runtime.drafting.ngrams import NGRAMS_NAME, NGrams
from tests.support.cli import fails

Make = Callable[..., Path]
ANSWER = "the quick brown fox jumps over the lazy dog while a small model learns to speak"
EXACT = ("--max-length", 128, "--threads", 1)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Restore accelerate's state and PyTorch's number of threads after each test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{n} say"}, {"role": "assistant", "content": ANSWER}]} for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def heads(make_heads: Make, tmp_path: Path) -> Path:
    return shutil.copytree(make_heads(), tmp_path / "heads")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_training_leaves_n_grams_beside_the_heads(make_model: Make, data: Path, tmp_path: Path) -> None:
    words = ("--data", data, "-o", tmp_path / "heads", "--mixed-precision", "no", "--backbone-dtype", "fp32", *EXACT)
    result = run("train", make_model(), *words, "--batch-tokens", 64, "--held-out", 0.25, "--epochs", 1, "--num-heads", 2)
    assert result.exit_code == 0, result.output
    found = NGrams.load(tmp_path / "heads" / NGRAMS_NAME)
    assert found.weights.shape == (2, 5)
    assert native.is_alone(tmp_path / "heads")
    again = run("heads", "ngrams", tmp_path / "heads", "--model", make_model(), "--data", data, "--held-out", 0.25, *EXACT)
    assert again.exit_code == 0, again.output
    same = NGrams.load(tmp_path / "heads" / NGRAMS_NAME)
    np.testing.assert_array_equal(same.cells, found.cells)
    np.testing.assert_allclose(same.weights, found.weights, atol=0.02)  # the precision of the backbone may differ


def test_the_command_makes_n_grams_for_heads_there_are(make_model: Make, heads: Path, data: Path) -> None:
    result = run("heads", "ngrams", heads, "--model", make_model(), "--data", data, "--held-out", 0, *EXACT)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(heads / NGRAMS_NAME)
    assert sorted(path.name for path in heads.iterdir()) == ["config.json", NGRAMS_NAME, "heads.safetensors"]
    save_heads(load_heads(heads), heads, force=True)  # it holds heads and what belongs to them, so it may be replaced
    assert not (heads / NGRAMS_NAME).exists()  # other heads need others


def test_a_bundle_takes_them_along_and_no_answer_changes(make_model: Make, heads: Path, data: Path, tmp_path: Path) -> None:
    export_bundle(ExportOptions(str(make_model()), heads, tmp_path / "without"))
    assert NGRAMS_NAME not in Manifest.load(tmp_path / "without").files
    run("heads", "ngrams", heads, "--model", make_model(), "--data", data, *EXACT)
    export_bundle(ExportOptions(str(make_model()), heads, tmp_path / "with"))
    assert (tmp_path / "with" / NGRAMS_NAME).read_bytes() == (heads / NGRAMS_NAME).read_bytes()
    Manifest.load(tmp_path / "with").require_intact(tmp_path / "with")

    answers = []
    for name in ("without", "with"):
        with MedusaLM.from_bundle(tmp_path / name, costs=None) as lm:
            assert (lm.engine.ngrams is None) == (name == "without")
            answers.append([lm.generate(prompt, max_new_tokens=30).token_ids for prompt in ("a fox", "the dog runs")])
    assert answers[0] == answers[1]


def test_a_damaged_file_stops_the_export(make_model: Make, heads: Path, tmp_path: Path) -> None:
    (heads / NGRAMS_NAME).write_bytes(b"no n-grams")
    with pytest.raises(BundleError, match="holds no draft n-grams"):
        export_bundle(ExportOptions(str(make_model()), heads, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_heads_without_a_directory_have_no_place_for_them(make_model: Make, data: Path, tmp_path: Path) -> None:
    (tmp_path / "heads.pt").write_bytes(b"")
    result = run("heads", "ngrams", tmp_path / "heads.pt", "--model", make_model(), "--data", data)
    fails(result, 2, "is not a directory of heads")


@pytest.mark.parametrize("root", [8, 9])  # of the known tokens, and not
@pytest.mark.parametrize("known", [None, list(range(5, 300, 3))])
def test_weights_are_fitted_on_what_the_exported_heads_say(
    known, root, make_model: Make, make_heads: Make, tmp_path: Path
) -> None:
    heads = load_heads(make_heads())
    heads.draft_ids = known
    save_heads(heads, tmp_path / "heads")
    export_bundle(ExportOptions(str(make_model()), tmp_path / "heads", tmp_path / "bundle", head_top_k=6))
    backend = open_backend(tmp_path / "bundle", Manifest.load(tmp_path / "bundle"))
    backend.resize(1, 4)
    backend.step(
        np.arange(20, 24)[None], np.arange(4)[None], np.tri(4, dtype=bool)[None], np.zeros(1, np.int64), np.array([[3]])
    )
    exported = backend.propose(np.zeros(1, np.int64), np.array([root]))

    model = load_backbone(str(make_model())).model
    with torch.no_grad():
        hidden = model.base_model(torch.arange(20, 24)[None]).last_hidden_state[0, -1:]
    ids, log_probs = head_candidates(heads, model.get_output_embeddings(), hidden, torch.tensor([root]), 6)
    np.testing.assert_array_equal(ids, exported.token_ids)
    np.testing.assert_allclose(log_probs, exported.log_probs, atol=1e-4)
