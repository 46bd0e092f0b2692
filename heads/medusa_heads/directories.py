"""Output directories that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medusa_runtime.bundle.files import sync_directory, sync_tree
from medusa_runtime.errors import OptionError


def require_new(
    path: str | Path,
    replaceable: Callable[[Path], bool],
    *,
    force: bool = False,
    inputs: Sequence[str | Path] = (),
) -> Path:
    """Check an output directory before the work that fills it starts.

    Args:
        path: the output directory.
        replaceable: whether a directory is an earlier output of the same kind. With `force`, such a directory or an empty one
            is replaced; nothing else is ever removed.
        force: replace an existing output.
        inputs: the paths that the work reads. The output must not be one of them or contain one.

    Returns:
        The path with symbolic links and dots resolved.

    Raises:
        OptionError: the path exists and must not be replaced, or it cannot be written.
    """
    path = Path(path)
    target = path.resolve()
    if path.is_symlink() and not target.exists():
        raise OptionError(f"{path} is a symbolic link to a missing file; choose another output")
    if target.exists():
        if not force:
            raise OptionError(f"{path} exists; choose another output, or replace it with --force")
        if not target.is_dir():
            raise OptionError(f"{path} exists and is not a directory; choose another output")
        for other in (*inputs, Path.cwd()):
            if Path(other).resolve().is_relative_to(target):
                raise OptionError(f"{path} contains {other}, so it cannot be replaced; choose another output")
        if any(target.iterdir()) and not replaceable(target):
            raise OptionError(
                f"{path} is not an earlier output of this command, so --force does not replace it; choose another output"
            )
    _require_writable(path, target.parent)
    return target


@contextmanager
def new_directory(
    path: str | Path,
    replaceable: Callable[[Path], bool],
    *,
    force: bool = False,
    inputs: Sequence[str | Path] = (),
) -> Iterator[Path]:
    """Fill a temporary directory next to `path` and, if nothing fails, rename it to `path`. Arguments as for `require_new`.

    All files are on the disk before the renaming. With `force`, the earlier output is moved away at the very end, and put back
    if the renaming fails. Leftovers of killed runs are removed.

    Raises:
        OptionError: see `require_new`; also if the output appears during the work.
    """
    target = require_new(path, replaceable, force=force, inputs=inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary, lock = _held_sibling(target)
    try:
        yield temporary
        require_new(path, replaceable, force=force, inputs=inputs)
        sync_tree(temporary)
        _swap(temporary, target)
        sync_directory(target.parent)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_beside(path: str | Path) -> Iterator[Path]:
    """A temporary directory on the disk of an output. If the process is killed, the next `new_directory` of it removes this."""
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _held_sibling(target)
    try:
        yield temporary
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Lock a directory against other processes that call this. It is created if it is missing.

    Raises:
        OptionError: another process has locked it.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    if lock is None and sys.platform != "win32":  # Windows has no such locks
        raise OptionError(f"{path} is in use by another run; wait for it, or choose another directory")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _held_sibling(target: Path) -> tuple[Path, int | None]:
    """A new directory beside the target and the lock on it; no lock on systems that have none."""
    while True:
        temporary = target.with_name(f".{target.name}.partial-{secrets.token_hex(8)}")
        temporary.mkdir()
        lock = _lock(temporary, wait=True)
        if temporary.exists():  # another run may have removed it as a leftover before it was locked
            return temporary, lock
        if lock is not None:
            os.close(lock)


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    os.replace(target, replaced)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(replaced, target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _require_writable(path: Path, parent: Path) -> None:
    """Check that the output can be created: its nearest existing parent must be writable."""
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        Path(tempfile.mkdtemp(prefix=".medusa-export-", dir=parent)).rmdir()
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {parent}: {error.strerror}") from error


def _sweep(target: Path) -> None:
    """Remove leftovers of killed runs next to the target, and put back an output that one had moved away."""
    replaced = target.with_name(f".{target.name}.replaced")
    if replaced.exists() and not target.exists():
        os.replace(replaced, target)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        if (lock := _lock(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path, *, wait: bool = False) -> int | None:
    """Lock a directory as long as this process lives.

    Returns:
        An open descriptor, which holds the lock. None if another process holds it, or if the file system has no locks.
    """
    if sys.platform == "win32":  # no such locks; leftovers are not removed
        return None
    import fcntl  # noqa: PLC0415 - not on Windows

    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # removed meanwhile
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
