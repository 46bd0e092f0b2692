"""Reads and writes heads whose tensors follow a naming scheme. Heads and layers are counted from the names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import ValidationError

from medusa_heads.config import HeadsConfig
from medusa_heads.errors import CheckpointError
from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.modules import MedusaHeads
from medusa_runtime.bundle.manifest import first_problem

Note = Callable[[str], None]


@dataclass(frozen=True)
class Naming:
    """How a flavour names its tensors, without the last part (`weight` or `bias`).

    Args:
        flavour: the flavour's name.
        prefix: all tensors of heads start with it.
        block: the name of block l of head h, after the prefix.
        lm_head: the name of the LM head of head h, after the prefix. {l} stands for the number of blocks, if it is in the name.
        residual: for Hydra, the name of the residual path of block l of head h.
    """

    flavour: str
    prefix: str
    block: str
    lm_head: str
    residual: str = ""

    def block_name(self, head: int, layer: int) -> str:
        """The name of a block's linear layer."""
        return self.prefix + self.block.format(h=head, l=layer)

    def lm_head_name(self, head: int, num_layers: int) -> str:
        """The name of a head's LM head."""
        return self.prefix + self.lm_head.format(h=head, l=num_layers)

    def residual_name(self, head: int) -> str:
        """The name of the residual path of Hydra's first block."""
        return self.prefix + self.residual.format(h=head, l=0)

    def matched(self, template: str, names: Iterator[str]) -> set[tuple[int, int, str]]:
        """Head, layer (0 if the name has none) and last part of the names that follow a template."""
        pattern = re.escape(self.prefix + template)
        pattern = pattern.replace(re.escape("{h}"), r"(?P<h>\d{1,4})").replace(re.escape("{l}"), r"(?P<l>\d{1,4})")
        found = (re.fullmatch(pattern + r"\.(?P<part>weight|bias)", name) for name in names)
        return {(int(m["h"]), int(m.groupdict().get("l") or 0), m["part"]) for m in found if m}


class Reading:
    """The heads of a checkpoint, as their tensors' names and shapes show them.

    Args:
        checkpoint: the tensors.
        naming: how they are named.
        note: takes a line about a contradiction that the tensors decide.
    """

    def __init__(self, checkpoint: Checkpoint, naming: Naming, note: Note) -> None:
        self.checkpoint, self.naming, self.note = checkpoint, naming, note
        self.blocks = naming.matched(naming.block, iter(checkpoint.names))
        self.lm_heads = naming.matched(naming.lm_head, iter(checkpoint.names))

    @property
    def what(self) -> str:
        """The heads, for messages."""
        return f"the heads in {self.checkpoint.path} ({self.naming.flavour})"

    @cached_property
    def num_heads(self) -> int:
        """K."""
        found = {head for head, _, _ in (*self.blocks, *self.lm_heads)}
        if missing := {*range(max(found) + 1)} - found:
            raise CheckpointError(f"{self.what} lack head {min(missing)}, but have head {max(found)}; the file is incomplete")
        return len(found)

    @cached_property
    def layers_present(self) -> list[int]:
        """The layers that head 0 has tensors of. All heads have the same."""
        layers = [sorted({layer for h, layer, _ in self.blocks if h == head}) for head in range(self.num_heads)]
        for head, found in enumerate(layers):
            if found != layers[0]:
                raise CheckpointError(
                    f"{self.what} have blocks {found} in head {head}, but {layers[0]} in head 0; the file is incomplete"
                )
        return layers[0]

    @cached_property
    def num_layers(self) -> int:
        """L: the LM head's place in its head where names tell it, or else the number of blocks."""
        if "{l}" in self.naming.lm_head and self.lm_heads:
            places = {(head, layer) for head, layer, _ in self.lm_heads}
            heads, layers = {head for head, _ in places}, {layer for _, layer in places}
            if len(layers) > 1 or len(heads) < self.num_heads:
                raise CheckpointError(f"{self.what} do not have one LM head each, at the same place; the file is incomplete")
            return layers.pop()
        return max(self.layers_present, default=-1) + 1

    @cached_property
    def one_block(self) -> bool:
        """Whether a head's blocks (Hydra: those after the first) are one block, which the file has once or under several names.

        The original code makes them as ``[block] * L``. Libraries that write safetensors drop the further names.
        """
        first = 1 if self.naming.residual and self.has_residual else 0
        needed = [*range(first, self.num_layers)]
        if len(needed) < 2:
            return False
        present = [layer for layer in self.layers_present if layer >= first]
        if present == needed:
            return all(
                self.checkpoint.is_same(
                    f"{self.naming.block_name(head, layer)}.weight", f"{self.naming.block_name(head, first)}.weight"
                )
                for head in range(self.num_heads)
                for layer in needed[1:]
            )
        return present == needed[:1]

    @cached_property
    def has_residual(self) -> bool:
        """Whether heads have Hydra's residual path."""
        return bool(self.naming.residual) and f"{self.naming.residual_name(0)}.weight" in self.checkpoint.names

    @cached_property
    def hidden_size(self) -> int:
        """C: the columns of the first LM head, or else of the first block."""
        layer = self.layers_present[0] if self.layers_present else 0
        for name in (f"{self.naming.lm_head_name(0, self.num_layers)}.weight", f"{self.naming.block_name(0, layer)}.weight"):
            if name in self.checkpoint.names:
                return self._matrix(name)[1]
        raise CheckpointError(f"{self.what} lack {self.naming.block_name(0, 0)}.weight; the file is incomplete")

    @cached_property
    def lm_head_rows(self) -> int | None:
        """Rows of the first LM head, over all ranks; None if the heads have none of their own."""
        if not self.lm_heads:
            return None
        name = f"{self.naming.lm_head_name(0, self.num_layers)}.weight"
        if name not in self.checkpoint.names:
            raise CheckpointError(f"{self.what} lack {name}; the file is incomplete")
        return self._matrix(name)[0] * self.checkpoint.num_parts(name)

    def _matrix(self, name: str) -> tuple[int, int]:
        shape = self.checkpoint.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{self.what} have {name} of shape {list(shape)}; it must be a matrix")
        return shape[0], shape[1]

    def told(self, name: str, value: Any, found: int, *, is_certain: bool = True) -> None:
        """Compare a count in the config with the tensors. These decide, and a note tells of a contradiction.

        Args:
            name: what is counted.
            value: what the config says; None if it says nothing.
            found: what the tensors show.
            is_certain: whether the tensors show it beyond doubt. If not, a contradiction is an error.
        """
        if value is None or value == found:
            return
        line = f"the config of {self.checkpoint.path} says {value} {name}, but its tensors are of {found}"
        if not is_certain:
            raise CheckpointError(f"{line}; correct the config, or download the file again")
        self.note(f"{line}; the tensors decide")

    def config(self, **settings: Any) -> HeadsConfig:
        """The heads' configuration, from the tensors. Other fields are given.

        Raises:
            CheckpointError: it is none that heads can have.
        """
        own = self.lm_head_rows is not None
        found: dict[str, Any] = {
            "base_model": base_model(self.checkpoint),
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.lm_head_rows if own else positive(self.checkpoint.config.get("vocab_size")),
            "shared_lm_head": not own,
            "one_block": self.one_block,
            "block_bias": not self.blocks or any(part == "bias" for _, _, part in self.blocks),
            "lm_head_bias": any(part == "bias" for _, _, part in self.lm_heads),
        }
        try:
            return HeadsConfig(**(found | settings))
        except ValidationError as error:
            raise CheckpointError(f"{self.what} cannot be used: {first_problem(error)}") from error

    def heads(self, config: HeadsConfig, draft_ids: list[int] | None = None, *, beside: Collection[str] = ()) -> MedusaHeads:
        """The heads, with their tensors read.

        Args:
            config: see `config`.
            draft_ids: the draft vocabulary.
            beside: tensors under the prefix that are no weights.

        Raises:
            CheckpointError: a tensor is missing, superfluous, or of another shape.
        """
        with torch.device("meta"):
            heads = MedusaHeads(config, draft_ids)
        expected = heads.state_dict()
        names = theirs(self.naming, config, expected)
        if missing := [name for name in names.values() if name not in self.checkpoint.names]:
            raise CheckpointError(f"{self.what} lack {missing[0]}; the file is incomplete")
        known = {*names.values(), *repeated(self.naming, config), *beside}
        extra = sorted(name for name in self.checkpoint.names if name.startswith(self.naming.prefix) and name not in known)
        if extra:
            raise CheckpointError(
                f"{self.what} have {extra[0]}, which is no part of such heads; quantised ones must be dequantised first"
            )
        tensors = {ours: self._tensor(name, tuple(expected[ours].shape)) for ours, name in names.items()}
        heads.load_state_dict(tensors, assign=True)
        return heads.eval()

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        parts = self.checkpoint.parts(name)
        is_whole = tuple(parts[0].shape) == shape and all(torch.equal(part, parts[0]) for part in parts)
        tensor = parts[0] if is_whole else torch.cat(parts)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.what} have {name} of shape {list(tensor.shape)}, but it must be {list(shape)}")
        return tensor


