"""Medusa 1.0, by FasterDecoding: a merged checkpoint, with the heads under `medusa_head.`."""

from __future__ import annotations

from pathlib import Path

from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.merged import is_merged, save_merged
from medusa_heads.formats.named import Naming, Note, named_tensors
from medusa_heads.formats.sayable import require_sayable
from medusa_heads.formats.sequential import BLOCK, LM_HEAD, found, is_sequential, load_sequential
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR, PREFIX = "medusa-1.0", "Medusa 1.0, merged", "medusa_head."


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour; without residual layers, they are Axolotl's."""
    return is_merged(checkpoint) and is_sequential(checkpoint, PREFIX) and bool(found(checkpoint, PREFIX).blocks)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads; see `load_sequential`."""
    return load_sequential(checkpoint, PREFIX, FLAVOUR, note)


def save(heads: MedusaHeads, path: str | Path, model: Path, *, force: bool = False, flavour: str = FLAVOUR) -> None:
    """Write a model with heads in it; see `save_merged` and `require_sayable` for errors."""
    require_sayable(heads, flavour, {"one_block"})
    tensors = named_tensors(heads, Naming(flavour, PREFIX, BLOCK, LM_HEAD), with_repeats=False)
    counts = {"medusa_num_heads": heads.config.num_heads, "medusa_num_layers": heads.config.num_layers}
    save_merged(path, model, tensors, counts, force=force)
