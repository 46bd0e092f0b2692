"""The project's own format: a directory with `config.json` and `heads.safetensors`.

Heads that were trained only on frequent tokens have a third file, `draft_vocabulary.json`: the list of these tokens.
Training adds files that are not part of the heads: `draft_ngrams.npz` (see `medusa_runtime.drafting.ngrams`), a log, a card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medusa_heads.config import VERSIONS, HeadsConfig
from medusa_heads.directories import new_directory
from medusa_heads.errors import CheckpointError
from medusa_heads.modules import MedusaHeads
from medusa_runtime.bundle.files import is_leftover, read_json
from medusa_runtime.bundle.manifest import first_problem
from medusa_runtime.drafting.ngrams import NGRAMS_NAME
from medusa_runtime.errors import first_line

CONFIG_NAME, WEIGHTS_NAME = "config.json", "heads.safetensors"
FILES = (CONFIG_NAME, WEIGHTS_NAME)
RUN_NAME, LOG_NAME, EVALUATION_NAME, CURVES_NAME = "run.json", "log.jsonl", "evaluation.json", "curves.png"
VOCABULARY_NAME = "draft_vocabulary.json"
EXPORTED = (VOCABULARY_NAME, EVALUATION_NAME, NGRAMS_NAME)  # files that an export reads, too, if they are there
CARD_NAME, MERGED_NAME, ADAPTER_NAME = "README.md", "merged", "adapter"
# files that training adds
BESIDE = (RUN_NAME, LOG_NAME, EVALUATION_NAME, CURVES_NAME, CARD_NAME, MERGED_NAME, ADAPTER_NAME, NGRAMS_NAME)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def matches(path: Path) -> bool:
    """Whether the path is a directory in this format."""
    return path.is_dir() and any((path / name).is_file() for name in FILES)


def is_alone(path: Path) -> bool:
    """Whether a directory has heads in this format and no other files, so that it can be replaced by other heads."""
    names = {entry.name for entry in path.iterdir() if not is_leftover(entry.name)} if matches(path) else set()
    return bool(names) and names <= {*FILES, VOCABULARY_NAME, *BESIDE}


def save(
    heads: MedusaHeads,
    path: str | Path,
    *,
    force: bool = False,
    beside: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write heads to a new directory. It appears whole or not at all.

    Args:
        heads: the heads; they are written in the precision that they have.
        path: the directory.
        force: replace existing heads.
        beside: writes more files to the directory.

    Raises:
        OptionError: the directory exists and must not be replaced.
        CheckpointError: the directory cannot be written.
    """
    with new_directory(path, is_alone, force=force) as directory:
        (directory / CONFIG_NAME).write_text(json.dumps(heads.config.stored(), indent=2) + "\n", encoding="utf-8")
        if heads.draft_ids is not None:
            (directory / VOCABULARY_NAME).write_text(json.dumps(heads.draft_ids) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in heads.state_dict().items()}
        try:
            save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "medusa-export"})
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error
        # safetensors makes its file readable only by the owner
        shutil.copymode(directory / CONFIG_NAME, directory / WEIGHTS_NAME)
        beside(directory)


def load(path: Path) -> MedusaHeads:
    """Read heads. Number and shapes of the tensors are checked against the config.

    Raises:
        CheckpointError: a file is missing, damaged or newer than this package, or tensors and config do not match.
    """
    try:
        data = read_json(path / CONFIG_NAME)
        if problem := VERSIONS.problem(data, "train or convert the heads again"):
            raise CheckpointError(f"the heads in {path} cannot be read: {problem}")
        config = HeadsConfig.model_validate(data)
        tensors = load_file(path / WEIGHTS_NAME)
    except ValidationError as error:
        raise CheckpointError(f"the heads in {path}: {CONFIG_NAME}: {first_problem(error)}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the heads in {path} are damaged or incomplete: {first_line(error)}") from error
    if strange := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise CheckpointError(f"the heads in {path} have {strange[0]} as {tensors[strange[0]].dtype}; it must be a float type")
    draft_ids = _load_vocabulary(path / VOCABULARY_NAME, config)
    with torch.device("meta"):
        heads = MedusaHeads(config, draft_ids)
    expected = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        name = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"the heads in {path} do not match their config: {name} is {found.get(name, 'missing')}, "
            f"but must be {expected.get(name, 'absent')}"
        )
    heads.load_state_dict(tensors, assign=True)
    return heads.eval()


def _load_vocabulary(path: Path, config: HeadsConfig) -> list[int] | None:
    if not path.exists():
        if config.draft_rows:
            raise CheckpointError(f"the heads in {path.parent} lack {path.name}: their LM heads have rows only for its tokens")
        return None
    try:
        if config.kind == "hydra":
            raise ValueError("Hydra heads have no draft vocabulary")
        token_ids: list[int] = read_json(path)
        require_draft_vocabulary(token_ids, config.vocab_size)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"the heads' {path} cannot be used: {error}") from error
    return token_ids


def require_draft_vocabulary(token_ids: object, vocab_size: int | None) -> None:
    """Raise a `ValueError` unless these are distinct token ids of the vocabulary."""
    if (
        not isinstance(token_ids, list)
        or not all(type(token) is int for token in token_ids)
        or len(set(token_ids)) != len(token_ids)
    ):
        raise ValueError("it must be a list of token ids, each once")
    if not token_ids or min(token_ids) < 0 or (vocab_size is not None and max(token_ids) >= vocab_size):
        raise ValueError(f"its token ids must be below the vocabulary size {vocab_size}")
