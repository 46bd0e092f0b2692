"""Schedules of learning rates and loss weights."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """Linear from 0 to 1 during the warm-up, then half a cosine down to 0 at the end.

    Args:
        step: the step, from 0.
        num_steps: steps of the whole run.
        warmup: part of the run that is warm-up.
    """
    rising = math.ceil(warmup * num_steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def weight_factor(step: int, num_steps: int, schedule: Literal["constant", "linear", "sine"]) -> float:
    """The part of the heads' loss weight (the paper's λ₀) that is used at a step: constant, or growing over the run."""
    done = min(1.0, step / max(1, num_steps - 1))
    return {"constant": 1.0, "linear": done, "sine": math.sin(0.5 * math.pi * done)}[schedule]
