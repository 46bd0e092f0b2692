"""Scaling and capping that some architectures apply to the LM head's output."""

from __future__ import annotations

from typing import Any

import torch


def shaped_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """The logits that the model itself returns.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 applies a soft cap. This does not change
    which token is most likely, but it changes probabilities.

    Args:
        logits: the LM head's output. [..., V]
        config: the text model's configuration.
    """
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits
