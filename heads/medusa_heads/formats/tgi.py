"""Text Generation Inference and LoRAX: the names of Medusa 0.1 or v2 in `medusa_lm_head.safetensors`."""

from __future__ import annotations

from pathlib import Path

from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.named import Naming, Note, named_tensors
from medusa_heads.formats.sayable import require_sayable
from medusa_heads.formats.sequential import BLOCK, LM_HEAD, has_lm_heads, load_sequential, medusa_config
from medusa_heads.formats.writing import save_directory
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR = "tgi", "TGI"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour. Those that use the backbone's LM head count as Medusa v2."""
    return not checkpoint.is_pickle and has_lm_heads(checkpoint)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads; see `load_sequential`."""
    return load_sequential(checkpoint, "", FLAVOUR, note)


def save(heads: MedusaHeads, path: str | Path, *, force: bool = False) -> None:
    """Write heads to a new directory; see `save_directory` and `require_sayable` for errors."""
    require_sayable(heads, FLAVOUR, {"one_block"}, "any")
    tensors = named_tensors(heads, Naming(FLAVOUR, "", BLOCK, LM_HEAD))
    more = {"version": "2"} if heads.config.shared_lm_head else {}
    save_directory(path, "medusa_lm_head.safetensors", tensors, medusa_config(heads, **more), force=force)
