"""In which order data is taken. Everything follows from the seed and the epoch, so that a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def row_batches(num_rows: int, batch_size: int, seed: int, epoch: int, block: int = 1) -> list[IntArray]:
    """Rows in random order, in batches of one size; what is left over is left out this time.

    Args:
        num_rows: there are.
        batch_size: rows of a batch.
        seed: of the order.
        epoch: from 0; each has an order of its own.
        block: so many neighbours stay together.
    """
    generator = np.random.default_rng([seed, epoch])
    shift = int(generator.integers(block)) if block > 1 else 0  # so that blocks differ between epochs
    starts = generator.permutation(-(-(num_rows + shift) // block)) * block - shift
    order = (starts[:, None] + np.arange(block)).ravel()
    order = order[(order >= 0) & (order < num_rows)]
    size = min(batch_size, num_rows)
    return [order[start : start + size] for start in range(0, num_rows - size + 1, size)]


def sequence_batches(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[IntArray]:
    """Sequences in batches of alike lengths that hold at most `batch_tokens`, padding included, in random order.

    A sequence that is longer than that is a batch of its own.
    """
    generator = np.random.default_rng([seed, epoch])
    noisy = np.asarray(lengths) * generator.uniform(0.9, 1.1, len(lengths))  # so that neighbours change between epochs
    batches: list[list[int]] = [[]]
    longest = 0
    for place in np.argsort(noisy):
        longest = max(longest, lengths[place])
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lengths[place]
        batches[-1].append(int(place))
    return [np.array(batches[index]) for index in generator.permutation(len(batches))]
