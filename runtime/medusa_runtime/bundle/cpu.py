"""The machine this process runs on: its cores, threads and memory, and its CPU's name and features.

In a container, the limits that it was started with count, not the whole machine: they are read from Linux's control groups
(cgroups), of version 2 or 1.
"""

from __future__ import annotations

import math
import operator
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from medusa_runtime.bundle.amx import may_use_amx
from medusa_runtime.errors import OptionError

CPU_FEATURES = ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "i8mm", "asimddp", "sve")  # that the products use
EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # x86: products of uint8 with int8 keep all their bits
UNLIMITED = 1 << 60  # bytes; control groups of version 1 write such a number if there is no limit
CPUINFO, ROOT = Path("/proc/cpuinfo"), Path("/")
THREADS_PER_CORE, MIN_THREADS = 4, 32  # `max_threads`: 512 threads on 2 cores take 38 s to start
Spin = Literal["auto", "on", "off"]  # how a thread waits for work within a step
SPINS: tuple[Spin, ...] = get_args(Spin)


def device_key(backend: str, *, num_threads: int = 0, spin: Spin = "auto", processor: str | None = None) -> str:
    """The name of a device in `tuning.json`: everything that the time of a step depends on, in words.

    Args:
        backend: one of `medusa_runtime.BACKENDS` except auto; see `medusa_runtime.choose_backend`.
        num_threads: of a CPU backend; 0 means one for each core.
        spin: of a CPU backend. It is named only if it is not auto.
        processor: the GPU's name; omit it for this machine's CPU.
    """
    if processor is not None:
        return f"{backend}, {processor}"
    cores = num_cores()
    waiting = "" if spin == "auto" else f", spin {spin}"
    return f"{backend}, {cpu_name()}, {num_threads or cores} threads on {cores} cores{waiting}"


def num_cores(root: Path = ROOT) -> int:
    """Cores this process may use: those of its affinity, or fewer if its container is limited (1.5 CPUs count as 2).

    Args:
        root: the file system's root, where `proc` and `sys` are.
    """
    quotas = [quota for quota in (*_quotas_v2(root), *_quotas_v1(root)) if quota is not None]
    return max(1, min([num_affine_cores(), *map(math.ceil, quotas)]))


def num_affine_cores() -> int:
    """Cores that this process may run on, whatever part of their time its container may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory this process may use: the machine's, or fewer if its container is limited. None if neither is known.

    Args:
        root: the file system's root, where `proc` and `sys` are.
    """
    v2 = (_number(group / "memory.max") for group in _groups(root, ""))
    v1 = (_number(group / "memory.limit_in_bytes") for group in _groups(root, "memory"))
    return min((size for size in (_physical_memory(), *v2, *v1) if size is not None), default=None)


def available_memory(root: Path = ROOT) -> int:
    """Bytes of memory this process could still take: of the machine, or of its container if that has less. 0 if unknown.

    Args:
        root: the file system's root, where `proc` and `sys` are.
    """
    meminfo = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    kilobytes = meminfo.get("MemAvailable", "").split()[:1]
    machine = int(kilobytes[0]) * 1024 if kilobytes else None
    v2 = (_left(group / "memory.max", group / "memory.current") for group in _groups(root, ""))
    v1 = (_left(group / "memory.limit_in_bytes", group / "memory.usage_in_bytes") for group in _groups(root, "memory"))
    return min((size for size in (machine, *v2, *v1) if size is not None), default=0)


def max_threads() -> int:
    """The most threads that an option may ask for: more than a few for each core only wait for each other."""
    return max(MIN_THREADS, THREADS_PER_CORE * (os.cpu_count() or 1))


def check_num_threads(num_threads: int) -> int:
    """The option `num_threads`, checked: a whole number from 0, which means one for each core, to `max_threads()`.

    Raises:
        OptionError: it is something else.
    """
    try:
        number = -1 if isinstance(num_threads, bool) else operator.index(num_threads)
    except TypeError:
        number = -1
    if not 0 <= number <= max_threads():
        raise OptionError(
            f"num_threads is {num_threads!r}; it must be a whole number from 0 to {max_threads()}: "
            f"0 for one thread on each of the {num_cores()} cores that may be used here"
        )
    return number


def check_spin(spin: Spin) -> Spin:
    """The option `spin`, checked: one of `SPINS`.

    Raises:
        OptionError: it is something else.
    """
    if spin not in SPINS:
        raise OptionError(f"spin is {spin!r}; there are: {', '.join(SPINS)}")
    return spin


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's model and the features that matter here: many virtual machines name nothing but a maker.

    Args:
        cpuinfo: Linux's description of the CPU. If there is none, the name is what Python knows of the machine.
    """
    facts = _cpu_facts(cpuinfo)
    model = facts.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    flags = _flags(facts)
    if "amx_int8" in flags and not may_use_amx():
        flags.remove("amx_int8")
    found = [feature for feature in CPU_FEATURES if feature in flags]
    return f"{' '.join(model.split())} ({' '.join(found)})" if found else " ".join(model.split())


def has_exact_products(cpuinfo: Path = CPUINFO) -> bool:
    """Whether ONNX Runtime's products of uint8 with int8 keep all their bits: on x86 only with VNNI or AMX.

    Args:
        cpuinfo: Linux's description of the CPU. If there is none, an x86 CPU is taken to have neither.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return not EXACT.isdisjoint(_flags(_cpu_facts(cpuinfo)))


def _cpu_facts(cpuinfo: Path) -> dict[str, str]:
    """What Linux tells of the first core, by name in small letters."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":") for line in lines]
    return {name.strip().lower(): value.strip() for name, _, value in reversed(pairs)}


def _flags(facts: dict[str, str]) -> set[str]:
    return set((facts.get("flags") or facts.get("features") or "").split())


def _quotas_v2(root: Path) -> Iterator[float | None]:
    """CPUs that each enclosing group may use. The file holds microseconds of work and of the period they are counted in."""
    for group in _groups(root, ""):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        yield _ratio(quota, period)


def _quotas_v1(root: Path) -> Iterator[float | None]:
    for group in _groups(root, "cpu"):
        yield _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """The CPUs of a quota; none without a limit, which is written as max, or as -1."""
    if not (quota.isdecimal() and period.isdecimal()) or int(quota) * int(period) == 0:
        return None
    return int(quota) / int(period)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of this process's control group and of all those around it: any of them may hold a limit.

    Args:
        root: the file system's root.
        controller: of version 1, such as ``cpu``; empty for version 2, which has one tree for all.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        names, _, place = line.partition(":")[2].partition(":")
        if controller not in (names.split(",") if names else [""]):
            continue
        for mount in (mounts / names, mounts / controller) if controller else (mounts, mounts / "unified"):
            inner = mount / place.lstrip("/")
            if ".." in inner.parts or not inner.is_dir():  # a container sees its own group as the root, whatever its name
                inner = mount
            yield from (group for group in (inner, *inner.parents) if group.is_relative_to(mount))


def _physical_memory() -> int | None:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
    return size if size > 0 else None


def _left(limit: Path, used: Path) -> int | None:
    """Bytes that a control group leaves; None if it has no limit."""
    most, taken = _number(limit), _number(used)
    return None if most is None or taken is None else max(most - taken, 0)


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isdecimal() and int(text) < UNLIMITED else None


def _read(path: Path) -> str:
    """A small file of the system's, or nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
