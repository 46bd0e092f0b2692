"""Medusa 0.1, by FasterDecoding: `medusa_lm_head.pt`, a pickle with blocks and an LM head for each head."""

from __future__ import annotations

from pathlib import Path

from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.named import Naming, Note, named_tensors
from medusa_heads.formats.sayable import require_sayable
from medusa_heads.formats.sequential import BLOCK, LM_HEAD, has_lm_heads, load_sequential, medusa_config
from medusa_heads.formats.writing import save_directory
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR = "medusa-0.1", "Medusa 0.1"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour."""
    return checkpoint.is_pickle and has_lm_heads(checkpoint)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads; see `load_sequential`."""
    return load_sequential(checkpoint, "", FLAVOUR, note)


def save(heads: MedusaHeads, path: str | Path, *, force: bool = False) -> None:
    """Write heads to a new directory; see `save_directory` and `require_sayable` for errors."""
    require_sayable(heads, FLAVOUR, {"one_block"})
    tensors = named_tensors(heads, Naming(FLAVOUR, "", BLOCK, LM_HEAD))
    save_directory(path, "medusa_lm_head.pt", tensors, medusa_config(heads), force=force)
