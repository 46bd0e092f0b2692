"""The cache of a traced model, in the place of Transformers' own: what layers keep of each token is scattered into tensors."""

from __future__ import annotations

from typing import Any

import torch

from medusa_export.opsets import MIN_OPSET
from medusa_export.trace.ancestors import Ancestors
from medusa_export.trace.short_convolution import ShortConvolution
from medusa_runtime.bundle.cache_layout import CAPACITY_AXIS


class RecurrentStateError(Exception):
    """A layer keeps a state of all tokens so far."""


class ScatterCache:
    """Preallocated tensors, into which new entries are written at each sequence's length.

    It has the methods of Transformers' ``Cache`` that decoders call.

    Args:
        past: by name, such as ``0.key``: [B, H, S, D].
        ancestors: of the new tokens.
    """

    is_compileable = False
    is_initialized = True  # so that no prompt is taken for the first part of one

    def __init__(self, past: dict[str, torch.Tensor], ancestors: Ancestors) -> None:
        self.past, self.ancestors = past, ancestors
        self.present: dict[str, torch.Tensor] = {}
        self.waiting: list[ShortConvolution] = []  # convolutions whose input was cached, and which were not computed yet
        self.scanned_layer = -1  # the layer that asked for its recurrent state last
        self.scanned: set[int] = set()  # layers whose recurrence was computed on entries, see `medusa_export.trace.state_space`

    @property
    def capacity(self) -> int:
        """S, the entries of each sequence."""
        return next(iter(self.past.values())).shape[CAPACITY_AXIS]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache the keys and values of new tokens, [B, Hkv, T, D]. Returns those of all entries, [B, Hkv, S, D]."""
        return self.write(f"{layer}.key", key), self.write(f"{layer}.value", value)

    def update_conv_state(self, states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Cache what a short convolution reads, [B, C, T]. The convolution that follows is `ShortConvolution`'s."""
        name = f"{layer_idx}.conv{state_idx or ''}"
        cached = self.write(name, states.transpose(1, 2).unsqueeze(1))
        self.waiting.append(ShortConvolution(states, cached, self.ancestors))
        return states

    def update_recurrent_state(self, state: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        """A state of all tokens so far is not cached; there is none if the recurrence was computed on entries.

        Raises:
            RecurrentStateError: there is one.
        """
        if layer_idx not in self.scanned:
            raise RecurrentStateError(f"its layer {layer_idx} keeps a recurrent state, which a tree of drafts cannot branch")
        return state

    @staticmethod
    def get_conv_state(*_: Any, **__: Any) -> None:
        """There is no state apart from the entries: decoders then take the path of a prompt."""

    def get_recurrent_state(self, layer_idx: int, *_: Any, **__: Any) -> None:
        """As `get_conv_state`."""
        self.scanned_layer = layer_idx

    @staticmethod
    def has_previous_state(*_: Any, **__: Any) -> bool:
        return False

    @staticmethod
    def is_recording_past(*_: Any) -> bool:
        return False

    def update_indexer(self, key: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """What scores the tokens to select, [B, T, D], is not cached; see `medusa_export.trace.selection`."""
        return key.new_zeros(key.shape[0], self.capacity, key.shape[-1])

    def write(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Cache what a layer keeps of new tokens. [B, H, T, D] -> [B, H, S, D]"""
        past = self.past[name]
        self.present[name] = torch.onnx.ops.symbolic(
            "TensorScatter",
            [past, new, self.ancestors.cache_lengths],
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
