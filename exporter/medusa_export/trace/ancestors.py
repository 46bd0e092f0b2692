"""Which cache entries hold the tokens before each new token, along its own path of the tree."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from medusa_export.opsets import MIN_OPSET


@dataclass
class Ancestors:
    """The new tokens of a step, and where their ancestors are.

    The ancestor of a token at distance d is the token on its path that stands d positions before it: a cached one, whose
    position is its entry's number, or a new one, which the tree's mask names.
    """

    position_ids: torch.Tensor  # [B, T]
    tree_mask: torch.Tensor  # [B, T, T] bool
    cache_lengths: torch.Tensor  # [B]
    entries_axis: torch.Tensor = field(default_factory=lambda: torch.tensor(2))  # S in [B, H, S]; one constant for all layers
    _entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def offsets(self, capacity: int) -> torch.Tensor:
        """The number of each entry among the new tokens: negative for cached ones, too large for unused ones. [B, S]"""
        return torch.arange(capacity).unsqueeze(0) - self.cache_lengths.unsqueeze(1)

    def visible(self, capacity: int) -> torch.Tensor:
        """Whether each entry is an ancestor of each new token, or the token itself. [B, 1, T, S]"""
        tokens, offsets = self.position_ids.shape[1], self.offsets(capacity)
        is_new = (offsets >= 0) & (offsets < tokens)
        index = offsets.clamp(0, tokens - 1).unsqueeze(1).expand(-1, tokens, -1)
        among_new = torch.gather(self.tree_mask, 2, index)  # [B, T, S]
        return ((offsets < 0).unsqueeze(1) | (among_new & is_new.unsqueeze(1))).unsqueeze(1)

    def entries(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries of the ancestors at distances count - 1, …, 1, 0, and whether they exist. [B, T, count] and [B, T, count]

        An ancestor before the sequence's first token does not exist; its entry is 0.
        """
        if count not in self._entries:
            tokens = self.position_ids.shape[1]
            lengths, numbers = self.cache_lengths.unsqueeze(1), torch.arange(tokens).unsqueeze(0)  # [B, 1], [1, T]
            parents = self._parents(numbers)
            node = numbers.expand_as(self.position_ids)  # [B, T]: the ancestor's number among the new tokens, if it is one
            places: list[torch.Tensor] = []
            found: list[torch.Tensor] = []
            for distance in range(count):
                position = self.position_ids - distance
                node = torch.gather(parents, 1, node) if distance else node
                place = torch.where(position < lengths, position, lengths + node)
                places.insert(0, place.clamp(min=0))
                found.insert(0, position >= 0)
            self._entries[count] = torch.stack(places, -1), torch.stack(found, -1)
        return self._entries[count]

    def _parents(self, numbers: torch.Tensor) -> torch.Tensor:
        """The number of each new token's parent among the new tokens; 0 if it is cached. [B, T]"""
        before = self.position_ids.unsqueeze(1) == self.position_ids.unsqueeze(2) - 1  # [B, T, T]: j is one before i
        parent = (self.tree_mask & before).float()
        return (parent * numbers.float()).sum(-1).long()  # in floats, which every runtime can sum


def gathered(cached: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Entries of a cache tensor by their numbers. [B, 1, S, C] and [B, N] -> [B, N, C]"""
    head = torch.zeros_like(entries)
    return torch.onnx.ops.symbolic(
        "GatherND",
        [cached, torch.stack([head, entries], -1)],
        attrs={"batch_dims": 1},
        dtype=cached.dtype,
        shape=(*entries.shape, cached.shape[-1]),
        version=MIN_OPSET,
    )
