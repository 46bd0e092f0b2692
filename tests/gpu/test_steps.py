"""What a step costs beside its kernels: captured or not, what comes down, and what memory stays taken."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_runtime import DynamicTree, MedusaError, MedusaLM
from medusa_runtime.backends.base import cache_entry_bytes
from medusa_runtime.backends.gpu.backend import GpuBackend
from tests.gpu.conftest import Open, logits
from tests.gpu.here import a_gpus, device_of, on_each_engine, on_each_with_cuda

pytestmark = a_gpus
Make = Callable[..., Path]
PROMPT = "the quick brown fox jumps over the lazy dog"
WARM_UP, REQUESTS = 100, 1000
SLACK = 4 << 20  # bytes that the driver may take for itself meanwhile
MOST_DOWN = 16 << 10  # bytes a step


def answers(bundle: Path, backend: str, *, cuda_graphs: bool) -> list[list[int]]:
    """Greedy requests with trees of several sizes, alone and in a batch."""
    with MedusaLM.from_bundle(bundle, backend, device=device_of(backend), cuda_graphs=cuda_graphs) as lm:
        found = [
            lm.generate(PROMPT, max_new_tokens=50, tree=DynamicTree(nodes), ignore_eos=True).token_ids
            for nodes in (1, 2, 7, 16)
        ]
        together = lm.generate_batch([PROMPT, "dog", "a small model"], max_new_tokens=30, ignore_eos=True)
        return found + [one.token_ids for one in together]


@on_each_with_cuda
def test_captured_steps_give_the_same_tokens(backend: str, bundle_for: Make) -> None:
    bundle = bundle_for(backend)
    plain = answers(bundle, backend, cuda_graphs=False)
    try:
        captured = answers(bundle, backend, cuda_graphs=True)
    except MedusaError as error:
        if backend != "ort-cuda":
            raise
        pytest.skip(f"ONNX Runtime does not capture this graph: {error}")
    assert captured == plain
    assert all(tokens == plain[0] for tokens in plain[:4])  # whatever the tree


@on_each_engine
def test_steps_are_captured_at_all(backend: str, open_gpu: Open) -> None:
    gpu = open_gpu(backend, cuda_graphs=True)
    gpu.resize(1, 64)
    for _ in range(3):
        logits(gpu, [5, 6, 7, 8])
    captured = [work.graph is not None for work in gpu._works.values()]
    assert captured == [backend == "trt"]  # TensorRT-RTX captures inside of its contexts


@on_each_with_cuda
def test_little_comes_down(backend: str, bundle_for: Make) -> None:
    with MedusaLM.from_bundle(bundle_for(backend), backend, device=device_of(backend), max_batch_size=1) as lm:
        gpu = lm.engine.backend
        assert isinstance(gpu, GpuBackend)
        lm.generate(PROMPT, max_new_tokens=10)
        before = gpu.num_bytes_down
        stats = lm.generate(PROMPT, max_new_tokens=60, ignore_eos=True).stats
        assert 0 < gpu.num_bytes_down - before < MOST_DOWN * (stats.num_steps + 1)


@on_each_with_cuda
def test_memory_is_constant_over_a_thousand_requests(backend: str, bundle_for: Make) -> None:
    with MedusaLM.from_bundle(bundle_for(backend), backend, device=device_of(backend), max_batch_size=4) as lm:
        gpu = lm.engine.backend
        assert isinstance(gpu, GpuBackend)
        rng = random.Random(0)
        _ask(lm, rng, WARM_UP)
        before = gpu.gpu.free_memory()
        _ask(lm, rng, REQUESTS)
        assert before - gpu.gpu.free_memory() < SLACK
        assert lm.stats().num_failed == 0


def _ask(lm: MedusaLM, rng: random.Random, count: int) -> None:
    words = PROMPT.split()
    prompts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)]
    for start in range(0, count, 8):
        lm.generate_batch(prompts[start : start + 8], max_new_tokens=rng.randint(1, 24))


@on_each_with_cuda
def test_memory_is_given_back(backend: str, bundle_for: Make) -> None:
    from medusa_runtime.backends.gpu.driver import Gpu

    watcher = Gpu()
    answers(bundle_for(backend), backend, cuda_graphs=False)  # what libraries take once, they keep
    gc.collect()
    before = watcher.free_memory()
    for _ in range(3):
        answers(bundle_for(backend), backend, cuda_graphs=False)
        gc.collect()
    assert before - watcher.free_memory() < SLACK


@on_each_with_cuda
def test_memory_is_told_by_purpose(backend: str, open_gpu: Open) -> None:
    gpu = open_gpu(backend)
    gpu.resize(2, 64)
    logits(gpu, [5, 6])
    told = gpu.memory()
    assert told["cache"] == 2 * gpu.capacity * cache_entry_bytes(gpu.manifest)
    assert told["buffers"] > 0
    assert ("weights" in told, "activations" in told) == (backend != "ort-cuda", backend != "ort-cuda")
    assert sum(told.values()) < gpu.gpu.facts.memory - gpu.gpu.free_memory()
