"""Experts in loops of their own: what they compute next depends on the data, which a trace cannot follow.

While a model is traced, each row takes the weight of its expert instead. Known are linear layers that take rows sorted by
expert and the number of rows of each (JetMoE), and gated experts whose weights are matrices of all experts (DBRX).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from medusa_export.trace.experts_node import expert_linear

GATED = ("w1", "v1", "w2")  # the parameters of gated experts, each [E · F, C]
SIZES = "expert_size"  # the parameter with each expert's number of rows


def is_parallel_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer of experts, with a weight [E, out, in] and forward(rows, expert_size)."""
    weight = getattr(module, "weight", None)
    has_weight = isinstance(weight, torch.Tensor) and weight.dim() == 3
    return has_weight and list(inspect.signature(module.forward).parameters) == ["inputs", SIZES]


def is_sorting_router(module: torch.nn.Module) -> bool:
    """Whether a module scores experts with ``layer``, chooses ``top_k`` of them and sorts the rows by expert."""
    return all(hasattr(module, name) for name in ("layer", "top_k", "num_experts", "input_size"))


def is_gated_loop(module: torch.nn.Module) -> bool:
    """Whether a module runs gated experts in a loop: forward(hidden_states, top_k_index, top_k_weights), weights in ``mlp``."""
    weights = [getattr(getattr(module, "mlp", None), name, None) for name in GATED]
    return all(isinstance(weight, torch.Tensor) and weight.dim() == 2 for weight in weights) and hasattr(module, "num_experts")


@contextmanager
def unsorted_experts(model: torch.nn.Module) -> Iterator[None]:
    """While open, routers pair rows with experts in the rows' order, and linear layers of experts take each row's expert."""
    linear = [module for module in model.modules() if is_parallel_linear(module)]
    routers = [module for module in model.modules() if linear and is_sorting_router(module)]
    with ExitStack() as stack:
        for module in linear:
            stack.enter_context(patch.object(module, "forward", partial(_linear, module)))
        if routers:
            pairs = _Pairs()
            stack.enter_context(patch.object(torch.Tensor, "index_add", pairs.adding()))
        for module in routers:
            stack.enter_context(patch.object(module, "forward", partial(_route, module, pairs)))
        for module in filter(is_gated_loop, model.modules()):
            stack.enter_context(patch.object(module, "forward", partial(_gated, module)))
        yield


def _linear(module: torch.nn.Module, inputs: torch.Tensor, expert_size: torch.Tensor) -> torch.Tensor:
    """In place of the linear layer's forward: `expert_size` is the expert of each row."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return expert_linear(inputs, expert_size, weight)


def _gated(experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """In place of the loop's forward. hidden_states: [B, T, C]; the others: [B·T, K]"""
    chosen, width = top_k_index.shape[1], hidden_states.shape[-1]
    up, gate, down = (getattr(experts.mlp, name).view(experts.num_experts, -1, width) for name in ("v1", "w1", "w2"))
    rows = hidden_states.reshape(-1, 1, width).expand(-1, chosen, -1).reshape(-1, width)
    each = top_k_index.reshape(-1)
    inner = experts.mlp.activation_fn(expert_linear(rows, each, gate)) * expert_linear(rows, each, up)
    result = expert_linear(inner, each, down, transposed=True) * top_k_weights.reshape(-1, 1)
    return result.reshape(-1, chosen, width).sum(1).reshape(hidden_states.shape)


class _Pairs:
    """The indices that routers gave. Their order is known, so a sum takes the place of adding at an index.

    TensorRT has no node that adds at an index.
    """

    def __init__(self) -> None:
        self._indices: list[tuple[torch.Tensor, int]] = []

    def of(self, num_tokens: Any, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The index of each pair, and that of its token: [N·K]"""
        order = torch.arange(num_tokens * chosen)
        indices = order, order // chosen
        self._indices += zip(indices, (1, chosen), strict=True)
        return indices

    def adding(self) -> Callable[..., torch.Tensor]:
        """What takes the place of Tensor.index_add."""
        index_add = torch.Tensor.index_add

        def add(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, **options: Any) -> torch.Tensor:
            for known, chosen in self._indices:
                if index is known and dim == 0 and not options:
                    return x + source.reshape(-1, chosen, *source.shape[1:]).sum(1)
            return index_add(x, dim, index, source, **options)

        return add


def _route(router: torch.nn.Module, pairs: _Pairs, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In place of the router's forward: the pairs' order, their tokens, weights and experts [N·K], and the scores [N, E]."""
    layer, chosen = router.layer, router.top_k
    assert isinstance(layer, torch.nn.Module)
    assert isinstance(chosen, int)
    logits = layer(hidden_states).float()
    best, experts = logits.topk(chosen, dim=1)
    weights = torch.softmax(best, dim=1).type_as(hidden_states)
    return *pairs.of(hidden_states.shape[0], chosen), weights.flatten(), experts.flatten(), logits
