"""Our own decoding in a process of its own: `python -m medusa_export.measure.bench.own SETTINGS`, where SETTINGS is JSON.

It uses the protocol of `workers/request_loop.py`. All modes share the weights and the cache, and use them in turn.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from medusa_export.measure.bench.workers.request_loop import Operations, serve
from medusa_runtime import CandidateTree, DecodingEngine, DecodingOptions, DynamicTree, MedusaLM
from medusa_runtime.backends.base import Backend
from medusa_runtime.bundle.cpu import Spin
from medusa_runtime.decoding.prefill import CHUNK
from medusa_runtime.text.codec import TextCodec
from medusa_runtime.text.stream import TextStream

PARTS = ("step", "propose", "commit")
# fields of a request, by mode
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {"medusa": False},
    "heads": {"prompt_lookup": False},
    "lookup": {"prompt_lookup": True},
}


class Clock:
    """Adds up the seconds of a backend's calls.

    It replaces methods of the backend itself, since the parts of an engine that is already there hold the backend, too.
    """

    def __init__(self, backend: Backend) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        for name in PARTS:
            setattr(backend, name, partial(self._timed, name, getattr(backend, name)))

    def _timed(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds[name] += time.perf_counter() - started


class OwnDecoding:
    """A bundle that can decode in every mode."""

    def __init__(
        self,
        bundle: str,
        threads: int,
        backend: str,
        device: str,
        *,
        cuda_graphs: bool | None,
        spin: Spin = "auto",
        allow_engine_code: bool = False,
    ) -> None:
        lm = MedusaLM.from_bundle(
            bundle,
            backend,
            max_batch_size=1,
            reuse_prefixes=False,
            device=device,
            num_threads=threads,
            spin=spin,
            cuda_graphs=cuda_graphs,
            allow_engine_code=allow_engine_code,
        )
        self._lm, self._codec, self.backend = lm, lm.codec, lm.engine.backend
        self._clock = Clock(self.backend)
        tree = CandidateTree.from_json(lm.manifest.tree)
        trees: dict[str, CandidateTree | DynamicTree] = {"plain": tree, "static": tree, "dynamic": DynamicTree(tree.num_nodes)}
        self._engines = {
            mode: DecodingEngine(self.backend, chosen, max_batch_size=1, reuse_prefixes=False, ngrams=lm.engine.ngrams)
            for mode, chosen in trees.items()
        } | dict.fromkeys(("tuned", "heads", "lookup"), lm.engine)

    def operations(self) -> Operations:
        """The operations that requests can name."""
        return {"generate": self.generate, "steps": self.steps}

    def generate(self, mode: str, token_ids: list[int], max_new_tokens: int) -> dict[str, Any]:
        """Like `workers.request_loop.timed`, and with the seconds of each part of decoding.

        Text is decoded from the same pieces after the clock has stopped, since no other contestant decodes text.
        """
        options = DecodingOptions(max_new_tokens=max_new_tokens, ignore_eos=True, **FIELDS.get(mode, {}))
        pieces: list[list[int]] = []
        seconds: list[float] = []
        before: dict[str, float] = {}
        started = time.perf_counter()
        for steps in self._engines[mode].generate([token_ids], options=options):
            seconds.append(time.perf_counter() - started)
            pieces.append([token for step in steps for token in step.token_ids])
            before = before or dict(self._clock.seconds)  # set when the first token arrives
        parts = {name: self._clock.seconds[name] - before[name] for name in PARTS}
        return {"pieces": pieces, "seconds": seconds, "parts": parts | {"text": _text_seconds(self._codec, pieces[1:])}}

    def steps(self, widths: list[int], token_ids: list[int], capacity: int, repeats: int) -> dict[str, dict[str, float]]:
        """Median seconds of steps of several widths after a context, and of the heads. All are measured in turn.

        Args:
            widths: tokens per step.
            token_ids: the context, which is read first.
            capacity: entries of the cache.
            repeats: number of steps of each width.
        """
        backend = self.backend
        _fill(backend, token_ids, capacity)
        times = defaultdict(list)
        heads, first = [], np.zeros(1, np.int64)
        for _ in range(repeats):
            for width in widths:
                times[width].append(_seconds(partial(_step, backend, token_ids[:1] * width, len(token_ids))))
            heads.append(_seconds(partial(backend.propose, first, first)))
        return {
            "step_seconds": {str(width): float(np.median(found)) for width, found in times.items()},
            "head_seconds": {"1": float(np.median(heads))},
        }


def _fill(backend: Backend, token_ids: list[int], capacity: int) -> None:
    """Read a context into an empty cache, like the engine."""
    backend.resize(1, capacity)
    chunk = min(CHUNK, backend.manifest.limits.max_prefill_tokens or CHUNK)
    for start in range(0, len(token_ids), chunk):
        _step(backend, token_ids[start : start + chunk], start, rows=1)


def _step(backend: Backend, token_ids: list[int], cached: int, rows: int | None = None) -> None:
    width = len(token_ids)
    backend.step(
        np.array([token_ids], np.int64),
        cached + np.arange(width)[None],
        np.tri(width, dtype=np.bool_)[None],
        np.array([cached]),
        np.arange(width)[None, -(rows or width) :],
    )


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _text_seconds(codec: TextCodec, pieces: list[list[int]]) -> float:
    stream = TextStream(codec)
    return _seconds(lambda: [stream.push(piece) for piece in pieces])


if __name__ == "__main__":
    serve(lambda: OwnDecoding(**json.loads(sys.argv[1])).operations())
