"""Writes directories of heads in other projects' formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from medusa_heads.directories import new_directory
from medusa_heads.formats.checkpoint_files import CONFIG_NAME, PICKLES
from medusa_runtime.bundle.files import is_leftover


def save_directory(
    path: str | Path, weights_name: str, tensors: Mapping[str, torch.Tensor], config: dict[str, Any], *, force: bool = False
) -> None:
    """Write heads to a new directory: a file of tensors and a config. It appears whole or not at all.

    Args:
        path: the directory.
        weights_name: the file of tensors; its suffix tells whether it is a pickle.
        tensors: the tensors by name. In safetensors, a tensor with two names is stored twice.
        config: the content of config.json.
        force: replace a directory with no other files than these two.

    Raises:
        OptionError: the directory exists and must not be replaced.
    """

    def replaceable(directory: Path) -> bool:
        names = {entry.name for entry in directory.iterdir() if not is_leftover(entry.name)}
        return weights_name in names and names <= {weights_name, CONFIG_NAME}

    with new_directory(path, replaceable, force=force) as directory:
        save_config(directory, config)
        write_tensors(directory / weights_name, tensors)
        shutil.copymode(directory / CONFIG_NAME, directory / weights_name)


def save_config(directory: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file of tensors."""
    if file.suffix in PICKLES:
        torch.save(dict(tensors), file)
        return
    once: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        separate[name] = tensor.clone() if tensor.data_ptr() in once else tensor
        once.add(tensor.data_ptr())
    save_file(separate, file, metadata={"format": "pt"})
