"""The real small model on the GPU, where it was fetched: held to PyTorch, and faster with Medusa than without."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.check import validate
from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.engine.build import build_engines
from medusa_export.model.download import cache_directory
from medusa_export.recipe import library
from medusa_runtime import MedusaLM
from tests.gpu.here import FLAVORS, GPUS, a_gpus, needs_cuda, on_each_with_cuda

NAME = "smollm2-135m-instruct"
MODEL = cache_directory() / NAME
pytestmark = [
    a_gpus,
    needs_cuda,
    pytest.mark.e2e,
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"not fetched; do so with: medusa-export fetch {NAME}"),
]
PROMPTS = ("What is the capital of France?", "Write a Python function that reverses a string.")


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "fp16"
    export_bundle(ExportOptions(str(MODEL), library.folder() / "heads" / NAME, output, precision="fp16"))
    return output


@on_each_with_cuda
def test_it_answers_as_pytorch_does_and_faster_with_medusa(backend: str, onnx_bundle: Path, tmp_path: Path) -> None:
    bundle = onnx_bundle
    if backend in FLAVORS:
        bundle = tmp_path / "engines"
        own = (GPUS.gpus[0].compute_capability,)
        build_engines(EngineOptions(onnx_bundle, bundle, FLAVORS[backend], compute_capabilities=own, max_seq_len=1024))
    report = validate(bundle, str(MODEL), prompts=PROMPTS, backend=backend, device="cuda")
    assert report.status == "passed", report.verdicts()
    with MedusaLM.from_bundle(bundle, backend, device="cuda", max_batch_size=1) as lm:
        for medusa in (True, False):
            lm.generate(PROMPTS[1], max_new_tokens=64, medusa=medusa)
        fast = lm.generate(PROMPTS[1], max_new_tokens=128, ignore_eos=True).stats
        plain = lm.generate(PROMPTS[1], max_new_tokens=128, ignore_eos=True, medusa=False).stats
    assert fast.tokens_per_step > 1.5
    assert fast.tokens_per_second > plain.tokens_per_second
