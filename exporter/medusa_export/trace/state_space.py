"""State-space layers (Mamba 2) over a tree of tokens, in their quadratic form, which reads entries as attention does.

The recurrence h_t = exp(A dt_t) h_(t-1) + dt_t B_t x_t with y_t = C_t h_t + D x_t (Dao and Gu 2024, "Transformers are SSMs",
section 6) is the same as

    y_t = sum over t's ancestors s, t included, of exp(sum of A dt over those after s, up to t) (C_t B_s) dt_s x_s + D x_t

So no state is kept, but B, x and dt of each token, which are cached as keys and values are. Trees are exact, and a step costs
what attention to the context costs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from medusa_export.opsets import MIN_OPSET
from medusa_export.trace.scatter_cache import ScatterCache

SCAN = "_chunk_scan"  # how Transformers' modules name the function that scans a prompt
HIDDEN = -1e30  # the logarithm of no weight


def scan(
    cache: ScatterCache,
    states: torch.Tensor,  # [B, T, H, P]: x
    dt: torch.Tensor,  # [B, T, H]
    A: torch.Tensor,  # noqa: N803 - the paper's names, and Transformers': [H]
    B: torch.Tensor,  # noqa: N803 - [B, T, G, N]
    C: torch.Tensor,  # noqa: N803 - [B, T, G, N]
    D: torch.Tensor | None = None,  # noqa: N803 - [H]
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> torch.Tensor:
    """The scan's result for the new tokens, each along its own path. [B, T, H, P]"""
    (batch, tokens, heads, _), groups = states.shape, B.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).float()
    layer = cache.scanned_layer
    inputs = cache.write(f"{layer}.ssm_x", states.transpose(1, 2)).float()  # [B, H, S, P]
    keys = cache.write(f"{layer}.ssm_b", B.transpose(1, 2)).float()  # [B, G, S, N]
    steps = cache.write(f"{layer}.ssm_dt", dt.unsqueeze(1))[:, 0].transpose(1, 2)  # [B, H, S]
    decays = _decays(cache, A.float(), dt, steps)  # [B, H, T, S]
    queries = C.float().transpose(1, 2)  # [B, G, T, N]
    scores = torch.matmul(queries, keys.transpose(2, 3)).unsqueeze(2)  # [B, G, 1, T, S]
    weights = (decays * steps.unsqueeze(2)).reshape(batch, groups, heads // groups, tokens, -1) * scores
    result = torch.matmul(weights.reshape(batch, heads, tokens, -1), inputs).transpose(1, 2).contiguous()
    # [B, T, H, P]; callers view it as [B, T, H·P]
    return result if D is None else result + D.float().unsqueeze(-1) * states.float()


def _decays(cache: ScatterCache, A: torch.Tensor, dt: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """How much of each entry is left at each new token: exp of the sum of A dt after it on the path. [B, H, T, S]

    Sums begin at the end of what is cached: those that matter are small, and lose no precision in a long context.
    """
    new, capacity = cache.ancestors, cache.capacity
    offsets = new.offsets(capacity)  # [B, S]
    among_cached = torch.where((offsets < 0).unsqueeze(1), A.reshape(1, -1, 1) * steps, 0.0)  # [B, H, S]
    after = torch.onnx.ops.symbolic(
        "CumSum",
        [among_cached, new.entries_axis],
        attrs={"exclusive": 1, "reverse": 1},
        dtype=among_cached.dtype,
        shape=among_cached.shape,
        version=MIN_OPSET,
    )
    on_path = torch.matmul(new.tree_mask.float(), A * dt).transpose(1, 2)  # [B, H, T]: of the new ancestors, itself included
    index = offsets.clamp(0, dt.shape[1] - 1).unsqueeze(1).expand(-1, dt.shape[2], -1)
    until = torch.where((offsets < 0).unsqueeze(1), -after, torch.gather(on_path, 2, index))  # [B, H, S]
    logs = on_path.unsqueeze(3) - until.unsqueeze(2)
    return torch.exp(torch.where(new.visible(capacity), logs, HIDDEN))


@contextmanager
def scanned_along_paths(model: torch.nn.Module, cache: ScatterCache) -> Iterator[None]:
    """While open, the model's state-space layers scan with `scan`, whichever of its modules' files they are defined in."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    found = [(file, name, original) for file in files for name, original in vars(file).items() if name.endswith(SCAN)]
    for file, name, _ in found:
        setattr(file, name, _replacement(cache))
    try:
        yield
    finally:
        for file, name, original in found:
            setattr(file, name, original)


def _replacement(cache: ScatterCache) -> Callable[..., Any]:
    def chunk_scan(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        C: torch.Tensor,  # noqa: N803
        *_: Any,
        D: torch.Tensor | None = None,  # noqa: N803
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **__: Any,
    ) -> Any:
        result = scan(cache, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        cache.scanned.add(cache.scanned_layer)
        return (result, None) if return_final_states else result

    return chunk_scan
