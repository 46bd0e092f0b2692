"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from medusa_runtime.errors import OptionError


def require_new(path: str | Path, marker: str, *, force: bool = False, inputs: Sequence[str | Path] = ()) -> Path:
    """Check an output directory before the work that fills it.

    Args:
        path: where the output will be.
        marker: a file that every directory of the output's kind holds. With `force`, such a directory may be replaced,
            or an empty one; nothing else is ever removed.
        force: replace what is there.
        inputs: what the work reads; the output may be none of it, nor hold any of it.

    Returns:
        The path with symbolic links and dots resolved.

    Raises:
        OptionError: it exists and may not be replaced, or it cannot be written.
    """
    path = Path(path)
    target = path.resolve()
    if path.is_symlink() and not target.exists():
        raise OptionError(f"{path} is a symbolic link to nothing; choose another output")
    if target.exists():
        if not force:
            raise OptionError(f"{path} exists; choose another output, or replace it with --force")
        if not target.is_dir():
            raise OptionError(f"{path} exists and is not a directory")
        for other in (*inputs, Path.cwd()):
            if Path(other).resolve().is_relative_to(target):
                raise OptionError(f"{path} holds {other}, so it cannot be replaced; choose another output")
        if any(target.iterdir()) and not (target / marker).is_file():
            raise OptionError(f"{path} holds other files (no {marker}), so --force does not replace it; choose another output")
    _require_writable(path, target.parent)
    return target


@contextmanager
def new_directory(path: str | Path, marker: str, *, force: bool = False, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """Fill a temporary sibling and, if nothing fails, rename it to `path`. Arguments as for `require_new`.

    With `force`, what stood there is moved away first and removed last. What a killed run left behind is swept up.

    Raises:
        OptionError: see `require_new`.
    """
    target = require_new(path, marker, force=force, inputs=inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    temporary.mkdir()
    replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    try:
        yield temporary
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
    finally:
        if replaced.exists() and not target.exists():  # the second rename failed: put things back
            os.replace(replaced, target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _require_writable(path: Path, parent: Path) -> None:
    """Find out now, not after the work. The nearest directory there is must take a new one."""
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        Path(tempfile.mkdtemp(prefix=".medusa-export-", dir=parent)).rmdir()
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {parent}: {error.strerror}") from error


def _sweep(target: Path) -> None:
    """Remove what runs that no longer live have left beside the target."""
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        with suppress(ValueError):
            if not _is_alive(int(leftover.name.rsplit("-", 1)[1])):
                shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
