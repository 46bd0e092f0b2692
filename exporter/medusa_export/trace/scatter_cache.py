"""The cache of a traced model, in the place of Transformers' own: what layers keep of each token is scattered into tensors."""

from __future__ import annotations

from typing import Any

import torch

from medusa_export.trace.attention_node import MIN_OPSET
from medusa_runtime.bundle.cache_layout import CAPACITY_AXIS


class ScatterCache:
    """Preallocated tensors, into which new entries are written at each sequence's length.

    It has the methods of Transformers' ``Cache`` that decoders call.

    Args:
        past: by name, such as ``0.key``: [B, H, S, D].
        cache_lengths: valid entries of each sequence. [B]
    """

    is_compileable = False
    is_initialized = True  # so that no prompt is taken for the first part of one

    def __init__(self, past: dict[str, torch.Tensor], cache_lengths: torch.Tensor) -> None:
        self.past = past
        self.cache_lengths = cache_lengths
        self.present: dict[str, torch.Tensor] = {}

    @property
    def capacity(self) -> int:
        """S, the entries of each sequence."""
        return next(iter(self.past.values())).shape[CAPACITY_AXIS]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache the keys and values of new tokens, [B, Hkv, T, D]. Returns those of all entries, [B, Hkv, S, D]."""
        return self.write(f"{layer}.key", key), self.write(f"{layer}.value", value)

    @staticmethod
    def update_indexer(key: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """What scores the tokens to select is not cached; see `medusa_export.trace.selection`."""
        return key

    def write(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Cache what a layer keeps of new tokens. [B, H, T, D] -> [B, H, S, D]"""
        past = self.past[name]
        self.present[name] = torch.onnx.ops.symbolic(
            "TensorScatter",
            [past, new, self.cache_lengths],
            attrs={"axis": CAPACITY_AXIS, "mode": "linear"},
            dtype=past.dtype,
            shape=(*new.shape[:2], past.shape[2], new.shape[3]),  # the batch by its name in the step, not in the cache
            version=MIN_OPSET,
        )
        return self.present[name]

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_max_cache_shape(self, *_: Any) -> int:
        return self.capacity