def base_model(checkpoint: Checkpoint) -> str:
    """The model that heads were made for, as far as their config tells."""
    for name in ("base_model_name_or_path", "_name_or_path"):
        if isinstance(value := checkpoint.config.get(name), str) and value:
            return value
    return "an unnamed model"


def positive(value: Any) -> int | None:
    """A count in somebody's config; None if it is no count."""
    return value if type(value) is int and value > 0 else None


def theirs(naming: Naming, config: HeadsConfig, ours: Iterable[str]) -> dict[str, str]:
    """The names of our tensors in a flavour."""
    found = {}
    for name in ours:
        if name.startswith("lm_head."):
            found[name] = f"{naming.lm_head_name(0, config.num_layers)}.{name.split('.')[-1]}"
            continue
        _, head, kind, *rest = name.split(".")
        last = rest[-1]
        if kind == "lm_head":
            place = naming.lm_head_name(int(head), config.num_layers)
        elif rest[1] == "residual":
            place = naming.residual_name(int(head))
        else:
            place = naming.block_name(int(head), int(rest[0]))
        found[name] = f"{place}.{last}"
    return found


def repeated(naming: Naming, config: HeadsConfig) -> dict[str, str]:
    """Further names of blocks that are one block, each with the first name, in a flavour."""
    if not config.one_block:
        return {}
    first = 1 if config.kind == "hydra" else 0
    parts = ("weight", "bias") if config.block_bias else ("weight",)
    return {
        f"{naming.block_name(head, layer)}.{part}": f"{naming.block_name(head, first)}.{part}"
        for head in range(config.num_heads)
        for layer in range(first + 1, config.num_layers)
        for part in parts
    }


def named_tensors(heads: MedusaHeads, naming: Naming, *, with_repeats: bool = True) -> dict[str, torch.Tensor]:
    """The heads' tensors under a flavour's names, in no particular order.

    Args:
        heads: the heads.
        naming: the names.
        with_repeats: name a block that is used several times once a use; the tensors are then the same objects.
    """
    state = heads.state_dict()
    named = {name: state[ours].contiguous() for ours, name in theirs(naming, heads.config, state).items()}
    if with_repeats:
        named |= {further: named[first] for further, first in repeated(naming, heads.config).items()}
    return named
