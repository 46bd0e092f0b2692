"""What a process may use of its machine: cores, memory, threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest

from medusa_runtime import OptionError
from medusa_runtime.bundle.cpu import check_num_threads, has_exact_products, max_threads, memory_limit, num_cores

PHYSICAL = 64 << 30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores, of which this process may use 16, and 64 GiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": PHYSICAL // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system with control groups. groups: the lines of this process."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "150000 100000"}, 2),  # rounded up
        ("0::/", {"cpu.max": "5000 100000"}, 1),
        ("0::/", {"cpu.max": "3200000 100000"}, 16),  # affinity is less
        ("0::/", {"cpu.max": "surprise"}, 16),
        ("0::/", {}, 16),
        ("", {}, 16),
        ("0::/pod/box", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),  # a limit on what is around it
        ("0::/pod/box", {"pod/box/cpu.max": "100000 50000", "pod/cpu.max": "300000 100000"}, 2),
        ("0::/docker/0123", {"cpu.max": "400000 100000"}, 4),  # the host's name for what is the root in here
        ("0::/../box", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"unified/cpu.max": "700000 100000"}, 7),
        (
            "3:cpu,cpuacct:/box",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "250000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("1:cpu:/docker/0123", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "10000"}, 5),
        ("1:cpu:/a/b", {"cpu/a/cpu.cfs_quota_us": "60000", "cpu/a/cpu.cfs_period_us": "10000", "cpu/a/b/x": ""}, 6),
        ("2:cpuacct:/", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "10000"}, 16),  # of another controller
        ("1:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "80000", "cpu/cpu.cfs_period_us": "10000", "cpu.max": "max 100000"}, 8),
    ],
)
def test_a_containers_cpus_count(tmp_path: Path, groups: str, files: dict[str, str], cores: int) -> None:
    assert num_cores(tree(tmp_path, groups, files)) == cores


@pytest.mark.parametrize(
    ("groups", "files", "size"),
    [
        ("0::/", {"memory.max": "max"}, PHYSICAL),
        ("0::/", {"memory.max": str(2 << 30)}, 2 << 30),
        ("0::/", {"memory.max": str(PHYSICAL * 2)}, PHYSICAL),
        ("0::/pod/box", {"pod/box/memory.max": "max", "pod/memory.max": str(3 << 30)}, 3 << 30),
        ("4:memory:/box", {"memory/box/memory.limit_in_bytes": str(1 << 30)}, 1 << 30),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, PHYSICAL),  # no limit
        ("", {}, PHYSICAL),
    ],
)
def test_a_containers_memory_counts(tmp_path: Path, groups: str, files: dict[str, str], size: int) -> None:
    assert memory_limit(tree(tmp_path, groups, files)) == size


def test_a_system_that_tells_no_memory_has_no_limit_but_its_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert memory_limit(tmp_path) is None
    assert memory_limit(tree(tmp_path, "4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"})) is None
    assert memory_limit(tree(tmp_path, "0::/", {"memory.max": "1000000"})) == 1_000_000


def test_this_machine_can_be_asked() -> None:
    assert 1 <= num_cores() <= 16
    limit = memory_limit()
    assert limit is not None
    assert 0 < limit <= PHYSICAL


@pytest.mark.parametrize("value", [0, 1, 256, np.int64(3)])
def test_a_number_of_threads_is_taken(value: int) -> None:
    found = check_num_threads(value)
    assert (found, type(found)) == (value, int)


@pytest.mark.parametrize("value", ["2", -1, 257, 10_000, 1.0, 1.5, None, True, float("nan"), 10**30])
def test_another_number_of_threads_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(OptionError, match=r"num_threads is .*; it must be a whole number from 0 to 256: ") as caught:
        check_num_threads(value)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_small_machine_takes_some_threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert max_threads() == 32


def test_products_are_exact_if_the_cpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    info.write_text("processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor : 1\nflags : fpu\n", encoding="utf-8")
    assert has_exact_products(info)
    info.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\nvmx flags : avx_vnni\n", encoding="utf-8")
    assert not has_exact_products(info)
    assert not has_exact_products(tmp_path / "none")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert has_exact_products(tmp_path / "none")
