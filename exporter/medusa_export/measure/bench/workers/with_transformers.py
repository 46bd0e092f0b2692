"""Transformers' own `generate`, plain or with prompt lookup (`lookup`: tokens per draft)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer


class _Pieces(BaseStreamer):
    """Passes new tokens on. The first call is for the prompt and is skipped."""

    def __init__(self, emit: Callable[[list[int]], None]) -> None:
        self._emit, self._is_prompt = emit, True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self._emit(value.reshape(-1).tolist())
        self._is_prompt = False

    def end(self) -> None:
        """Do nothing: no tokens are held back."""


def load(settings: dict[str, Any]) -> Callable[[list[int], int, Callable[[list[int]], None]], None]:
    """settings: checkpoint, dtype, threads, and optionally lookup."""
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["checkpoint"], dtype=getattr(torch, settings["dtype"])).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # plain greedy decoding without an end, as the others do it
    lookup = {"prompt_lookup_num_tokens": settings["lookup"]} if settings.get("lookup") else {}

    def decode(token_ids: list[int], max_new_tokens: int, emit: Callable[[list[int]], None]) -> None:
        inputs = torch.tensor([token_ids])
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=_Pieces(emit),
            **lookup,
        )

    return decode
