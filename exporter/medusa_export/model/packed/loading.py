"""Loads a packed checkpoint as a model with float weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig, GenerationConfig

from medusa_export.model.packed.layouts import read_packed
from medusa_export.model.packed.tensors import LazyIntegers, Readable
from medusa_heads.errors import CheckpointError

# where a checkpoint says how it is packed; the first is today's, the others are those of AutoGPTQ and AutoAWQ
SETTINGS = ("quantization_config", "compression_config")
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass(frozen=True)
class Unpacked:
    """A model whose weights were packed."""

    model: Any
    loaded: dict[str, Any]  # as Transformers' `output_loading_info`
    integers: Mapping[str, LazyIntegers]  # the weights that were integers, by their names in the checkpoint
    note: str


@dataclass(frozen=True)
class _Watched:
    """A weight whose error is kept: the loader reports another one instead."""

    weight: Readable
    errors: list[CheckpointError] = field(default_factory=list)

    def __getitem__(self, key: Any) -> torch.Tensor:
        try:
            return self.weight[key]
        except CheckpointError as error:
            self.errors.append(error)
            raise


def settings_of(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How a checkpoint is packed; nothing if it is not.

    Args:
        config: its config.json.
        files: the content of those of `SETTINGS_FILES` that it has.
    """
    for part in (config, config.get("text_config") or {}):
        for name in SETTINGS:
            if isinstance(part, Mapping) and isinstance(found := part.get(name), Mapping) and found:
                return dict(found)
    for name, method in SETTINGS_FILES.items():
        if found := files.get(name):
            return {"quant_method": method} | dict(found)
    return {}


def load_packed(
    directory: Path, settings: dict[str, Any], *, trust_remote_code: bool, config: Any = None, **options: Any
) -> Unpacked:
    """Load a packed checkpoint. Each weight is unpacked when it is loaded, so that it is in memory once.

    Args:
        directory: the checkpoint's files.
        settings: how it is packed.
        trust_remote_code: let Python code of the checkpoint read its configuration.
        config: the model's configuration, if it is not the checkpoint's own.
        options: for Transformers' `from_pretrained`.

    Raises:
        CheckpointError: the layout is not known, or the files do not hold it.
        Exception: any that Transformers raises for a damaged checkpoint.
    """
    packed, tensors = read_packed(directory, settings)
    if config is None:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    for part in (config, config.get_text_config()):
        for name in SETTINGS:
            part.__dict__.pop(name, None)
    classes = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    model_class: Any = next((known[type(config)] for known in classes if type(config) in known), None)
    if model_class is None:
        raise CheckpointError(f"{directory} is packed, and its model type {config.model_type} is none that can be unpacked")
    errors: list[CheckpointError] = []
    state = packed.state(tensors)
    state |= {name: _Watched(weight, errors) for name, weight in packed.weights.items()}
    try:
        model, loaded = model_class.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **options)
    except Exception:
        if errors:
            raise errors[0] from None
        raise
    if errors:
        raise errors[0]
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return Unpacked(model, loaded, packed.integers, packed.note)
