"""The same trace in every process: Python's sets of texts are in another order in each, and some models run loops over them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OrderedSet(set[object]):
    """A set whose members come in the order of their texts."""

    def __iter__(self) -> Iterator[object]:
        return iter(sorted(super().__iter__(), key=str))


@contextmanager
def ordered_sets(model: torch.nn.Module) -> Iterator[None]:
    """While open, sets that the model's files make, and those that its modules hold as attributes, are in order."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    files = {file for file in files if file.__name__.partition(".")[0] != "torch" and "set" not in vars(file)}
    held = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is set and not name.startswith("_")
    ]
    for file in files:
        file.set = OrderedSet  # type: ignore[attr-defined]  # in the place of the built-in one
    for module, name, value in held:
        setattr(module, name, OrderedSet(value))
    try:
        yield
    finally:
        for file in files:
            del file.set
        for module, name, value in held:
            setattr(module, name, value)
