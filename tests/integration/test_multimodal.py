"""The language models of multimodal checkpoints: which class loads them, what is exported, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from medusa_export.bundle.export import export_bundle
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import load_backbone
from medusa_heads.errors import CheckpointError
from medusa_runtime.errors import MedusaError
from tests.support.models import save_random_heads
from tests.support.multimodal import save_multimodal_model

PROMPTS = ("the lazy dog learns to speak, while the quick model jumps over many words", "a fox")
IDS = torch.arange(10, 34)[None]
GetModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def get_model(tmp_path_factory: pytest.TempPathFactory) -> GetModel:
    """Makes a tiny model of a multimodal type, once."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_multimodal_model(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return get


@pytest.mark.parametrize("model_type", ["mistral3", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_the_language_model_decodes_like_the_whole_model(
    model_type: str, get_model: GetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = get_model(model_type), list[str]()
    heads = save_random_heads(model, tmp_path / "heads")
    monkeypatch.setattr("medusa_export.bundle.export.note", said.append)
    export_bundle(ExportOptions(str(model), heads, tmp_path / "bundle"))
    assert any("the bundle has its language model, without images" in line for line in said)
    report = validate(tmp_path / "bundle", str(model), heads=heads, prompts=PROMPTS, max_new_tokens=24)
    assert report.status == "passed", report.verdicts()


@pytest.mark.parametrize(
    "model_type", ["llava", "idefics3", "internvl", "aya_vision", "glm4v", "qwen2_vl", "voxtral", "llama4"]
)
def test_all_weights_of_the_language_model_are_found(model_type: str, get_model: GetModel) -> None:
    whole = AutoModelForMultimodalLM.from_pretrained(get_model(model_type), attn_implementation="eager").eval()
    backbone = load_backbone(str(get_model(model_type)))
    with torch.no_grad():
        torch.testing.assert_close(backbone.model(IDS, use_cache=False).logits, whole(input_ids=IDS).logits)


def save_t5(directory: Path) -> None:
    config = T5Config(vocab_size=320, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(directory)


def save_vit(directory: Path) -> None:
    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    ViTModel(config).save_pretrained(directory)


@pytest.mark.parametrize(
    ("save", "error", "message"),
    [
        (save_t5, ExportError, "t5 is an encoder-decoder model, and only decoders can be exported"),
        (save_vit, CheckpointError, "is a vit model, which cannot continue a text"),
    ],
)
def test_what_is_no_decoder_is_refused_before_it_is_loaded(
    save: Callable[[Path], None], error: type[MedusaError], message: str, tmp_path: Path
) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(error, match=message) as caught:
        load_backbone(str(tmp_path))
    assert "\n" not in str(caught.value)
