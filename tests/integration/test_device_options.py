"""`--backend`, `--device` and `--cuda-graphs` on the commands that run a bundle: without a GPU, and on a stand-in for one."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from medusa_export.check import sides as runner
from medusa_export.check.validation_report import BF16_ON_GPU, QUANTIZED, QUANTIZED_TO_8_BITS, TOLERANCES, tolerance
from medusa_export.cli import main
from medusa_runtime import Manifest
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.choosing import open_backend
from medusa_runtime.backends.gpu import ort_cuda
from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.drafting.tuning import Tuning
from tests.support.cli import fails
from tests.support.clock import TuningClock
from tests.support.engines import stand_in_engine
from tests.support.stand_in_cuda import StandInDriver
from tests.support.stand_in_ort_cuda import StandInOrt
from tests.support.stand_in_tensorrt import StandInTensorRT

Make = Callable[..., Path]
NAME = "Stand-in GPU"
ON_GPU = f"ort-cuda, {NAME}"
no_gpu = pytest.mark.skipif(find_gpus().why_none is None, reason="there is a GPU")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words: object) -> Result:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, ONNX Runtime for it, and both flavours of TensorRT."""
    driver = StandInDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, StandInTensorRT(driver))
    monkeypatch.setattr(ort_cuda, "ort", StandInOrt(driver))


@pytest.fixture
def engines(make_bundle: Make, tmp_path: Path) -> Path:
    return stand_in_engine(make_bundle(), tmp_path / "engines", max_tree_nodes=32, max_prefill_tokens=48)


