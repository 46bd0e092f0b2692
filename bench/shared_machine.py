"""Measures decoding on a machine that others use too: by how idle threads wait, and by the CPU time that there is.

    python bench/shared_machine.py BUNDLE … [--checkpoint MODEL] [-o bench/results/shared_machine.json]

Each bundle is decoded with `spin` on, off and auto, with Medusa and without, on the quiet machine and beside busy neighbours:
one and two processes that loop in Python. Then it is decoded inside CPU quotas, with several numbers of threads. With a
checkpoint, forward passes of PyTorch are timed too, by how its threads wait. All ways take turns, prompt by prompt, each in a
process of its own that is stopped while others work. `cores_used_by_others` leaves out the process that is measured and the
neighbours. The quiet rows need it to be near zero.

Quotas need the right to make a control group, which root has, but rarely inside a container. Without it, the result has the
reason, and the processes are tied to one core instead.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish
from two_checkouts import processor_seconds

from medusa_export.measure.bench.process import WORKERS, WorkerProcess
from medusa_runtime.bundle.cpu import SPINS, num_cores
from medusa_runtime.text.codec import TextCodec
from serving import PROMPTS

GROUPS = Path("/sys/fs/cgroup")
GROUP = "medusa-shared-machine"
PERIOD = 100_000  # microseconds in which a quota is counted: the default of containers
MODES = {"plain": "plain", "Medusa": "tuned"}
NEIGHBOURS = {"quiet": 0, "one neighbour": 1, "two neighbours": 2}
# by quota in CPUs: how idle threads wait, and the number of threads; 0 for as many as the runtime takes
IN_QUOTA: dict[float, tuple[tuple[str, int], ...]] = {
    1.5: (("auto", 0), ("on", 0), ("off", 0), ("auto", 1)),
    1.0: (("auto", 0), ("auto", 2), ("on", 2), ("off", 2)),
}
WAITS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
}
PASSES = (1, 43, 256)  # tokens
Numbers = dict[str, list[dict[str, float]]]  # by contestant, one entry a round


@contextmanager
def neighbours(count: int) -> Iterator[list[int]]:
    """Processes that are always busy. Gives their ids."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield [process.pid for process in busy]
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def quota(cpus: float) -> Iterator[Path]:
    """A control group that may use so much CPU time, of version 1 or 2. Gives the file for the ids of its processes.

    Raises:
        OSError: this system gives no right to make one.
    """
    first = GROUPS / "cpu"
    group = (first if first.is_dir() else GROUPS) / GROUP
    limits = {"cpu.cfs_period_us": str(PERIOD), "cpu.cfs_quota_us": str(int(cpus * PERIOD))}
    if not first.is_dir():
        (GROUPS / "cgroup.subtree_control").write_text("+cpu", encoding="utf-8")
        limits = {"cpu.max": f"{int(cpus * PERIOD)} {PERIOD}"}
    group.mkdir()
    try:
        for name, value in limits.items():
            (group / name).write_text(value, encoding="utf-8")
        yield group / "cgroup.procs"
    finally:
        for _ in range(50):  # a process that was killed stays in its group for a moment
            if not (group / "cgroup.procs").read_text(encoding="utf-8"):
                break
            time.sleep(0.1)
        group.rmdir()


def decoder(bundle: Path, spin: str, threads: int = 0, within: Sequence[str] = ()) -> WorkerProcess:
    """A process that decodes a bundle. within: a command that runs the rest of its words as a command."""
    settings = {
        "bundle": str(bundle.resolve()), "threads": threads, "spin": spin,
        "backend": "ort-cpu", "device": "cpu", "cuda_graphs": None,
    }  # fmt: skip
    command = [*within, sys.executable, "-m", "medusa_export.measure.bench.own", json.dumps(settings)]
    return WorkerProcess(f"{bundle.name}, spin {spin}", command)


def timed(worker: WorkerProcess, others: Sequence[int], do: str, **arguments: Any) -> tuple[Any, float]:
    """The answer of a worker, and the cores that programs other than it and `others` used meanwhile."""

    def used() -> float:
        (every, own), *rest = [processor_seconds(pid) for pid in (worker.pid, *others)]
        return every - own - sum(one for _, one in rest)

    started, before = time.perf_counter(), used()
    answer = worker.ask(do, **arguments)
    return answer, max(0.0, (used() - before) / (time.perf_counter() - started))


def decoded(worker: WorkerProcess, others: Sequence[int], mode: str, ids: list[int], tokens: int) -> dict[str, float]:
    """The speed of one answer."""
    answer, busy = timed(worker, others, "generate", mode=MODES[mode], token_ids=ids, max_new_tokens=tokens)
    seconds, pieces = answer["seconds"], answer["pieces"]
    return {
        "tokens_per_second": sum(map(len, pieces[1:])) / (seconds[-1] - seconds[0]),
        "longest_gap_ms": 1e3 * max(after - before for before, after in itertools.pairwise(seconds)),
        "cores_used_by_others": busy,
    }


def medians(found: Numbers) -> dict[str, dict[str, float]]:
    """Of each contestant, the median over the rounds."""
    return {
        name: {key: round(float(np.median([one[key] for one in rounds])), 3) for key in rounds[0]}
        for name, rounds in found.items()
    }


def turned(names: Sequence[Any], turn: int) -> list[Any]:
    """Another one begins each time."""
    return [*names[turn % len(names) :], *names[: turn % len(names)]]


