"""Run the module that is traced in PyTorch, without tracing it: what the step graph will compute, in a few milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from medusa_export.model.checkpoint import Backbone
from medusa_export.passes.common.attention_math import SINK_ATTENTION, SINK_DOMAIN
from medusa_export.passes.portable.expand_experts import EXPERT_LINEAR, EXPERTS, EXPERTS_DOMAIN
from medusa_export.trace.cache_shapes import cached_tensors
from medusa_export.trace.experts_node import UNGATED, Activation, swiglu
from medusa_export.trace.layers import NoLayersError, decoder_layers, text_decoder
from medusa_export.trace.selection import selecting_all
from medusa_export.trace.step_graph import step_module
from medusa_export.trace.step_module import StepModule


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, *, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """The standard operator, with grouped heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value


def sink_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention to one more key of score `sinks` [Hq] and a value of zeros."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    scores = (softcap * torch.tanh(scores / softcap) if softcap else scores).masked_fill(~mask, -torch.inf)
    column = sinks.reshape(1, -1, 1, 1).expand(len(query), -1, query.shape[2], 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    return weights @ value.repeat_interleave(groups, 1)


def expert_linear(
    rows: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: int
) -> torch.Tensor:
    """Each row times the weight of its own expert."""
    chosen = weight[experts] if transposed else weight[experts].transpose(1, 2)  # [S, in, out]
    return (rows.unsqueeze(1) @ chosen).squeeze(1) + (0 if bias is None else bias[experts])


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    *,
    transposed: int,
    activation: str,
    interleaved: int,
    alpha: float,
    beta: float,
    limit: float,
) -> torch.Tensor:
    """The chosen experts of each token, summed by their weights."""
    rows = x.repeat_interleave(ids.shape[1], 0)
    inner = expert_linear(rows, ids.flatten(), up, up_bias, transposed=transposed)
    if activation == "swiglu":
        inner = swiglu(Activation(activation, bool(interleaved), alpha, beta, limit))(inner)
    else:
        inner = UNGATED[activation](inner)
    result = expert_linear(inner, ids.flatten(), down, down_bias, transposed=transposed)
    return (result.reshape(*ids.shape, -1) * weights.unsqueeze(2)).sum(1)


def tensor_scatter(buffer: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, *, axis: int, mode: str) -> torch.Tensor:
    """The standard operator, on axis 2 of [B, H, S, D]."""
    assert (axis, mode) == (2, "linear")
    places = (lengths[:, None] + torch.arange(new.shape[2]))[:, None, :, None]
    return buffer.scatter(2, places.expand(-1, *new.shape[1:2], -1, new.shape[3]), new)


def gather_nd(data: torch.Tensor, indices: torch.Tensor, *, batch_dims: int) -> torch.Tensor:
    """The standard operator: entries of [B, H, S, C] by pairs of head and place, [B, N, 2]."""
    assert batch_dims == 1
    return data[torch.arange(len(data))[:, None], indices[..., 0], indices[..., 1]]


def cumulative_sum(data: torch.Tensor, axis: torch.Tensor, *, exclusive: int, reverse: int) -> torch.Tensor:
    """The standard operator, of what comes after each element."""
    assert (exclusive, reverse) == (1, 1)
    return data.flip(int(axis)).cumsum(int(axis)).flip(int(axis)) - data


OPERATORS = {
    "CumSum": cumulative_sum,
    "GatherND": gather_nd,
    "Attention": attention,
    "TensorScatter": tensor_scatter,
    f"{SINK_DOMAIN}::{SINK_ATTENTION}": sink_attention,
    f"{EXPERTS_DOMAIN}::{EXPERTS}": experts,
    f"{EXPERTS_DOMAIN}::{EXPERT_LINEAR}": expert_linear,
}


@contextmanager
def computed() -> Iterator[None]:
    """While open, the operators that are only named in a trace are computed."""
    before = torch.onnx.ops.symbolic

    def compute(name: str, inputs: list[Any], attrs: dict[str, Any] | None = None, **_: Any) -> Any:
        if name.startswith("medusa.trace::"):
            return inputs[0]
        return OPERATORS[name](*inputs, **(attrs or {}))

    torch.onnx.ops.symbolic = compute
    try:
        yield
    finally:
        torch.onnx.ops.symbolic = before


def empty_cache(backbone: Backbone, module: StepModule, capacity: int = 64) -> dict[str, torch.Tensor]:
    """The cache of one sequence, before its first step."""
    try:
        cached = cached_tensors(backbone, module, decoder_layers(backbone.model)[1])
    except NoLayersError:
        cached = cached_tensors(backbone, module, [text_decoder(backbone.model)])
    return {tensor.name: torch.zeros(tensor.shape(1, capacity)) for layer in cached for tensor in layer}


@torch.no_grad()
def chain_and_tree(
    module: torch.nn.Module, past: dict[str, torch.Tensor], token_ids: list[int], branch: list[int]
) -> np.ndarray:
    """Logits of a text that is read in two chunks, then of two continuations side by side. [T + A, V]

    The text's last tokens and the branch are a tree: both follow the first half of the text.
    """
    half = len(token_ids) // 2
    first, rest = token_ids[:half], token_ids[half:]
    found = []
    _, _, logits, *present = module(*_chain(first, 0), past)
    found.append(logits[0])
    past = dict(zip(past, present, strict=True))
    nodes = [*rest, *branch]
    mask = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for start, size in ((0, len(rest)), (len(rest), len(branch))):
        mask[start : start + size, start : start + size] = torch.ones(size, size, dtype=torch.bool).tril()
    positions = [half + place for place in (*range(len(rest)), *range(len(branch)))]
    tree = (torch.tensor([nodes]), torch.tensor([positions]), mask[None], torch.tensor([half]), torch.arange(len(nodes))[None])
    found.append(module(*tree, past)[2][0])
    return torch.cat(found).numpy()


def _chain(token_ids: list[int], start: int) -> tuple[torch.Tensor, ...]:
    count = len(token_ids)
    places = torch.arange(count)[None]
    mask = torch.ones(1, count, count, dtype=torch.bool).tril()
    return torch.tensor([token_ids]), places + start, mask, torch.tensor([start]), places


@torch.no_grad()
def compare(traced: Backbone, model: Backbone) -> tuple[np.ndarray, np.ndarray]:
    """Logits of what is traced, and of the model itself: of a text, and of another continuation of its first half."""
    token_ids = [(37 * place + 11) % 300 + 10 for place in range(26)]
    branch, half = [100, 200, 30, 45], len(token_ids) // 2
    whole = model.model(torch.tensor([token_ids]), use_cache=False).logits[0]
    other = model.model(torch.tensor([[*token_ids[:half], *branch]]), use_cache=False).logits[0, half:]
    module = step_module(traced)
    past = empty_cache(traced, module)
    with computed(), selecting_all(traced.model):
        found = chain_and_tree(module, past, token_ids, branch)
    return found, torch.cat([whole, other]).numpy()
