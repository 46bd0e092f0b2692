"""Measures the loss of quality by quantisation: both bundles read the same texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from medusa_runtime.backends.base import Backend

CHUNK = 256  # tokens per step, which limits the memory for logits


@runtime_checkable
class RowsSource(Protocol):
    """What gives logits of a text, such as a model in PyTorch."""

    def rows(self, text: Sequence[int], start: int, stop: int) -> npt.NDArray[np.floating]:
        """Logits after the tokens `start` … `stop` - 1 of a text. [stop - start, V]"""
        ...


Source = Backend | RowsSource


class Quality(BaseModel):
    """How much a quantised bundle differs from its original."""

    num_tokens: int
    perplexity: float
    perplexity_before: float
    mean_kl: float  # nats, from the original's next-token distribution to the quantised bundle's
    max_kl: float
    same_greedy: float  # part of the positions at which both choose the same token
    tokens_per_step_before: float | None = None  # the original's, in greedy decoding with the bundle's tree, if it was decoded
    tokens_per_step: float = 0.0

    def line(self) -> str:
        """The result as one line."""
        before = "" if self.tokens_per_step_before is None else f"{self.tokens_per_step_before:.3f} → "
        change = self.perplexity / self.perplexity_before - 1
        return (
            f"KL {self.mean_kl:.4f} nats on average and {self.max_kl:.4f} at the worst position, "
            f"perplexity {self.perplexity_before:.3f} → "
            f"{self.perplexity:.3f} ({change:+.2%}), the same greedy token at {self.same_greedy:.1%} of "
            f"{self.num_tokens} positions, {before}{self.tokens_per_step:.3f} tokens per step"
        )


def compare(before: Source, after: Backend, texts: Iterable[Sequence[int]]) -> Quality:
    """Read the same texts with both bundles, and compare their next-token distributions at each position.

    Args:
        before: the original: its backend, or what gives its logits.
        after: the quantised bundle's backend.
        texts: token ids of each text, at least two.
    """
    losses: list[npt.NDArray[np.float64]] = []
    kls, same, num_tokens = [], 0, 0
    for text in texts:
        pair = []
        for backend in (before, after):
            if not isinstance(backend, RowsSource):
                backend.resize(1, len(text))
        for start in range(0, len(text), CHUNK):
            pair = [_log_probs(backend, text, start) for backend in (before, after)]  # [T, V] each
            old, new = pair
            kls.append((np.exp(old) * (old - new)).sum(-1))
            same += int((old.argmax(-1) == new.argmax(-1)).sum())
            following = np.array(text[start + 1 : start + CHUNK + 1], np.int64)  # empty if the chunk is only the last token
            losses.append(np.stack([-rows[np.arange(len(following)), following] for rows in pair]))
        num_tokens += len(text)
    loss = np.concatenate(losses, axis=1).mean(1)
    kl = np.concatenate(kls)
    return Quality(
        num_tokens=num_tokens,
        perplexity=float(np.exp(loss[1])),
        perplexity_before=float(np.exp(loss[0])),
        mean_kl=max(float(kl.mean()), 0.0),
        max_kl=max(float(kl.max()), 0.0),
        same_greedy=same / num_tokens,
    )


def _log_probs(backend: Source, text: Sequence[int], start: int) -> npt.NDArray[np.float64]:
    if isinstance(backend, RowsSource):
        return _log_softmax(backend.rows(text, start, min(start + CHUNK, len(text))))
    tokens = np.array([text[start : start + CHUNK]], np.int64)
    count = tokens.shape[1]
    rows = np.arange(count)[None]
    output = backend.step(tokens, start + rows, np.tri(count, dtype=np.bool_)[None], np.array([start]), rows, with_logits=True)
    assert output.logits is not None
    return _log_softmax(output.logits[0])


def _log_softmax(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    logits = rows.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
