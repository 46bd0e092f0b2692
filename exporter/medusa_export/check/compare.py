"""Differences between logits, and between greedy decodings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medusa_export.check.validation_report import Divergence, LogitsDifference
from medusa_runtime.bundle.manifest import PORTABLE

Rows = npt.NDArray[np.floating]


def logits_difference(what: str, found: Rows, reference: Rows, target: str = PORTABLE) -> LogitsDifference:
    """The largest differences over rows of logits [R, V]. If `found` has a value that is not finite, they are infinite."""
    found, reference = found.astype(np.float64), reference.astype(np.float64)
    if not np.isfinite(found).all():
        return LogitsDifference(
            what=what,
            target=target,
            num_rows=len(found),
            max_abs=np.inf,
            min_cosine=-1.0,
            max_kl=np.inf,
            mean_kl=np.inf,
        )
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(reference, axis=-1)
    log_p, log_q = log_softmax(reference), log_softmax(found)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return LogitsDifference(
        what=what,
        target=target,
        num_rows=len(found),
        max_abs=float(np.abs(found - reference).max()),
        min_cosine=float(((found * reference).sum(-1) / np.maximum(norms, 1e-300)).min()),
        max_kl=float(divergence.max()),
        mean_kl=float(divergence.mean()),
    )


def divergences(token_ids: Sequence[int], reference: Rows) -> list[Divergence]:
    """The positions at which a token is not the reference's choice after the same prefix.

    Args:
        token_ids: an answer of A tokens.
        reference: the reference's logits for each token, given the tokens before it. [A, V]
    """
    choices = reference.argmax(-1)
    return [
        _divergence(position, token, int(choices[position]), reference[position])
        for position, token in enumerate(token_ids)
        if token != choices[position]
    ]


def first_divergence(token_ids: Sequence[int], others: Sequence[int], reference: Rows) -> Divergence | None:
    """The first position at which two answers differ, with the reference's logits of both tokens; None if they are equal."""
    for position, (token, other) in enumerate(zip(token_ids, others, strict=False)):
        if token != other:
            return _divergence(position, token, other, reference[position])
    if len(token_ids) != len(others):
        position = min(len(token_ids), len(others)) - 1
        return Divergence(
            position=position, token_id=-1, reference_token_id=-1, logit=0, reference_logit=0, margin=float("inf")
        )
    return None


def log_softmax(logits: Rows) -> Rows:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Rows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _divergence(position: int, token: int, other: int, logits: Rows) -> Divergence:
    return Divergence(
        position=position,
        token_id=token,
        reference_token_id=other,
        logit=float(logits[token]),
        reference_logit=float(logits[other]),
        margin=abs(float(logits[other]) - float(logits[token])),
    )