def beside_neighbours(bundle: Path, prompts: Sequence[list[int]], rounds: int, tokens: int) -> dict[str, Any]:
    """Speeds by neighbours, spin and mode; as parts of the contestant's own quiet speed, and of the best `spin` there."""
    found: dict[str, Numbers] = {situation: defaultdict(list) for situation in NEIGHBOURS}
    with ExitStack() as stack:
        workers = {spin: stack.enter_context(decoder(bundle, spin)) for spin in SPINS}
        for turn in range(-1, rounds):
            for situation, count in NEIGHBOURS.items():
                if turn < 0 and count:  # the first round is there to warm up
                    continue
                with neighbours(count) as pids:
                    for spin, mode in turned(list(itertools.product(SPINS, MODES)), turn):
                        outcome = decoded(workers[spin], pids, mode, prompts[turn % len(prompts)], tokens)
                        if turn >= 0:
                            found[situation][f"{spin}, {mode}"].append(outcome)
                        tell(f"{bundle.name}, {situation}, round {turn + 1}, spin {spin}, {mode}", outcome)
    result: dict[str, Any] = {situation: medians(numbers) for situation, numbers in found.items()}
    for contestants in result.values():
        for name, numbers in contestants.items():
            mode = name.partition(", ")[2]
            best = max(contestants[f"{spin}, {mode}"]["tokens_per_second"] for spin in SPINS)
            numbers["of_quiet"] = round(numbers["tokens_per_second"] / result["quiet"][name]["tokens_per_second"], 3)
            numbers["of_best_spin"] = round(numbers["tokens_per_second"] / best, 3)
    return result


def in_quota(bundle: Path, prompts: Sequence[list[int]], rounds: int, tokens: int, cpus: float) -> dict[str, Any]:
    """Speeds within a CPU quota, by how threads wait and how many there are, on a machine without neighbours."""
    found: Numbers = defaultdict(list)
    with ExitStack() as stack:
        try:
            procs = stack.enter_context(quota(cpus))
        except OSError as error:
            limit, within = f"none: {error}; tied to one core instead", ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
        else:
            limit, within = f"control group, {cpus:g} CPUs", ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh"]
        workers = {
            f"{spin}, {threads or 'as many as the runtime takes'} threads": stack.enter_context(
                decoder(bundle, spin, threads, within)
            )
            for spin, threads in IN_QUOTA[cpus]
        }
        for turn in range(-1, rounds):
            for name, mode in turned(list(itertools.product(workers, MODES)), turn):
                outcome = decoded(workers[name], (), mode, prompts[turn % len(prompts)], tokens)
                if turn >= 0:
                    found[f"{name}, {mode}"].append(outcome)
                tell(f"{bundle.name}, quota {cpus:g}, round {turn + 1}, spin {name}, {mode}", outcome)
        for worker in workers.values():
            worker.close()  # before the group goes
    return {"limit": limit, "medians": medians(found)}


def passes(checkpoint: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of PyTorch's forward passes by neighbours, by how its threads wait, and by tokens."""
    found: dict[str, dict[str, Numbers]] = {
        situation: {str(size): defaultdict(list) for size in PASSES} for situation in NEIGHBOURS
    }
    chosen = {name for variables in WAITS.values() for name in variables}
    for name in chosen & os.environ.keys():
        del os.environ[name]  # what the shell says is for none of them
    command = [sys.executable, str(Path(__file__).with_name("torch_pass.py")), str(checkpoint.resolve())]
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(WorkerProcess(name, command, {"PYTHONPATH": import_path(), **variables}))
            for name, variables in WAITS.items()
        }
        for turn in range(-1, rounds):
            for situation, count in NEIGHBOURS.items():
                with neighbours(count if turn >= 0 else 0) as pids:
                    for name, size in turned(list(itertools.product(WAITS, PASSES)), turn):
                        seconds, busy = timed(workers[name], pids, "forward", tokens=size)
                        outcome = {"ms": 1e3 * seconds, "cores_used_by_others": busy}
                        if turn >= 0:
                            found[situation][str(size)][name].append(outcome)
                        tell(f"PyTorch, {situation}, round {turn + 1}, {size} tokens, {name}", outcome)
    return {
        situation: {f"{size} tokens": medians(numbers) for size, numbers in sizes.items()} for situation, sizes in found.items()
    }


def import_path() -> str:
    """Where workers find the protocol of their requests."""
    return os.pathsep.join(filter(None, [str(WORKERS), os.environ.get("PYTHONPATH")]))


def tell(what: str, outcome: Mapping[str, float]) -> None:
    """Progress, for whoever waits."""
    click.echo(f"{what}: {', '.join(f'{name} {value:.2f}' for name, value in outcome.items())}", err=True)


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Time PyTorch's passes, too.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=8))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundles: tuple[Path, ...], checkpoint: Path | None, rounds: int, max_new_tokens: int, output: Path | None) -> None:
    """Measure BUNDLES on the CPU."""
    found: dict[str, Any] = {}
    for bundle in bundles:
        codec = TextCodec(bundle)
        prompts = [codec.encode(prompt) for prompt in PROMPTS]
        found[bundle.resolve().name] = {
            "beside neighbours": beside_neighbours(bundle, prompts, rounds, max_new_tokens),
            "in quotas": {f"{cpus:g} CPUs": in_quota(bundle, prompts, rounds, max_new_tokens, cpus) for cpus in IN_QUOTA},
        }
    result = environment() | {
        "rounds": rounds,
        "max_new_tokens": max_new_tokens,
        "unit": "medians of rounds; of_quiet: part of the same way's quiet speed; of_best_spin: part of the speed with "
        "the best spin in the same situation; longest_gap_ms: the longest time between two chunks of an answer",
        "neighbours": 'python -c "while True: pass"',
        "cores_without_quota": num_cores(),
        "bundles": found,
        "pytorch_forward_passes": None if checkpoint is None else passes(checkpoint, rounds),
    }
    publish(result, output)


if __name__ == "__main__":
    main()
