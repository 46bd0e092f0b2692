"""The doctor's report, as JSON and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from medusa_export.doctor.machine_facts import Facts
from medusa_export.doctor.verdicts import Verdict
from medusa_export.packages import install_command
from medusa_runtime.backends.webgpu.adapters import Adapter
from medusa_runtime.backends.webgpu.vulkan import VulkanDevice, device_of
from medusa_runtime.bundle.plans import FLAVOR_NAMES

BOTH = (
    "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one, with: "
    "pip uninstall --yes onnxruntime onnxruntime-gpu && {}"
)


def as_json(facts: Facts, found: Sequence[Verdict]) -> dict[str, Any]:
    """The whole report as JSON values."""
    return {
        "python": facts.python,
        "system": facts.system,
        "packages": facts.packages,
        "onnxruntime_providers": facts.providers,
        "why_no_cuda_provider": facts.why_no_cuda,
        "gpus": [dataclasses.asdict(gpu) for gpu in facts.gpus.gpus],
        "why_no_gpu": facts.gpus.why_none,
        "cuda_version": facts.gpus.cuda_version,
        "webgpu_adapters": [_adapter(adapter, facts) for adapter in facts.adapters],
        "tensorrt": {name: dataclasses.asdict(flavor) for name, flavor in facts.flavors.items()},
        "verdicts": [dataclasses.asdict(verdict) for verdict in found],
        "warnings": warnings(facts),
    }


def _adapter(adapter: Adapter, facts: Facts) -> dict[str, Any]:
    device = device_of(adapter, facts.vulkan)
    return {
        "index": adapter.index,
        "name": adapter.name,
        "is_software": adapter.is_software,
        "vulkan": None if device is None else dataclasses.asdict(device),
    }


def _limits(device: VulkanDevice | None) -> str:
    if device is None:
        return "whose limits are not told here"
    return f"{device.name}: {device.memory / 1e9:.1f} GB of memory, tensors of up to {device.largest_buffer / 1e9:.1f} GB"


def warnings(facts: Facts) -> list[str]:
    """Problems that cause no error by themselves."""
    if not (facts.packages["onnxruntime"] and facts.packages["onnxruntime-gpu"]):
        return []
    return [BOTH.format(install_command("cpu" if facts.gpus.is_absent else "gpu"))]


def show(facts: Facts, found: Sequence[Verdict], console: Console) -> None:
    """Print the facts as lines, the verdicts as a table, and the commands that install what is missing."""
    _line(console, f"{facts.python} on {facts.system}")
    _line(console, ", ".join(f"{name} {version}" for name, version in facts.packages.items() if version))
    _line(console, f"not installed: {', '.join(name for name, version in facts.packages.items() if not version)}")
    _line(console, f"ONNX Runtime's providers: {', '.join(facts.providers) or 'none'}")
    for gpu in facts.gpus.gpus:
        _line(console, f"cuda:{gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory / 1e9:.0f} GB")
    cuda = f"the driver supports CUDA {facts.gpus.cuda_version}" if facts.gpus.cuda_version else facts.gpus.why_none
    _line(console, f"GPUs: {len(facts.gpus.gpus)}; {cuda}")
    for adapter in facts.adapters:
        _line(console, f"gpu:{adapter.index}: {adapter.name} (WebGPU), {_limits(device_of(adapter, facts.vulkan))}")
    for name, flavor in facts.flavors.items():
        known = ", ".join(flavor.compute_capabilities) or "no GPU of this machine"
        _line(console, f"{FLAVOR_NAMES[name]}: {flavor.why_not or f'{flavor.version}, builds for {known}'}")
    table = Table("", "", "works", "why")
    for verdict in found:
        table.add_row(verdict.action, verdict.what, "[green]yes" if verdict.works else "[red]no", verdict.why)
    console.print(table)
    for warning in warnings(facts):
        _line(console, f"warning: {warning}")
    for mend in dict.fromkeys(verdict.mend for verdict in found if verdict.mend):
        names = ", ".join(f"{one.action} {one.what}" for one in found if one.mend == mend)
        _line(console, f"to {names}: {mend}")


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
