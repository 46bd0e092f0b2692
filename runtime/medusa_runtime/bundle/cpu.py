"""The CPU of this machine: its cores, its name and what its matrix products can do."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPU_FEATURES = ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "i8mm", "asimddp", "sve")  # that the products use


def device_key(backend: str, *, num_threads: int = 0, processor: str | None = None) -> str:
    """What names a device in `tuning.json`: whatever a step's time depends on, in words.

    Args:
        backend: one of `medusa_runtime.BACKENDS`, but for auto; see `medusa_runtime.choose_backend`.
        num_threads: of a CPU backend; 0 for one a core.
        processor: the GPU's name, or none for this machine's CPU.
    """
    if processor is not None:
        return f"{backend}, {processor}"
    cores = num_cores()
    return f"{backend}, {cpu_name()}, {num_threads or cores} threads on {cores} cores"


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model with the features that matter here: many virtual machines give no more than a maker's name.

    Args:
        cpuinfo: Linux's description of the CPU; elsewhere, what Python knows of the machine is told.
    """
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        lines = []
    facts = {name.strip().lower(): value.strip() for name, _, value in reversed(lines)}  # of the first core
    model = facts.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    flags = set((facts.get("flags") or facts.get("features") or "").split())
    found = [feature for feature in CPU_FEATURES if feature in flags]
    return f"{' '.join(model.split())} ({' '.join(found)})" if found else " ".join(model.split())
