"""Tensors of a checkpoint on disk: safetensors or pickles, in one file, in shards, or split by rank."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.files import read_json
from medusa_runtime.errors import first_line

CONFIG_NAME = "config.json"
HEADS_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "hydra_lm_head.safetensors", "hydra_lm_head.pt")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
PICKLES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
RANK_FILE = re.compile(r"rank(\d+)\.safetensors")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Checkpoint:
    """The tensors of a checkpoint by name, and its config. A file is only opened when a shape or a tensor in it is needed.

    Args:
        path: the directory or file, for messages.
        places: the files that hold each tensor; several for one that is split by rank.
        config: the content of config.json; empty if there is none.
    """

    def __init__(self, path: Path, places: dict[str, list[Path]], config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self._places = places
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._places.keys()

    @property
    def is_pickle(self) -> bool:
        """Whether the tensors are in pickles."""
        return any(file.suffix in PICKLES for places in self._places.values() for file in places)

    def num_parts(self, name: str) -> int:
        """The number of files that a tensor is split over."""
        return len(self._places[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; of its first part, if it is split by rank.

        Raises:
            CheckpointError: the file is damaged.
        """
        return self._shape(self._places[name][0], name)

    def parts(self, name: str) -> list[torch.Tensor]:
        """A tensor; several if it is split by rank.

        Raises:
            CheckpointError: the file is damaged, or it is not a tensor of floats.
        """
        found = [self._tensor(file, name) for file in self._places[name]]
        if found[0].dtype not in FLOATS:
            kind = str(found[0].dtype).removeprefix("torch.")
            raise CheckpointError(f"{self.path} has {name} as {kind}; heads must be plain floats, so dequantise them first")
        return found

    def integers(self, name: str) -> list[int]:
        """A tensor of whole numbers, as a list.

        Raises:
            CheckpointError: it is not one.
        """
        found = self._tensor(self._places[name][0], name)
        if found.is_floating_point() or found.is_complex() or found.dim() != 1 or found.dtype == torch.bool:
            raise CheckpointError(
                f"{self.path} has {name} as {found.dtype} of shape {tuple(found.shape)}; it must list token ids"
            )
        numbers: list[int] = found.tolist()
        return numbers

    def is_same(self, name: str, other: str) -> bool:
        """Whether two names stand for one tensor, which only pickles can tell."""
        if not self.is_pickle:
            return False
        one, two = (self._tensor(self._places[each][0], each) for each in (name, other))
        return one.data_ptr() == two.data_ptr() and one.shape == two.shape

    def _shape(self, file: Path, name: str) -> tuple[int, ...]:
        if file.suffix in PICKLES:
            return tuple(self._pickled(file, name).shape)
        try:
            return tuple(self._opened(file).get_slice(name).get_shape())
        except SafetensorError as error:
            raise _damaged(file, error) from error

    def _tensor(self, file: Path, name: str) -> torch.Tensor:
        if file.suffix in PICKLES:
            return self._pickled(file, name)
        try:
            tensor: torch.Tensor = self._opened(file).get_tensor(name)
        except SafetensorError as error:
            raise _damaged(file, error) from error
        return tensor

    def _pickled(self, file: Path, name: str) -> torch.Tensor:
        tensor: torch.Tensor | None = self._opened(file).get(name)
        if tensor is None:
            raise CheckpointError(f"{file} lacks {name}, which its index names; download it again")
        return tensor

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = read_pickle(file) if file.suffix in PICKLES else open_safetensors(file)
        return self._open[file]


def open_checkpoint(path: Path) -> Checkpoint | None:
    """The tensors of a directory or a file; None if there is no file of tensors.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    directory = path if path.is_dir() else path.parent
    config = _config(directory / CONFIG_NAME)
    if path.is_file():
        return Checkpoint(path, _places([path]), config) if path.suffix in SUFFIXES else None
    if found := [path / name for name in HEADS_FILES if (path / name).is_file()]:
        return Checkpoint(path, _places(found[:1]), config)
    if ranks := sorted(filter(_rank, path.iterdir()), key=_rank_number):
        return Checkpoint(path, _split(path, ranks), config)
    for name in INDEX_FILES:
        if (path / name).is_file():
            return Checkpoint(path, _indexed(path / name), config)
    if found := [path / name for name in WHOLE_FILES if (path / name).is_file()]:
        return Checkpoint(path, _places(found[:1]), config)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    return Checkpoint(path, _places(files), config) if files else None


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle. Nothing in it is run.

    Raises:
        CheckpointError: it holds anything but tensors by name, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other versions
            content = _torch_load(file)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is a pickle of more than tensors, which could run code, so it is not read; save its tensors as safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise _damaged(file, error) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{file} does not hold tensors by name (a state_dict); save it as one, or as safetensors")
    return content


def open_safetensors(file: Path) -> Any:
    """An open safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _torch_load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # files of old versions of PyTorch cannot be mapped
            raise
        return torch.load(file, map_location="cpu", weights_only=True)


def _damaged(file: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or incomplete: {first_line(error)}")


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged: it must be a JSON object")
    return config


def _names(file: Path) -> Iterable[str]:
    names: Iterable[str] = read_pickle(file).keys() if file.suffix in PICKLES else open_safetensors(file).keys()
    return names


def _places(files: list[Path]) -> dict[str, list[Path]]:
    return {name: [file] for file in files for name in _names(file)}


def _split(path: Path, ranks: list[Path]) -> dict[str, list[Path]]:
    if (numbers := [_rank_number(file) for file in ranks]) != list(range(len(ranks))):
        raise CheckpointError(f"{path} lacks rank{min({*range(max(numbers))} - {*numbers})}.safetensors; download it again")
    places: dict[str, list[Path]] = {}
    for file in ranks:
        for name in _names(file):
            places.setdefault(name, []).append(file)
    return places


def _indexed(index: Path) -> dict[str, list[Path]]:
    try:
        files = read_json(index)["weight_map"]
        places = {str(name): [index.parent / file] for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: it must have a weight_map from names to files") from error
    for [file] in places.values():
        if file.parent != index.parent or file.suffix not in SUFFIXES:
            raise CheckpointError(f"{index} names {file.name}, which is no file of tensors beside it")
        if not file.is_file():
            raise CheckpointError(f"{index.parent} lacks {file.name}, which {index.name} names; download it again")
    return places


def _rank(file: Path) -> bool:
    return RANK_FILE.fullmatch(file.name) is not None


def _rank_number(file: Path) -> int:
    match = RANK_FILE.fullmatch(file.name)
    assert match is not None
    return int(match[1])
