"""llama.cpp through llama-cpp-python, with a GGUF file that it quantises itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp

TYPES = {"f32": 0, "f16": 1, "q4_1": 3, "q8_0": 7}  # llama.cpp's `llama_ftype`


def build(settings: dict[str, Any]) -> None:
    """settings: gguf, precision, output."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = TYPES[settings["precision"]], True
    if llama_cpp.llama_model_quantize(settings["gguf"].encode(), settings["output"].encode(), params):
        raise SystemExit(f"llama.cpp cannot quantise {settings['gguf']}")


def load(settings: dict[str, Any]) -> Callable[[list[int], int, Callable[[list[int]], None]], None]:
    """settings: model, threads, max_length."""
    threads = settings["threads"]
    model = llama_cpp.Llama(
        settings["model"], n_ctx=settings["max_length"], n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def decode(token_ids: list[int], max_new_tokens: int, emit: Callable[[list[int]], None]) -> None:
        model.reset()  # otherwise it continues from an earlier prompt's cache
        for count, token in enumerate(model.generate(token_ids, temp=0.0, repeat_penalty=1.0), start=1):
            emit([token])
            if count == max_new_tokens:
                break

    return decode
