"""The project's own format: a directory with `config.json` and `heads.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medusa_heads.config import HeadsConfig
from medusa_heads.modules import MedusaHeads
from medusa_runtime.errors import CheckpointError
from medusa_runtime.files import new_directory

CONFIG_NAME, WEIGHTS_NAME = "config.json", "heads.safetensors"
FILES = (CONFIG_NAME, WEIGHTS_NAME)


def matches(path: Path) -> bool:
    """Whether the path is a directory of this format."""
    return path.is_dir() and any((path / name).is_file() for name in FILES)


def is_alone(path: Path) -> bool:
    """Whether a directory holds heads of this format and nothing else, so that it may be replaced by others."""
    return matches(path) and {entry.name for entry in path.iterdir()} <= set(FILES)


def save(heads: MedusaHeads, path: str | Path, *, force: bool = False) -> None:
    """Write heads into a new directory, whole or not at all.

    Raises:
        OptionError: the directory exists and may not be replaced.
        CheckpointError: it cannot be written.
    """
    with new_directory(path, is_alone, force=force) as directory:
        (directory / CONFIG_NAME).write_text(heads.config.model_dump_json(indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in heads.state_dict().items()}
        try:
            save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "medusa-export"})
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error


def load(path: Path) -> MedusaHeads:
    """Read heads; counts and shapes come from the tensors and are checked against the config.

    Raises:
        CheckpointError: a file is missing or damaged, or the two disagree.
    """
    try:
        config = HeadsConfig.model_validate(json.loads((path / CONFIG_NAME).read_text()))
        tensors = load_file(path / WEIGHTS_NAME)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "config"
        raise CheckpointError(f"the heads in {path}: {CONFIG_NAME}: {field}: {first['msg']}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the heads in {path} are damaged or incomplete: {reason}") from error
    if strange := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise CheckpointError(f"the heads in {path} hold {strange[0]} as {tensors[strange[0]].dtype}, not as floats")
    with torch.device("meta"):
        heads = MedusaHeads(config)
    expected = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        name = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"the heads in {path} do not match their config: {name} is {found.get(name, 'missing')}, "
            f"the config says {expected.get(name, 'there is none')}"
        )
    heads.load_state_dict(tensors, assign=True)
    return heads.eval()
