"""File formats of heads: one module per flavour, each with `matches` and `load`, and `save` if it can be written.

`native` is this project's own. The others are what published heads come in; `load_heads` tries each in turn, and takes flavour
and counts from the tensors.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from medusa_heads.errors import CheckpointError
from medusa_heads.formats import (
    axolotl,
    hydra,
    medusa_01,
    medusa_10,
    medusa_v2,
    mlc,
    modelopt,
    native,
    tensorrt_llm,
    tgi,
    vllm,
)
from medusa_heads.formats.checkpoint_files import open_checkpoint
from medusa_heads.formats.locating import locate
from medusa_heads.formats.named import Note
from medusa_heads.modules import MedusaHeads

FOREIGN: tuple[ModuleType, ...] = (
    hydra, vllm, tensorrt_llm, modelopt, medusa_10, axolotl, mlc, medusa_01, tgi, medusa_v2,
)  # fmt: skip
MERGED: tuple[ModuleType, ...] = (medusa_10, axolotl, modelopt)
NAMES = ("medusa-export", *(flavour.NAME for flavour in FOREIGN))

save_heads = native.save


def load_heads(path: str | Path, note: Note = lambda _: None) -> MedusaHeads:
    """Load heads of any known flavour.

    Args:
        path: a directory, a file, or a hub id.
        note: takes a line about each contradiction between config and tensors that the tensors decide.

    Raises:
        CheckpointError: the path does not exist, the format is unknown, or the file is damaged.
    """
    return read_heads(path, note)[1]


def read_heads(path: str | Path, note: Note = lambda _: None) -> tuple[str, MedusaHeads]:
    """The flavour's name, and the heads; see `load_heads`."""
    place = locate(path)
    if (place / native.WEIGHTS_NAME).is_file() or place.name == native.WEIGHTS_NAME:
        return "medusa-export", native.load(place if place.is_dir() else place.parent)
    checkpoint = open_checkpoint(place)
    for known in () if checkpoint is None else FOREIGN:
        if known.matches(checkpoint):
            heads: MedusaHeads = known.load(checkpoint, note)
            return known.NAME, heads
    if checkpoint is None and native.matches(place):
        return "medusa-export", native.load(place)
    raise CheckpointError(
        f"{path} has no heads in a known format; a directory of heads has {' and '.join(native.FILES)}, "
        f"other known formats are {', '.join(NAMES[1:])}"
    )
