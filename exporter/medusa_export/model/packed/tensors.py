"""The tensors of a checkpoint's files by name, read on demand, and weights that are computed from several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.files import read_json
from medusa_runtime.errors import first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Readable(Protocol):
    """A tensor that is read when it is indexed, like a slice of a safetensors file."""

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The tensor, or a part of it."""
        ...


class Tensors(Mapping[str, Any]):
    """The tensors of a directory's safetensors files. They stay on disk until they are read.

    Args:
        directory: a checkpoint's directory.

    Raises:
        CheckpointError: the directory has no safetensors files, or one cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open = ExitStack()
        self._slices: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        for path in _files(directory):
            try:
                file: Any = self._open.enter_context(safe_open(path, framework="pt"))
                self._slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            except Exception as error:  # safetensors raises errors of its own
                raise CheckpointError(f"{path} cannot be read: {first_line(error)}; download it again") from error
            self.metadata |= file.metadata() or {}

    def __getitem__(self, name: str) -> Any:
        return self._slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self._slices:
            raise CheckpointError(f"{self.directory} lacks the tensor {name}, which belongs to a packed weight")
        tensor: torch.Tensor = self._slices[name][...]
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type as safetensors calls it, such as ``F8_E4M3``."""
        return str(self._slices[name].get_dtype())

    def ending(self, suffix: str) -> list[str]:
        """The names that end so, without that end, in order."""
        return sorted(name.removesuffix(suffix) for name in self._slices if name.endswith(suffix))


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged; download it again") from error
        return [directory / str(name) for name in names]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if found := sorted(directory.glob("*.safetensors")):
        return found
    raise CheckpointError(f"{directory} has packed weights but no safetensors files; convert it to safetensors")


@dataclass(frozen=True)
class LazyWeight:
    """A weight that is computed when it is read. Transformers' loader reads it as it reads a slice of a file."""

    make: Callable[[], torch.Tensor]

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.make()[key]


@dataclass(frozen=True)
class IntegerWeight:
    """A weight stored as integers, ``(codes - zeros) * scales``. Each group of an output's inputs has a scale and a zero."""

    codes: torch.Tensor  # [N, K] uint8, 0 … 2^bits - 1
    scales: torch.Tensor  # [N, G] float32
    zeros: torch.Tensor  # [N, G] int32
    bits: int
    group_of: torch.Tensor | None = None  # [K]: the group of each input, if groups are not runs of equal length

    @property
    def block_size(self) -> int | None:
        """Inputs that share a scale, if each group is a run of that many inputs; None if groups are mixed."""
        inputs, groups = self.codes.shape[1], self.scales.shape[1]
        return None if inputs % groups or not self._are_runs(inputs // groups) else inputs // groups

    def _are_runs(self, size: int) -> bool:
        return self.group_of is None or torch.equal(self.group_of, torch.arange(self.codes.shape[1]) // size)

    def floats(self) -> torch.Tensor:
        """The weight in float32. [N, K]"""
        inputs, groups = self.codes.shape[1], self.scales.shape[1]
        places = self.group_of if self.group_of is not None else torch.arange(inputs) // -(-inputs // groups)
        whole = self.codes.to(torch.float32) - self.zeros.to(torch.float32)[:, places]
        return whole.mul_(self.scales[:, places])


class LazyIntegers:
    """An `IntegerWeight` that is unpacked when it is read."""

    def __init__(self, make: Callable[[], IntegerWeight]) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.make().floats()[key]


@dataclass(frozen=True)
class PackedWeights:
    """The weights of a packed checkpoint."""

    weights: Mapping[str, Readable]  # weights that were packed, by their usual name
    consumed: frozenset[str]  # the tensors that they are made of, and those that only describe activations
    note: str = ""  # what the float weights leave out

    def state(self, tensors: Tensors) -> dict[str, Any]:
        """All weights of the checkpoint under their usual names."""
        return {name: tensors[name] for name in tensors if name not in self.consumed} | dict(self.weights)

    @cached_property
    def integers(self) -> dict[str, LazyIntegers]:
        """The weights that are stored as integers."""
        return {name: weight for name, weight in self.weights.items() if isinstance(weight, LazyIntegers)}
