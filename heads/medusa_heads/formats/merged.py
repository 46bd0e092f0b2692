"""Merged checkpoints: a model and heads in one, as Transformers writes them. The heads are one more shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from medusa_heads.directories import new_directory
from medusa_heads.errors import CheckpointError
from medusa_heads.formats.checkpoint_files import CONFIG_NAME, Checkpoint, open_checkpoint
from medusa_heads.formats.writing import save_config, write_tensors
from medusa_runtime.bundle.files import read_json

INDEX_NAME, WHOLE_NAME = "model.safetensors.index.json", "model.safetensors"
HEADS_SHARD = "model-medusa-heads.safetensors"
MODEL_SHARD = "model-without-heads.safetensors"
PREFIXES = ("medusa_head.", "medusa_heads.")


def is_merged(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has both heads and a backbone."""
    are_heads = [name.startswith(PREFIXES) for name in checkpoint.names]
    return any(are_heads) and not all(are_heads)


def has_heads(directory: Path) -> bool:
    """Whether a directory is a model with heads in it.

    Raises:
        CheckpointError: it is damaged.
    """
    checkpoint = open_checkpoint(directory) if directory.is_dir() and (directory / CONFIG_NAME).is_file() else None
    return checkpoint is not None and is_merged(checkpoint)


def save_merged(
    path: str | Path, model: Path, tensors: Mapping[str, torch.Tensor], config: dict[str, Any], *, force: bool = False
) -> None:
    """Copy a model to a new directory, with heads as one more shard. It appears whole or not at all.

    Args:
        path: the directory.
        model: the model's directory; its weights are safetensors.
        tensors: the heads' tensors by name. A name that stands for another's tensor is left out, as Transformers does it.
        config: fields to add to the model's config.
        force: replace an earlier output.

    Raises:
        OptionError: the directory exists and must not be replaced.
        CheckpointError: the model cannot be copied.
    """
    index = _index(model)
    with new_directory(path, _is_earlier, force=force, inputs=[model]) as directory:
        for file in sorted(model.iterdir()):
            if file.is_file() and file.name not in {CONFIG_NAME, INDEX_NAME}:
                target = directory / (MODEL_SHARD if file.name == WHOLE_NAME else file.name)
                shutil.copyfile(file, target)
        save_config(directory, read_json(model / CONFIG_NAME) | config)
        write_tensors(directory / HEADS_SHARD, tensors)
        shutil.copymode(directory / CONFIG_NAME, directory / HEADS_SHARD)
        index["weight_map"] |= dict.fromkeys(sorted(tensors), HEADS_SHARD)
        shards = {*index["weight_map"].values()}
        index["metadata"] = {"total_size": sum((directory / file).stat().st_size for file in shards)}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _index(model: Path) -> dict[str, Any]:
    """The model's index of shards, as its copy needs it."""
    checkpoint = open_checkpoint(model)
    if checkpoint is None or not (model / CONFIG_NAME).is_file():
        raise CheckpointError(f"{model} is no model with its weights in safetensors, which a merged checkpoint needs")
    if is_merged(checkpoint):
        raise CheckpointError(f"{model} already has heads in it; give the model without heads")
    if (model / INDEX_NAME).is_file():
        return {"weight_map": dict(read_json(model / INDEX_NAME)["weight_map"])}
    if not (model / WHOLE_NAME).is_file():
        raise CheckpointError(
            f"the weights of {model} are no safetensors, which a merged checkpoint needs; save the model as such"
        )
    with safe_open(model / WHOLE_NAME, "pt") as file:
        return {"weight_map": dict.fromkeys(sorted(file.keys()), MODEL_SHARD)}


def _is_earlier(directory: Path) -> bool:
    return (directory / HEADS_SHARD).is_file()
