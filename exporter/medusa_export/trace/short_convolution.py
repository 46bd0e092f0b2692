"""Short causal convolutions over a tree of tokens: what a convolution reads is cached for each token, as keys are.

A decoder hands what it convolves to its cache, and then calls ``torch.nn.functional.conv1d``. The cache keeps these rows, and
the convolution is computed on each token's own ancestors instead of its neighbours in the step. So slots, prefixes and moved
entries work as they do for keys, and trees are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from medusa_export.trace.ancestors import Ancestors, gathered


class UnknownStateError(Exception):
    """A layer keeps something that its cache does not know of."""


class ShortConvolution:
    """One convolution's input, which waits for the weights.

    Args:
        states: the new tokens' rows, as the decoder has them. [B, C, T]
        cached: the rows of all entries, new ones included. [B, 1, S, C]
        ancestors: of the new tokens.
    """

    def __init__(self, states: torch.Tensor, cached: torch.Tensor, ancestors: Ancestors) -> None:
        self.states, self.cached, self.ancestors = states, cached, ancestors

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Convolve. The weight is [C, 1, L]; the result is [B, C, T]."""
        batch, channels, tokens = self.states.shape
        width = weight.shape[-1]
        entries, found = self.ancestors.entries(width)  # [B, T, L]
        rows = gathered(self.cached, entries.reshape(batch, tokens * width))
        windows = rows.reshape(batch, tokens, width, channels) * found.unsqueeze(-1).to(rows.dtype)  # [B, T, L, C]
        result = (windows * weight[:, 0].transpose(0, 1)).sum(2)  # [B, T, C]
        return (result if bias is None else result + bias).transpose(1, 2)

    def is_of(self, rows: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
        """Whether a call of ``conv1d`` is this convolution: depthwise, of the rows that were cached."""
        channels = self.states.shape[1]
        return rows.shape == self.states.shape and groups == channels and weight.shape[:2] == (channels, 1)


@contextmanager
def convolved_along_paths(waiting: list[ShortConvolution]) -> Iterator[None]:
    """While open, ``conv1d`` of rows that were just cached follows each token's path.

    Args:
        waiting: convolutions whose input was cached; the one that is computed is taken out.

    Raises:
        UnknownStateError: a convolution over several tokens reads rows that were not cached.
    """
    original: Any = functional.conv1d

    def conv1d(
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        if waiting and waiting[-1].is_of(rows, weight, groups):
            return waiting.pop()(weight, bias)
        if weight.shape[-1] > 1:
            raise UnknownStateError("it convolves over tokens without caching what it reads")
        result: torch.Tensor = original(rows, weight, bias, stride, padding, dilation, groups)
        return result

    torch_functions: Any = functional
    torch_functions.conv1d = conv1d
    try:
        yield
    finally:
        torch_functions.conv1d = original
