"""Measures steps of a bundle with AMX and without it, in turn: two processes, one of them with ``MEDUSA_AMX=off``.

    python bench/amx.py BUNDLE [--rounds 12] [-o bench/results/amx.json]

One process waits while the other one is timed, so both see the same minutes of the machine. A round times a step of each width
after 256 tokens, a prompt of 512 tokens, and an answer of 128 tokens by plain decoding, with heads, and with prompt lookup as
well, with learned costs. The file has the medians of the rounds, and the quartiles of how many times as fast it is without AMX,
of the pairs of one round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_runtime import Manifest, MedusaLM, open_backend
from medusa_runtime.bundle.amx import VARIABLE
from serving import PROMPTS

WIDTHS, LENGTH, STEPS, PROMPT, CHUNK = (1, 2, 4, 8, 16, 32), 256, 6, 512, 128

NEW_TOKENS = 128
WAYS: dict[str, dict[str, bool]] = {
    "plain": {"medusa": False},
    "with heads": {"prompt_lookup": False},
    "with heads and lookup": {"prompt_lookup": True},
}


class Timer:
    """Times the steps of one bundle in this process."""

    def __init__(self, bundle: Path) -> None:
        self.backend = open_backend(bundle, Manifest.load(bundle), "ort-cpu")
        self.backend.resize(1, PROMPT + CHUNK)
        self.lm = MedusaLM.from_bundle(bundle, backend="ort-cpu", costs="learn", max_batch_size=1, reuse_prefixes=False)
        self.number = 0

    def round(self) -> dict[str, float]:
        """Seconds of a step by its width, of one evaluation of the heads, of a prompt, and of a token of an answer."""
        started = time.perf_counter()
        for start in range(0, PROMPT, CHUNK):
            self._step(CHUNK, start, 1)
        found = {"prompt": time.perf_counter() - started}
        for width in WIDTHS:
            found[str(width)] = float(np.median([self._step(width, LENGTH, width) for _ in range(STEPS)]))
        first = np.zeros(1, np.int64)
        started = time.perf_counter()
        for _ in range(STEPS):
            self.backend.propose(first, first)
        return found | {"heads": (time.perf_counter() - started) / STEPS} | self._answer()

    def _answer(self) -> dict[str, float]:
        """Seconds of a token of the next prompt's answer, by the way to decode it."""
        prompt = PROMPTS[self.number % len(PROMPTS)]
        self.number += 1
        found = {}
        for name, fields in WAYS.items():
            stats = self.lm.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, **fields).stats
            found[name] = stats.seconds_per_token
        return found

    def _step(self, width: int, length: int, num_rows: int) -> float:
        rows = np.arange(width)[None]
        mask, ids = np.tri(width, dtype=np.bool_)[None], np.full((1, width), 5)
        started = time.perf_counter()
        self.backend.step(ids, length + rows, mask, np.array([length]), rows[:, -num_rows:])
        return time.perf_counter() - started


def serve(bundle: Path) -> None:
    """Answer each line of the standard input with a round."""
    timer = Timer(bundle)
    timer.round()
    for _ in sys.stdin:
        print(json.dumps(timer.round()), flush=True)


def measure(bundle: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Rounds with AMX and without it, in turn."""
    command = [sys.executable, __file__, str(bundle), "--serve"]
    children = {
        name: subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=os.environ | {VARIABLE: value}
        )
        for name, value in (("amx", "on"), ("without", "off"))
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in children}
    try:
        for number in range(rounds):
            for name in sorted(children, reverse=bool(number % 2)):
                child = children[name]
                assert child.stdin is not None
                assert child.stdout is not None
                child.stdin.write("\n")
                child.stdin.flush()
                found[name].append(json.loads(child.stdout.readline()))
    finally:
        for child in children.values():
            child.kill()
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=12, show_default=True)
@click.option("--serve", "as_child", is_flag=True, hidden=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, rounds: int, as_child: bool, output: Path | None) -> None:
    """Measure BUNDLE on a processor with AMX."""
    if as_child:
        serve(bundle)
        return
    found = measure(bundle, rounds)
    keys = list(found["amx"][0])
    ratios = {key: [one[key] / other[key] for one, other in zip(found["amx"], found["without"], strict=True)] for key in keys}
    result: dict[str, Any] = environment() | {
        "unit": "ms; medians of rounds; 'faster without': the quartiles of the ratio in one round",
        "length": LENGTH,
        "rounds": rounds,
        "with": {key: round(1e3 * float(np.median([one[key] for one in found["amx"]])), 2) for key in keys},
        "without": {key: round(1e3 * float(np.median([one[key] for one in found["without"]])), 2) for key in keys},
        "faster without": {key: np.round(np.quantile(found_, [0.25, 0.5, 0.75]), 2).tolist() for key, found_ in ratios.items()},
    }
    publish(result, output)


if __name__ == "__main__":
    main()
