"""What `two_checkouts.py` has each checkout do: put loads on a bundle, and time them by the caller's clock.

It is run as a process of its own, with that checkout on the path. It uses nothing of the runtime but `MedusaLM`.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from request_loop import Operations, serve

import medusa_runtime
from medusa_runtime import GenerationResult, MedusaLM

SIDE_BY_SIDE, DECODED, ANSWERED = 8, 96, 16  # requests at once; new tokens of an answer where decoding is timed, and elsewhere
STREAMED, FIRST_CHUNKS = 4000, 5  # new tokens of the stream beside a load, which never come to an end; chunks before the load
HEAD_START = 0.05  # seconds that a long prompt is ahead of the short request behind it


@dataclass
class Watched:
    """A request that is done, and when each of its chunks came."""

    started: float
    times: list[float]
    result: GenerationResult

    @property
    def first_token_ms(self) -> float:
        """From the call of `submit` to the first chunk."""
        return 1e3 * (self.times[0] - self.started)


def watch(lm: MedusaLM, prompt: str) -> Watched:
    """Send a request, and take its chunks as they come."""
    started = time.perf_counter()
    handle = lm.submit(prompt, max_new_tokens=ANSWERED, ignore_eos=True, raw=True)
    return Watched(started, [time.perf_counter() for _ in handle], handle.result())


@contextmanager
def watching(lm: MedusaLM) -> Iterator[dict[str, float]]:
    """After the block: tokens per second of its time, and how long the host worked in each forward pass that decoded."""
    numbers: dict[str, float] = {}
    before, started = dataclasses.replace(lm.engine.stats), time.perf_counter()
    yield numbers
    seconds, after = time.perf_counter() - started, lm.engine.stats
    host = after.decode_seconds - after.engine_seconds - (before.decode_seconds - before.engine_seconds)
    numbers["tokens_per_second"] = (after.num_generated_tokens - before.num_generated_tokens) / seconds
    numbers["host_us_a_pass"] = 1e6 * host / (after.num_passes - before.num_passes)


@contextmanager
def streaming(lm: MedusaLM, prompt: str | None) -> Iterator[list[tuple[float, int]]]:
    """Decode a stream until the block ends, or none without a prompt. Gives when its chunks came, and the tokens of each."""
    chunks: list[tuple[float, int]] = []
    if prompt is None:
        yield chunks
        return
    handle = lm.stream(prompt, max_new_tokens=STREAMED, ignore_eos=True)

    def read() -> None:
        for chunk in handle:
            chunks.append((time.perf_counter(), len(chunk.token_ids)))  # noqa: PERF401 - others look at it meanwhile

    reader = threading.Thread(target=read)
    reader.start()
    while len(chunks) < FIRST_CHUNKS and reader.is_alive():
        time.sleep(0.002)
    try:
        yield chunks
        if handle.is_done:
            raise RuntimeError(f"the stream ended before the load beside it: {handle.result().finish_reason}")
    finally:
        handle.cancel()
        reader.join()


def told(numbers: dict[str, float], results: Sequence[GenerationResult]) -> dict[str, Any]:
    """What an operation returns: its numbers, the answers, and the sizes of the prompts."""
    return {
        "numbers": numbers,
        "answers": [result.token_ids for result in results],
        "prompt_tokens": [result.stats.num_prompt_tokens for result in results],
    }


class Loads:
    """A bundle, opened for one request at a time and for several, and the loads that may be put on it."""

    def __init__(self, bundle: str) -> None:
        self._one, self._several = (
            MedusaLM.from_bundle(bundle, max_batch_size=size, reuse_prefixes=False) for size in (1, SIDE_BY_SIDE)
        )

    def operations(self) -> Operations:
        """What may be asked of this process."""
        names = ("one_after_the_other", "side_by_side", "short_behind_long", "short_at_once", "long_beside_a_stream")
        return {"where": lambda: str(Path(medusa_runtime.__file__))} | {name: getattr(self, name) for name in names}

    def one_after_the_other(self, prompts: list[str], *, medusa: bool) -> dict[str, Any]:
        """Each prompt when the one before it is answered."""
        with watching(self._one) as numbers:
            results = [self._one.generate(prompt, max_new_tokens=DECODED, ignore_eos=True, medusa=medusa) for prompt in prompts]
        return told(numbers, results)

    def side_by_side(self, prompts: list[str], *, medusa: bool) -> dict[str, Any]:
        """All prompts as one batch."""
        with watching(self._several) as numbers:
            results = self._several.generate_batch(prompts, max_new_tokens=DECODED, ignore_eos=True, medusa=medusa)
        return told(numbers, results)

    def short_behind_long(self, long: str, short: str, stream: str | None = None) -> dict[str, Any]:
        """A short request that comes when a long prompt has just begun to be read."""
        with streaming(self._several, stream), ThreadPoolExecutor(2) as pool:
            ahead = pool.submit(watch, self._several, long)
            time.sleep(HEAD_START)
            behind = pool.submit(watch, self._several, short)
            found = [ahead.result(), behind.result()]
        numbers = {"short_first_token_ms": found[1].first_token_ms, "long_first_token_ms": found[0].first_token_ms}
        return told(numbers, [one.result for one in found])

    def short_at_once(self, prompts: list[str], stream: str | None = None) -> dict[str, Any]:
        """Several short requests at the same moment."""
        with streaming(self._several, stream), ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(watch, [self._several] * len(prompts), prompts))
        first = [one.first_token_ms for one in found]
        all_done = max(one.times[-1] for one in found) - min(one.started for one in found)
        numbers = {
            "median_first_token_ms": float(np.median(first)),
            "worst_first_token_ms": max(first),
            "all_answered_ms": 1e3 * all_done,
        }
        return told(numbers, [one.result for one in found])

    def long_beside_a_stream(self, long: str, stream: str) -> dict[str, Any]:
        """A long prompt, and what a stream that decodes feels of it: the gaps between its chunks until the prompt is read."""
        with streaming(self._several, stream) as chunks:
            found = watch(self._several, long)
            start, end = found.started, found.times[0]
            spans = [(b - a, tokens) for (a, _), (b, tokens) in pairwise(chunks[:]) if b > start and a < end]
        gaps = 1e3 * np.array([seconds for seconds, _ in spans])
        numbers = {
            "median_gap_ms": float(np.median(gaps)),
            "95th_percentile_gap_ms": float(np.percentile(gaps, 95)),
            "longest_gap_ms": float(gaps.max()),
            "stream_tokens_per_second": 1e3 * sum(tokens for _, tokens in spans) / float(gaps.sum()),
            "long_first_token_ms": found.first_token_ms,
        }
        return told(numbers, [found.result])


if __name__ == "__main__":
    serve(lambda: Loads(sys.argv[1]).operations())
