"""The description of the machine in a benchmark's result."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medusa_runtime.backends.gpu.devices import find_gpus

SHOWN_FLAGS = ("amx_int8", "avx2", "avx512_vnni", "avx512f")


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores, system and GPUs."""
    found = find_gpus()
    gpus = {"gpus": [asdict(gpu) for gpu in found.gpus], "cuda": found.cuda_version} if found.gpus else {}
    return {"cpu": _cpu(), "cores": num_cores(), "system": platform.system()} | gpus


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in SHOWN_FLAGS if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({', '.join(flags)})"
