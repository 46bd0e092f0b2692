"""MLC LLM: heads alone, under the prefix `medusa_head.`, with an LM head each."""

from __future__ import annotations

from pathlib import Path

from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.named import Naming, Note, named_tensors
from medusa_heads.formats.sayable import require_sayable
from medusa_heads.formats.sequential import BLOCK, LM_HEAD, is_sequential, load_sequential, medusa_config
from medusa_heads.formats.writing import save_directory
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR, PREFIX = "mlc", "MLC", "medusa_head."


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour."""
    return all(name.startswith(PREFIX) for name in checkpoint.names) and is_sequential(checkpoint, PREFIX)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads; see `load_sequential`."""
    return load_sequential(checkpoint, PREFIX, FLAVOUR, note)


def save(heads: MedusaHeads, path: str | Path, *, force: bool = False) -> None:
    """Write heads to a new directory; see `save_directory` and `require_sayable` for errors."""
    require_sayable(heads, FLAVOUR, {"one_block"})
    tensors = named_tensors(heads, Naming(FLAVOUR, PREFIX, BLOCK, LM_HEAD))
    save_directory(path, "model.safetensors", tensors, medusa_config(heads), force=force)
