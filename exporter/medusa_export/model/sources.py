"""Where a checkpoint's files are: a directory, a hub id, or a GGUF file, which may be one of several or in parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GgufConfig
from transformers.utils.hub import cached_file

from medusa_export.model.download import MODELS, fetched
from medusa_export.model.gguf_parts import merge_parts
from medusa_export.model.merged_config import merged_config
from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.files import read_json

CONFIG = "config.json"
GGUF = ".gguf"
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


@contextmanager
def opened(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the options with which Transformers finds a checkpoint. They are valid while this is open.

    A GGUF file in parts is put together in a temporary file.

    Args:
        source: a directory, a hub id, a GGUF file, or ``DIRECTORY:FILE`` or ``HUB_ID:FILE`` for one GGUF file of several. Of a
            file in parts, any part may be given. Or the name of a model that was fetched.

    Raises:
        CheckpointError: there is no such file, a part is missing, or there are several GGUF files.
    """
    place, file = located(source)
    if file is None:
        config = merged_config(place)
        yield place, {} if config is None else {"config": config}
    elif (parts := _parts(Path(place), file)) is None:
        yield place, _gguf_options(file)
    else:
        with TemporaryDirectory(prefix="medusa-export-") as scratch:
            whole = merge_parts(parts, Path(scratch) / "whole.gguf")
            yield scratch, _gguf_options(whole.name)


def located(source: str) -> tuple[str, str | None]:
    """The directory or hub id of a checkpoint, and the name of its GGUF file if it is one.

    Raises:
        CheckpointError: as `opened`.
    """
    path = Path(source)
    if source in MODELS and not path.exists():
        return str(fetched(source)), None
    directory, colon, file = source.rpartition(":")
    if colon and not path.exists() and _is_gguf(file):
        if Path(directory).is_dir() and not (Path(directory) / file).is_file():
            raise CheckpointError(f"there is no file {Path(directory) / file}; {_offer(Path(directory))}")
        return directory, file
    if path.is_dir() and not (path / CONFIG).is_file():
        return str(path), _only_gguf(path)
    if _is_gguf(path.name) and not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        return str(path.parent), path.name
    if path.is_file():
        raise CheckpointError(f"{source} is a file but not a GGUF file; give a directory, a hub id or a GGUF file")
    return source, None


def file_of(place: str, name: str) -> Path | None:
    """A small file of a directory or hub id; None if it has no such file."""
    if Path(place).is_dir():
        return Path(place) / name if (Path(place) / name).is_file() else None
    try:
        found = cached_file(
            place,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such model; loading it will say so
        return None
    return None if found is None else Path(found)


def local_directory(place: str) -> Path:
    """A directory with the configuration and the safetensors files of a directory or hub id, which are downloaded."""
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for a hub's packed checkpoints

    return Path(snapshot_download(place, allow_patterns=["*.json", "*.safetensors"]))


def read_settings(place: str, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint; an empty one if there is no such file, or it is damaged (the loader will say so)."""
    path = file_of(place, name)
    try:
        found = {} if path is None else read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(GGUF)


def _gguf_options(file: str) -> dict[str, Any]:
    return {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}


def _only_gguf(directory: Path) -> str:
    """The name of a directory's only GGUF file, or of the first part of the only one in parts."""
    names = sorted(path.name for path in directory.iterdir() if _is_gguf(path.name) and path.is_file())
    if not names:
        raise CheckpointError(f"{directory} has no config.json; it is not a checkpoint")
    models = {found["stem"] if (found := PART.fullmatch(name)) else name for name in names}
    if len(models) > 1:
        raise CheckpointError(f"{directory} has no config.json; {_offer(directory)}")
    return names[0]


def _offer(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir() if _is_gguf(path.name))
    firsts = [name for name in names if not (found := PART.fullmatch(name)) or int(found["number"]) == 1]
    return f"give one of its GGUF files as {directory}:FILE: {', '.join(firsts or names)}"


def _parts(directory: Path, file: str) -> list[Path] | None:
    """All parts of the GGUF file that a file is a part of; None if it is whole.

    Raises:
        CheckpointError: a part is missing.
    """
    found = PART.fullmatch(file)
    if found is None:
        return None
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}:{file} is a part of a GGUF file on a hub; download all parts and give the directory"
        )
    by_name = {path.name.lower(): path for path in directory.iterdir()}
    count, parts = int(found["count"]), []
    for number in range(1, count + 1):
        name = f"{found['stem']}-{number:05}-of-{count:05}{file[-len(GGUF) :]}"
        if (path := by_name.get(name.lower())) is None:
            raise CheckpointError(
                f"{directory / file} is one of {count} parts, and {name} is missing; put all into one directory"
            )
        parts.append(path)
    return parts
