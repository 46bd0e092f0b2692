"""The precision in which a checkpoint stores its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from medusa_export.model.packed.tensors import Tensors
from medusa_heads.errors import CheckpointError

HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(directory: Path) -> torch.dtype | None:
    """The half precision of all weights in a directory's safetensors files; None if they are of several or other types."""
    try:
        tensors = Tensors(directory)
    except (CheckpointError, OSError):  # no such files, or damaged ones: loading them will say so
        return None
    found = {tensors.dtype(name) for name in tensors}
    return HALVES.get(found.pop()) if len(found) == 1 else None
