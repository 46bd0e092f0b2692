"""The record, in an artifact, of the command that made it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from medusa_runtime.bundle.manifest import Provenance
from medusa_runtime.errors import OptionError

PACKAGES = (
    "medusa-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "tensorrt-rtx-cu13", "tensorrt-cu13", "cuda-bindings",
)  # fmt: skip
FOLDERS = re.compile(
    r"(?<![\w.:/])(?:\.\.)?/(?:[^/\s,=\[\]{}'\"]+/)+"
)  # absolute paths, and those that leave the current directory: they describe the machine, not the artifact


def provenance() -> Provenance:
    """The running command and the versions of its packages. Paths outside the current directory are cut to their last part."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    words = [word.encode(errors="backslashreplace").decode() for word in sys.argv]  # a file's name may be no text
    command = [Path(words[0]).name, *(FOLDERS.sub("", word) for word in words[1:])]
    return Provenance(command=command, versions=versions, created=_now().isoformat(timespec="seconds"))


def _now() -> datetime:
    """The time; or the one that SOURCE_DATE_EPOCH fixes, for builds that must not differ (reproducible-builds.org)."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    if fixed is None:
        return datetime.now(UTC)
    try:
        return datetime.fromtimestamp(int(fixed), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise OptionError(f"SOURCE_DATE_EPOCH is {fixed!r}; it must be a number of seconds since 1970") from error
