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

from medusa_export.opsets import MIN_OPSET
from medusa_export.passes.common.attention_math import SINK_ATTENTION, SINK_DOMAIN
from medusa_export.trace import experts_node

ATTENTION_NAME = "medusa_onnx"
# Arguments that do not change the result: our masks say the same (`is_causal`, `sliding_window`), they are about training or
# what else is returned, the rotary embedding has used them already, or they select tokens that are all of them (``indices``,
# see `medusa_export.trace.selection`).
HARMLESS = frozenset(
    {"cache_position", "dropout", "indices", "is_causal", "position_ids", "return_dict", "sliding_window", "use_cache"}
)


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
    s_aux: torch.Tensor | None = None,  # [Hq]: sinks, one more score for each query head
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention as one ``Attention`` node, or ``SinkAttention``. Returns [B, T, Hq, D].

    Raises:
        UnknownAttentionError: the model passes an argument that could change the result.
    """
    given = {name for name, value in others.items() if value is not None and not name.startswith("output_")}
    if unknown := sorted(given - HARMLESS):
        raise UnknownAttentionError(f"its attention has the extra inputs {', '.join(unknown)}")
    width = query.shape[-1]
    scale = scaling if scaling is not None else width**-0.5
    attended = attention_node(query, key, value, attention_mask, s_aux, scale=float(scale), softcap=softcap)
    return attended.transpose(1, 2).contiguous(), None


def attention_node(
    query: torch.Tensor,  # [B, Hq, T, D]
    key: torch.Tensor,  # [B, Hkv, S, D]
    value: torch.Tensor,  # [B, Hkv, S, D]
    mask: torch.Tensor,  # [B, 1, T, S] bool
    sinks: torch.Tensor | None = None,  # [Hq]
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The node ``Attention``, or ``SinkAttention`` if there are sinks. [B, Hq, T, D]"""
    batch, heads, tokens, _ = query.shape
    attributes: dict[str, Any] = {"scale": scale} | ({"softcap": float(softcap)} if softcap else {})
    return torch.onnx.ops.symbolic(
        "Attention" if sinks is None else f"{SINK_DOMAIN}::{SINK_ATTENTION}",
        [query, key, value, mask] if sinks is None else [query, key, value, mask, sinks],
        attrs=attributes,
        dtype=query.dtype,
        shape=(batch, heads, tokens, value.shape[-1]),
        version=MIN_OPSET if sinks is None else 1,
    )


def register() -> None:
    """Register ``attn_implementation="medusa_onnx"`` with Transformers, and experts of that name. It may be called again."""
    AttentionInterface.register(ATTENTION_NAME, onnx_attention)
    experts_node.register(ATTENTION_NAME)
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
