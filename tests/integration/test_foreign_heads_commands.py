"""What the commands make of other projects' heads: converting, quantising, engines, evaluation, merged checkpoints' configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from medusa_export.bundle.export import export_bundle
from medusa_export.cli import main
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.model.checkpoint import load_backbone
from medusa_export.quantize import quantize_bundle
from medusa_export.quantize import quantized_bundle as quantizing
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import load_heads, read_heads
from medusa_heads.replay import Evaluation
from medusa_heads.train.run import Source, _new_heads
from medusa_heads.train.settings import TrainSettings
from medusa_runtime import Manifest, MedusaLM
from tests.support.cli import fails
from tests.support.published_heads import publish, publish_merged
from tests.support.tracing import traced_once

Make = Callable[..., Path]


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def exported(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports a kind of published heads, once."""
    made: dict[str, Path] = {}

    def export(what: str) -> Path:
        if what not in made:
            root = tmp_path_factory.mktemp("foreign")
            export_bundle(ExportOptions(str(make_model()), publish(what, root / "heads").path, root / "bundle"))
            made[what] = root / "bundle"
        return made[what]

    return export


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("what", ["hydra", "vllm of a truncated vocabulary"])
def test_quantised_bundles_decode(
    what: str, exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "QUALITY_PROMPTS", ("a fox",))
    monkeypatch.setattr(quantizing, "CALIBRATION_PROMPTS", ("a fox",))
    quantize_bundle(QuantizeOptions(exported(what), tmp_path / "int8", "int8"))
    lm = MedusaLM.from_bundle(tmp_path / "int8")
    plain, medusa = (lm.generate("a fox jumps", max_new_tokens=30, medusa=medusa) for medusa in (False, True))
    assert medusa.token_ids == plain.token_ids


def test_the_embedding_that_hydra_heads_read_is_stored_once(exported: Callable[[str], Path]) -> None:
    sizes = {what: (exported(what) / "weights.bin").stat().st_size for what in ("hydra", "hydra that reads no tokens")}
    reads = 4 * 64 * 64 * (2 * (2 + 3 + 4) - 3)  # the wider first blocks and residual paths of three heads
    assert sizes["hydra"] - sizes["hydra that reads no tokens"] < reads + 12 * 4096  # pages; an embedding has 20


