"""The KV cache of a traced decoder: the standard ``TensorScatter`` operator."""

from __future__ import annotations

from typing import Any

import torch

from medusa_export.trace.attention_node import MIN_OPSET


class ScatterCache:
    """The preallocated KV cache of a traced model: new entries are written at each sequence's length.

    It has the methods of Transformers' ``Cache`` that decoders call.
    """

    is_compileable = False
    is_initialized = True  # so that no prompt is taken for the first part of one

    def __init__(self, past: dict[int, tuple[torch.Tensor, torch.Tensor]], cache_lengths: torch.Tensor) -> None:
        self.past = past  # layer -> key, value: [B, Hkv, S, D]
        self.cache_lengths = cache_lengths  # [B]
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past_key, past_value = self.past[layer]
        self.present[layer] = (self._scatter(past_key, key), self._scatter(past_value, value))
        return self.present[layer]

    @staticmethod
    def update_indexer(key: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """What scores the tokens to select is not cached; see `medusa_export.trace.selection`."""
        return key

    def _scatter(self, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            [buffer, new, self.cache_lengths],
            attrs={"axis": 2, "mode": "linear"},
            dtype=buffer.dtype,
            shape=(*new.shape[:2], buffer.shape[2], new.shape[3]),  # the batch by its name in the step, not in the cache
            version=MIN_OPSET,
        )

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_max_cache_shape(self, *_: Any) -> int:
        return next(iter(self.past.values()))[0].shape[2]
