"""Tiny random checkpoints of multimodal models, whose image towers are as deep as their text decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import tokenizer
from tests.support.zoo import NUM_LAYERS, randomise, tiny_settings

TOWER: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS, "depth": NUM_LAYERS,
    "num_attention_heads": 2, "num_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14, "num_channels": 3,
    "out_hidden_size": 64, "mlp_ratio": 2, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [1],
    "projection_dim": 32, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}  # of a half of 16 dimensions
TEXT: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"rope_parameters": MROPE},
    "qwen2_5_vl": {"rope_parameters": MROPE},
    "qwen3_vl": {"rope_parameters": MROPE | {"mrope_interleaved": True}},
    "glm4v": {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
}  # fmt: skip


def save_multimodal_model(directory: Path, model_type: str) -> Path:
    """Save a random model of a multimodal type, such as mistral3, and its tokenizer."""
    make_multimodal_model(model_type).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def make_multimodal_model(model_type: str) -> Any:
    """A random model of a multimodal type, with tiny settings."""
    default = CONFIG_MAPPING[model_type]()
    text_type = default.get_text_config(decoder=True).model_type
    parts: dict[str, Any] = {"text_config": {"model_type": text_type, **tiny_settings(text_type), **TEXT.get(model_type, {})}}
    for name in default.sub_configs.keys() - {"text_config"}:
        if (tower := getattr(default, name)) is not None:
            parts[name] = {"model_type": tower.model_type} | {key: TOWER[key] for key in tower.to_dict() if key in TOWER}
    tokens = {
        "image_token_id": 5,
        "image_token_index": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    }
    config = CONFIG_MAPPING[model_type](**parts, **tokens)
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config).eval()
    randomise(model)
    return model
