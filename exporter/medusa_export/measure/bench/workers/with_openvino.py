"""OpenVINO GenAI, with a GGUF file or the directory of a converted model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai


class _Pieces(genai.StreamerBase):  # type: ignore[misc]
    """Passes new tokens on as they are decoded."""

    def __init__(self, emit: Callable[[list[int]], None]) -> None:
        super().__init__()
        self._emit = emit

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        self._emit([token] if isinstance(token, int) else list(token))
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Do nothing: no tokens are held back."""


def load(settings: dict[str, Any]) -> Callable[[list[int], int, Callable[[list[int]], None]], None]:
    """settings: model, threads."""
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # read every prompt, like all other contestants
    pipeline = genai.LLMPipeline(
        settings["model"], "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=settings["threads"]
    )

    def decode(token_ids: list[int], max_new_tokens: int, emit: Callable[[list[int]], None]) -> None:
        config = genai.GenerationConfig(max_new_tokens=max_new_tokens, ignore_eos=True, do_sample=False)
        ids = ov.Tensor(np.array([token_ids], np.int64))
        inputs = genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, len(token_ids)), np.int64)))
        pipeline.generate(inputs, config, _Pieces(emit))

    return decode
