"""Bundles for the GPU's backends: tiny random models, and engines built for the GPU that is here."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.engine.build import build_engines
from medusa_runtime import Backend, Manifest, open_backend
from tests.gpu.here import FLAVORS, GPUS, device_of
from tests.support.software_gpu import settings

Make = Callable[..., Path]
Open = Callable[..., Any]  # GpuBackend, or what has its methods
Rows = npt.NDArray[np.floating]
MAX_BATCH_SIZE, MAX_TREE_NODES, MAX_PREFILL_TOKENS = 4, 16, 32  # of the engines


@pytest.fixture(autouse=True)
def _driver_in_software(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebGPU may use a driver in software, but only in these tests."""
    for name, value in settings().items():
        monkeypatch.setenv(name, os.environ.get(name, value))


@pytest.fixture(scope="session")
def bundle_for(make_bundle: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The tiny model's bundle for a backend and a precision: engines where the backend runs such."""
    made: dict[tuple[str, str], Path] = {}

    def make(backend: str, precision: str = "fp32") -> Path:
        source = make_bundle("llama", precision=precision)
        if backend not in FLAVORS:
            return source
        if (backend, precision) not in made:
            output = tmp_path_factory.mktemp("engines") / precision
            own = (GPUS.gpus[0].compute_capability,)
            build_engines(
                EngineOptions(
                    source,
                    output,
                    FLAVORS[backend],
                    compute_capabilities=own,
                    max_batch_size=MAX_BATCH_SIZE,
                    max_tree_nodes=MAX_TREE_NODES,
                    max_prefill_tokens=MAX_PREFILL_TOKENS,
                )
            )
            made[backend, precision] = output
        return made[backend, precision]

    return make


@pytest.fixture
def open_gpu(bundle_for: Make) -> Iterator[Open]:
    """Opens the tiny model on a backend of the GPU. What was opened goes before the next test begins."""
    opened: list[Backend] = []

    def open_(backend: str, precision: str = "fp32", *, cuda_graphs: bool | None = None) -> Backend:
        bundle = bundle_for(backend, precision)
        found = open_backend(bundle, Manifest.load(bundle), backend, device=device_of(backend), cuda_graphs=cuda_graphs)
        opened.append(found)
        return found

    yield open_
    opened.clear()
    gc.collect()


@pytest.fixture
def cpu(make_bundle: Make) -> Backend:
    """The same model on the CPU: what is right."""
    bundle = make_bundle("llama", precision="fp32")
    return open_backend(bundle, Manifest.load(bundle), "ort-cpu")


def logits(backend: Backend, token_ids: list[int], *, slot: int = 0, start: int = 0) -> Rows:
    """Write tokens behind `start` entries of a slot, and evaluate all of them. [T, V]"""
    width = len(token_ids)
    found = backend.step(
        np.array([token_ids]),
        start + np.arange(width)[None],
        np.tri(width, dtype=np.bool_)[None],
        np.array([start]),
        np.arange(width)[None],
        first_slot=slot,
        with_logits=True,
    ).logits
    assert found is not None
    rows: Rows = found[0].copy()  # the next step overwrites them
    return rows
