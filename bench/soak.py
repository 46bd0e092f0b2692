"""Sends thousands of random requests, some cancelled, dropped or invalid, and checks that none is lost, stuck or wrong.

    python bench/soak.py BUNDLE [--requests 10000] [-o bench/results/soak.json]

The expected tokens of each request are decoded first, alone and without Medusa. Use a tiny bundle, since this tests the service
and not the model. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_runtime import CandidateTree, CapacityError, DynamicTree, Handle, MedusaLM, OptionError, QueueFullError, TreeError

HANG_SECONDS = 120
BAD = [
    {"temperature": -1.0},
    {"top_p": 0.0},
    {"max_new_tokens": 10**6},
    {"stop_token_ids": [-3]},
    {"no_such_option": 1},
    {"stop": [""]},
    {"tree": CandidateTree.from_choices([[0] * 30])},
    {"logit_bias": {10**9: 1.0}},
]
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "small", "models", "learn")
TREES = [None, CandidateTree.root_only(), DynamicTree(2), DynamicTree(7), DynamicTree(16)]


@dataclass(frozen=True)
class Expected:
    """A request and the tokens that it gives when it is decoded alone."""

    prompt: str
    fields: dict[str, Any]
    token_ids: list[int]


def expectations(lm: MedusaLM, prompts: Sequence[str], longest: int, seed: int) -> list[Expected]:
    """Requests of every kind with their expected tokens, each decoded alone on an idle model."""
    rng = random.Random(seed)
    found = []
    for prompt in prompts:
        fields: dict[str, Any] = {"max_new_tokens": rng.randint(1, longest), "ignore_eos": rng.random() < 0.5}
        if rng.random() < 0.5:
            fields |= {"temperature": rng.choice([0.5, 1.0, 1.5]), "seed": rng.randrange(100)}
            fields |= rng.choice([{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}])
        fields |= rng.choice([{}, {}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.2}, {"logprobs": 2}])
        found.append(Expected(prompt, fields, lm.generate(prompt, **fields, medusa=False).token_ids))
    return found


class Storm:
    """Callers in many threads, and counts of the outcomes of their requests.

    Args:
        lm: the model that they use.
        expected: the requests to choose from, with their expected tokens.
    """

    def __init__(self, lm: MedusaLM, expected: Sequence[Expected]) -> None:
        self._lm, self._expected = lm, expected
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def run(self, num_requests: int, seed: int, num_threads: int = 16) -> dict[str, int]:
        """Send `num_requests` requests, and wait until all slots are free again."""
        share = -(-num_requests // num_threads)
        with ThreadPoolExecutor(num_threads) as pool:
            callers = [pool.submit(self._call, random.Random(f"{seed} {thread}"), share) for thread in range(num_threads)]
            for caller in callers:
                caller.result()
        settled = time.monotonic() + HANG_SECONDS
        while (stats := self._lm.stats()).num_active + stats.num_waiting and time.monotonic() < settled:
            time.sleep(0.01)
        names = ("completed", "cancelled", "dropped", "refused_options", "refused_queue", "wrong", "hung")
        state = {"slots_in_use": stats.num_active, "waiting": stats.num_waiting, "failed": stats.num_failed}
        return {name: self._counts[name] for name in names} | state

    def _call(self, rng: random.Random, num_requests: int) -> None:
        for _ in range(num_requests):
            want = rng.choice(self._expected)
            if rng.random() < 0.1:
                self._ask_badly(want, rng)
            else:
                self._ask(want, rng)

    def _ask_badly(self, want: Expected, rng: random.Random) -> None:
        try:
            self._lm.submit(want.prompt, **want.fields | rng.choice(BAD))
            self._count("wrong")
        except (OptionError, CapacityError, TreeError):
            self._count("refused_options")

    def _ask(self, want: Expected, rng: random.Random) -> None:
        handle = self._submit(want, rng)
        if (kind := rng.random()) < 0.05:
            self._count("dropped")
            return
        if kind < 0.2:
            for _ in range(rng.randrange(4)):
                next(handle, None)
            handle.cancel()
        try:
            result = handle.result(HANG_SECONDS)
        except TimeoutError:
            self._count("hung")
            return
        is_cut = result.finish_reason == "cancelled"
        right = result.token_ids == (want.token_ids[: len(result.token_ids)] if is_cut else want.token_ids)
        self._count("wrong" if not right else "cancelled" if is_cut else "completed")

    def _submit(self, want: Expected, rng: random.Random) -> Handle:
        while True:
            try:
                return self._lm.submit(want.prompt, **want.fields, tree=rng.choice(TREES))
            except QueueFullError:
                self._count("refused_queue")
                time.sleep(0.001)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def resident_bytes() -> int:
    """The resident memory of this process, in bytes."""
    return 4096 * int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--requests", default=10_000, show_default=True)
@click.option("--longest", default=40, show_default=True, help="Most new tokens of a request.")
@click.option("--max-batch-size", default=8, show_default=True)
@click.option("--max-queue", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    bundle: Path, requests: int, longest: int, max_batch_size: int, max_queue: int, seed: int, output: Path | None
) -> None:
    """Send many requests to BUNDLE."""
    rng = random.Random(seed)
    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(200)]
    with MedusaLM.from_bundle(bundle, max_batch_size=1, reuse_prefixes=False) as alone:
        expected = expectations(alone, prompts, longest, seed)
    with MedusaLM.from_bundle(bundle, max_batch_size=max_batch_size, max_queue=max_queue) as lm:
        Storm(lm, expected).run(requests // 10, seed + 1)
        before, started = resident_bytes(), time.perf_counter()
        outcome = Storm(lm, expected).run(requests, seed)
        result = environment() | {
            "requests": requests,
            "outcome": outcome,
            "seconds": round(time.perf_counter() - started, 1),
            "resident_megabytes_before": round(before / 1e6, 1),
            "resident_megabytes_after": round(resident_bytes() / 1e6, 1),
            "threads_of_this_process": threading.active_count(),
        }
    publish(result, output)
    sys.exit(1 if outcome["wrong"] or outcome["hung"] or outcome["slots_in_use"] or outcome["failed"] else 0)


if __name__ == "__main__":
    main()