COMMANDS = [
    ("generate", "{bundle}", "-p", "x"),
    ("tune", "{bundle}"),
    ("tree", "show", "{bundle}"),
    ("validate", "{bundle}", "--reference", "{model}"),
    ("bench", "{bundle}"),
    ("distill", "{bundle}", "-o", "{new}", "--prompts", "{prompts}"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_every_command_refuses_what_it_cannot_do(
    words: tuple[str, ...], make_bundle: Make, make_model: Make, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a question\n")
    places = {"bundle": make_bundle(), "model": make_model(), "new": tmp_path / "new", "prompts": tmp_path / "p.txt"}
    command = [word.format(**places) for word in words]
    fails(
        run(*command, "--device", "tpu"),
        2,
        "the device is 'tpu'; there are: auto, cpu, cuda, cuda:1 … (CUDA), gpu, gpu:1 … (WebGPU)",
    )
    if find_gpus().why_none is not None:
        fails(run(*command, "--device", "cuda:0"), 1, "ort-cuda needs an NVIDIA GPU: ")
    if words[0] != "tree":
        message = "--no-cuda-graphs is only for CUDA and TensorRT, but the bundle runs with ort-cpu on cpu (asked for)"
        fails(run(*command, "--device", "cpu", "--no-cuda-graphs"), 2, message)
    if words[0] != "distill":
        message = "the backend ort-cuda does not run on the device cpu"
        fails(run(*command, "--backend", "ort-cuda", "--device", "cpu"), 2, message)
        message = "trt-rtx runs engine bundles, this is an ONNX bundle; build one with: medusa-export trt"
        fails(run(*command, "--backend", "trt-rtx"), 1, message)


@no_gpu
def test_engines_need_a_gpu_and_are_not_marked_for_want_of_one(engines: Path, make_model: Make) -> None:
    fails(run("generate", engines, "-p", "x"), 1, "trt-rtx needs an NVIDIA GPU: ")
    fails(run("validate", engines, "--reference", make_model()), 1, "trt-rtx needs an NVIDIA GPU: ")
    fails(run("generate", engines, "-p", "x", "--device", "cpu"), 2, "TensorRT engines do not run on the device cpu")
    assert Manifest.load(engines).validation.status == "not run"


def test_generate_tells_where_it_ran(make_bundle: Make) -> None:
    words = ("generate", make_bundle(), "-p", "a fox", "--max-new-tokens", 4, "--device", "cpu")
    assert done(*words).stderr.splitlines()[-1] == "ran with ort-cpu on cpu"
    assert "chosen because: asked for" in done(*words, "--verbose").stderr
    told = done(*words, "--json")
    assert told.stderr.splitlines()[-1] == "ran with ort-cpu on cpu"
    assert json.loads(told.stdout)["token_ids"]


@pytest.mark.usefixtures("stand_ins")
def test_generate_gives_the_same_on_every_device(make_bundle: Make, engines: Path) -> None:
    words = ("-p", "the quick brown fox", "--max-new-tokens", 24, "--ignore-eos")
    right = done("generate", make_bundle(), *words, "--device", "cpu")
    for bundle, place in ((make_bundle(), "ort-cuda"), (engines, "trt-rtx")):
        for more in ((), ("--no-cuda-graphs",), ("--no-medusa",)):
            found = done("generate", bundle, *words, "--device", "cuda", *more)
            assert found.stdout == right.stdout
            assert found.stderr.splitlines()[-1] == f"ran with {place} on cuda:0"


@pytest.mark.usefixtures("stand_ins")
def test_validation_on_a_gpu_is_of_what_runs_there(make_bundle: Make, make_model: Make, engines: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(make_bundle(), tmp_path / "bundle"))
    for place, backend, target in ((bundle, "ort-cuda", "portable"), (engines, "trt-rtx", "tensorrt-rtx")):
        done("validate", place, "--reference", make_model(), "--max-new-tokens", 16, "--device", "cuda")
        report = json.loads((place / "validation.json").read_text())
        assert (report["status"], report["backend"], report["processor"]) == ("passed", backend, NAME)
        assert report["targets"] == [target]
        assert {row["target"] for row in report["prompt_logits"]} == {target}
        assert Manifest.load(place).validation.status == "passed"


def test_cuda_graphs_are_for_gpus_where_validation_runs_on_the_cpu_by_itself(make_bundle: Make, make_model: Make) -> None:
    words = ("validate", make_bundle(), "--reference", make_model(), "--cuda-graphs")
    fails(
        run(*words),
        2,
        "--cuda-graphs is only for CUDA and TensorRT, but the bundle runs with ort-cpu on cpu (all graphs of an ONNX bundle",
    )


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("flag", ["--cuda-graphs", "--no-cuda-graphs"])
def test_validation_is_of_captured_steps_or_not_as_asked(
    make_model: Make, engines: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    opened: list[bool | None] = []

    def spy(*places: Any, **options: Any) -> Backend:
        opened.append(options["cuda_graphs"])
        return open_backend(*places, **options)

    monkeypatch.setattr(runner, "open_backend", spy)
    done("validate", engines, "--reference", make_model(), "--max-new-tokens", 8, flag)
    assert opened == [flag == "--cuda-graphs"]


@pytest.mark.usefixtures("stand_ins")
def test_what_keeps_engines_from_being_opened_is_no_verdict(engines: Path, make_model: Make) -> None:
    manifest = Manifest.load(engines)
    assert manifest.engine is not None
    manifest.engine.compute_capabilities = ["12.0"]
    manifest.save(engines)
    result = run("validate", engines, "--reference", make_model())
    assert result.exit_code == 1
    assert re.search(r"was built for GPUs of compute capability 12\.0, this one has 8\.9", result.stderr)
    assert Manifest.load(engines).validation.status == "not run"


@pytest.mark.usefixtures("stand_ins")
def test_a_gpu_is_tuned_under_its_own_name(make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TuningClock().install(monkeypatch)
    bundle = Path(shutil.copytree(make_bundle(), tmp_path / "bundle"))
    small = ("--quick", "--max-nodes", 4, "--max-new-tokens", 8)
    told = done("tune", bundle, *small, "--device", "cuda")
    assert told.stdout.startswith(f"{ON_GPU}; acceptance from built-in prompts")
    assert "runs with ort-cuda on cuda:0 (asked for)" in told.stderr
    found = Tuning.load(bundle)
    assert found is not None
    assert list(found.devices) == [ON_GPU]
    assert (found.devices[ON_GPU].backend, found.devices[ON_GPU].processor, found.devices[ON_GPU].threads) == (
        "ort-cuda",
        NAME,
        0,
    )
    assert done("tree", "show", bundle, "--device", "cuda").stdout.startswith("the best static tree for batch size 1")
    assert done("tree", "show", bundle, "--device", "cpu").stdout.startswith(
        "the bundle's default tree; the bundle is not tuned"
    )


@pytest.mark.usefixtures("stand_ins")
def test_an_engine_of_one_sequence_is_tuned_within_its_limits(
    make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Default batch sizes, also those of --quick, are cut to the bundle's limit; larger given ones are refused."""
    TuningClock().install(monkeypatch)
    engine = stand_in_engine(make_bundle(), tmp_path / "engine", max_batch_size=1)
    done("tune", engine, "--quick", "--max-new-tokens", 8)
    found = Tuning.load(engine)
    assert found is not None
    [device] = found.devices.values()
    assert [batch.batch_size for batch in device.batches] == device.costs.batch_sizes == [1]
    assert device.backend == "trt-rtx"
    message = "--batch-sizes has 4, but the bundle's largest batch is 1"
    fails(run("tune", engine, "--quick", "--batch-sizes", "1,4"), 1, message)


@pytest.mark.usefixtures("stand_ins")
def test_a_bundle_answers_prompts_on_a_gpu(make_bundle: Make, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\nthe dog\n")
    words = ("--prompts", tmp_path / "p.txt", "--max-new-tokens", 12, "--max-prompt-tokens", 64)
    answers = {}
    for device in ("cpu", "cuda"):
        told = done("distill", make_bundle(), "-o", tmp_path / device, *words, "--device", device)
        assert f"runs with ort-{'cpu on cpu' if device == 'cpu' else 'cuda on cuda:0'} (asked for)" in told.stderr
        rows = [json.loads(line) for line in (tmp_path / device / "answers.jsonl").read_text().splitlines()]
        answers[device] = sorted(json.dumps(row["response_token_ids"]) for row in rows)
    assert answers["cuda"] == answers["cpu"]


def test_bench_says_where_a_bundle_ran(make_bundle: Make, tmp_path: Path) -> None:
    words = ("--limit", 1, "--max-new-tokens", 4, "--steps", "none", "--prefill", "none", "--context", "none")
    done("bench", make_bundle(), *words, "--modes", "plain", "--device", "cpu", "--json", tmp_path / "out.json")
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert settings["placements"] == {"bundle": "ort-cpu on cpu (asked for)"}
    assert settings["cuda_graphs"] is None


def test_only_bfloat16_is_judged_by_where_it_runs() -> None:
    for precision, wanted in TOLERANCES.items():
        assert tolerance(precision, activation_bits=None, on_gpu=False) == wanted
        on_gpu = tolerance(precision, activation_bits=None, on_gpu=True)
        assert on_gpu == (BF16_ON_GPU if precision == "bf16" else wanted)
        assert tolerance(precision, activation_bits=16, on_gpu=False) == QUANTIZED
        assert tolerance(precision, activation_bits=8, on_gpu=False) == QUANTIZED_TO_8_BITS
        assert tolerance(precision, activation_bits=8, on_gpu=True) == QUANTIZED  # there, activations are not rounded
    assert TOLERANCES["fp16"].max_abs < BF16_ON_GPU.max_abs
