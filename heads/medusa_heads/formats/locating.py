"""Finds heads by a path or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from medusa_heads.errors import CheckpointError
from medusa_heads.formats.checkpoint_files import CONFIG_NAME, HEADS_FILES, INDEX_FILES
from medusa_heads.formats.native import BESIDE, VOCABULARY_NAME, WEIGHTS_NAME
from medusa_runtime.errors import first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL = (CONFIG_NAME, VOCABULARY_NAME, *INDEX_FILES, *(name for name in BESIDE if "." in name))
MAX_REASON = 200  # most characters quoted from the hub library's message


def is_hub_id(source: str | Path) -> bool:
    """Whether something that is no local path may be the name of a repository on the hub."""
    return not Path(source).exists() and HUB_ID.fullmatch(str(source)) is not None


def locate(source: str | Path) -> Path:
    """The path of heads. A hub id's files are fetched to the hub's cache: those of heads alone if there are any, or else all.

    Raises:
        CheckpointError: there is no such path, and the hub cannot be reached or does not have it.
    """
    if Path(source).exists():
        return Path(source)
    name = str(source)
    if not is_hub_id(source):
        raise CheckpointError(f"there are no heads at {source}; make some with: medusa-export heads init MODEL -o {source}")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - imported only if it is needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        heads_alone = [*SMALL, WEIGHTS_NAME, *HEADS_FILES]
        found = Path(snapshot_download(name, allow_patterns=heads_alone))
        if not any((found / file).is_file() for file in (WEIGHTS_NAME, *HEADS_FILES)):
            found = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.pt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = first_line(error)[:MAX_REASON]
        raise CheckpointError(
            f"there are no heads at {name}: it is no path, and the hub does not give it ({reason})"
        ) from error
    return found
