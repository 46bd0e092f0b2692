"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_runtime.errors import OptionError


def require_new(path: str | Path, *, force: bool = False) -> None:
    """Raise an `OptionError` where an output path exists and may not be replaced. Call it before the work."""
    path = Path(path)
    if path.exists() and not force:
        raise OptionError(f"{path} exists; choose another output, or replace it with --force")
    if path.exists() and not path.is_dir():
        raise OptionError(f"{path} exists and is not a directory")


@contextmanager
def new_directory(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Fill a temporary sibling and, if nothing fails, rename it to `path`.

    What an interrupted run left behind is removed first; with `force`, what stood at `path` is replaced at the very end.

    Raises:
        OptionError: `path` exists and `force` is not set.
    """
    path = Path(path)
    require_new(path, force=force)
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
