"""Recognises directories that are bundles."""

from __future__ import annotations

from pathlib import Path

from medusa_runtime.bundle.files import is_leftover, read_json
from medusa_runtime.bundle.manifest import MANIFEST_NAME, REPORT_NAME, RUNTIME_CACHE, TUNING_NAME, WEIGHTS_NAME


def is_bundle(path: Path, kind: str) -> bool:
    """Whether a directory is a bundle of that kind and has no other files, so that it can be replaced by another bundle."""
    try:
        data = read_json(path / MANIFEST_NAME)
        beside = {REPORT_NAME, TUNING_NAME, WEIGHTS_NAME, *(file.name for file in path.glob(RUNTIME_CACHE.format("*")))}
        known = {MANIFEST_NAME, *data["files"], *beside}
        return bool(
            data["kind"] == kind
            and "schema_version" in data
            and {entry.name for entry in path.iterdir() if not is_leftover(entry.name)} <= known
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
