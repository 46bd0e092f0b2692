"""What a server is compared with: `MedusaLM` in a process of its own, asked by as many threads as there are streams."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from answer_times import timed
from request_loop import serve

from medusa_runtime import MedusaLM


def answer(lm: MedusaLM, prompt: str, max_tokens: int) -> dict[str, Any]:
    """Have a prompt answered, and take the chunks as they come."""
    started, times, tokens = time.perf_counter(), [], 0
    handle = lm.stream([{"role": "user", "content": prompt}], temperature=0, max_new_tokens=max_tokens, ignore_eos=True)
    for chunk in handle:
        times.append(time.perf_counter())
        tokens += len(chunk.token_ids)
    return timed(started, times, handle.result().text, tokens)


def load(lm: MedusaLM, prompts: list[str], streams: int, max_tokens: int) -> dict[str, Any]:
    """Have all prompts answered, `streams` at a time."""
    started = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        answers = list(pool.map(lambda prompt: answer(lm, prompt, max_tokens), prompts))
    return {"seconds": time.perf_counter() - started, "answers": answers}


if __name__ == "__main__":
    model = MedusaLM.from_bundle(sys.argv[1], max_batch_size=int(sys.argv[2]))
    serve(lambda: {"load": lambda **words: load(model, **words)})
