"""Shared fixtures: tiny random models with a tokenizer, heads for them, and bundles made from both."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_export.cli.torch_threads import share_cores

share_cores()  # before any test imports PyTorch
if threading.current_thread() is threading.main_thread():  # a shell's background jobs ignore it, and so would what is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)

TEXT = "the quick brown fox jumps over the lazy dog while a small model learns to speak in many words at once"


# Files that take long. They begin first: a long one that is left for the end runs while other processes have nothing to do.
LONG = (
    "e2e/test_tutorial.py",
    "e2e/test_real_recipe.py",
    "integration/test_architectures.py",
    "e2e/test_real_model.py",
    "integration/test_odds_and_ends.py",
    "integration/test_gpu_tests.py",
    "integration/test_train_processes.py",
    "integration/test_documented_commands.py",
    "gpu/test_webgpu.py",
    "gpu/test_parity.py",
    "integration/test_train.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, the others with most tests first."""
    tests = Counter(item.path for item in items)
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: (place.get(item.path, len(LONG)), -tests[item.path], item.path))


def pytest_runtest_setup() -> None:
    """Trace each tiny model once. Tests that do not export should not wait for PyTorch, so this waits until it is imported."""
    for name in ("medusa_export.trace.step_graph", "medusa_export.trace.heads_graph"):
        if tracer := sys.modules.get(name):
            from tests.support.trace_memo import TraceMemo

            if not isinstance(tracer.export_module, TraceMemo):
                tracer.export_module = TraceMemo(tracer.export_module)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny random model of an architecture, with a tokenizer and a chat template, as a checkpoint directory."""
    from tests.support.models import save_tiny_model

    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **settings: object) -> Path:
        key = f"{model_type}-{sorted(settings.items())}"
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp(model_type), model_type, **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_heads(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Callable[..., Path]:
    """Makes random heads for a tiny model."""
    from tests.support.models import save_random_heads

    def make(model_type: str = "llama", **settings: object) -> Path:
        return save_random_heads(make_model(model_type), tmp_path_factory.mktemp("heads") / "heads", **settings)

    return make


@pytest.fixture(scope="session")
def make_bundle(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path], make_heads: Callable[..., Path]
) -> Callable[..., Path]:
    """Exports a tiny model to a bundle, once per set of settings. Tests that change a bundle must copy it first."""
    from medusa_export.bundle.export import export_bundle
    from medusa_export.command_options.export_options import ExportOptions

    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **settings: object) -> Path:
        key = f"{model_type}-{sorted(settings.items())}"
        if key not in made:
            output = tmp_path_factory.mktemp("bundle") / "bundle"
            export_bundle(ExportOptions(str(make_model(model_type)), make_heads(model_type), output, **settings))
            made[key] = output
        return made[key]

    return make
