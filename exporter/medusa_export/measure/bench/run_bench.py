"""Runs a benchmark, from options to the dictionary of results."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from medusa_export.measure.bench import bench_sections as sections
from medusa_export.measure.bench.bench_options import MODES, BenchOptions
from medusa_export.measure.bench.bench_prompts import load_prompts
from medusa_export.measure.bench.contest import Contestant, contest, warm_up
from medusa_export.measure.bench.contest_state import Bench
from medusa_export.measure.bench.floor import read_bandwidth, step_weight_bytes
from medusa_export.measure.bench.peers import ALL, choose_peers, peer_command
from medusa_export.measure.bench.process import WorkerProcess
from medusa_export.measure.bench.result import result_of
from medusa_export.placement import place
from medusa_export.progress import count_stage, note, stage, step_stage
from medusa_runtime.bundle.manifest import ORT_CPU, Manifest
from medusa_runtime.errors import MedusaError, OptionError
from medusa_runtime.text.codec import TOKENIZER_NAME, TextCodec


def prepare(options: BenchOptions) -> Bench:
    """Check everything that can be checked before measuring.

    Raises:
        OptionError, BundleError, BackendError: an option or a bundle cannot be used.
    """
    if unknown := [mode for mode in options.modes if mode not in MODES]:
        raise OptionError(f"there is no mode {unknown[0]!r}; use some of: {', '.join(MODES)}")
    bundles = _bundles(options.bundles)
    chosen = choose_peers(options.peers, options.sources, options.peers_python)
    placements = {
        name: place(
            manifest,
            options.backend,
            options.device,
            threads=options.threads,
            spin=options.spin,
            cuda_graphs=options.cuda_graphs,
        )
        for name, (_, manifest) in bundles.items()
    }
    bench = Bench(options, bundles, [], chosen, placements)
    prompts = load_prompts(options.prompts, options.limit, TextCodec(options.bundles[0]))
    bench.prompts = [one for one in prompts if len(one.token_ids) + options.max_new_tokens <= bench.longest]
    if not bench.prompts:
        raise OptionError(
            f"no prompt leaves room for {options.max_new_tokens} new tokens within the bundle's limit of {bench.longest}; "
            "lower --max-new-tokens"
        )
    if len(bench.prompts) < len(prompts):
        note(f"left out {len(prompts) - len(bench.prompts)} prompts that leave no room for the answer")
    return bench


def measure(bench: Bench) -> dict[str, Any]:
    """Run all measurements. `complete` in the result is False if they were interrupted.

    Ctrl-C and SIGTERM interrupt them; the result then has everything measured so far.

    Raises:
        MedusaError: one of our own contestants failed. `result_of` still returns the result so far.
    """
    with _terminated_as_interrupted(), ExitStack() as processes:
        try:
            _start(bench, processes)
            _measure(bench)
        except KeyboardInterrupt:
            return result_of(bench, complete=False)
        return result_of(bench, complete=True)


def _bundles(paths: Sequence[Path]) -> dict[str, tuple[Path, Manifest]]:
    """Manifests by short names. All bundles must have the same tokenizer, or token ids would differ in meaning."""
    manifests = [Manifest.load(path) for path in paths]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise OptionError("a bundle is given twice; give each bundle once")
    digests = [manifest.files[TOKENIZER_NAME].sha256 for manifest in manifests]
    for name, digest in zip(names, digests, strict=True):
        if digest != digests[0]:
            raise OptionError(f"{names[0]} and {name} have different tokenizers; give bundles of one model")
    return dict(zip(names, zip(paths, manifests, strict=True), strict=True))


def _start(bench: Bench, processes: ExitStack) -> None:
    environment = {"OMP_NUM_THREADS": str(bench.threads)}
    for name, (path, _) in bench.bundles.items():
        placement = bench.placements[name]
        settings = json.dumps(
            {
                "bundle": str(path),
                "threads": bench.threads,
                "spin": bench.options.spin,
                "backend": placement.backend,
                "device": placement.device,
                "cuda_graphs": bench.options.cuda_graphs,
                "allow_engine_code": bench.options.allow_engine_code,
            }
        )
        with stage(f"load {name}"):
            command = [sys.executable, "-m", "medusa_export.measure.bench.own", settings]
            process = processes.enter_context(WorkerProcess(name, command, environment))
        for mode in bench.options.modes:
            bench.contestants.append(Contestant(f"{name} {mode}", process, {"mode": mode}, name, mode, drafts=mode != "plain"))
    for peer in bench.chosen.peers:
        settings_ = {"threads": bench.threads, "max_length": _max_length(bench), "tree": _first(bench).tree}
        try:
            with stage(f"load {peer.name}"):
                command = peer_command(
                    peer, bench.options.sources, bench.options.peers_python, bench.options.peer_models, **settings_
                )
                process = processes.enter_context(WorkerProcess(peer.name, command, environment))
        except MedusaError as error:
            if ALL not in bench.options.peers:
                raise
            note(f"left out: {error}")
            bench.failed[peer.name] = str(error)
            continue
        bench.contestants.append(Contestant(peer.name, process, drafts=peer.drafts))


def _measure(bench: Bench) -> None:
    options, contestants = bench.options, bench.contestants
    with stage("warm up"):
        warm_up(contestants, bench.prompts, options.max_new_tokens)
    _memory(bench)
    with count_stage("answers", unit="tokens") as tell:
        contest(
            contestants, bench.prompts, bench.answers,
            rounds=options.rounds, max_new_tokens=options.max_new_tokens, tell=tell,
        )  # fmt: skip
    _memory(bench)
    _floors(bench)
    _sections(bench)


def _memory(bench: Bench) -> None:
    """Record the memory that each process has needed so far."""
    owners = {contestant.bundle or contestant.name: contestant for contestant in bench.contestants}
    for owner, contestant in owners.items():
        if contestant.failure is None:
            bench.memory[owner] = {key: round(value, 1) for key, value in contestant.process.ask("memory").items()}


def _floors(bench: Bench) -> None:
    with stage("memory bandwidth"):
        for name, (path, manifest) in bench.bundles.items():
            if bench.placements[name].backend != ORT_CPU:  # the floor is about the CPU's memory
                continue
            if (num_bytes := step_weight_bytes(path, manifest)) is None:
                note("the floor is not measured: packages are missing; install them with: pip install 'medusa-export[build]'")
                return
            bandwidth = read_bandwidth(num_bytes, bench.threads)
            bench.floors[name] = {
                "weight_mb": round(num_bytes / 1e6, 1),
                "bandwidth_gb_per_s": round(bandwidth / 1e9, 2),
                "ms": round(1e3 * num_bytes / bandwidth, 3),
            }


def _sections(bench: Bench) -> None:
    options, contestants, prompts = bench.options, bench.contestants, bench.prompts
    cached = min(sections.STEP_CONTEXT, bench.longest // 2)
    widths = [width for width in bench.fitting(options.steps, cached) if width <= bench.widest]
    context = bench.fitting(options.context, max(sections.CONTEXT_TOKENS, bench.tree_nodes))
    prefill = bench.fitting(options.prefill, 1)
    left_out = {*options.steps} - {*widths} | {*options.context} - {*context} | {*options.prefill} - {*prefill}
    if left_out:
        note(
            f"not measured: sizes {', '.join(map(str, sorted(left_out)))}. A sequence has at most {bench.longest} tokens "
            f"and a step at most {bench.widest}"
        )
    if widths:
        with step_stage("step costs", len(bench.bundles)) as tell:
            bench.sections["steps"] = sections.step_costs(contestants, prompts, widths, cached, tell)
    if context:
        with step_stage("contexts", len(bench.bundles) * len(context)) as tell:
            bench.sections["context"] = sections.context_costs(contestants, prompts, context, bench.tree_nodes, tell)
    if prefill or context:
        with step_stage("long prompts", len({*prefill, *context})) as tell:
            bench.sections["lengths"] = sections.lengths_costs(contestants, prompts, prefill, context, tell)


def _max_length(bench: Bench) -> int:
    """The most entries that a sequence needs."""
    longest = max(len(one.token_ids) for one in bench.prompts) + bench.options.max_new_tokens
    return max(longest, *bench.options.prefill, *bench.options.context, 0) + sections.CONTEXT_TOKENS + 64


def _first(bench: Bench) -> Manifest:
    return next(manifest for _, manifest in bench.bundles.values())


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """While open, SIGTERM acts like Ctrl-C."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
