"""The commands as a user types them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from medusa_export.cli import main
from medusa_runtime import Manifest, MedusaLM

Make = Callable[..., Path]


def run(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin)


def fails(result: Result, exit_code: int, message: str) -> None:
    """Nothing on stdout, the exit code, and at the end of stderr one line of ours, or Click's usage and one line."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    *before, last = result.stderr.splitlines()
    assert last.startswith("Error: ")
    assert message in last
    told = ("  ", "Usage: ", "Try ", "fp32 bundle", "\u250f", "\u2503", "\u2521", "\u2502", "\u2514")  # stages, usage, a table
    assert [line for line in before if line and not line.startswith(told)] == []


def test_verbose_says_what_passes_match_and_why_not(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    words = ("onnx", make_model(), "--heads", make_heads(), "--no-validate", "-o")
    told = run(*words, tmp_path / "told", "--verbose").stderr
    assert "FuseRotary: 4 matched\n" in told  # of the two layers that are traced
    assert re.search(r"IntegerProducts: 0 matched; not \d+: a product with a float weight\n", told)
    assert "matched" not in run(*words, tmp_path / "silent").stderr


def test_from_a_model_to_tokens(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    made = run("heads", "init", model, "-o", tmp_path / "heads", "--num-heads", 2)
    assert made.stdout == f"{tmp_path / 'heads'}\n"
    told = json.loads(run("heads", "inspect", tmp_path / "heads", "--json").stdout)
    assert (told["num_heads"], told["hidden_size"], told["shared_lm_head"]) == (2, 64, True)
    assert "heads.1.blocks.0.linear.weight" in run("heads", "inspect", tmp_path / "heads").stdout

    exported = run("onnx", model, "--heads", tmp_path / "heads", "-o", tmp_path / "bundle")
    assert exported.exit_code == 0, exported.stderr
    assert exported.stdout == f"{tmp_path / 'bundle'}\n"
    assert "passed" in exported.stderr
    assert Manifest.load(tmp_path / "bundle").validation.status == "passed"

    answer = run("generate", tmp_path / "bundle", "-p", "a fox", "--max-new-tokens", 12)
    plain = run("generate", tmp_path / "bundle", "-p", "-", "--max-new-tokens", 12, "--no-medusa", stdin="a fox")
    assert answer.stdout == plain.stdout
    assert answer.stderr.startswith("medusa: ")
    assert plain.stderr.startswith("plain: ")
    quiet = run("generate", tmp_path / "bundle", "-p", "a fox", "--max-new-tokens", 12, "-q")
    assert (quiet.stdout, quiet.stderr) == (answer.stdout, "")
    (tmp_path / "tree.json").write_text("[[0], [0, 0], [1]]")
    words = ("-p", "a fox", "--max-new-tokens", 12, "--tree", tmp_path / "tree.json", "--json", "--seed", 7)
    result = json.loads(run("generate", tmp_path / "bundle", *words).stdout)
    assert result["text"] + "\n" == answer.stdout
    assert (len(result["token_ids"]), result["seed"]) == (result["stats"]["num_generated_tokens"], 7)


def test_an_export_from_a_file_of_options_tells_as_much_as_it_should(
    make_model: Make, make_heads: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx.yaml").write_text(f"model: {make_model()}\nheads: {make_heads()}\ntree_nodes: 5\nvalidate: false\n")
    monkeypatch.setenv("MEDUSA_EXPORT_ONNX_OUTPUT", str(tmp_path / "bundle"))
    loud = run("onnx", "--config", tmp_path / "onnx.yaml", "--verbose", "--json")
    assert loud.exit_code == 0, loud.stderr
    assert "matched" in loud.stderr
    facts = json.loads(loud.stdout)
    assert (facts["bundle"], facts["tree"]["nodes"]) == (str(tmp_path / "bundle"), 5)
    assert facts["validation"]["status"] == "not run"

    plain = run("onnx", "--config", tmp_path / "onnx.yaml", "--force")
    assert plain.stdout == f"{tmp_path / 'bundle'}\n"
    assert "write the weights" in plain.stderr
    assert "matched" not in plain.stderr
    quiet = run("onnx", "--config", tmp_path / "onnx.yaml", "--force", "-q")
    assert (quiet.stdout, quiet.stderr) == (plain.stdout, "")

    report = run("validate", tmp_path / "bundle", "--reference", make_model(), "--max-new-tokens", 4, "--json")
    assert report.exit_code == 0, report.stderr
    told = json.loads(report.stdout)
    assert (told["status"], told["summary"]["failed_checks"]) == ("passed", [])
    assert "  compare: 0:" in report.stderr


def test_heads_with_an_lm_head_of_their_own(make_model: Make, tmp_path: Path) -> None:
    assert run("heads", "init", make_model(), "-o", tmp_path / "heads", "--own-lm-head", "--num-layers", 2).exit_code == 0
    exported = run("onnx", make_model(), "--heads", tmp_path / "heads", "-o", tmp_path / "bundle")
    assert exported.exit_code == 0, exported.stderr


def test_generate_takes_the_runtimes_options(make_bundle: Make, tmp_path: Path) -> None:
    def answer(*words: object) -> dict[str, Any]:
        result = run("generate", make_bundle(), "-p", "a fox", "--max-new-tokens", 20, "--ignore-eos", "--json", *words)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    warm = answer("--temperature", 1.0, "--top-k", 40, "--top-p", 0.95, "--min-p", 0.01, "--seed", 5)
    assert warm["token_ids"] != answer()["token_ids"]
    for words in (("--no-medusa",), ("--tree-nodes", 7), ("--tree-nodes", 1)):
        again = answer("--temperature", 1.0, "--top-k", 40, "--top-p", 0.95, "--min-p", 0.01, "--seed", 5, *words)
        assert again["token_ids"] == warm["token_ids"]
    several = answer("--temperature", 1.0, "--n", 3, "--logprobs", 2)
    assert len({choice["text"] for choice in several["choices"]}) == 3
    assert len(several["logprobs"]) == 20
    first = answer()["token_ids"][0]
    assert answer("--logit-bias", f"{first}=-100")["token_ids"][0] != first
    assert answer("--stop", answer()["text"][3:6])["finish_reason"] == "stop"
    assert answer("--stop-token-ids", first)["token_ids"] == [first]


def test_generate_follows_a_json_schema(make_bundle: Make, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    result = run("generate", make_bundle(), "-p", "a fox", "--json-schema", tmp_path / "schema.json", "--max-new-tokens", 60)
    assert json.loads(result.stdout)["a"] in {"x", "y"}
    chosen = run("generate", make_bundle(), "-p", "a fox", "--choice", "yes", "--choice", "no")
    assert chosen.stdout in {"yes\n", "no\n"}
    several = run("generate", make_bundle(), "-p", "a fox", "--regex", "[0-9]{3}", "--n", 2, "--temperature", 1)
    assert "[answer 2]" in several.stdout
    assert several.stderr.count("finished by stop, seed ") == 2


def test_raw_prompts_skip_the_chat_template(make_bundle: Make) -> None:
    lm = MedusaLM.from_bundle(make_bundle())
    for words, raw in (((), False), (("--raw",), True)):
        result = json.loads(run("generate", make_bundle(), "-p", "a fox", "--max-new-tokens", 5, "--json", *words).stdout)
        assert result["prompt_ids"] == lm.codec.encode("a fox", raw=raw)
        assert result["stats"]["num_prompt_tokens"] == len(result["prompt_ids"])


def test_a_prompt_is_scored(make_bundle: Make) -> None:
    words = ("-p", "a fox", "--raw", "--max-new-tokens", 0, "--prompt-logprobs", 2, "--json")
    result = json.loads(run("generate", make_bundle(), *words).stdout)
    assert (result["text"], result["token_ids"], result["finish_reason"]) == ("", [], "length")
    assert [one["token_id"] for one in result["prompt_logprobs"]] == result["prompt_ids"][1:]
    assert all(one["logprob"] < 0 and len(one["top"]) == 2 for one in result["prompt_logprobs"])


def test_a_failed_validation_exits_with_3_and_marks_the_bundle(make_model: Make, make_bundle: Make, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(make_bundle(), bundle)
    with (bundle / "weights.bin").open("r+b") as file:
        file.seek(0)
        file.write(b"\x3f" * 4096)
    result = run("validate", bundle, "--reference", make_model())
    fails(result, 3, f"{bundle} is marked as failed (files match the manifest")
    fails(run("generate", bundle, "-p", "x"), 1, "failed its validation")
    fails(run("generate", bundle, "-p", "x", "--allow-failed"), 1, "does not match its manifest: weights.bin has sha256")


def test_input_that_is_no_text_is_refused(make_bundle: Make, make_model: Make, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["generate", str(make_bundle()), "-p", "-"], input=b"\xff\xfe")
    fails(result, 2, "not UTF-8 text")
    (tmp_path / "prompts.txt").write_bytes("caf\xe9".encode("latin-1"))
    fails(
        run("validate", make_bundle(), "--reference", make_model(), "--prompts", tmp_path / "prompts.txt"), 2, "not UTF-8 text"
    )


def test_validation_takes_prompts_from_a_file(make_model: Make, make_bundle: Make, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(make_bundle(), bundle)
    (tmp_path / "prompts.txt").write_text("one fox\n\ntwo foxes\n")
    result = run("validate", bundle, "--reference", make_model(), "--prompts", tmp_path / "prompts.txt")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads((bundle / "validation.json").read_text())["greedy"]) == 2


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (("fetch", "gpt-17"), 2, "fetch does not know the model 'gpt-17'; known models: smollm2-135m-instruct, gemma-3-270m"),
        (("generate", "/nowhere", "-p", "x"), 1, "/nowhere is not a bundle"),
        (("generate", "{bundle}", "-p", ""), 0, ""),
        (("generate", "{bundle}", "-p", "", "--raw"), 2, "the prompt is empty"),
        (("generate", "{bundle}", "-p", "x " * 300), 1, "together more than the bundle's 256"),
        (("generate", "{bundle}", "-p", "x", "--temperature", "-1"), 2, "Invalid value for '--temperature'"),
        (("generate", "{bundle}", "-p", "x", "--logit-bias", "1"), 2, "--logit-bias is '1'; it must be a token id"),
        (("generate", "{bundle}", "-p", "x", "--logit-bias", "1=900"), 2, "logit_bias is 900.0 for token 1"),
        (("generate", "{bundle}", "-p", "x", "--stop-token-ids", "999"), 2, "stop_token_ids names the token 999"),
        (("generate", "{bundle}", "-p", "x", "--json-schema", "/nowhere"), 2, "cannot read the JSON schema /nowhere"),
        (("generate", "{bundle}", "-p", "x", "--regex", "(a"), 2, "regex cannot be used: "),
        (("generate", "{bundle}", "-p", "x", "--regex", "a", "--choice", "b"), 2, "regex and choice exclude each other"),
        (("generate", "{bundle}", "-p", "x", "--tree-nodes", "0"), 2, "a dynamic tree has 1 to 1024 nodes"),
        (("generate", "{bundle}", "-p", "x", "--tree-nodes", "4", "--tree", "t"), 2, "--tree and --tree-nodes exclude"),
        (("generate", "{bundle}", "-p", "x", "--min-new-tokens", "9", "--max-new-tokens", "3"), 2, "min_new_tokens is 9"),
        (("generate", "{bundle}", "-p", "x", "--max-new-tokens", "-1"), 2, "Invalid value for '--max-new-tokens'"),
        (("generate", "{bundle}", "-p", "x", "--tree", "/nowhere.json"), 2, "cannot read the tree /nowhere.json"),
        (("generate", "{bundle}", "-p", "a\udcffb"), 2, "the prompt is not Unicode text"),
        (("generate", "{bundle}", "-p", "x", "--threads", "100000"), 2, "Invalid value for '--threads'"),
        (("generate", "{bundle}", "-p", "x", "--backend", "tpu"), 2, "Invalid value for '--backend'"),
        (("heads", "inspect", "/nowhere"), 1, "there are no heads at /nowhere"),
        (("heads", "inspect", "{model}"), 1, "has no heads in a known format"),
        (("heads", "init", "/nowhere", "-o", "{new}"), 1, "there is no model '/nowhere'"),
        (("heads", "init", "{model}", "-o", "{model}", "--force"), 2, "so it cannot be replaced"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{heads}", "--force"), 2, "so it cannot be replaced"),
        (("onnx", "{model}/config.json", "--heads", "{heads}", "-o", "{new}"), 1, "is a file but not a GGUF file"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{model}/config.json/new"), 2, "cannot be written"),
        (("trt", "{bundle}", "-o", "{bundle}", "--force"), 2, "so it cannot be replaced"),
        (("trt", "/nowhere", "-o", "{new}"), 1, "/nowhere is not a bundle"),
        (("trt", "{bundle}", "-o", "{new}", "--max-batch-size", "-1"), 2, "--max-batch-size is -1; it must be 1"),
        (("heads", "init", "{model}", "-o", "{model}"), 2, "exists; choose another output, or replace it with --force"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{bundle}"), 2, "exists; choose another output"),
        (("onnx", "{model}", "--heads", "{model}", "-o", "{new}"), 1, "has no heads in a known format"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{new}", "--dtype", "fp8"), 2, "Invalid value for '--dtype'"),
        (("onnx", "{model}/model.gguf", "--heads", "{heads}", "-o", "{new}"), 1, "there is no file"),
        (("validate", "/nowhere", "--reference", "{model}"), 1, "/nowhere is not a bundle"),
        (("validate", "{bundle}", "--reference", "/nowhere"), 1, "there is no model '/nowhere'"),
        (
            ("validate", "{bundle}", "--reference", "{model}", "--prompts", "/nowhere.txt"),
            2,
            "/nowhere.txt cannot be read: No such file",
        ),
    ],
)
def test_bad_input_gets_one_line(
    words, exit_code, message, make_model: Make, make_heads: Make, make_bundle: Make, tmp_path: Path
) -> None:
    places = {"model": make_model(), "heads": make_heads(), "bundle": make_bundle(), "new": tmp_path / "new"}
    result = run(*(word.format(**places) for word in words))
    if exit_code:
        fails(result, exit_code, message)
    assert result.exit_code == exit_code
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    """In a process of its own: it imports everything anew, as if PyTorch were not there."""
    words = ["heads", "init", "x", "-o", str(tmp_path / "heads")]
    program = f"import sys; sys.modules['torch'] = None; from medusa_export.cli import main; main({words!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "Error: torch is not installed; install it with: pip install 'medusa-export[export]'\n"


def test_of_several_gguf_files_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    message = f"{tmp_path} has no config.json; give one of its GGUF files as {tmp_path}:FILE: a.gguf, b.gguf"
    fails(run("heads", "init", tmp_path, "-o", tmp_path / "new"), 1, message)
