"""The computation of the step graph, in torch: a forward pass over new tokens, and the reductions that verification needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa_export.model.checkpoint import FULL, SLIDING, WITHOUT_ATTENTION
from medusa_export.trace.ancestors import Ancestors
from medusa_export.trace.layers import text_decoder
from medusa_export.trace.scatter_cache import ScatterCache
from medusa_export.trace.short_convolution import UnknownStateError, convolved_along_paths
from medusa_export.trace.state_space import scanned_along_paths


class StepModule(torch.nn.Module):
    """A causal LM with the inputs and outputs of docs/onnx-contract.md, for tracing.

    Only the layers in ``past`` run; see `medusa_export.trace.layers`.
    """

    def __init__(self, model: PreTrainedModel, layer_types: list[str], sliding_window: int | None) -> None:
        super().__init__()
        self.model = model
        self.layer_types = layer_types
        self.sliding_window = sliding_window

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, T]
        position_ids: torch.Tensor,  # [B, T]
        tree_mask: torch.Tensor,  # [B, T, T] bool
        cache_lengths: torch.Tensor,  # [B]
        logit_rows: torch.Tensor,  # [B, R]
        past: dict[str, torch.Tensor],  # by name, such as 0.key: [B, H, S, D]
    ) -> tuple[torch.Tensor, ...]:
        cache = ScatterCache(past, Ancestors(position_ids, tree_mask, cache_lengths))
        results = self.run(cache, input_ids, logit_rows)
        return *results, *(cache.present[name] for name in past)

    def run(
        self,
        cache: ScatterCache,
        input_ids: torch.Tensor,
        logit_rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The forward pass: greedy ids [B, R], hidden rows [B, R, C] and logits [B, R, V]. What layers keep is in the cache."""
        tokens = cache.ancestors
        with (
            _only_rows(self.model, logit_rows) as rows,
            convolved_along_paths(cache.waiting),
            scanned_along_paths(self.model, cache),
        ):
            logits = self.model(
                input_ids=input_ids,
                position_ids=tokens.position_ids,
                attention_mask=self._masks(tokens.position_ids, tokens.tree_mask, tokens.cache_lengths, cache.capacity),
                past_key_values=cache,
                use_cache=True,
            ).logits  # [B, R, V]
        if cache.waiting:
            raise UnknownStateError("it caches what a convolution reads, but calls no conv1d on it")
        return logits.argmax(-1), rows[0], logits

    def _masks(self, position_ids: torch.Tensor, tree_mask: torch.Tensor, cache_lengths: torch.Tensor, capacity: int) -> Any:
        tokens = position_ids.shape[1]
        slots = torch.arange(capacity).unsqueeze(0)  # [1, S]
        offset = slots - cache_lengths.unsqueeze(
            1
        )  # [B, S]: negative for cached entries, then the new tokens, then unused entries
        cached = offset < 0
        new = (offset >= 0) & (offset < tokens)
        index = offset.clamp(0, tokens - 1)  # [B, S]
        among_new = torch.gather(tree_mask, 2, index.unsqueeze(1).expand(-1, tokens, -1))  # [B, T, S]
        full = (cached.unsqueeze(1) | (among_new & new.unsqueeze(1))).unsqueeze(1)  # [B, 1, T, S]
        if SLIDING not in self.layer_types:
            return full
        key_positions = torch.where(cached, slots, torch.gather(position_ids, 1, index))  # [B, S]
        assert self.sliding_window is not None  # a model with sliding-window layers always has it
        near = position_ids.unsqueeze(2) - key_positions.unsqueeze(1) < self.sliding_window  # [B, T, S]
        sliding = full & near.unsqueeze(1)
        unmasked = dict.fromkeys(WITHOUT_ATTENTION & {*self.layer_types})
        return {FULL: full, SLIDING: sliding, **unmasked} if FULL in self.layer_types else sliding


@contextmanager
def _only_rows(model: PreTrainedModel, logit_rows: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """While open, the LM head computes only the requested rows [B, R]. Yields a list that gets their hidden states, [B, R, C].

    Most models call their base model, whose result is picked from. Some call the decoder in it.
    """
    rows: list[torch.Tensor] = []
    base, decoder = model.base_model, text_decoder(model)
    running: list[bool] = []

    def begin(*_: Any) -> None:
        running.append(True)

    def keep_rows(module: torch.nn.Module, _: Any, output: Any) -> Any:
        if running and module is not base:
            return output
        hidden = output.last_hidden_state  # [B, T, C]
        picked = torch.gather(hidden, 1, logit_rows.unsqueeze(2).expand(-1, -1, hidden.shape[-1]))  # [B, R, C]
        rows.append(picked)
        output.last_hidden_state = picked
        return output

    handles = [base.register_forward_pre_hook(begin)]
    handles += [module.register_forward_hook(keep_rows) for module in dict.fromkeys((base, decoder)) if module is not model]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
