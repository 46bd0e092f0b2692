"""What the parts of a check do. Each runs commands of this project, and puts what they say into an entry of the report."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gpu_checking.budget import ROOT, Budget, Failed, OutOfTime
from gpu_checking.record import Entry, Facts

MEDUSA = (sys.executable, "-m", "medusa_export")
RECIPE = "smollm2-135m-instruct"
HEADS = ROOT / "recipes" / "heads" / RECIPE
FIRST, OTHERS = "fp16", ("bf16", "fp32")
SCHEMES = ("int4", "int8-blocks")  # for which bundles have graphs for WebGPU
WEBGPU_PRECISIONS = ("fp16", "fp32")
NO_FP16 = "cannot compute in fp16 through WebGPU"  # in the error of a device that refuses a bundle in fp16


@dataclass(frozen=True)
class Way:
    """A way to run a bundle on a GPU."""

    device: str
    verdicts: tuple[tuple[str, str], ...]  # of the doctor, which must be good
    flavor: str | None = None  # of TensorRT, if it runs engines


WAYS = {
    "cuda": Way("cuda", (("run", "ort-cuda"),)),
    "rtx": Way("cuda", (("build", "rtx"), ("run", "trt-rtx")), "rtx"),
    "tensorrt": Way("cuda", (("build", "trt"), ("run", "trt")), "tensorrt"),
    "webgpu": Way("gpu", (("run", "ort-webgpu"),)),
}


@dataclass
class Check:
    """What a check works on.

    Args:
        budget: its time.
        doctor: what `medusa-export doctor --json` says.
        work: where bundles and engines are written.
        bundles: ONNX bundles. The first one is tried first, in every way. Exported ones are added.
        are_given: they are the user's; none is exported unless it is needed.
        source: the checkpoint that they are made from.
        heads: its heads, if they are known.
        tests: files and folders of tests.
        schemes: to quantise to.
        validation: options of `medusa-export validate`.
        bench: options of bench/gpu.py.
    """

    budget: Budget
    doctor: Facts
    work: Path
    bundles: list[Path]
    source: str | None
    heads: Path | None
    tests: Sequence[str]
    schemes: Sequence[str] = SCHEMES
    validation: Sequence[str] = ()
    bench: Sequence[str] = ()
    refuses_fp16: str | None = None  # what WebGPU's device says of fp16; empty if it computes in it, None if it was not asked
    are_given: bool = field(init=False)

    def __post_init__(self) -> None:
        """Note whether the bundles are the user's."""
        self.are_given = bool(self.bundles)

    def why_not(self, name: str) -> str | None:
        """The doctor's reason why one of `WAYS` does not work on this machine; None if it works."""
        return next(filter(None, (self._reason(*key) for key in WAYS[name].verdicts)), None)

    def why_no_torch(self) -> str | None:
        """The doctor's reason why models cannot be exported, and bundles not be compared with them."""
        return self._reason("export", "onnx")

    def why_no_rtx_verdict(self) -> str | None:
        """Why TensorRT-RTX cannot be asked what it says of this GPU."""
        return self._why_no_nvidia() or self.doctor["tensorrt"]["rtx"]["why_not"]

    def why_no_pytorch(self) -> str | None:
        """Why PyTorch is not measured on this GPU."""
        if why := self._why_no_nvidia() or self.why_no_torch():
            return why
        is_known = self.heads is not None and (self.source is not None or not self.are_given)
        return None if is_known else "no --model with --heads is given for the bundles"

    def why_no_webgpu(self) -> str | None:
        """Why no bundle runs through WebGPU."""
        if why := self.why_not("webgpu"):
            return why
        runs = not self.bundles or any(_precision(one) in WEBGPU_PRECISIONS for one in self.bundles)
        return None if runs else f"WebGPU runs bundles in {' and '.join(WEBGPU_PRECISIONS)} alone"

    def _reason(self, action: str, what: str) -> str | None:
        [found] = [one for one in self.doctor["verdicts"] if (one["action"], one["what"]) == (action, what)]
        return None if found["works"] else str(found["why"])

    def _why_no_nvidia(self) -> str | None:
        return None if self.doctor["gpus"] else str(self.doctor["why_no_gpu"])

    def has_real_gpu(self) -> bool:
        """Whether there is a GPU, or only a driver in software."""
        return bool(self.doctor["gpus"]) or not self.doctor["webgpu_adapters"][0]["is_software"]

    def bundle(self, precision: str) -> Path | None:
        """The bundle of a precision, if there is one already."""
        return next((one for one in self.bundles if _precision(one) == precision), None)


