"""Rotary embeddings that a model multiplies as complex numbers, in real numbers: ONNX has no complex ones."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

FUNCTION, ANGLES = "apply_rotary_emb", "freqs_cis"  # a function of the model's file, and its complex parameter [B, T, D / 2]


@contextmanager
def real_rotary(model: PreTrainedModel, heads_axis: int | None) -> Iterator[None]:
    """While open, a model for which `complex_rotary` found an axis rotates in real numbers."""
    if heads_axis is None:
        yield
        return
    with patch.object(sys.modules[type(model).__module__], FUNCTION, partial(_rotate_both, heads_axis)):
        yield


def complex_rotary(model: PreTrainedModel) -> int | None:
    """The axis of the heads in what a model's ``apply_rotary_emb(query, key, freqs_cis)`` rotates, if it has one."""
    original = getattr(sys.modules[type(model).__module__], FUNCTION, None)
    if original is None or ANGLES not in inspect.signature(original).parameters:
        return None
    return _heads_axis(original)


def _heads_axis(original: Callable[..., Any]) -> int:
    """The axis of the heads in query and key, which the angles lack: 2 for [B, T, H, D], 1 for [B, H, T, D]."""
    try:
        original(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 2, dtype=torch.complex64))
    except RuntimeError:  # two tokens are taken for two heads, and three heads for three tokens
        return 1
    return 2


def _rotate_both(
    heads_axis: int, query: torch.Tensor, key: torch.Tensor, freqs_cis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.view_as_real(freqs_cis).unsqueeze(heads_axis)  # [B, T, 1, D / 2, 2] or [B, 1, T, D / 2, 2]
    return _rotate(query, angles), _rotate(key, angles)


def _rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours as complex numbers, times cos + i sin."""
    real, imaginary = states.float().reshape(*states.shape[:-1], -1, 2).unbind(-1)
    cos, sin = angles.unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return turned.flatten(3).type_as(states)
