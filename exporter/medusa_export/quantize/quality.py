"""What quantising costs in quality: two bundles side by side over the same text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from medusa_runtime.backends.base import Backend

CHUNK = 256  # tokens a step, so that their logits stay few


class Quality(BaseModel):
    """How far a bundle is from the one it was made from."""

    num_tokens: int
    perplexity: float
    perplexity_before: float
    mean_kl: float  # nats, from the next-token distribution before to the one after
    max_kl: float
    same_greedy: float  # part of the places where both choose the same token
    tokens_per_step_before: float = 0.0  # of greedy decoding with the bundle's tree
    tokens_per_step: float = 0.0

    def line(self) -> str:
        """For people."""
        change = self.perplexity / self.perplexity_before - 1
        return (
            f"KL {self.mean_kl:.4f} nats (at most {self.max_kl:.2f}), perplexity {self.perplexity_before:.3f} → "
            f"{self.perplexity:.3f} ({change:+.2%}), the same greedy token in {self.same_greedy:.1%} of "
            f"{self.num_tokens} places, {self.tokens_per_step_before:.3f} → {self.tokens_per_step:.3f} tokens a step"
        )


def compare(before: Backend, after: Backend, texts: Sequence[Sequence[int]]) -> Quality:
    """Read the same texts with both, and compare what they expect at each place.

    Args:
        before: the original.
        after: the quantised one.
        texts: token ids, two or more each.
    """
    losses: list[npt.NDArray[np.float64]] = []
    kls, same, num_tokens = [], 0, 0
    for text in texts:
        pair = []
        for backend in (before, after):
            backend.resize(1, len(text))
        for start in range(0, len(text), CHUNK):
            pair = [_log_probs(backend, text, start) for backend in (before, after)]  # [T, V] each
            old, new = pair
            kls.append((np.exp(old) * (old - new)).sum(-1))
            same += int((old.argmax(-1) == new.argmax(-1)).sum())
            following = np.array(text[start + 1 : start + CHUNK + 1], np.int64)  # none after a last token alone
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


def _log_probs(backend: Backend, text: Sequence[int], start: int) -> npt.NDArray[np.float64]:
    tokens = np.array([text[start : start + CHUNK]], np.int64)
    count = tokens.shape[1]
    rows = np.arange(count)[None]
    output = backend.step(tokens, start + rows, np.tri(count, dtype=np.bool_)[None], np.array([start]), rows, with_logits=True)
    assert output.logits is not None
    logits = output.logits[0].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
