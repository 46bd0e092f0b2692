"""Differences between logits, and between greedy decodings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medusa_export.check.validation_report import Divergence, LogitsDifference
from medusa_runtime.bundle.manifest import PORTABLE

Rows = npt.NDArray[np.floating]
BLOCK_ELEMENTS = 1 << 21  # logits that are compared at a time


def logits_difference(what: str, found: Rows, reference: Rows, target: str = PORTABLE) -> LogitsDifference:
    """The largest differences over rows of logits [R, V]. If `found` has a value that is not finite, they are infinite.

    Rows are compared block by block: with a large vocabulary, the numbers in between would take more memory than the model.
    """
    if not all(np.isfinite(found[rows]).all() for rows in _blocks(found)):
        return LogitsDifference(
            what=what,
            target=target,
            num_rows=len(found),
            max_abs=np.inf,
            min_cosine=-1.0,
            max_kl=np.inf,
            mean_kl=np.inf,
        )
    largest, cosines, divergences = zip(*(_differences(found[rows], reference[rows]) for rows in _blocks(found)), strict=True)
    divergence = np.concatenate(divergences)
    return LogitsDifference(
        what=what,
        target=target,
        num_rows=len(found),
        max_abs=max(largest),
        min_cosine=min(cosines),
        max_kl=float(divergence.max()),
        mean_kl=float(divergence.mean()),
    )


def _blocks(rows: Rows) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // rows.shape[-1])
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _differences(found: Rows, reference: Rows) -> tuple[float, float, Rows]:
    """The largest difference of a logit, the smallest cosine, and the KL divergence of each row."""
    found, reference = found.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(reference, axis=-1)
    log_p, log_q = log_softmax(reference), log_softmax(found)
    divergence: Rows = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    cosine = float(((found * reference).sum(-1) / np.maximum(norms, 1e-300)).min())
    return float(np.abs(found - reference).max()), cosine, divergence


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
