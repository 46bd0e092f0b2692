"""Models with attention code of their own, which Transformers cannot replace by name.

Most of them add the mask to the scores, so they are traced as they are, with a mask of numbers. Where the attention is a method
of the module (``_attn``), the standard operator takes its place, if the method is found to compute just that.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from medusa_export.model.checkpoint import ALIBI, FULL, SLIDING, unsupported
from medusa_export.trace.attention_node import ATTENTION_NAME, attention_node
from medusa_export.trace.layers import text_decoder
from medusa_export.trace.step_masks import Masks

METHOD, PARAMETERS = "_attn", ["query", "key", "value", "attention_mask"]
LONGEST_PROBE = 2048  # tokens: a window of more is taken for none


def has_own_attention(model: PreTrainedModel) -> bool:
    """Whether a model's attention is not that of Transformers' interface."""
    return model.config._attn_implementation != ATTENTION_NAME or not model._can_set_attn_implementation()  # noqa: SLF001


def require_known(model: PreTrainedModel) -> None:
    """Refuse attention code of which we know that it cannot be traced for several sequences and trees.

    Raises:
        ExportError: the model attends to later tokens, has no KV cache, or adds positions to the scores in a way that cannot
            differ by sequence.
    """
    decoder = text_decoder(model)
    if any(getattr(part, "is_causal", True) is False for part in (decoder.config, *decoder.modules())):
        raise unsupported(type(model).__name__, "its tokens attend to later ones too, so it cannot continue a text")
    if not has_own_attention(model):
        return
    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise unsupported(name, "it has no KV cache")
    parameters = {name for module in model.modules() for name in inspect.signature(module.forward).parameters}
    if "position_bias" in parameters:
        raise unsupported(name, "it adds a bias by position to the scores, which cannot differ from sequence to sequence")
    if getattr(model.config, "alibi", False) and "position_ids" in parameters:
        raise unsupported(name, "its ALiBi bias is added twice by its eager code, and once by others")


@dataclass(frozen=True)
class _Method:
    """What a module's own attention method computes: softmax(scale · q kᵀ + mask) v."""

    scale: float
    kind: str  # FULL or SLIDING


@contextmanager
def own_attention(model: PreTrainedModel, masks: Masks, key_positions: torch.Tensor, methods: dict[Any, Any]) -> Iterator[Any]:
    """While open, a model with attention code of its own attends as our masks say. Yields the mask to pass to it.

    Args:
        model: the model.
        masks: the masks [B, 1, T, S], by kind or one for all.
        key_positions: the position of each cache entry and new token. [B, S]
        methods: what `attention_methods` found.
    """
    if not has_own_attention(model):
        yield masks
        return
    by_kind: dict[str, Any] = masks if isinstance(masks, dict) else dict.fromkeys((FULL, SLIDING), masks)
    with ExitStack() as stack:
        for module, method in methods.items():
            stack.enter_context(patch.object(module, METHOD, partial(_attend, method.scale, by_kind[method.kind])))
        code = sys.modules[type(model).__module__]
        if hasattr(code, ALIBI):
            stack.enter_context(patch.object(code, ALIBI, partial(_alibi, getattr(code, ALIBI), key_positions)))
        yield _additive(by_kind.get(FULL, by_kind[SLIDING]), model.dtype)


def _attend(
    scale: float, mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """In place of the method. Returns [B, H, T, D]."""
    return attention_node(query, key.to(query.dtype), value.to(query.dtype), mask, scale=scale), None


def _alibi(
    original: Callable[..., torch.Tensor], key_positions: torch.Tensor, _: Any, num_heads: int, dtype: torch.dtype
) -> torch.Tensor:
    """In place of the function (mask [B, S], num_heads, dtype) -> [B·Hq, 1, S]: each head's slope times the key's position."""
    slopes = original(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)[:, 0, 1]  # [Hq]
    bias = slopes.reshape(1, num_heads, 1) * key_positions.unsqueeze(1)  # [B, Hq, S]
    return bias.reshape(-1, 1, key_positions.shape[1]).to(dtype)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the lowest number hides, as in `medusa_export.passes.common.masks`."""
    return torch.zeros((), dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min / 2)


def attention_methods(model: PreTrainedModel) -> dict[torch.nn.Module, _Method]:
    """The modules of a model with a method that attends and that computes what the standard operator does.

    Raises:
        ExportError: there is such a method, and it computes something else.
    """
    found: dict[torch.nn.Module, _Method] = {}
    if not has_own_attention(model):
        return found
    for module in model.modules():
        method = getattr(module, METHOD, None)
        if method is not None and list(inspect.signature(method).parameters)[:4] == PARAMETERS:
            found[module] = _probe(model, method)
    return found


def _probe(model: PreTrainedModel, method: Callable[..., Any]) -> _Method:
    """Find out what a method computes, by its results: their logarithms are the scores but for a constant in each row."""
    window = getattr(model.config, "window_size", None)
    count = min(model.config.max_position_embeddings, LONGEST_PROBE if window else 16)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, count, 4, generator=generator) for _ in range(2))
    with torch.no_grad():
        weights = method(query, key, torch.eye(count)[None, None], None)[0][0, 0].double()  # [T, S]
    scores = (query @ key.transpose(2, 3))[0, 0].double()
    last = count - 1
    scale = float((weights[last, last].log() - weights[last, last - 1].log()) / (scores[last, last] - scores[last, last - 1]))
    back = torch.arange(count)[:, None] - torch.arange(count)
    visible = {FULL: [torch.ones_like(back, dtype=torch.bool), back >= 0]}
    if window:
        visible[SLIDING] = [(back >= 0) & (back < window)]
    for kind, masks in visible.items():
        for mask in masks:
            expected = torch.softmax((scale * scores).masked_fill(~mask, -torch.inf), -1)
            if torch.allclose(weights, expected, atol=1e-5):
                return _Method(scale, kind)
    raise unsupported(type(model).__name__, "its attention method computes something else than scaled dot-product attention")
