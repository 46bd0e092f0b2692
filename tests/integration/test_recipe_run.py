"""`medusa-export recipes run` on a tiny model: every step runs once, and again only if something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from medusa_export.cli import main
from medusa_export.recipe import library
from medusa_export.recipe.recipe_state import STATE_NAME, opened
from medusa_export.recipe.steps import Job, steps
from medusa_heads.distill.store import AnswerStore, Row
from medusa_runtime import Manifest, MedusaLM

Make = Callable[..., Path]
STEPS = ["fetch", "distill", "train", "onnx", "validate"]


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete recipe at a tiny size, with its prompts next to it."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "prompts.txt").write_text("".join(f"the fox number {n}\n" for n in range(6)))
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({
            "name": "tiny",
            "description": "a tiny model",
            "model": str(make_model("llama", num_hidden_layers=2)),
            "output": "nowhere",
            "distill": {
                "prompts": ["prompts.txt"], "self_prompts": 4, "max_new_tokens": 24, "max_prompt_tokens": 60, "dtype": "fp32",
            },
            "train": {
                "num_heads": 2, "max_steps": 4, "batch_tokens": 64, "held_out": 0.2, "max_length": 100, "min_token_count": 1,
                "mixed_precision": "no", "backbone_dtype": "fp32",
            },
            "onnx": {"head_top_k": 5},
            "validate": {"prompts": ["a fox", "the lazy dog"], "max_new_tokens": 8},
        })
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of that recipe, run once."""
    output = tmp_path_factory.mktemp("done") / "out"
    ran = run(recipe, "-o", output)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout == f"{output}\n"
    assert steps_of(ran) == STEPS
    return output


def run(recipe: Path, *words: object) -> Result:
    return CliRunner().invoke(main, ["recipes", "run", str(recipe), "--threads", "1", *(str(word) for word in words)])


def told(result: Result) -> list[tuple[str, list[str]]]:
    """The lines that are printed under each step's header."""
    found: list[tuple[str, list[str]]] = []
    for line in result.stderr.splitlines():
        if line.endswith(")") and line.partition(" (")[0] in STEPS and " of " in line:
            found.append((line.partition(" (")[0], []))
        elif found:
            found[-1][1].append(line.strip())
    return found


def steps_of(result: Result) -> list[str]:
    """The steps that were not done before."""
    return [name for name, lines in told(result) if lines[:1] != ["already done"]]


def files_of(output: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(output)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in output.rglob("*")
        if path.is_file()
    }


def trained(result: Result) -> bool:
    """Whether optimizer steps were done."""
    return any(line.startswith("steps: ") for _, lines in told(result) for line in lines)


def copy_of(done: Path, output: Path) -> Path:
    return Path(shutil.copytree(done, output))


def test_one_command_makes_a_bundle_that_decodes(done: Path) -> None:
    assert {path.name for path in done.iterdir()} == {"data", "heads", "bundle", "work", "hidden", STATE_NAME}
    manifest = Manifest.load(done / "bundle")
    assert (manifest.validation.status, manifest.heads.num_heads, manifest.heads.top_k) == ("passed", 2, 5)
    report = json.loads((done / "bundle" / "validation.json").read_text())
    assert [row["prompt"] for row in report["greedy"]] == ["a fox", "the lazy dog"]
    assert MedusaLM.from_bundle(done / "bundle").generate("a fox", max_new_tokens=4).token_ids


def test_a_second_run_does_nothing_and_tells_what_there_is(recipe: Path, done: Path) -> None:
    before = files_of(done)
    again = run(recipe, "-o", done)
    assert (again.exit_code, steps_of(again)) == (0, [])
    assert files_of(done) == before
    summary = " ".join(again.stderr.split())
    rows = [json.loads(line) for line in (done / "data" / "answers.jsonl").read_text().splitlines()]
    tokens = sum(len(row["response_token_ids"]) for row in rows)
    assert f"{len(rows)} answers, {tokens} tokens" in summary
    for word in ("top-1", "tokens/step", "fp32", "passed", "earlier)"):
        assert word in summary


def test_where_a_recipe_runs_changes_nothing(recipe: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done.parent)
    again = run(recipe, "-o", "out", "--device", "cpu", "--threads", 2)
    assert (again.exit_code, steps_of(again)) == (0, [])


