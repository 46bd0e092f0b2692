"""What the decoding loop asks of a device: run the two graphs, own the KV cache, move entries within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medusa_runtime.errors import CapacityError
from medusa_runtime.manifest import Manifest
from medusa_runtime.tree import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass tells about the rows that were asked for."""

    greedy_ids: IntArray  # [B, R] the most likely next token
    logits: npt.NDArray[np.floating] | None = None  # [B, R, V], only on request


@dataclass(frozen=True)
class HeadOutput:
    """The heads' candidates, best first."""

    token_ids: IntArray  # [B, K, M]
    log_probs: FloatArray  # [B, K, M]


class Backend(Protocol):
    """Runs a bundle's graphs on one device. The cache, and the last step's hidden rows, stay there.

    The letters are those of docs/onnx-contract.md: B sequences, T new tokens, R rows to evaluate, S slots, K heads,
    M candidates a head.
    """

    @property
    def manifest(self) -> Manifest:
        """The bundle's facts and limits."""
        ...

    @property
    def capacity(self) -> int:
        """Slots a sequence has in the cache now."""
        ...

    @property
    def epoch(self) -> int:
        """How often the cache was started anew: who finds another number than before has lost it to somebody else."""
        ...

    def reset(self, batch_size: int, capacity: int) -> None:
        """Start anew with an empty cache for so many sequences, of at least `capacity` slots each; it may shrink.

        Raises:
            CapacityError: as for `reserve`.
        """
        ...

    def reserve(self, batch_size: int, capacity: int) -> None:
        """Make room for `capacity` slots for each of `batch_size` sequences, keeping what is cached.

        Raises:
            CapacityError: the bundle's limits, or the memory, do not allow it.
        """
        ...

    def step(
        self,
        input_ids: IntArray,  # [B, T]
        position_ids: IntArray,  # [B, T]
        tree_mask: BoolArray,  # [B, T, T]
        cache_lengths: IntArray,  # [B]
        logit_rows: IntArray,  # [B, R]
        *,
        with_logits: bool = False,
    ) -> StepOutput:
        """One forward pass: attend, write the T new entries at each sequence's cache length, evaluate R rows.

        Raises:
            CapacityError: the new entries would pass the capacity.
        """
        ...

    def propose(self, rows: IntArray) -> HeadOutput:
        """Evaluate the heads at one of the last step's R rows for each sequence. rows: [B]."""
        ...

    def commit(self, sequence: int, start: int, nodes: IntArray) -> None:
        """Move a sequence's cache entries at slots ``start + nodes`` to ``start, start + 1 …``. nodes: [A], ascending."""
        ...


def require_room(cache_lengths: IntArray, new_tokens: int, capacity: int) -> None:
    """Refuse a step that would write past the capacity: some engines drop such writes without a word."""
    if (needed := int(cache_lengths.max()) + new_tokens) > capacity:
        raise CapacityError(f"the step needs {needed} cache slots, the cache has {capacity}")
