"""Recipes as files: their fields, errors, and the commands that read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from medusa_export.cli import main
from medusa_export.command_options.distill_options import DistillOptions
from medusa_export.recipe import document, library
from medusa_export.recipe.schema import Recipe, RecipeError, parse
from medusa_heads.train.settings import TrainSettings
from medusa_runtime.errors import OptionError

WHOLE = """
name: x
description: a tiny one
model: tiny
output: out
distill: {self_prompts: 3}
train: {}
onnx: {}
validate: {}
"""
SHIPPED = library.shipped()


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["recipes", *(str(word) for word in words)])


def read(text: str, *overrides: str) -> Recipe:
    return parse(text, "recipes/x.yaml", overrides)


def wrong(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return caught.value.lines


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(WHOLE)
    return path


def test_a_section_holds_the_options_of_its_step_with_their_defaults() -> None:
    recipe = read(WHOLE)
    assert recipe.steps == ("fetch", "distill", "train", "onnx", "validate")
    DistillOptions(model="m", output=Path("o"), **recipe.distill)  # takes each of them
    assert recipe.distill["self_prompts"] == 3
    assert recipe.train == TrainSettings().model_dump()
    assert recipe.onnx["precision"] == "fp32"
    assert not {"model", "output", "heads", "force", "trust_remote_code"} & (recipe.distill.keys() | recipe.onnx.keys())
    assert set(recipe.validation) == {"prompts", "max_new_tokens"}


def test_a_section_that_is_left_out_is_a_step_that_is_not_run() -> None:
    recipe = read("name: x\ndescription: d\nmodel: m\noutput: o\nheads: h\nonnx: {}\n")
    assert recipe.steps == ("fetch", "onnx")
    assert recipe.method is None


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("train: {learning_rate: 0}", "train.learning_rate: input should be greater than 0, found 0"),
        ("train: {learning_rate: fast}", "train.learning_rate: input should be a valid number, found 'fast'"),
        ("train: {learnin_rate: 1}", "train.learnin_rate: there is no such field; did you mean learning_rate?"),
        ("train: {epochs: '3'}", "train.epochs: input should be a valid number, found '3'"),
        ("train: {method: medusa-3}", "train.method: input should be 'medusa-1' or 'medusa-2', found 'medusa-3'"),
        ("train:", "train: the section is empty; write {} to use the defaults, or leave the section out"),
        ("train: [1]", "train: input should be an object, found [1]"),
        ("distill: {max_new_tokens: 0}", "distill.max_new_tokens: input should be greater than or equal to 1, found 0"),
        (
            "distill: {limit: 1.5}",
            "distill.limit: input should be a valid integer, found 1.5",
        ),
        ("distill: {mix: {fox: many}}", "distill.mix.fox: input should be a valid integer, found 'many'"),
        ("distill: {prompts: a.txt}", "distill.prompts: input should be a valid array, found 'a.txt'"),
        ("distill: {output: data}", "distill.output: there is no such field"),
        ("distill: {trust_remote_code: true}", "distill.trust_remote_code: there is no such field"),
        ("onnx: {precision: fp8}", "onnx.precision: input should be 'fp32', 'fp16' or 'bf16', found 'fp8'"),
        ("onnx: {head_top_k: true}", "onnx.head_top_k: input should be a valid integer, found True"),
        ("validate: {heads: h}", "validate.heads: there is no such field; the fields are: prompts, max_new_tokens"),
        ("validate: {prompts: why}", "validate.prompts: input should be a valid array, found 'why'"),
        ("data: 7", "data: input should be a valid array, found 7"),
        ("model: ''", "model: string should match pattern"),
        ("description: |\n  two\n  lines", "description: string should match pattern"),
        ("trian: {}", "trian: there is no such field; did you mean train?"),
        ("heads: h", "heads: train makes the heads; remove heads, or use train.start_from"),
    ],
)
def test_what_is_wrong_gets_one_line_with_its_path(section: str, line: str) -> None:
    name = section.partition(":")[0]
    others = [line for line in WHOLE.splitlines() if line.partition(":")[0] != name]
    [found] = wrong("\n".join([*others, section]))
    assert found.startswith(f"recipes/x.yaml: {line}")
    assert "\n" not in found


def test_all_that_is_wrong_is_told() -> None:
    lines = wrong("name: x\nmodel: m\noutput: o\ntrain: {epochs: 0, seed: x}\nonnx: {opset: no}\n")
    assert [line.split(": ")[1] for line in lines] == ["description", "train.epochs", "train.seed", "onnx.opset"]


@pytest.mark.parametrize(
    ("without", "line"),
    [
        (("distill",), "train: there is no data to train on"),
        (("train",), "onnx: there are no heads to export"),
        (("onnx",), "validate: there is no bundle to validate"),
        (("distill", "train", "onnx", "validate"), "there is nothing to do"),
    ],
)
def test_a_step_needs_what_it_works_on(without: tuple[str, ...], line: str) -> None:
    [found] = wrong(WHOLE, *(f"{name}=null" for name in without))
    assert found.startswith(f"recipes/x.yaml: {line}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipes/x.yaml is not a recipe: it is empty"),
        ("- 1\n", "recipes/x.yaml is not a recipe: it has no fields"),
        ("name: [\n", "recipes/x.yaml: line 2: "),
        ("name: x\nname: y\n", "recipes/x.yaml: line 2: the key name is given twice"),
        ("name: *here\n", "recipes/x.yaml: line 1: found undefined alias"),
        ("name: x\x00\n", "recipes/x.yaml is not valid YAML: "),
        (WHOLE + "data: &here [*here]\n", "recipes/x.yaml has an alias (*) that refers to itself"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(text)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("no", "no"),
        ("true", True),
        ("7", 7),
        ("1.5", 1.5),
        ("~", None),
        ("0x1", "0x1"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = document.load(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_overrides_come_in_place_of_what_the_text_says() -> None:
    recipe = read(WHOLE, "train.learning_rate=1e-3", "distill.prompts=[a.txt, b.txt]", "distill.mix.fox=2", "model=other")
    assert recipe.train["learning_rate"] == 1e-3
    assert recipe.distill["prompts"] == (Path("a.txt"), Path("b.txt"))
    assert recipe.distill["mix"] == {"fox": 2}
    assert recipe.model == "other"
    assert read(WHOLE, "distill=null", "data=[more.jsonl]").steps == ("fetch", "train", "onnx", "validate")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.learnin_rate=1", "--set: train.learnin_rate: there is no such field; did you mean learning_rate?"),
        ("train.epochs=-1", "--set: train.epochs: input should be greater than 0, found -1"),
        ("distill.mix.fox=x", "--set: distill.mix.fox: input should be a valid integer, found 'x'"),
        ("tarin.epochs=1", "--set: tarin: there is no such field; did you mean train?"),
        ("train.epochs", "--set is 'train.epochs'; it must be section.field=value"),
        ("train.=1", "--set is 'train.=1'; it must be section.field=value"),
        ("name.first=1", "--set name.first: name has no fields"),
        ("train.epochs=[", "--set train.epochs: line 1: "),
    ],
)
def test_an_override_that_is_wrong_gets_one_line(override: str, line: str, recipe: Path) -> None:
    result = run("run", recipe, "--set", override)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {line}")
    assert result.stderr.count("\n") == 1


def test_ls_shows_all_that_come_with_the_package() -> None:
    told = json.loads(run("ls", "--json").stdout)["recipes"]
    assert [recipe["name"] for recipe in told] == [path.stem for path in library.shipped()]
    assert all(recipe.keys() == {"name", "description", "model", "method"} for recipe in told)
    lines = run("ls").stdout.splitlines()
    assert lines[0].split() == ["name", "description", "model", "method"]
    assert [line.split()[0] for line in lines[1:]] == [path.stem for path in SHIPPED]
    assert [line.split()[-1] for line in lines[1:]] == ["medusa-1", "medusa-1", "medusa-2"]


def test_show_prints_the_file_or_every_field(recipe: Path) -> None:
    assert run("show", recipe).stdout == WHOLE
    resolved = run("show", recipe, "--resolved")
    assert resolved.exit_code == 0, resolved.stderr
    fields = yaml.safe_load(resolved.stdout)
    assert fields["train"] == TrainSettings().model_dump()
    assert read(resolved.stdout).to_yaml() == resolved.stdout


def test_cp_never_overwrites(recipe: Path, tmp_path: Path) -> None:
    assert run("cp", SHIPPED[0].stem, tmp_path / "mine.yaml").stdout == f"{tmp_path / 'mine.yaml'}\n"
    assert (tmp_path / "mine.yaml").read_text() == SHIPPED[0].read_text()
    assert run("cp", SHIPPED[0].stem, tmp_path).stdout == f"{tmp_path / SHIPPED[0].name}\n"
    again = run("cp", SHIPPED[0].stem, recipe)
    assert (again.exit_code, again.stderr) == (2, f"Error: {recipe} exists; choose another destination\n")
    assert recipe.read_text() == WHOLE


def test_validate_tells_all_that_is_wrong_and_exits_with_2(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(WHOLE.replace("train: {}", "train: {epochs: 0, seeds: 1}"))
    told = run("validate", recipe, tmp_path / "bad.yaml", "--json")
    errors = list(json.loads(told.stdout)["errors"].values())
    assert (told.exit_code, errors[0], [f"Error: {line}" for line in errors[1]]) == (2, [], told.stderr.splitlines())
    result = run("validate", recipe, tmp_path / "bad.yaml")
    assert result.exit_code == 2
    assert result.stdout == f"{recipe}: ok\n"
    assert [line.partition("bad.yaml: ")[2].partition(":")[0] for line in result.stderr.splitlines()] == [
        "train.epochs",
        "train.seeds",
    ]


@pytest.mark.parametrize(
    "words", [("show", "gpt"), ("run", "gpt"), ("cp", "gpt", "x"), ("validate", "gpt"), ("show", "no/gpt.yaml")]
)
def test_an_unknown_recipe_is_told_with_those_there_are(words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: there is no recipe ")
    assert SHIPPED[0].stem in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "train", "--from", "onnx"), "--only cannot be combined with --from or --to"),
        (("--from", "onnx", "--to", "train"), "--from onnx comes after --to train"),
        (
            ("--only", "distill", "--set", "distill=null", "--set", "data=[x]"),
            "the recipe has no step distill; it has: fetch, train",
        ),
        (("--only", "bake"), "Invalid value for '--only'"),
    ],
)
def test_steps_that_cannot_be_chosen_are_refused_before_anything_is_written(
    words: tuple[str, ...], message: str, recipe: Path, tmp_path: Path
) -> None:
    result = run("run", recipe, "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_recipes_that_come_with_the_package_are_whole() -> None:
    result = run("validate")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(": ok\n") == len(SHIPPED) == 3


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_that_comes_with_the_package_opens_with_its_command(path: Path) -> None:
    opening = path.read_text().partition("\nname: ")[0].splitlines()
    assert all(line.startswith("#") for line in opening)
    assert len(opening[0]) > 20  # what it is for
    assert any(line.split()[1:5] == ["medusa-export", "recipes", "run", path.stem] for line in opening)
    assert all(len(line) <= 128 for line in path.read_text().splitlines())


def test_a_recipe_of_the_package_is_called_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "y.yaml").write_text(WHOLE)
    monkeypatch.setattr(library, "folder", lambda: tmp_path)
    result = run("validate")
    assert result.exit_code == 2
    assert "y.yaml: name: must be the file's name without its ending, found 'x'" in result.stderr