def test_a_changed_setting_does_its_step_again_and_what_follows(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    data = files_of(output / "data")
    faster = ("--set", "train.learning_rate=0.02")
    changed = run(recipe, "-o", output, *faster)
    assert (changed.exit_code, steps_of(changed)) == (0, ["train", "onnx", "validate"]), changed.output
    assert dict(told(changed))["train"][0] == "done again, because learning_rate was 0.0012, is 0.02"
    assert json.loads((output / "heads" / "run.json").read_text())["settings"]["learning_rate"] == 0.02
    assert Manifest.load(output / "bundle").heads.sha256 != Manifest.load(done / "bundle").heads.sha256
    assert files_of(output / "data") == data
    assert steps_of(run(recipe, "-o", output, *faster, "--set", "validate.max_new_tokens=4")) == ["validate"]


def test_a_recipe_may_quantise(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    ran = run(recipe, "-o", output, "--set", "onnx.quantize=int8")
    assert ran.exit_code == 0, ran.output
    assert steps_of(ran) == ["onnx", "validate"]
    manifest = Manifest.load(output / "bundle")
    assert manifest.quantization is not None
    assert (manifest.quantization.scheme, manifest.validation.status) == ("int8", "passed")


def test_what_does_not_decide_the_training_does_not_train_anew(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    log = (output / "work" / "log.jsonl").read_text()
    changed = run(recipe, "-o", output, "--to", "train", "--set", "train.heads_dtype=fp32")
    assert (changed.exit_code, steps_of(changed)) == (0, ["train"]), changed.output
    assert not trained(changed)
    assert (output / "work" / "log.jsonl").read_text() == log
    assert (output / "heads" / "heads.safetensors").stat().st_size > (done / "heads" / "heads.safetensors").stat().st_size


def test_what_a_step_reads_decides_as_well(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    more = tmp_path / "more.jsonl"
    more.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "brown fox jumps"}]}\n')
    words = ("--to", "train", "--set", f"data=[{more}]")
    added = run(recipe, "-o", output, *words)
    assert (added.exit_code, steps_of(added)) == (0, ["train"]), added.output
    assert dict(told(added))["train"][0] == f"done again, because the data in {more} changed"
    assert trained(added)
    more.touch()
    assert steps_of(run(recipe, "-o", output, *words)) == []
    more.write_text(more.read_text().replace("jumps", "sleeps"))
    assert steps_of(run(recipe, "-o", output, *words)) == ["train"]


def test_what_is_gone_is_made_again(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    shutil.rmtree(output / "heads")
    again = run(recipe, "-o", output)
    assert (again.exit_code, steps_of(again)) == (0, ["train"])  # the same heads as before: nothing follows
    assert not trained(again)


def test_other_answers_need_another_output(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    before = (output / "data" / "answers.jsonl").read_text()
    refused = run(recipe, "-o", output, "--set", "distill.seed=1")
    assert refused.exit_code == 2
    assert "was started with other settings (" in refused.stderr.splitlines()[-1]
    assert "seed was 0, is 1" in refused.stderr.splitlines()[-1]
    assert (output / "data" / "answers.jsonl").read_text() == before
    back = run(recipe, "-o", output)
    assert (back.exit_code, steps_of(back)) == (0, ["distill"])  # which finds all answers there
    assert (output / "data" / "answers.jsonl").read_text() == before


def test_force_does_steps_again(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    forced = run(recipe, "-o", output, "--only", "train", "--force")
    assert (forced.exit_code, steps_of(forced)) == (0, ["train"]), forced.output
    assert trained(forced)
    assert (output / "heads" / "heads.safetensors").read_bytes() == (done / "heads" / "heads.safetensors").read_bytes()


def test_an_interrupted_run_goes_on(recipe: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    append = AnswerStore.append

    def interrupted(store: AnswerStore, row: Row) -> None:
        if len(store.rows) == 3:
            raise KeyboardInterrupt
        append(store, row)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerStore, "append", interrupted)
        stopped = run(recipe, "-o", output)
    assert stopped.exit_code == 1
    assert list(json.loads((output / STATE_NAME).read_text())["steps"]) == ["fetch"]
    assert not (output / "heads").exists()

    with monkeypatch.context() as patch:
        patch.setattr("medusa_export.head_training.training.save_heads", _interrupt)
        stopped = run(recipe, "-o", output)
    assert (stopped.exit_code, steps_of(stopped)) == (1, ["distill", "train"])

    went_on = run(recipe, "-o", output, "--to", "train")
    assert (went_on.exit_code, steps_of(went_on)) == (0, ["train"]), went_on.output
    assert not trained(went_on)  # all steps were done
    assert (output / "heads" / "heads.safetensors").read_bytes() == (done / "heads" / "heads.safetensors").read_bytes()
    rows = {json.loads(line)["key"]: line for line in (output / "data" / "answers.jsonl").read_text().splitlines()}
    assert rows == {json.loads(line)["key"]: line for line in (done / "data" / "answers.jsonl").read_text().splitlines()}


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_failed_validation_exits_with_3_each_time(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    with (output / "bundle" / "weights.bin").open("r+b") as file:
        file.write(b"\x3f" * 4096)
    for _ in range(2):
        failed = run(recipe, "-o", output, "--force", "--only", "validate")
        assert failed.exit_code == 3
        assert "is marked as failed" in failed.stderr.splitlines()[-1]
        assert failed.stdout == ""
    assert "validate" not in json.loads((output / STATE_NAME).read_text())["steps"]
    assert run(recipe, "-o", output).exit_code == 3


def test_parts_of_a_recipe(recipe: Path, tmp_path: Path) -> None:
    part = run(recipe, "-o", tmp_path / "out", "--to", "distill")
    assert (part.exit_code, steps_of(part)) == (0, ["fetch", "distill"])
    missing = run(recipe, "-o", tmp_path / "out", "--from", "onnx")
    assert missing.exit_code == 1
    assert "there are no heads at" in missing.stderr.splitlines()[-1]


def test_medusa_2_exports_the_backbone_that_it_trained(recipe: Path, done: Path, tmp_path: Path) -> None:
    output = copy_of(done, tmp_path / "out")
    words = ("--set", "train.method=medusa-2", "--set", "train.max_steps=2", "--set", "train.learning_rate=0.02")
    result = run(recipe, "-o", output, *words)
    assert (result.exit_code, steps_of(result)) == (0, ["train", "onnx", "validate"]), result.output
    report = json.loads((output / "bundle" / "validation.json").read_text())
    assert (report["status"], report["reference"]) == ("passed", str(output / "heads" / "merged"))
    weights = {path: Manifest.load(path / "bundle").files["weights.bin"].sha256 for path in (output, done)}
    assert len(set(weights.values())) == 2


def test_where_heads_and_backbone_come_from(recipe: Path, tmp_path: Path) -> None:
    def read_by_onnx(*overrides: str) -> tuple[str, str]:
        job = Job(library.load(recipe, overrides), recipe.parent, tmp_path)
        inputs = next(step.inputs for step in steps(job) if step.name == "onnx")
        return inputs["the model"], inputs["the heads"]

    model = library.load(recipe).model
    assert read_by_onnx() == (model, str(tmp_path / "heads"))
    joint = ("train.method=medusa-2", "train.save_backbone=adapter")
    assert read_by_onnx(*joint) == (str(tmp_path / "heads" / "adapter"), str(tmp_path / "heads"))
    assert read_by_onnx("distill=null", "train=null", "heads=mine") == (model, str(recipe.parent / "mine"))
    assert read_by_onnx("distill=null", "train=null", "heads=mine", "model=org/name")[0] == "org/name"


def test_an_output_of_something_else_is_left_alone(recipe: Path, done: Path, tmp_path: Path) -> None:
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "mine").touch()
    for output, message in (
        (tmp_path, f"{tmp_path} has files in it that no recipe made; choose another --output"),
        (recipe, f"{recipe} is not a directory; choose another --output"),
    ):
        result = run(recipe, "-o", output)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]

    other = run(recipe, "-o", done, "--set", "name=other")
    assert (other.exit_code, other.stderr) == (2, f"Error: {done} belongs to the recipe tiny; choose another --output\n")
    with opened(done, "tiny"):
        busy = run(recipe, "-o", done)
    assert (busy.exit_code, busy.stderr) == (
        2,
        f"Error: {done} is in use by another run; wait for it, or choose another directory\n",
    )
    output = copy_of(done, tmp_path / "damaged")
    (output / STATE_NAME).write_text("{")
    assert "is damaged; choose another --output" in run(recipe, "-o", output).stderr


def test_a_model_that_is_not_fetched_is_told(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path / "cache"))
    result = run(recipe, "-o", tmp_path / "out", "--set", "model=smollm2-135m-instruct", "--from", "distill")
    assert result.exit_code == 2
    assert result.stderr == "Error: smollm2-135m-instruct is not fetched yet; run the step fetch first\n"
    assert list(tmp_path.iterdir()) == []
