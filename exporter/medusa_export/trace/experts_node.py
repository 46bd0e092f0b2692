"""The experts of a traced mixture-of-experts layer: one marker node per layer or per linear layer of the experts.

Transformers can replace the computation of all experts by name (`use_experts_implementation`), as it can for attention. Ours
emits nodes of the domain ``medusa.experts``, which the pass `ExpandExperts` turns into standard operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from medusa_export.passes.portable.expand_experts import EXPERT_LINEAR, EXPERTS, EXPERTS_DOMAIN

UNGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "identity": lambda x: x,
}
RECOGNISED = "medusa_activation"  # the attribute of an experts module that holds its `Activation`, or None
PROBE_WIDTH = 64  # values of gate and of up with which an activation is recognised


@dataclass(frozen=True)
class Activation:
    """What experts compute between their two linear layers.

    ``swiglu``: with the first layer's outputs g and u, G = min(g, limit), U = clamp(u, ±limit):
    (U + beta) · G · sigmoid(alpha · G). Otherwise a function of `UNGATED`.
    """

    name: str
    interleaved: bool = False  # swiglu: outputs are g0, u0, g1, u1, ...; otherwise all g, then all u
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0  # 0: none

    def attributes(self) -> dict[str, Any]:
        """The attributes of the marker."""
        return {
            "activation": self.name,
            "interleaved": int(self.interleaved),
            "alpha": self.alpha,
            "beta": self.beta,
            "limit": self.limit,
        }


def onnx_experts(
    self: Any,
    hidden_states: torch.Tensor,  # [N, C]
    top_k_index: torch.Tensor,  # [N, K]
    top_k_weights: torch.Tensor,  # [N, K]
) -> torch.Tensor:
    """All experts of a layer, as Transformers' experts functions compute them. Returns [N, C].

    With an activation that we recognise, this is one node. Otherwise the two linear layers are a node each, with the module's
    own activation between them, on one row for each pair of token and expert.
    """
    first, bias = ("gate_up_proj", "gate_up_proj_bias") if self.has_gate else ("up_proj", "up_proj_bias")
    up, up_bias = getattr(self, first), getattr(self, bias) if self.has_bias else None
    down, down_bias = self.down_proj, self.down_proj_bias if self.has_bias else None
    activation = getattr(self, RECOGNISED)
    if activation is not None and not self.has_post_expert_norm:
        return torch.onnx.ops.symbolic(
            f"{EXPERTS_DOMAIN}::{EXPERTS}",
            [hidden_states, top_k_index, top_k_weights, up, up_bias, down, down_bias],
            attrs={"transposed": int(self.is_transposed), **activation.attributes()},
            dtype=hidden_states.dtype,
            shape=hidden_states.shape,
            version=1,
        )
    count, chosen = top_k_index.shape
    experts = top_k_index.reshape(-1)  # [N·K]
    rows = hidden_states.unsqueeze(1).expand(-1, chosen, -1).reshape(count * chosen, -1)
    inner = expert_linear(rows, experts, up, up_bias, transposed=self.is_transposed)
    inner = gate(inner) if (gate := _gate(self)) else self.act_fn(inner)
    result = expert_linear(inner, experts, down, down_bias, transposed=self.is_transposed)
    if self.has_post_expert_norm:
        result = self.post_expert_norm(result)
    weighted = result * top_k_weights.reshape(-1, 1)
    return weighted.reshape(count, chosen, -1).sum(1).to(hidden_states.dtype)


def expert_linear(
    rows: torch.Tensor,  # [S, in]
    experts: torch.Tensor,  # [S]
    weight: torch.Tensor,  # [E, out, in], or [E, in, out] if transposed
    bias: torch.Tensor | None = None,  # [E, out]
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """A linear layer whose weight is that of each row's expert. Returns [S, out]."""
    return torch.onnx.ops.symbolic(
        f"{EXPERTS_DOMAIN}::{EXPERT_LINEAR}",
        [rows, experts, weight, bias],
        attrs={"transposed": int(transposed)},
        dtype=rows.dtype,
        shape=(rows.shape[0], weight.shape[2 if transposed else 1]),
        version=1,
    )


def recognise_activations(model: torch.nn.Module) -> None:
    """Find out what each experts module of a model computes between its linear layers, before the model is traced."""
    for module in model.modules():
        if hasattr(module, "has_post_expert_norm") and not hasattr(module, RECOGNISED):
            setattr(module, RECOGNISED, recognise(module))


def take_activations_for_unknown(model: torch.nn.Module) -> None:
    """In the place of `recognise_activations`, for a model without values."""
    for module in model.modules():
        if hasattr(module, "has_post_expert_norm"):
            setattr(module, RECOGNISED, None)


def recognise(experts: Any) -> Activation | None:
    """The activation of an experts module, found by evaluating it; None if it is of another kind."""
    probe = torch.linspace(-12, 12, 2 * PROBE_WIDTH).reshape(2, PROBE_WIDTH).flip(1)
    probe = torch.cat([probe, probe.flip(0) * 0.37, 40 * probe])  # [6, 2·I]: beyond any limit, too
    candidates: Iterator[tuple[Activation, Callable[[torch.Tensor], torch.Tensor]]]
    if experts.has_gate:
        candidates = ((found, swiglu(found)) for found in _swiglus(experts))
    else:
        candidates = ((Activation(name), function) for name, function in UNGATED.items())
    with torch.no_grad():
        wanted = gate(probe) if (gate := _gate(experts)) else experts.act_fn(probe)
        for activation, function in candidates:
            if torch.allclose(function(probe), wanted, rtol=1e-5, atol=1e-6):
                return activation
    return None


def _gate(experts: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What Transformers computes from the first layer's output, if that has a gate."""
    return experts._apply_gate if experts.has_gate else None  # noqa: SLF001 - Transformers' own experts functions call it


def _swiglus(experts: Any) -> Iterator[Activation]:
    """Every form of swiglu that the module's own settings can mean."""
    settings = {value for value in vars(experts).values() if isinstance(value, float)}
    for interleaved, beta, alpha, limit in product((False, True), (0.0, 1.0), (1.0, *settings), (0.0, *settings)):
        yield Activation("swiglu", interleaved, alpha, beta, limit)


def swiglu(form: Activation) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that an `Activation` of that name describes."""

    def compute(inner: torch.Tensor) -> torch.Tensor:
        gate, up = (inner[..., ::2], inner[..., 1::2]) if form.interleaved else inner.chunk(2, dim=-1)
        if form.limit:
            gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        return (up + form.beta) * gate * torch.sigmoid(form.alpha * gate)

    return compute


def register(name: str) -> None:
    """Register `onnx_experts` with Transformers under a name. It may be called again."""
    ALL_EXPERTS_FUNCTIONS.register(name, onnx_experts)
