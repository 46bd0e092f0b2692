"""What can be exported, built and run on this machine, and how to install what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medusa_export.doctor.machine_facts import CUDA_PROVIDER, Facts
from medusa_export.engine.flavor import install_flavor
from medusa_export.packages import install_command
from medusa_runtime.bundle.plans import FLAVOR_NAMES

EXPORT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors")
BUILD = ("onnx", "onnx_ir")
BINDINGS = "cuda.bindings.driver"
LEAST_CUDA = 13  # the version that TensorRT's packages need
REPLACE = "pip uninstall --yes onnxruntime && "


@dataclass(frozen=True)
class Verdict:
    """A task, and whether it works on this machine."""

    action: str  # export, build, run
    what: str
    works: bool
    why: str
    mend: str | None = None  # the command that installs what is missing, if that is enough


def verdicts(facts: Facts) -> list[Verdict]:
    """The verdicts on all tasks."""
    return [
        _export(facts),
        _build(facts, "tensorrt", "trt"),
        _build(facts, "rtx", "rtx"),
        _run_on_cpu(facts),
        _run_on_gpu(facts),
        _run_on_webgpu(facts),
        _run_engines(facts, "tensorrt", "trt"),
        _run_engines(facts, "rtx", "trt-rtx"),
    ]


def _export(facts: Facts) -> Verdict:
    if problems := _missing(facts, EXPORT):
        return Verdict("export", "onnx", works=False, why=problems, mend=install_command("export"))
    return Verdict("export", "onnx", works=True, why=f"PyTorch {facts.packages['torch']}")


def _build(facts: Facts, flavor: str, name: str) -> Verdict:
    found = facts.flavors[flavor]
    missing = "; ".join(filter(None, (found.why_not, _missing(facts, BUILD))))
    if missing:
        why = missing if flavor == "rtx" else _with_gpu(facts, missing)
        mend = install_flavor(flavor, "build")
        return Verdict("build", name, works=False, why=why, mend=mend if flavor == "rtx" else _if_gpu(facts, mend))
    title = f"{FLAVOR_NAMES[flavor]} {found.version}"
    if not found.compute_capabilities:
        return Verdict("build", name, works=False, why=f"{title} builds for the GPU of the machine; {_no_gpu(facts)}")
    unknown = "" if flavor == "tensorrt" else "".join(f"; {left}" for left in _left_out(facts, flavor))
    return Verdict("build", name, works=True, why=f"{title}, for {', '.join(found.compute_capabilities)}{unknown}")


def _run_on_cpu(facts: Facts) -> Verdict:
    if problem := facts.missing.get("onnxruntime"):
        return Verdict("run", "ort-cpu", works=False, why=problem, mend=install_command("cpu"))
    return Verdict("run", "ort-cpu", works=True, why=f"ONNX Runtime {_onnxruntime(facts)}")


def _run_on_gpu(facts: Facts) -> Verdict:
    is_for_cpu = "onnxruntime" not in facts.missing and CUDA_PROVIDER not in facts.providers
    problems = _missing(facts, ("onnxruntime", BINDINGS))
    if is_for_cpu:
        problems = "; ".join(filter(None, (f"ONNX Runtime {_onnxruntime(facts)} is only for the CPU", problems)))
    if problems:
        mend, why = install_command("gpu"), _with_gpu(facts, problems)
        return Verdict("run", "ort-cuda", works=False, why=why, mend=_if_gpu(facts, REPLACE + mend if is_for_cpu else mend))
    if not facts.gpus.gpus:
        return Verdict("run", "ort-cuda", works=False, why=_no_gpu(facts))
    if facts.why_no_cuda:
        why = f"ONNX Runtime's CUDA provider does not load: {facts.why_no_cuda}"
        return Verdict("run", "ort-cuda", works=False, why=why, mend=install_command("gpu"))
    return Verdict("run", "ort-cuda", works=True, why=f"ONNX Runtime {_onnxruntime(facts)}, {_gpus(facts)}")


def _run_on_webgpu(facts: Facts) -> Verdict:
    needed = ("cpu", "webgpu") if "onnxruntime" in facts.missing else ("webgpu",)
    if facts.why_no_webgpu:
        return Verdict("run", "ort-webgpu", works=False, why=facts.why_no_webgpu, mend=install_command(*needed))
    if not facts.adapters:
        return Verdict(
            "run", "ort-webgpu", works=False, why="WebGPU finds no GPU with a driver for Vulkan, Metal or Direct3D 12"
        )
    names = ", ".join(adapter.name for adapter in facts.adapters)
    return Verdict("run", "ort-webgpu", works=True, why=f"ONNX Runtime {_onnxruntime(facts)}, {names}")


def _run_engines(facts: Facts, flavor: str, name: str) -> Verdict:
    found = facts.flavors[flavor]
    missing = "; ".join(filter(None, (found.why_not, _missing(facts, (BINDINGS,)))))
    if missing:
        return Verdict("run", name, works=False, why=_with_gpu(facts, missing), mend=_if_gpu(facts, install_flavor(flavor)))
    if not facts.gpus.gpus:
        return Verdict("run", name, works=False, why=_no_gpu(facts))
    cuda = facts.gpus.cuda_version or "0"
    if int(cuda.partition(".")[0]) < LEAST_CUDA:
        why = (
            f"{FLAVOR_NAMES[flavor]} {found.version} needs CUDA {LEAST_CUDA}, but the driver supports {cuda}; update the driver"
        )
        return Verdict("run", name, works=False, why=why)
    left_out = _left_out(facts, flavor)
    if len(left_out) == len(facts.gpus.gpus):
        return Verdict("run", name, works=False, why=f"{'; '.join(left_out)}; use ort-cuda or full TensorRT")
    return Verdict("run", name, works=True, why=f"{FLAVOR_NAMES[flavor]} {found.version}, {_gpus(facts)}")


def _left_out(facts: Facts, flavor: str) -> list[str]:
    """The GPUs of this machine that a flavour does not build for, one line each. Full TensorRT builds for all."""
    known = facts.flavors[flavor].compute_capabilities
    if flavor == "tensorrt":
        return []
    return [
        f"{FLAVOR_NAMES[flavor]} does not build for {gpu.name} ({gpu.compute_capability}), only for {', '.join(known)}"
        for gpu in facts.gpus.gpus
        if gpu.compute_capability not in known
    ]


def _missing(facts: Facts, modules: Sequence[str]) -> str:
    return "; ".join(facts.missing[name] for name in modules if name in facts.missing)


def _onnxruntime(facts: Facts) -> str:
    return facts.packages["onnxruntime-gpu"] or facts.packages["onnxruntime"] or "of unknown version"


def _no_gpu(facts: Facts) -> str:
    """The reason without its details, which the report prints once."""
    return (facts.gpus.why_none or "there is no GPU").partition(" (")[0]


def _with_gpu(facts: Facts, problems: str) -> str:
    """Problems with packages, and a missing GPU if that is known."""
    is_unknown = BINDINGS in facts.missing and not facts.gpus.is_absent
    return problems if facts.gpus.gpus or is_unknown else f"{problems}; {_no_gpu(facts)}"


def _if_gpu(facts: Facts, mend: str) -> str | None:
    """A command that installs what uses an NVIDIA GPU; None if there is none, which no package can change."""
    return None if facts.gpus.is_absent else mend


def _gpus(facts: Facts) -> str:
    return ", ".join(gpu.name for gpu in facts.gpus.gpus)
