"""The computation of the step graph, in torch: a forward pass over new tokens, and the reductions that verification needs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from medusa_export.trace.scatter_cache import ScatterCache
from medusa_export.trace.step_masks import StepMasks


class StepModule(torch.nn.Module):
    """A causal LM with the inputs and outputs of docs/onnx-contract.md, for tracing.

    Only the layers in ``past`` run; see `medusa_export.trace.layers`.
    """

    def __init__(self, model: PreTrainedModel, masks: StepMasks) -> None:
        super().__init__()
        self.model = model
        self.masks = masks

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, T]
        position_ids: torch.Tensor,  # [B, T]
        tree_mask: torch.Tensor,  # [B, T, T] bool
        cache_lengths: torch.Tensor,  # [B]
        logit_rows: torch.Tensor,  # [B, R]
        past: dict[str, tuple[torch.Tensor, torch.Tensor]],  # layer -> key, value: [B, Hkv, S, D]
    ) -> tuple[torch.Tensor, ...]:
        cache = ScatterCache({int(layer): pair for layer, pair in past.items()}, cache_lengths)
        rows: list[torch.Tensor] = []

        def keep_rows(_: Any, __: Any, output: Any) -> Any:  # so that the LM head computes only the requested rows
            hidden = output.last_hidden_state  # [B, T, C]
            picked = torch.gather(hidden, 1, logit_rows.unsqueeze(2).expand(-1, -1, hidden.shape[-1]))  # [B, R, C]
            rows.append(picked)
            output.last_hidden_state = picked
            return output

        base: torch.nn.Module = self.model.base_model
        handle = base.register_forward_hook(keep_rows)
        try:
            logits = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=self.masks(position_ids, tree_mask, cache_lengths, cache.get_max_cache_shape()),
                past_key_values=cache,
                use_cache=True,
            ).logits  # [B, R, V]
        finally:
            handle.remove()
        greedy_ids = logits.argmax(-1)  # [B, R]
        present = [tensor for layer in past for tensor in cache.present[int(layer)]]
        return greedy_ids, rows[0], logits, *present
