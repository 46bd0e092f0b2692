"""What is told of one answer. It imports only the standard library, so that it runs in every engine's environment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def timed(started: float, times: Sequence[float], text: str, tokens: int) -> dict[str, Any]:
    """What is told of one answer."""
    return {
        "text": text,
        "tokens": tokens,
        "first_ms": 1e3 * (times[0] - started),
        "gaps_ms": [1e3 * (then - before) for before, then in pairwise(times)],
        "token_ms": 1e3 * (times[-1] - times[0]) / max(1, tokens - 1),
    }
