"""The computation of the step graph, in torch: a forward pass over new tokens, and the reductions that verification needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa_export.trace.ancestors import Ancestors
from medusa_export.trace.experts_node import recognise_activations
from medusa_export.trace.layers import text_decoder
from medusa_export.trace.own_attention import attention_methods, own_attention
from medusa_export.trace.parallel_experts import unsorted_experts
from medusa_export.trace.real_rotary import complex_rotary, real_rotary
from medusa_export.trace.scatter_cache import ScatterCache
from medusa_export.trace.short_convolution import UnknownStateError, convolved_along_paths
from medusa_export.trace.state_space import scanned_along_paths
from medusa_export.trace.step_masks import StepMasks


class StepModule(torch.nn.Module):
    """A causal LM with the inputs and outputs of docs/onnx-contract.md, for tracing.

    Only the layers in ``past`` run; see `medusa_export.trace.layers`.
    """

    def __init__(self, model: PreTrainedModel, masks: StepMasks) -> None:
        super().__init__()
        self.model = model
        self.masks = masks
        self.methods = attention_methods(model)
        self.heads_axis = complex_rotary(model)
        recognise_activations(model)

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
        masks, key_positions = self.masks(tokens.position_ids, tokens.tree_mask, tokens.cache_lengths, cache.capacity)
        with (
            _only_rows(self.model, logit_rows) as rows,
            convolved_along_paths(cache.waiting),
            scanned_along_paths(self.model, cache),
            own_attention(self.model, masks, key_positions, self.methods) as attention_mask,
            real_rotary(self.model, self.heads_axis),
            unsorted_experts(self.model),
        ):
            logits = self.model(
                input_ids=input_ids,
                position_ids=tokens.position_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
            ).logits  # [B, R, V]
        if cache.waiting:
            raise UnknownStateError("it caches what a convolution reads, but calls no conv1d on it")
        return logits.argmax(-1), rows[0], logits


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

    handles = [base.register_forward_pre_hook(begin)] if base is not model else []
    inner = [module for module in dict.fromkeys((base, decoder)) if module is not model]
    inner = inner or [module for module in model.children() if isinstance(module, PreTrainedModel)]  # of an unusual name
    handles += [module.register_forward_hook(keep_rows) for module in inner]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