def export_first(check: Check, entry: Entry) -> None:
    """Export the first bundle, after fetching the real small model if no checkpoint is given."""
    check.source = check.source or check.budget.run(*MEDUSA, "fetch", RECIPE).splitlines()[-1]
    entry.facts["model"] = Path(check.source).name
    entry.do(FIRST, partial(export, check, FIRST))


def export(check: Check, precision: str, entry: Entry) -> None:  # noqa: ARG001 - as all actions
    """Export the model in a precision. Its comparison with PyTorch on the CPU is left out: it is compared on the GPU."""
    if check.source is None:
        raise Failed(f"there is no bundle in {precision}; give one with --bundle, or the checkpoint with --model")
    target, heads = check.work / precision, check.heads or HEADS
    words = ("--heads", heads, "--dtype", precision, "-o", target, "--no-validate", "--force")
    check.budget.run(*MEDUSA, "onnx", check.source, *words)
    check.bundles.append(target)


def run_first(name: str, check: Check, entry: Entry) -> None:
    """The first bundle, in one of `WAYS`."""
    bundle = check.bundles[0]
    entry.do(bundle.name, partial(run_bundle, check, name, bundle))


def run_bundle(check: Check, name: str, bundle: Path, entry: Entry) -> None:
    """Build a bundle's engine if it needs one, compare it with PyTorch, and measure it."""
    way = WAYS[name]
    if way.flavor:
        engine = check.work / f"{bundle.name}-{way.flavor}"
        if not entry.do("build", partial(_build, check, way.flavor, bundle, engine)):
            return
        bundle = engine
    if why := check.why_no_torch() or (None if check.source else "no --model is given to compare with"):
        entry.leave_out("validation", why)
    else:
        entry.do("validation", partial(_validate, check, way.device, bundle))
    entry.do("benchmark", partial(_measure, check, bundle, ("--device", way.device)))


def _build(check: Check, flavor: str, bundle: Path, target: Path, entry: Entry) -> None:
    capability = check.doctor["gpus"][0]["compute_capability"]
    entry.facts["compute_capability"] = capability
    words = ("-o", target, "--flavor", flavor, "--compute-capability", capability, "--force")
    check.budget.run(*MEDUSA, "trt", bundle, *words)


def _validate(check: Check, device: str, bundle: Path, entry: Entry) -> None:
    words = ["--reference", str(check.source), "--device", device]
    words += ["--heads", str(check.heads)] if check.heads else []
    check.budget.run(*MEDUSA, "validate", bundle, *words, *check.validation, ends_with=(0, 3))
    facts = json.loads((bundle / "validation.json").read_text(encoding="utf-8"))
    summary = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["validation"]["summary"]
    entry.facts.update({name: facts[name] for name in ("status", "backend", "processor", "precision")} | summary)
    if facts["status"] != "passed":
        raise Failed(f"different from PyTorch: {facts['status']}")


def _measure(check: Check, bundle: Path, words: Sequence[str], entry: Entry) -> None:
    """Run bench/gpu.py. What it has measured is kept even if it is ended. CUDA graphs may fail, if all else is measured."""
    ways: Facts = {}
    failure: Failed | None = None
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "gpu.json"
        try:
            check.budget.run(sys.executable, "bench/gpu.py", bundle, *words, *check.bench, "-o", target)
        except Failed as error:
            failure = error
        finally:
            if target.exists():
                found = json.loads(target.read_text(encoding="utf-8"))
                ways = found["runs"].get(bundle.name, {}) | found["pytorch"]
                entry.facts.update({name: found[name] for name in ("prompts", "max_new_tokens")} | ways)
    if ways and all("failed" in way for way in ways.values()):
        raise Failed("; ".join(f"{name}: {way['failed']}" for name, way in ways.items()))
    if failure:
        raise failure


def run_webgpu(check: Check, entry: Entry) -> None:
    """The first bundle through WebGPU: in fp32 if the device refuses fp16, which is recorded."""
    adapter = check.doctor["webgpu_adapters"][0]
    entry.facts.update({"adapter": adapter["name"], "is_software": adapter["is_software"]})
    bundle = for_webgpu(check, entry)
    entry.do(bundle.name, partial(run_bundle, check, "webgpu", bundle))


