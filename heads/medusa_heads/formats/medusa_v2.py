"""Medusa "v2", by FasterDecoding: blocks only, in `medusa_lm_head.safetensors`; the LM head is the backbone's."""

from __future__ import annotations

from pathlib import Path

from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.named import Naming, Note, named_tensors
from medusa_heads.formats.sayable import require_sayable
from medusa_heads.formats.sequential import BLOCK, LM_HEAD, has_lm_heads, is_sequential, load_sequential, medusa_config
from medusa_heads.formats.writing import save_directory
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR = "medusa-v2", "Medusa v2"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour."""
    return is_sequential(checkpoint) and not has_lm_heads(checkpoint)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads; see `load_sequential`. The size of the vocabulary is the backbone's."""
    return load_sequential(checkpoint, "", FLAVOUR, note)


def save(heads: MedusaHeads, path: str | Path, *, force: bool = False) -> None:
    """Write heads to a new directory; see `save_directory` and `require_sayable` for errors."""
    require_sayable(heads, FLAVOUR, {"one_block"}, "backbone")
    tensors = named_tensors(heads, Naming(FLAVOUR, "", BLOCK, LM_HEAD))
    save_directory(path, "medusa_lm_head.safetensors", tensors, medusa_config(heads, version="2"), force=force)
