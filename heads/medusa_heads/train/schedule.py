"""How rates and weights change over a run."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """Linear from nothing to 1 over the warm-up, then half a cosine down to nothing at the end.

    Args:
        step: from 0.
        num_steps: of the whole run.
        warmup: part of the run.
    """
    rising = math.ceil(warmup * num_steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def weight_factor(step: int, num_steps: int, schedule: Literal["constant", "linear", "sine"]) -> float:
    """How much of the heads' loss weight (the paper's λ₀) counts at a step: all along, or coming up to it over the run."""
    done = min(1.0, step / max(1, num_steps - 1))
    return {"constant": 1.0, "linear": done, "sine": math.sin(0.5 * math.pi * done)}[schedule]