def for_webgpu(check: Check, entry: Entry) -> Path:
    """The first bundle that WebGPU runs, or the one in fp32 if WebGPU's device refuses fp16."""
    bundle = next(one for one in check.bundles if _precision(one) in WEBGPU_PRECISIONS)
    if check.refuses_fp16 is None:
        check.refuses_fp16 = _refusal(check, bundle)
        entry.facts.update({"refused": {bundle.name: check.refuses_fp16}} if check.refuses_fp16 else {})
    if not check.refuses_fp16:
        return bundle
    if check.bundle("fp32") is None and not entry.do("export", partial(export, check, "fp32")):
        why = "this device needs a bundle in fp32, and there is none"
        raise OutOfTime(why) if "out_of_time" in entry.facts["export"] else Failed(why)
    other = check.bundle("fp32")
    assert other is not None
    return other


def _refusal(check: Check, bundle: Path) -> str:
    """What a device says that does not compute in a bundle's fp16; empty if it computes."""
    if _precision(bundle) != "fp16":
        return ""
    words = ("--device", "gpu", "--prompt", "Hello", "--max-new-tokens", 1)
    try:
        check.budget.run(*MEDUSA, "generate", bundle, *words)
    except Failed as error:
        last = str(error).splitlines()[-1]
        if NO_FP16 not in last:
            raise
        return last
    return ""


def run_quantised(check: Check, entry: Entry) -> None:
    """Quantised bundles through WebGPU."""
    bundle = for_webgpu(check, entry)
    for scheme in check.schemes:
        entry.do(scheme, partial(_quantise, check, bundle, scheme))


def _quantise(check: Check, bundle: Path, scheme: str, entry: Entry) -> None:
    target = check.work / scheme
    words = ("--scheme", scheme, "-o", target, "--force")
    if entry.do("quantise", lambda _: check.budget.run(*MEDUSA, "quantize", bundle, *words)):
        run_bundle(check, "webgpu", target, entry)


def run_others(check: Check, entry: Entry) -> None:
    """The other bundles that were given, or the other precisions of the model, in every way."""
    if check.are_given:
        for bundle in check.bundles[1:]:
            entry.do(bundle.name, partial(_run_every_way, check, bundle))
        return
    for precision in OTHERS:
        entry.do(precision, partial(_run_precision, check, precision))


def _run_precision(check: Check, precision: str, entry: Entry) -> None:
    if all(_why_not_in(check, name, precision) for name in WAYS):
        entry.leave_out("export", "nothing here runs it, or it has run already")
    elif check.bundle(precision) or entry.do("export", partial(export, check, precision)):
        bundle = check.bundle(precision)
        assert bundle is not None
        _run_every_way(check, bundle, entry)


def _run_every_way(check: Check, bundle: Path, entry: Entry) -> None:
    for name in WAYS:
        if why := _why_not_in(check, name, _precision(bundle)):
            entry.leave_out(name, why)
        else:
            entry.do(name, partial(run_bundle, check, name, bundle))


def _why_not_in(check: Check, name: str, precision: str) -> str | None:
    """Why a bundle of a precision is not run in one of `WAYS`."""
    if why := check.why_not(name):
        return why
    if name == "webgpu" and precision not in WEBGPU_PRECISIONS:
        return f"WebGPU does not run {precision}"
    if name == "webgpu" and check.refuses_fp16 and precision == "fp16":
        return check.refuses_fp16
    if name == "webgpu" and check.refuses_fp16 and not check.are_given:
        return "it has run already, since the device refuses fp16"
    return None


def ask_rtx(check: Check, entry: Entry) -> None:
    """What TensorRT-RTX says of this GPU, also if it does not list it."""
    words = (sys.executable, "scripts/rtx_verdict.py", check.doctor["gpus"][0]["compute_capability"])
    entry.facts.update(json.loads(check.budget.run(*words)))


def run_pytorch(check: Check, entry: Entry) -> None:
    """The same decoding in PyTorch on this GPU."""
    assert check.source is not None
    words = ("--checkpoint", check.source, "--heads", str(check.heads))
    for how in ("eager", "compiled"):
        entry.do(how, partial(_measure, check, check.bundles[0], (*words, "--measure", how)))


def _precision(bundle: Path) -> str:
    return str(json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["precision"])
