"""The cache on the GPU: written in place, moved as the CPU moves it, never written past its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from medusa_runtime import Backend, CapacityError
from medusa_runtime.backends.gpu.backend import GpuBackend
from tests.gpu.conftest import MAX_PREFILL_TOKENS, Open, Rows, logits
from tests.gpu.here import a_gpus, on_each_backend, on_each_engine, on_each_with_cuda

pytestmark = a_gpus
Make = Callable[..., Path]
IDS = [5, 9, 14, 21, 33, 40, 52, 61, 77, 80, 93, 101]
OTHER = [200, 7, 31, 8, 150, 44]


def close(found: Rows, want: Rows) -> None:
    np.testing.assert_allclose(found, want, atol=5e-3)


@on_each_backend
def test_a_prompt_in_chunks_is_the_prompt_whole(backend: str, open_gpu: Open, cpu: Backend) -> None:
    gpu = open_gpu(backend)
    for one in (gpu, cpu):
        one.resize(1, 64)
    want = logits(cpu, IDS)
    for sizes in ([12], [7, 5], [1, 4, 4, 3]):
        start, pieces = 0, []
        for size in sizes:
            pieces.append(logits(gpu, IDS[start : start + size], start=start))
            start += size
        close(np.concatenate(pieces), want)


@on_each_backend
def test_commit_copy_swap_and_clear_are_the_cpus(backend: str, open_gpu: Open, cpu: Backend) -> None:
    found = [_moved(one) for one in (open_gpu(backend), cpu)]
    for name, rows in found[0].items():
        close(rows, found[1][name])


def _moved(backend: Backend) -> dict[str, Rows]:
    """What a token sees after each of the moves. [1, V] each."""
    backend.resize(3, 64)
    logits(backend, IDS)
    logits(backend, OTHER, slot=1)
    found = {}
    backend.commit(0, 4, np.array([1, 2, 5]))  # entries 5, 6 and 9 to 4, 5 and 6
    found["commit"] = logits(backend, [42], start=7)
    backend.copy(0, 2, 7)
    found["copy"] = logits(backend, [42], slot=2, start=7)
    backend.swap(0, 1, 6)
    found["swap, there"] = logits(backend, [42], slot=0, start=6)
    found["swap, back"] = logits(backend, [42], slot=1, start=6)
    backend.clear(0, 3, 7)
    found["clear"] = logits(backend, [42], slot=0, start=6)
    backend.resize(4, 64, [0, 6, 7])
    found["resize"] = logits(backend, [42], slot=2, start=7)
    return found


@on_each_with_cuda
def test_the_cache_is_updated_where_it_is(backend: str, open_gpu: Open, capfd: pytest.CaptureFixture[str]) -> None:
    """Steps neither move the cache nor allocate, and what they write is there. ONNX Runtime would warn of a copy."""
    gpu = open_gpu(backend)
    gpu.resize(2, 64)
    addresses, want = _addresses(gpu), logits(gpu, IDS)
    capfd.readouterr()  # what was said when the graphs were opened
    free = []
    for _ in range(20):
        logits(gpu, IDS[:8])
        found = logits(gpu, IDS[8:], start=8)
        free.append(gpu.gpu.free_memory())
    close(found, want[8:])
    assert _addresses(gpu) == addresses
    assert free[3:] == [free[3]] * 17  # the first ones may be captured, or compiled
    assert "copy" not in capfd.readouterr().err.lower()


def _addresses(gpu: GpuBackend) -> list[int]:
    assert gpu._cache is not None
    return [memory.address for _, memory in gpu._cache.tensors(0, 1)]


@on_each_backend
def test_a_step_past_the_capacity_is_refused_and_writes_nothing(backend: str, open_gpu: Open) -> None:
    gpu = open_gpu(backend)
    gpu.resize(2, 64)
    logits(gpu, IDS)
    logits(gpu, IDS, slot=1)
    last = gpu.capacity - 4
    before = logits(gpu, OTHER[:1], start=12)
    neighbour = logits(gpu, OTHER[:1], slot=1, start=12)
    down = getattr(gpu, "num_bytes_down", None)
    with pytest.raises(CapacityError, match=f"needs {last + 5} cache entries a slot, the cache has {gpu.capacity}"):
        logits(gpu, OTHER[:5], start=last)
    with pytest.raises(CapacityError, match=r"needs the slots 1 to 2, the cache has 2"):
        gpu.step(*(np.repeat(part, 2, axis=0) for part in _one(OTHER[0])), first_slot=1)
    assert getattr(gpu, "num_bytes_down", None) == down  # it did not even run
    close(logits(gpu, OTHER[:1], start=12), before)
    close(logits(gpu, OTHER[:1], slot=1, start=12), neighbour)


def _one(token: int) -> tuple[npt.NDArray[np.generic], ...]:
    return np.array([[token]]), np.array([[0]]), np.ones((1, 1, 1), np.bool_), np.array([0]), np.array([[0]])


@on_each_engine
def test_what_no_profile_takes_is_refused_with_the_option_that_helps(backend: str, open_gpu: Open) -> None:
    gpu = open_gpu(backend)
    gpu.resize(1, 64)
    with pytest.raises(CapacityError, match=f"--max-prefill-tokens {MAX_PREFILL_TOKENS + 1}"):
        logits(gpu, [5] * (MAX_PREFILL_TOKENS + 1))
    with pytest.raises(CapacityError, match="rebuild it with a larger --max-seq-len"):
        gpu.resize(1, gpu.capacity + 1)
    assert gpu.capacity == gpu.manifest.limits.capacity


@on_each_with_cuda
def test_a_cache_larger_than_the_gpu_is_refused_and_the_old_one_stays(backend: str, open_gpu: Open) -> None:
    gpu = open_gpu(backend)
    gpu.resize(1, 64)
    want = logits(gpu, IDS)
    slot_bytes = gpu.memory()["cache"]
    too_many = gpu.gpu.facts.memory // slot_bytes + 2
    with pytest.raises(CapacityError, match=r"a cache of \d+ times \d+ entries needs [\d.]+ MB of GPU memory, [\d.]+ MB are"):
        gpu.resize(too_many, 64, [len(IDS)])
    close(logits(gpu, IDS), want)
