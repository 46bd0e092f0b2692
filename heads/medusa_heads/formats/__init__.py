"""File formats of heads: one module per format, each with `matches(path)` and `load(path)`.

Formats of other projects get their modules here. `load_heads` tries each in turn.
"""

from __future__ import annotations

from pathlib import Path

from medusa_heads.errors import CheckpointError
from medusa_heads.formats import native
from medusa_heads.modules import MedusaHeads

FORMATS = (native,)


def load_heads(path: str | Path) -> MedusaHeads:
    """Load heads from a directory or a file of any known format.

    Raises:
        CheckpointError: the path does not exist, the format is unknown, or the file is damaged.
    """
    if not Path(path).exists():
        raise CheckpointError(f"there are no heads at {path}; make some with: medusa-export heads init MODEL -o {path}")
    for known in FORMATS:
        if known.matches(Path(path)):
            heads: MedusaHeads = known.load(Path(path))
            return heads
    raise CheckpointError(f"{path} has no heads in a known format; a directory of heads has {' and '.join(native.FILES)}")


save_heads = native.save
