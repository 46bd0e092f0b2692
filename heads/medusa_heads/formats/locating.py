"""Finds heads by a path or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from medusa_heads.errors import CheckpointError
from medusa_heads.formats.checkpoint_files import CONFIG_NAME, HEADS_FILES, INDEX_FILES
from medusa_heads.formats.merged import PREFIXES, has_heads
from medusa_heads.formats.native import BESIDE, VOCABULARY_NAME, WEIGHTS_NAME
from medusa_runtime.errors import first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL = (CONFIG_NAME, VOCABULARY_NAME, *INDEX_FILES, *(name for name in BESIDE if "." in name))
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
MAX_REASON = 200  # most characters quoted from the hub library's message


def is_hub_id(source: str | Path) -> bool:
    """Whether something that is no local path may be the name of a repository on the hub."""
    return not Path(source).exists() and HUB_ID.fullmatch(Path(source).as_posix()) is not None


def locate(source: str | Path) -> Path:
    """The path of heads. A hub id's files are fetched to the hub's cache: those of heads alone if there are any, or else all.

    Raises:
        CheckpointError: there is no such path, and the hub cannot be reached or does not have it.
    """
    if Path(source).exists():
        return Path(source)
    name = Path(source).as_posix()
    if not is_hub_id(source):
        raise CheckpointError(f"there are no heads at {source}; make some with: medusa-export heads init MODEL -o {source}")
    found = _snapshot(name, *SMALL, WEIGHTS_NAME, *HEADS_FILES)
    if any((found / file).is_file() for file in (WEIGHTS_NAME, *HEADS_FILES)):
        return found
    return _snapshot(name, "*.json", *WEIGHTS)


def locate_merged(model: str) -> Path | None:
    """The directory of a merged checkpoint; None if a model has no heads in it.

    Of a model on the hub, weights are only fetched if its index names heads, or if it has no index.

    Raises:
        CheckpointError: the hub cannot be reached or does not have it, or a file is damaged.
    """
    if is_hub_id(model):
        found = _snapshot(model, CONFIG_NAME, *INDEX_FILES)
        index = next((found / name for name in INDEX_FILES if (found / name).is_file()), None)
        if index is not None and not any(f'"{prefix}' in index.read_text(encoding="utf-8") for prefix in PREFIXES):
            return None
        found = _snapshot(model, "*.json", *WEIGHTS)
    else:
        found = Path(model)
    return found if has_heads(found) else None


def _snapshot(name: str, *patterns: str) -> Path:
    """Fetch files of a repository on the hub."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - imported only if it is needed

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the library passes on what its HTTP client raises
        reason = first_line(error)[:MAX_REASON]
        raise CheckpointError(
            f"there are no heads at {name}: it is no path, and the hub does not give it ({reason}); "
            f"make some with: medusa-export heads init MODEL -o {name}"
        ) from error
