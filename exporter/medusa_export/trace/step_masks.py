"""The masks of a step, one for each kind of attention that a model's layers have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from medusa_export.model.checkpoint import CHUNKED, FULL, HYBRID, SLIDING, WITHOUT_ATTENTION

Masks = torch.Tensor | dict[str, Any]  # [B, 1, T, S]: one for all layers, or by the layers' kind; None for one without


@dataclass(frozen=True)
class StepMasks:
    """What a model's layers may attend to.

    Args:
        layer_types: the kind of attention of each layer: `FULL`, `SLIDING` or `CHUNKED`.
        sliding_window: how many positions back a `SLIDING` layer attends, itself included.
        chunk_size: a `CHUNKED` layer attends to tokens whose position is in the same chunk of this many.
    """

    layer_types: list[str]
    sliding_window: int | None
    chunk_size: int | None

    def __call__(
        self,
        position_ids: torch.Tensor,  # [B, T]
        tree_mask: torch.Tensor,  # [B, T, T] bool
        cache_lengths: torch.Tensor,  # [B]
        capacity: int,
    ) -> tuple[Masks, torch.Tensor]:
        """The masks, and the position of each cache entry and new token [B, S]."""
        tokens = position_ids.shape[1]
        slots = torch.arange(capacity).unsqueeze(0)  # [1, S]
        offset = slots - cache_lengths.unsqueeze(1)  # [B, S]: negative for cached entries, then new tokens, then unused
        cached = offset < 0
        new = (offset >= 0) & (offset < tokens)
        index = offset.clamp(0, tokens - 1)  # [B, S]
        among_new = torch.gather(tree_mask, 2, index.unsqueeze(1).expand(-1, tokens, -1))  # [B, T, S]
        full = (cached.unsqueeze(1) | (among_new & new.unsqueeze(1))).unsqueeze(1)  # [B, 1, T, S]
        kinds = {FULL if kind == HYBRID else kind for kind in self.layer_types} - WITHOUT_ATTENTION
        masks = {FULL: full} if FULL in kinds or not kinds else {}
        key_positions = torch.where(cached, slots, torch.gather(position_ids, 1, index))  # [B, S]
        if kinds != {FULL}:
            keys = key_positions.unsqueeze(1)  # [B, 1, S]
            queries = position_ids.unsqueeze(2)  # [B, T, 1]
            if SLIDING in kinds:
                assert self.sliding_window is not None  # `Backbone.layer_types` has checked it
                masks[SLIDING] = full & (queries - keys < self.sliding_window).unsqueeze(1)
            if CHUNKED in kinds:
                assert self.chunk_size is not None
                masks[CHUNKED] = full & (queries // self.chunk_size == keys // self.chunk_size).unsqueeze(1)
        if len(masks) == 1:
            return next(iter(masks.values())), key_positions
        return masks | dict.fromkeys(WITHOUT_ATTENTION & {*self.layer_types}), key_positions
