"""NVIDIA ModelOpt, Hugging Face form: a merged checkpoint, with the heads under `medusa_heads.` with a config section."""

from __future__ import annotations

from pathlib import Path

from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.merged import save_merged
from medusa_heads.formats.named import Naming, Note, named_tensors
from medusa_heads.formats.sayable import require_sayable
from medusa_heads.formats.sequential import BLOCK, LM_HEAD, is_sequential, load_sequential
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR, PREFIX = "modelopt", "ModelOpt, merged", "medusa_heads."


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour."""
    return is_sequential(checkpoint, PREFIX)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads; see `load_sequential`."""
    section = checkpoint.config.get("medusa")
    told = section if isinstance(section, dict) else {}
    counts = {"num_heads": told.get("num_medusa_heads"), "num_layers": told.get("num_medusa_layers")}
    return load_sequential(checkpoint, PREFIX, FLAVOUR, note, counts)


def save(heads: MedusaHeads, path: str | Path, model: Path, *, force: bool = False) -> None:
    """Write a model with heads in it; see `save_merged` and `require_sayable` for errors."""
    require_sayable(heads, FLAVOUR, {"one_block"})
    tensors = named_tensors(heads, Naming(FLAVOUR, PREFIX, BLOCK, LM_HEAD), with_repeats=False)
    counts = {"num_medusa_heads": heads.config.num_heads, "num_medusa_layers": heads.config.num_layers}
    save_merged(path, model, tensors, {"medusa": counts}, force=force)
