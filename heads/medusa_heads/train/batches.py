"""The order of training data. It depends only on seed and epoch, so a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def row_batches(num_rows: int, batch_size: int, seed: int, epoch: int, block: int = 1) -> list[IntArray]:
    """Rows in random order, in batches of equal size. Rows left over are skipped in this epoch.

    Args:
        num_rows: number of rows.
        batch_size: rows per batch.
        seed: seed of the order.
        epoch: number of the epoch, from 0. Each has its own order.
        block: number of adjacent rows that stay together.
    """
    generator = np.random.default_rng([seed, epoch])
    shift = int(generator.integers(block)) if block > 1 else 0  # so that the blocks differ between epochs
    starts = generator.permutation(-(-(num_rows + shift) // block)) * block - shift
    order = (starts[:, None] + np.arange(block)).ravel()
    order = order[(order >= 0) & (order < num_rows)]
    size = min(batch_size, num_rows)
    return [order[start : start + size] for start in range(0, num_rows - size + 1, size)]


def sequence_batches(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[IntArray]:
    """Sequences in batches of similar length with at most `batch_tokens` tokens, including padding, in random order.

    A longer sequence is a batch by itself.
    """
    generator = np.random.default_rng([seed, epoch])
    # so that sequences have other neighbours in each epoch
    noisy = np.asarray(lengths) * generator.uniform(0.9, 1.1, len(lengths))
    batches: list[list[int]] = [[]]
    longest = 0
    for place in np.argsort(noisy):
        longest = max(longest, lengths[place])
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lengths[place]
        batches[-1].append(int(place))
    return [np.array(batches[index]) for index in generator.permutation(len(batches))]
