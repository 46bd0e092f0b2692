"""What some architectures do to the LM head's output before it is a distribution."""

from __future__ import annotations

from typing import Any

import torch


def shaped_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Logits as the model itself gives them.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 caps softly. None of it changes which token
    is best, but all of it changes probabilities.

    Args:
        logits: the LM head's plain product. [..., V]
        config: the text model's configuration.
    """
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits
