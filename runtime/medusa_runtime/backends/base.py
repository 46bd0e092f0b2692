"""The protocol of backends: they run the two graphs on a device, own the KV cache, and move its entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import BoolArray, FloatArray, IntArray
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import STEP, Manifest
from medusa_runtime.errors import BackendError, CapacityError

CAPACITY_BUCKET = 64  # entries a cache grows by at least


@dataclass(frozen=True)
class StepOutput:
    """The results of one forward pass for the rows that were asked for."""

    greedy_ids: IntArray  # [B, R] the most likely next token
    logits: npt.NDArray[np.floating] | None = None  # [B, R, V], if asked for; the next step may overwrite them
    is_warm: bool = True  # False while the device still compiles or captures this shape; such timings must not be learned from
    finite: BoolArray | None = None  # [B, R] whether the model's numbers are finite; None if the device does not tell

    def is_row_finite(self, row: int, *rows: int) -> bool:
        """Whether a sequence's numbers are finite in some of its R rows, as far as that is known."""
        return self.finite is None or all(self.finite[row, one] for one in rows)


@dataclass(frozen=True)
class HeadOutput:
    """The heads' candidates, the likeliest first."""

    token_ids: IntArray  # [B, K, M]
    log_probs: FloatArray  # [B, K, M]


class Backend(Protocol):
    """Runs a bundle's graphs on one device. The cache, and the last step's hidden rows, stay there.

    The cache has *slots*, one per sequence. Each has room for S *entries*, one per token. A step runs on B neighbouring
    slots. The other letters are those of docs/onnx-contract.md: T new tokens, R rows to evaluate, K heads, M candidates per
    head.
    """

    @property
    def manifest(self) -> Manifest:
        """The bundle's facts and limits."""
        ...

    @property
    def num_slots(self) -> int:
        """How many sequences the cache has room for now."""
        ...

    @property
    def capacity(self) -> int:
        """How many entries a slot has room for now."""
        ...

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int] = ()) -> None:
        """Change the size of the cache, to at least the size asked for. Some devices cannot make it smaller.

        Args:
            num_slots: sequences.
            capacity: entries of each slot.
            lengths: slot i keeps its first ``lengths[i]`` entries. All other entries are zero afterwards.

        Raises:
            CapacityError: the bundle's limits, or the memory, do not allow it. The cache is as it was before.
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
        first_slot: int = 0,
        with_logits: bool = False,
        propose_ahead: bool = False,
    ) -> StepOutput:
        """One forward pass on the slots from `first_slot` on. It writes T new entries after each length and evaluates R rows.

        `propose_ahead` says that `propose` will probably be called next, for the rows that greedy decoding accepts and the
        tokens that it decides there. A device that finds these by itself may run the heads at once.

        Raises:
            CapacityError: the new entries would pass the capacity, or the cache has fewer slots.
        """
        ...

    def propose(self, rows: IntArray, root_ids: IntArray) -> HeadOutput:
        """Evaluate the heads for each of the last step's sequences.

        Args:
            rows: for each sequence, the one of its R rows that the heads read. [B]
            root_ids: the token that was decided after that row. [B]
        """
        ...

    def commit(self, slot: int, start: int, nodes: IntArray) -> None:
        """Move a slot's entries at ``start + nodes`` to ``start, start + 1 …``. nodes: [A], ascending."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        ...

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` entries of two slots."""
        ...

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zero a slot's entries from `start` to `stop`.

        Entries after a sequence's length have the weight 0 in attention. But 0 times NaN is NaN, so a NaN that an earlier
        request left there would spread.
        """
        ...

    def save(self) -> None:
        """Write to disk what makes the next start faster, such as compiled code. The backend can still be used afterwards."""
        ...

    def close(self) -> None:
        """Free the memory of graphs and cache. Afterwards only `close` may be called, and does nothing."""
        ...


def require_room(cache_lengths: IntArray, new_tokens: int, capacity: int) -> None:
    """Refuse a step that would write past the capacity. Some engines ignore such writes silently."""
    if (needed := int(cache_lengths.max()) + new_tokens) > capacity:
        raise CapacityError(f"the step needs {needed} cache entries a slot, the cache has {capacity}")


def require_slots(first_slot: int, batch_size: int, num_slots: int) -> None:
    """Refuse a step on slots that the cache does not have."""
    if not 0 <= first_slot <= first_slot + batch_size <= num_slots:
        raise CapacityError(
            f"the step needs the slots {first_slot} to {first_slot + batch_size - 1}, the cache has {num_slots}"
        )


def not_finite() -> BackendError:
    """The error of a sequence for which the model computed numbers that are not finite."""
    return BackendError(
        "the model's numbers are not finite (NaN or infinity), so no token can be chosen; "
        "a bundle in fp16 may overflow: try fp32 or bf16, and validate the bundle with: medusa-export validate"
    )


def cache_entry_bytes(manifest: Manifest) -> int:
    """Bytes of one token's entry in the cache, all tensors together."""
    return CacheLayout.of(manifest.graphs[STEP]).entry_bytes


def bucket(capacity: int) -> int:
    """The capacity to allocate: the next multiple of 64, or of an eighth of the largest power of two that is not above it.

    So at most an eighth is unused, and growing copies little beside the steps between (docs/decisions/0008-cache-growth.md).
    """
    step = max(CAPACITY_BUCKET, 1 << max(capacity.bit_length() - 4, 0))
    return -(-capacity // step) * step
