"""Axolotl's fork (ctlllll/axolotl): as Medusa 1.0 merged, where heads without residual layers are the default."""

from __future__ import annotations

from pathlib import Path

from medusa_heads.formats import medusa_10
from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.merged import is_merged
from medusa_heads.formats.named import Note
from medusa_heads.formats.sequential import is_sequential, load_sequential
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR = "axolotl", "Axolotl, merged"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads that only Axolotl makes: without residual layers. The others count as Medusa 1.0."""
    return is_merged(checkpoint) and is_sequential(checkpoint, medusa_10.PREFIX) and not medusa_10.matches(checkpoint)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads; see `load_sequential`."""
    return load_sequential(checkpoint, medusa_10.PREFIX, FLAVOUR, note)


def save(heads: MedusaHeads, path: str | Path, model: Path, *, force: bool = False) -> None:
    """Write a model with heads in it; see `medusa_10.save`."""
    medusa_10.save(heads, path, model, force=force, flavour=FLAVOUR)
