"""`medusa-export heads evaluate` as a user types it, and the tree that a bundle takes from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from medusa_export.bundle import default_tree
from medusa_export.bundle.tree_shapes import prior_tree
from medusa_export.cli import main
from medusa_export.model.checkpoint import load_backbone
from medusa_heads.formats import load_heads
from medusa_heads.replay import Evaluation
from medusa_runtime import CandidateTree, MedusaLM
from medusa_runtime.bundle.manifest import Manifest

Make = Callable[..., Path]
NUM_ANSWERS = 6
BY_HEART = "--epochs 30 --batch-tokens 32 --held-out 0 --num-heads 3 --heads-dtype fp32 --mixed-precision no --max-length 110"


@pytest.fixture(scope="module")
def data(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy answers of the tiny model."""
    root = tmp_path_factory.mktemp("answers")
    prompts = root / "prompts.txt"
    prompts.write_text("".join(f"the fox number {n}\n" for n in range(NUM_ANSWERS)))
    command = ["distill", str(make_model()), "--prompts", str(prompts), "-o", str(root / "data"), "--max-new-tokens", "40"]
    result = CliRunner().invoke(main, [*command, "--max-prompt-tokens", "60", "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    return root / "data"


def run(*words: object) -> Result:
    length = [] if "--max-length" in words else ["--max-length", "200"]  # the tiny models take 256
    return CliRunner().invoke(main, ["heads", "evaluate", *(str(word) for word in words), *length])


def test_counts_what_a_direct_computation_counts(make_model: Make, make_heads: Make, data: Path, tmp_path: Path) -> None:
    model, heads = make_model(), make_heads()
    output = tmp_path / "evaluation.json"
    result = run(heads, "--model", model, "--data", data, "--dtype", "fp32", "-o", output, "--json")
    assert result.exit_code == 0, result.output
    evaluation = Evaluation.model_validate_json(output.read_text())
    assert json.loads(result.stdout) == json.loads(output.read_text())
    assert evaluation.answers == NUM_ANSWERS

    backbone, loaded = load_backbone(str(model)).model, load_heads(heads)
    right = np.zeros((3, 10))
    valid = np.zeros(3)
    for line in (data / "answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, answer = row["prompt_token_ids"], row["response_token_ids"]
        with torch.no_grad():
            hidden = backbone.model(torch.tensor([prompt + answer])).last_hidden_state[0].half().float()
            roots = torch.tensor([*prompt, *answer, 0][1:])  # what follows each place
            logits = loaded(hidden, backbone.lm_head, roots)  # [T, K, V]
        for n in range(len(answer)):
            for k in range(3):
                if n + k + 1 < len(answer):
                    best = logits[len(prompt) - 1 + n, k].argsort(descending=True)[:10].tolist()
                    valid[k] += 1
                    if answer[n + k + 1] in best:
                        right[k, best.index(answer[n + k + 1])] += 1
    np.testing.assert_allclose(evaluation.accuracy, right / valid[:, None], atol=0.02)  # fp16 rows may swap near ties


def test_replayed_tokens_per_step_are_the_runtimes(make_bundle: Make, make_model: Make, data: Path, tmp_path: Path) -> None:
    tree = CandidateTree.from_choices([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(tree.to_json()))
    heads = tmp_path / "heads"
    trained = CliRunner().invoke(
        main,
        ["train", str(make_model()), "--data", str(data), "-o", str(heads), *BY_HEART.split()],
    )
    assert trained.exit_code == 0, trained.output
    result = run(heads, "--model", make_model(), "--data", data, "--dtype", "fp32", "--json", "--tree", path, "--limit", 1)
    assert result.exit_code == 0, result.output
    replayed = json.loads(result.stdout)["trees"][0]

    bundle = tmp_path / "bundle"
    exported = CliRunner().invoke(main, ["onnx", str(make_model()), "--heads", str(heads), "-o", str(bundle), "--no-validate"])
    assert exported.exit_code == 0, exported.output
    row = json.loads((data / "answers.jsonl").read_text().splitlines()[0])
    lm = MedusaLM.from_bundle(bundle)
    steps = [step for [step] in lm.engine.generate([row["prompt_token_ids"]], 40, tree=tree)]
    assert [token for step in steps for token in step.token_ids] == row["response_token_ids"]
    assert replayed["tokens_per_step"] == pytest.approx((len(row["response_token_ids"]) - 1) / (len(steps) - 1))
    assert replayed["tokens_per_step"] > 1.2  # heads that learned these answers by heart, so that there is something to compare


def test_no_tree_is_chosen_by_few_tokens(make_model: Make, make_heads: Make, data: Path, tmp_path: Path) -> None:
    heads = make_heads()
    judged = run(heads, "--model", make_model(), "--data", data, "--nodes", 6, "-o", heads / "evaluation.json")
    assert judged.exit_code == 0, judged.output
    found = Evaluation.model_validate_json((heads / "evaluation.json").read_text())
    assert 0 < found.tokens < default_tree.MIN_TOKENS
    words = ["onnx", str(make_model()), "--heads", str(heads), "-o", str(tmp_path / "bundle"), "--no-validate"]
    result = CliRunner().invoke(main, [*words, "--tree-nodes", "6"])
    assert result.exit_code == 0, result.output
    assert f"was made on {found.tokens} tokens, too few to choose a tree by" in " ".join(result.stderr.split())
    manifest = Manifest.load(tmp_path / "bundle")
    assert CandidateTree.from_json(manifest.tree) == prior_tree(len(found.accuracy), manifest.heads.top_k, 6)


def test_a_bundle_starts_with_the_best_tree_of_its_heads(
    make_model: Make, make_heads: Make, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_tree, "MIN_TOKENS", 1)
    heads = make_heads()
    judged = run(heads, "--model", make_model(), "--data", data, "--nodes", 6, "-o", heads / "evaluation.json")
    assert judged.exit_code == 0, judged.output
    expected = Evaluation.model_validate_json((heads / "evaluation.json").read_text()).trees[0]

    def export(name: str, *options: object) -> tuple[CandidateTree, str]:
        output = tmp_path / name
        words = ["onnx", str(make_model()), "--heads", str(heads), "-o", str(output), "--no-validate", *map(str, options)]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        return CandidateTree.from_json(Manifest.load(output).tree), result.stderr

    assert export("best", "--tree-nodes", expected.nodes)[0] == CandidateTree.from_json(expected.tree)
    assert "using a default tree" in export("other", "--tree-nodes", 5)[1]
    own = tmp_path / "own.json"
    own.write_text("[[0], [0, 0]]")
    assert export("own", "--tree", own)[0] == CandidateTree.from_choices([[0], [0, 0]])
    (heads / "heads.safetensors").write_bytes((make_heads(num_layers=1) / "heads.safetensors").read_bytes())
    (heads / "config.json").write_bytes((make_heads(num_layers=1) / "config.json").read_bytes())
    assert "is of other heads" in export("stale", "--tree-nodes", expected.nodes)[1]


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--tree", "missing.json"], 2, "cannot read the tree"),
        (["-o", "no/such/place.json"], 2, "there is no directory"),
        (["--held-out", "0.0000001"], 2, "leaves no answers to evaluate on"),
        (["--device", "cuda:77"], 2, "no such device"),
        (["--plot", "accuracy.txt"], 2, "ends in .png"),
        (["--max-length", "100000"], 2, "the model takes at most 256 tokens"),
    ],
)
def test_bad_options_are_one_line(
    make_model: Make, make_heads: Make, data: Path, options: list[str], exit_code: int, message: str
) -> None:
    result = run(make_heads(), "--model", make_model(), "--data", data, *options)
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr.strip().splitlines()[-1]
    assert isinstance(result.exception, SystemExit)  # not an exception that came through
    assert result.stdout == ""


def test_heads_of_another_model_are_refused(make_model: Make, make_heads: Make, data: Path) -> None:
    result = run(make_heads(), "--model", make_model("llama", hidden_size=48), "--data", data, "--max-length", 200)
    assert result.exit_code == 1, result.output
    assert "hidden_size 64" in result.stderr.strip().splitlines()[-1]


def test_the_best_tree_of_a_size_is_taken_whoever_gave_it(
    make_model: Make, make_heads: Make, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_tree, "MIN_TOKENS", 1)
    heads, bad = make_heads(), tmp_path / "bad.json"
    bad.write_text("[[9], [9, 9], [9, 9, 9]]")
    judged = run(
        heads,
        "--model",
        make_model(),
        "--data",
        data,
        "--max-length",
        200,
        "--nodes",
        4,
        "--tree",
        bad,
        "-o",
        heads / "evaluation.json",
    )
    assert judged.exit_code == 0, judged.output
    found = Evaluation.model_validate_json((heads / "evaluation.json").read_text())
    assert [tree.nodes for tree in found.trees] == [4, 4]
    best = max(found.trees, key=lambda tree: tree.tokens_per_step)
    words = ["onnx", str(make_model()), "--heads", str(heads), "-o", str(tmp_path / "b"), "--no-validate", "--tree-nodes", "4"]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert CandidateTree.from_json(Manifest.load(tmp_path / "b").tree) == CandidateTree.from_json(best.tree)
