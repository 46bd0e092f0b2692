"""What people bring: GGUF files by any name and in parts, adapters, resized embeddings, and weights that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medusa_export.model.checkpoint import load_backbone
from medusa_export.model.tokenizer import load_tokenizer
from medusa_heads.errors import CheckpointError
from tests.support.gguf_file import write_gguf

Make = Callable[..., Path]


def _edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _copy(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    return directory


# --- GGUF


def _in_parts(whole: Path, directory: Path, count: int = 3) -> Path:
    """What llama.cpp's gguf-split writes: all metadata in the first part, the tensors in all."""
    directory.mkdir()
    reader = gguf.GGUFReader(whole)
    for number in range(count):
        writer = gguf.GGUFWriter(directory / f"m-{number + 1:05}-of-{count:05}.gguf", "qwen2")
        for field in reader.fields.values():
            if number == 0 and not field.name.startswith("GGUF.") and field.name != "general.architecture":
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return directory


def _same(found: str, expected: str) -> None:
    ours, theirs = (load_backbone(source).model.state_dict() for source in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    text = "the quick brown fox"
    assert load_tokenizer(found).encode(text) == load_tokenizer(expected).encode(text)


def test_a_gguf_file_is_found_by_any_name(make_model: Make, tmp_path: Path) -> None:
    small = write_gguf(make_model(), tmp_path / "one" / "m.gguf")
    large = _copy(small.parent, tmp_path / "two") / "m.gguf"
    large = large.rename(large.with_name("M.GGUF"))
    _same(str(large), str(small))
    _same(str(large.parent), str(small))
    shutil.copy(small, large.with_name("other.gguf"))
    _same(f"{large.parent}:M.GGUF", str(small))
    with pytest.raises(CheckpointError, match=r"give one of its GGUF files as .*two:FILE: M\.GGUF, other\.gguf"):
        load_backbone(str(large.parent))
    with pytest.raises(CheckpointError, match=r"there is no file .*none\.gguf; give one of its GGUF files"):
        load_backbone(f"{large.parent}:none.gguf")


def test_a_gguf_file_in_parts_is_put_together(make_model: Make, tmp_path: Path) -> None:
    whole = write_gguf(make_model(), tmp_path / "m.gguf")
    parts = _in_parts(whole, tmp_path / "parts")
    _same(str(parts), str(whole))
    _same(str(parts / "m-00002-of-00003.gguf"), str(whole))
    (parts / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"is one of 3 parts, and m-00003-of-00003\.gguf is missing"):
        load_backbone(str(parts))
    (parts / "m-00003-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="cannot be put together"):
        load_backbone(str(parts))


# --- adapters


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks for deprecated attributes
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("PROMPT_TUNING", PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)),
        ("PREFIX_TUNING", PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)),
    ],
)
def test_adapters_that_change_no_weights_are_refused(kind: str, config: object, make_model: Make, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(make_model())
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=f"an adapter of kind {kind}: it adds to the model instead of changing its weights"
    ):
        load_backbone(str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_may_have_added_tokens(make_model: Make, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(make_model())
    base.resize_token_embeddings(330, mean_resizing=False)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj"])
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    backbone = load_backbone(str(tmp_path / "adapter"))
    assert backbone.facts.vocab_size == 330
    assert torch.equal(backbone.model.get_input_embeddings().weight, base.get_input_embeddings().weight)


# --- weights and configurations that contradict each other


def test_resized_embeddings_are_used_as_they_are(make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _copy(make_model(), tmp_path / "model")

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(8, 64)])

    _edit(model, grow)
    backbone = load_backbone(str(model))
    assert backbone.facts.vocab_size == 328
    assert torch.equal(backbone.model.get_output_embeddings().weight[-8:], torch.ones(8, 64))
    assert "has 328 rows, config.json says 320; all are used" in capsys.readouterr().err


def test_other_shapes_that_do_not_fit_are_refused(make_model: Make, tmp_path: Path) -> None:
    model = _copy(make_model(), tmp_path / "model")
    _edit(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"has another shape for 1 of the model's weights, such as model\.norm\.weight"):
        load_backbone(str(model))


def test_weights_that_are_not_used_are_named(make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _copy(make_model(), tmp_path / "model")
    _edit(model, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    load_backbone(str(model))
    expected = "has 1 weights that the model does not use, such as model.layers.0.self_attn.q_proj.bias"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_more_layers_than_the_configuration_says_are_an_error(make_model: Make, tmp_path: Path) -> None:
    model = _copy(make_model(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"holds weights of 4 layers, such as model\.layers\.3\..*num_hidden_layers 3"):
        load_backbone(str(model))


@pytest.mark.parametrize(
    ("value", "precision", "message"),
    [
        (float("nan"), "fp32", r"is damaged: model\.layers\.2\.mlp\.up_proj\.weight holds NaN"),
        (float("inf"), "fp32", r"is damaged: model\.layers\.2\.mlp\.up_proj\.weight holds infinite numbers"),
        (7e4, "fp16", r"model\.layers\.2\.mlp\.up_proj\.weight of .* does not fit fp16, whose largest number is 65504"),
    ],
)
def test_weights_that_are_no_numbers_are_named(
    value: float, precision: str, message: str, make_model: Make, tmp_path: Path
) -> None:
    model = _copy(make_model(), tmp_path / "model")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][1, 1] = value

    _edit(model, spoil)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(str(model), precision)