@pytest.mark.parametrize("what", ["hydra", "vllm with a map of tokens"])
def test_engines_are_built_without_a_gpu(what: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from medusa_export.command_options.engine_options import EngineOptions
    from medusa_export.engine.build import build_engines

    build_engines(EngineOptions(exported(what), tmp_path / "engine", max_seq_len=128, max_prefill_tokens=64))
    manifest = Manifest.load(tmp_path / "engine")
    assert [tensor.name for tensor in manifest.graphs["heads"].inputs] == (
        ["hidden", "root_ids"] if what == "hydra" else ["hidden"]
    )


def test_evaluation_counts_what_the_exported_heads_guess(
    exported: Callable[[str], Path], make_model: Make, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("the fox number 1\nthe fox number 2\n")
    made = run(
        "distill", make_model(), "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "data", "--max-new-tokens", 30,
        "--max-prompt-tokens", 60, "--dtype", "fp32",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    heads, output = exported("hydra").parent / "heads", tmp_path / "evaluation.json"
    done = run(
        "heads", "evaluate", heads, "--model", make_model(), "--data", tmp_path / "data", "--dtype", "fp32", "-o", output,
        "--max-length", 200,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    evaluation = Evaluation.model_validate_json(output.read_text())
    assert evaluation.heads == load_heads(heads).digest() == Manifest.load(exported("hydra")).heads.sha256
    assert len(evaluation.accuracy) == 3
    assert run("heads", "ngrams", heads, "--model", make_model(), "--data", tmp_path / "data").exit_code == 2  # not our format


def test_our_heads_go_to_vllm_with_the_models_lm_head(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    heads = make_heads(reads_root=False)
    fails(run("heads", "convert", heads, "-o", tmp_path / "vllm", "--format", "vllm"), 1, "give --model, to write it as well")
    done = run("heads", "convert", heads, "-o", tmp_path / "vllm", "--format", "vllm", "--model", make_model())
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert (told["original_lm_head"], told["medusa_fc_bias"], told["num_heads"], told["num_hidden_layers"]) == (
        True,
        True,
        3,
        2,
    )
    lm_head = AutoModelForCausalLM.from_pretrained(make_model()).lm_head
    stored = load_file(tmp_path / "vllm" / "model.safetensors")
    assert torch.equal(stored["lm_heads.0.weight"], lm_head.weight)
    hidden = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_heads(tmp_path / "vllm")(hidden, None), load_heads(heads)(hidden, lm_head))
    again = run("heads", "convert", heads, "-o", tmp_path / "vllm", "--format", "vllm", "--model", make_model(), "--force")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("what", ["medusa-1.0", "medusa-1.0 of one block twice", "axolotl", "modelopt"])
def test_a_merged_checkpoint_comes_back_bit_for_bit(what: str, make_model: Make, tmp_path: Path) -> None:
    given = publish_merged(what, make_model(), tmp_path / "merged")
    for words in (("ours", "medusa-export", given.path), ("back", given.flavour, tmp_path / "ours")):
        name, flavour, source = words
        done = run("heads", "convert", source, "-o", tmp_path / name, "--format", flavour, "--model", make_model())
        assert done.exit_code == 0, done.output
    before, after = (
        {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for path in (given.path, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert read_heads(tmp_path / "back")[0] == given.flavour
    one, other = (load_backbone(str(path)).model.state_dict() for path in (make_model(), tmp_path / "back"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((given.path / "config.json").read_text())
    fails(
        run("heads", "convert", tmp_path / "ours", "-o", tmp_path / "x", "--format", given.flavour, "--model", given.path),
        1,
        "already has heads in it",
    )


@pytest.mark.parametrize("changes", [{"model_type": "medusa"}, {"model_type": None}])
def test_a_merged_config_with_a_model_type_of_its_own(changes: dict[str, Any], make_model: Make, tmp_path: Path) -> None:
    given = publish_merged("medusa-1.0", make_model(), tmp_path / "merged")
    path = given.path / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["MedusaLlamaForCausalLM"]} | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    done = run("onnx", given.path, "-o", tmp_path / "bundle", "--no-validate")
    assert done.exit_code == 0, done.output
    manifest = Manifest.load(tmp_path / "bundle")
    assert (manifest.model.architecture, manifest.heads.num_heads) == ("LlamaForCausalLM", 3)
    path.write_text(path.read_text().replace("MedusaLlamaForCausalLM", "SomethingElse"))
    fails(run("onnx", given.path, "-o", tmp_path / "x"), 1, "set it to the type of the model that the heads were merged with")


def test_a_model_without_heads_is_told(make_model: Make, tmp_path: Path) -> None:
    fails(run("onnx", make_model(), "-o", tmp_path / "bundle"), 2, "has no heads in it; give some with --heads")


def test_the_full_vocabulary_needs_rows_for_it(make_model: Make, tmp_path: Path) -> None:
    given = publish("vllm of a truncated vocabulary", tmp_path / "heads")
    words = ("onnx", make_model(), "--heads", given.path, "-o", tmp_path / "bundle", "--full-head-vocabulary")
    fails(run(*words), 2, "their LM heads know only the draft vocabulary")


def test_inspect_names_the_format(tmp_path: Path) -> None:
    given = publish("vllm of a truncated vocabulary", tmp_path / "heads")
    told = json.loads(run("heads", "inspect", given.path, "--json").stdout)
    assert (told["format"], told["num_heads"], told["num_layers"], told["draft_vocab_size"]) == ("vllm", 3, 1, 94)
    assert told["lm_heads"] == "their own, one each, 94 of 320 tokens"
    assert told["num_parameters"] == 3 * (64 * 64 + 94 * 64)
    file = publish("medusa-0.1", tmp_path / "one").path / "medusa_lm_head.pt"
    assert "medusa-0.1" in run("heads", "inspect", file).stdout


def test_training_starts_from_medusas_heads_but_not_from_hydras(make_model: Make, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model())
    source = Source("tiny", model, lambda: model)
    given = publish("medusa-0.1", tmp_path / "medusa")
    settings = {"num_heads": 3, "own_lm_head": True, "read_root": False}
    heads = _new_heads(source, TrainSettings(start_from=str(given.path), **settings))
    assert all(parameter.requires_grad for parameter in heads.parameters())
    given = publish("hydra", tmp_path / "hydra")
    with pytest.raises(CheckpointError, match="can be exported but not trained"):
        _new_heads(source, TrainSettings(start_from=str(given.path), **settings))


def test_half_precision_stays(make_model: Make, tmp_path: Path) -> None:
    given = publish("hydra", tmp_path / "heads")
    weights = given.path / "hydra_lm_head.pt"
    torch.save({name: tensor.half() for name, tensor in torch.load(weights, weights_only=True).items()}, weights)
    assert {tensor.dtype for tensor in load_heads(given.path).state_dict().values()} == {torch.float16}
    export_bundle(ExportOptions(str(make_model()), given.path, tmp_path / "bundle"))
    lm = MedusaLM.from_bundle(tmp_path / "bundle")
    answers = [lm.generate("a fox", max_new_tokens=20, medusa=medusa).token_ids for medusa in (False, True)]
    assert answers[0] == answers[1]
