"""Two checkouts of this repository side by side in one sitting: what a change of the runtime does to speed and to waiting.

    python bench/two_checkouts.py BEFORE AFTER BUNDLE [-o bench/results/two_checkouts.json]

Each checkout has a process of its own, which loads the bundle once and is stopped while the other one works. They take turns
load by load, on the same prompts, so that drift of the machine hits both alike; who begins changes too. Of each load there is
a time or a rate by the caller's clock, without reuse of prefixes: tokens per second one after the other and side by side, with
Medusa and without; the time to the first token of a short request behind a long prompt, and of eight short requests at once,
each with nobody decoding and with one stream decoding; the gaps between a stream's chunks while a long prompt is read.

Other programs on the machine spoil it. On Linux, `cores_used_by_others` says how much of it they had meanwhile.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.measure.bench.process import WORKERS, WorkerProcess
from serving import PROMPTS as ALL_PROMPTS

PROMPTS = ALL_PROMPTS[:8]
STREAM = "Tell me a long story about a boy who finds a map in the attic of an old house."
WORDS = sorted(set(re.findall("[a-z]+", " ".join(PROMPTS).lower())))
ROOMS = ("runtime", "exporter", "heads")
LONG, MEDIUM, SHORT = 2000, 40, 20  # about so many tokens
Load = tuple[str, dict[str, Any]]


def text(rng: random.Random, num_tokens: int) -> str:
    """Sentences of random words, most of them one token each."""
    words: list[str] = []
    while len(words) < num_tokens:
        words += ["The", *rng.choices(WORDS, k=8), "."]
    return " ".join(words[:num_tokens]).replace(" .", ".")


def loads(turn: int) -> dict[str, Load]:
    """What both are asked in a round, on texts that no other round has."""
    rng = random.Random(turn)
    found: dict[str, Load] = {}
    for mode, medusa in (("Medusa", True), ("plain", False)):
        found[f"one after the other, {mode}"] = ("one_after_the_other", {"prompts": PROMPTS[:4], "medusa": medusa})
        found[f"eight side by side, {mode}"] = ("side_by_side", {"prompts": PROMPTS, "medusa": medusa})
    for beside, stream in (("", None), (", beside a stream", STREAM)):
        prompts = {"long": text(rng, LONG), "short": text(rng, SHORT), "stream": stream}
        found[f"a short request behind a long prompt{beside}"] = ("short_behind_long", prompts)
        prompts = {"prompts": [text(rng, MEDIUM) for _ in PROMPTS], "stream": stream}
        found[f"eight short requests at once{beside}"] = ("short_at_once", prompts)
    found["a long prompt beside a stream"] = ("long_beside_a_stream", {"long": text(rng, LONG), "stream": STREAM})
    return found


def opened(name: str, checkout: Path, bundle: Path) -> WorkerProcess:
    """A process that runs a checkout's runtime on the bundle."""
    path = [*(str(checkout.resolve() / room) for room in ROOMS), str(WORKERS)]
    command = [sys.executable, str(Path(__file__).with_name("loads.py")), str(bundle.resolve())]
    worker = WorkerProcess(name, command, {"PYTHONPATH": os.pathsep.join(path)})
    if not Path(worker.ask("where")).is_relative_to(checkout.resolve()):
        worker.close()
        raise click.ClickException(f"{checkout} has no runtime of its own")
    return worker


def commit_of(checkout: Path) -> str:
    """What is checked out, and whether it was changed since."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()


def processor_seconds(pid: int) -> tuple[float, float]:
    """What all programs have used so far, and what one of them has. Zeros where the system does not tell."""
    try:
        every = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
        own = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    idle = every[3:5]
    ticks = os.sysconf("SC_CLK_TCK")
    return (sum(map(int, every)) - sum(map(int, idle))) / ticks, (int(own[11]) + int(own[12])) / ticks


def asked(worker: WorkerProcess, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Put a load on a checkout, and see how busy others were meanwhile."""
    started, (every, own) = time.perf_counter(), processor_seconds(worker.pid)
    outcome: dict[str, Any] = worker.ask(operation, **arguments)
    every_then, own_then = processor_seconds(worker.pid)
    others = (every_then - every) - (own_then - own)
    return outcome | {"others": max(others, 0.0) / (time.perf_counter() - started)}


def compared(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of one load, by number: medians of both checkouts, and of their ratios round by round."""
    pairs = list(zip(found["before"], found["after"], strict=True))
    answers = [one == other for before, after in pairs for one, other in zip(before["answers"], after["answers"], strict=True)]
    entry: dict[str, Any] = {
        "prompt_tokens": found["after"][-1]["prompt_tokens"],
        "equal_answers": f"{sum(answers)} of {len(answers)}",
        "cores_used_by_others": {
            name: round(float(np.median([outcome["others"] for outcome in outcomes])), 2) for name, outcomes in found.items()
        },
    }
    for name in found["after"][0]["numbers"]:
        values = np.array([[before["numbers"][name], after["numbers"][name]] for before, after in pairs])
        ratios = values[:, 1] / values[:, 0]
        before, after = np.median(values, axis=0).round(2).tolist()
        entry[name] = {
            "before": before,
            "after": after,
            "ratio": round(float(np.median(ratios)), 3),
            "ratios": ratios.round(3).tolist(),
        }
    return entry


@click.command()
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(before: Path, after: Path, bundle: Path, rounds: int, output: Path | None) -> None:
    """Compare the checkouts BEFORE and AFTER on BUNDLE, which both must be able to read."""
    checkouts = {"before": before, "after": after}
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(opened(name, checkout, bundle)) for name, checkout in checkouts.items()}
        for turn in range(rounds + 1):
            for place, (load, (operation, arguments)) in enumerate(loads(turn).items()):
                for name in sorted(workers, reverse=bool((turn + place) % 2)):
                    outcome = asked(workers[name], operation, arguments)
                    if turn:  # the first round is there to warm up
                        found[load][name].append(outcome)
                    click.echo(f"round {turn} of {rounds}, {load}, {name}: {shown(outcome)}", err=True)
    result = environment() | {
        "checkouts": {name: commit_of(checkout) for name, checkout in checkouts.items()},
        "bundle": bundle.resolve().name,
        "rounds": rounds,
        "unit": "medians of rounds, in what the name says; ratio: the median of after / before, round by round",
        "loads": {load: compared(outcomes) for load, outcomes in found.items()},
    }
    publish(result, output)


def shown(outcome: Mapping[str, Any]) -> str:
    """An outcome for the line that tells of progress."""
    numbers = ", ".join(f"{name} {value:.1f}" for name, value in outcome["numbers"].items())
    return f"{numbers} (others used {outcome['others']:.1f} cores)"


if __name__ == "__main__":
    main()
