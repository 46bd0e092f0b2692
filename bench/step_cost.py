"""Measures a step's time by its tokens, the cache's capacity and the cached tokens, and alternatives for the CPU backend.

    python bench/step_cost.py BUNDLE [-o bench/results/step_cost.json]

The sides of every comparison take turns in one process, so that changes of the machine's speed affect all alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_runtime import DecodingStats, Manifest, MedusaLM
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.choosing import open_backend
from medusa_runtime.backends.ort_sessions import SPIN_SETTINGS

REPEATS = 15
FIRST = (np.zeros(1, np.int64), np.zeros(1, np.int64))  # row and root of one sequence
STOP = "session.force_spinning_stop"
OWN_SETTINGS = {STOP, *(key for key, _ in SPIN_SETTINGS.values())}  # of the backend
PROMPT = "Explain in three sentences why the sky is blue."


def medians(**sides: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of each side. The sides take turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS + 2):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(float(np.median(found[2:])), 2) for name, found in times.items()}


def step(backend: Backend, tokens: int, cached: int) -> Callable[[], Any]:
    inputs = (
        np.ones((1, tokens), np.int64),
        np.arange(cached, cached + tokens)[None],
        np.tri(tokens, dtype=np.bool_)[None],
        np.array([cached]),
        np.arange(tokens)[None],
    )
    return lambda: backend.step(*inputs)


class ThreadOptions(ort.SessionOptions):  # type: ignore[misc]
    """Options of a session with one setting for its idle threads, instead of the backend's own."""

    def __init__(self, key: str, value: str) -> None:
        super().__init__()
        super().add_session_config_entry(key, value)

    def add_session_config_entry(self, key: str, value: str) -> None:
        if key not in OWN_SETTINGS:
            super().add_session_config_entry(key, value)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, output: Path | None) -> None:
    """Measure BUNDLE on the CPU."""
    manifest = Manifest.load(bundle)
    backends: dict[int, Backend] = {}
    for capacity in (256, 512, 1024, 2048):
        backends[capacity] = open_backend(bundle, manifest)
        backends[capacity].resize(1, capacity)
    small = backends[256]

    by_tokens = {
        tokens: medians(step=step(small, tokens, 128), heads=lambda: small.propose(*FIRST))
        for tokens in (1, 2, 4, 8, 16, 32, 64)
    }
    by_capacity = {
        tokens: medians(**{str(capacity): step(backend, tokens, 128) for capacity, backend in backends.items()})
        for tokens in (1, 16)
    }
    path = np.array([0, 3, 9])
    commit = medians(
        move=lambda: small.commit(0, 128, path),
        step_of_16=step(small, 16, 128),
        step_of_18_that_feeds_the_accepted_again=step(small, 18, 128),
    )
    result = environment() | {
        "precision": manifest.precision,
        "heads": manifest.heads.model_dump(),
        "unit": "ms, median",
        "step_by_tokens": by_tokens,
        "step_by_capacity": by_capacity,
        "commit_three_tokens": commit,
        "threads": threads(bundle, manifest),
        "loop": loop(bundle),
    }
    publish(result, output)


def threads(bundle: Path, manifest: Manifest) -> dict[str, dict[str, float]]:
    """Times of step and heads with three ways for the idle threads of a session to wait."""
    found = {}
    settings = {
        "spin until the session's run ends": (STOP, "1"),
        "spin on": (STOP, "0"),
        "never spin": ("session.intra_op.allow_spinning", "0"),
    }
    for name, setting in settings.items():
        with mock.patch.object(ort, "SessionOptions", partial(ThreadOptions, *setting)):
            backend = open_backend(bundle, manifest)
        backend.resize(1, 256)
        run = step(backend, 16, 128)
        found[name] = medians(step=run, heads=lambda backend=backend: backend.propose(*FIRST))
    return found


def loop(bundle: Path) -> dict[str, dict[str, float]]:
    """Whole answers with and without Medusa, in turn: medians of tokens per second and of the time outside the engine."""
    lm = MedusaLM.from_bundle(bundle)
    found: dict[str, list[DecodingStats]] = {"medusa": [], "plain": []}
    for _ in range(5):
        for name, runs in found.items():
            runs.append(lm.generate(PROMPT, max_new_tokens=96, medusa=name == "medusa", ignore_eos=True).stats)
    return {
        name: {
            "tokens_per_second": round(float(np.median([run.tokens_per_second for run in runs])), 1),
            "tokens_per_step": round(runs[0].tokens_per_step, 3),
            "host_share": round(float(np.median([1 - run.engine_seconds / run.decode_seconds for run in runs])), 4),
        }
        for name, runs in found.items()
    }


if __name__ == "__main__":
    main()
