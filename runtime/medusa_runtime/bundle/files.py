"""Files that appear whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STALE_SECONDS = 3600  # a temporary file that nobody has written to for so long belongs to a run that was killed
_OWN = re.compile(r"\.(?P<name>.+)\.partial-(?:[0-9a-f]{16}|\d+)", re.DOTALL)  # earlier versions wrote the process's number


def write_whole(path: Path, text: str) -> None:
    """Write a text file, as UTF-8 with line feeds, at once or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write. It takes that place if nothing fails, and is gone if something does.

    Its name is its own, so any number of processes, threads and machines may do this with one file: each reader sees what one
    of them wrote. It is on the disk before it takes its place. It has the mode of the file it replaces, or of any new file.
    A device or a pipe, such as /dev/stdout, is written itself.
    """
    if _is_special(path):
        yield path
        return
    temporary = path.with_name(f".{path.name}.partial-{os.urandom(8).hex()}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes away
        _sweep(path, temporary)
        yield temporary
        with suppress(FileNotFoundError):
            temporary.chmod(path.stat().st_mode & 0o777)
        sync(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether a file's name is that of a temporary one of `replacing`: a run that was killed may have left it."""
    return _OWN.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk, so that neither a crash nor a loss of power can leave it torn."""
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries are on the disk, on systems and file systems that can."""
    if sys.platform == "win32":
        return
    with suppress(OSError):  # some network file systems refuse it
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Wait until all files and directories within a directory are on the disk."""
    for place, _, names in os.walk(path):
        for name in names:
            if (file := Path(place) / name).is_file() and not file.is_symlink():
                sync(file)
        sync_directory(Path(place))


def read_json(path: Path, encoding: str = "utf-8") -> Any:
    """Parse a file of JSON.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or not UTF-8, or nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(path.read_text(encoding=encoding))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_text(data: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Data as JSON. Numbers that JSON does not have (NaN and the infinities) are written as null."""
    return json.dumps(finite(data), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def finite(data: Any) -> Any:
    """The same data with None for every number that JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return data


def _is_special(path: Path) -> bool:
    """Whether this is a device or a pipe, which cannot be replaced."""
    return path.parent == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir())


def _sweep(path: Path, temporary: Path) -> None:
    """Remove what killed runs have left. Ages are by the file system's clock, which may be another machine's."""
    now = temporary.stat().st_mtime
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            if (found := _OWN.fullmatch(entry.name)) and found["name"] == path.name:
                with suppress(OSError):
                    if entry.is_file(follow_symlinks=False) and now - entry.stat().st_mtime > STALE_SECONDS:
                        Path(entry.path).unlink()
