"""The attention of a traced decoder: the standard ``Attention`` and ``TensorScatter`` operators instead of its own kernels.

Transformers can replace a model's attention by name. Ours emits the ONNX operator directly, so we copy no model code and can
trace every architecture that uses the attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

ATTENTION_NAME = "medusa_onnx"
# Arguments that do not change the result. Selected tokens (``indices``) are all of them, see `medusa_export.trace.selection`.
HARMLESS = frozenset({"position_ids", "cache_position", "indices"})
MIN_OPSET = 24  # the first opset with TensorScatter, and with an Attention that CPU, CUDA and TensorRT compute alike


class UnknownAttentionError(Exception):
    """A model's attention is not plain scaled dot-product attention."""


def onnx_attention(
    _: torch.nn.Module,
    query: torch.Tensor,  # [B, Hq, T, D]
    key: torch.Tensor,  # [B, Hkv, S, D]
    value: torch.Tensor,  # [B, Hkv, S, D]
    attention_mask: torch.Tensor,  # [B, 1, T, S] bool
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention as one ``Attention`` node. Returns [B, T, Hq, D], as Transformers expects.

    Raises:
        UnknownAttentionError: the model passes a tensor that would change the result, such as attention sinks.
    """
    if unknown := [name for name, value in others.items() if isinstance(value, torch.Tensor) and name not in HARMLESS]:
        raise UnknownAttentionError(f"its attention has the extra inputs {', '.join(unknown)}")
    batch, heads, tokens, width = query.shape
    attributes: dict[str, Any] = {"scale": float(scaling if scaling is not None else width**-0.5)}
    if softcap:
        attributes["softcap"] = float(softcap)
    attended = torch.onnx.ops.symbolic(
        "Attention",
        [query, key, value, attention_mask],
        attrs=attributes,
        dtype=query.dtype,
        shape=(batch, heads, tokens, value.shape[-1]),
        version=MIN_OPSET,
    )
    return attended.transpose(1, 2).contiguous(), None


def register() -> None:
    """Register ``attn_implementation="medusa_onnx"`` with Transformers. It may be called again."""
    AttentionInterface.register(ATTENTION_NAME, onnx_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, attention_mask=None, **__: attention_mask)


@contextmanager
def counted() -> Iterator[list[torch.nn.Module]]:
    """While open, note each attention that runs by its module."""
    modules: list[torch.nn.Module] = []

    def note_and_attend(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        modules.append(module)
        return onnx_attention(module, *args, **kwargs)

    AttentionInterface.register(ATTENTION_NAME, note_and_attend)
    try:
        yield modules
    finally:
        register()
