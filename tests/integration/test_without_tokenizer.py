"""A model without a tokenizer exports, is validated and quantised, and decodes token ids; text is refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.quantize import quantize_bundle
from medusa_runtime import GenerationOptions, Manifest, MedusaLM, OptionError
from medusa_runtime.errors import BundleError
from medusa_serve.state import ServedBundle
from tests.integration.test_cli import run
from tests.support.cli import fails

Make = Callable[..., Path]
IDS = [5, 17, 42, 99]


@pytest.fixture(scope="module")
def model(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ids") / "model"
    shutil.copytree(make_model(), directory, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    return directory


@pytest.fixture(scope="module")
def bundle(model: Path, make_heads: Make) -> Path:
    export_bundle(ExportOptions(str(model), make_heads(), model.parent / "bundle"))
    return model.parent / "bundle"


def test_it_decodes_token_ids_like_pytorch(bundle: Path, model: Path) -> None:
    assert not Manifest.load(bundle).has_text
    report = validate(bundle, str(model), max_new_tokens=8)
    assert report.status == "passed", report.verdicts()
    assert sum(row.num_tokens for row in report.greedy) > 0
    with MedusaLM.from_bundle(bundle) as lm:
        result = lm.generate(IDS, max_new_tokens=6)
        assert len(result.token_ids) == 6
        assert result.text == ""
        for prompt, options in (("text", {}), ([{"role": "user", "content": "text"}], {}), (IDS, {"stop": ["x"]})):
            with pytest.raises(OptionError, match="this bundle has no tokenizer"):
                lm.generate(prompt, GenerationOptions(max_new_tokens=4, **options))
        with pytest.raises(OptionError, match="this bundle has no tokenizer"):
            lm.generate(IDS, max_new_tokens=4, json_schema={"type": "object"})


def test_it_is_quantised(bundle: Path, tmp_path: Path) -> None:
    quantize_bundle(QuantizeOptions(bundle, tmp_path / "int8"))
    with MedusaLM.from_bundle(tmp_path / "int8") as lm:
        assert len(lm.generate(IDS, max_new_tokens=6).token_ids) == 6


def test_the_command_takes_and_prints_token_ids(bundle: Path) -> None:
    result = run("generate", bundle, "-p", "5, 17 42,99", "--max-new-tokens", "6")
    assert result.exit_code == 0, result.stderr
    assert len([int(word) for word in result.stdout.split()]) == 6
    fails(
        run("generate", bundle, "-p", "hello"),
        2,
        "this bundle has no tokenizer; give the prompt as token ids, such as -p '1 42 7'",
    )


def test_it_is_not_served(bundle: Path) -> None:
    with pytest.raises(OptionError, match="model has no tokenizer, and clients send text; it cannot be served"):
        ServedBundle(Manifest.load(bundle), None, lambda: None)


def test_one_text_file_without_the_other_is_damage(bundle: Path, make_bundle: Make, tmp_path: Path) -> None:
    shutil.copytree(make_bundle(), tmp_path / "bundle")
    manifest = Manifest.load(tmp_path / "bundle")
    del manifest.files["chat.json"]
    manifest.save(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"files: chat\.json is missing"):
        Manifest.load(tmp_path / "bundle")
