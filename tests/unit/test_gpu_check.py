"""`scripts/gpu_check.sh` and what it runs, as far as that needs no GPU: options, refusals, order, time, and what has failed.

tests/integration/test_gpu_check_runs.py runs it for real.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.backends.webgpu.vulkan import find_vulkan_devices

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
HAS_GPU = find_gpus().why_none is None or bool(find_vulkan_devices()) or sys.platform == "darwin"
no_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU: it would be checked for minutes")
NO_FP16 = "Error: A GPU cannot compute in fp16 through WebGPU; use a bundle in fp32"
SKIPPED = {"test": "t::skipped", "outcome": "skipped", "text": "no GPU"}
PASSED, FAILED, RUNNING = (
    [{"test": f"t::{outcome}", "outcome": kind, "text": text} for kind in ("running", outcome)]
    for outcome, text in (("passed", ""), ("failed", "why"), ("running", ""))
)


def shell(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(SCRIPTS / "gpu_check.sh"), *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope"], "there is no option --nope"),
        (["--output"], "--output needs a value"),
        (["--minutes", "5", "--part"], "--part needs a value"),
        (["--bundle", "b", "--wheels"], "--wheels needs a value"),
        (["--wheels", "/nowhere"], "--wheels /nowhere: there is no such directory"),
        (["--output", "x.json", "--system", "--wheels", "/"], "--wheels and --system exclude each other"),
        (["--dry-run", "--python", "no-such-python"], "--python no-such-python: there is no such program"),
    ],
)
def test_wrong_options_are_told_before_any_work(words: list[str], message: str) -> None:
    done = shell(*words)
    assert (done.returncode, done.stdout) == (2, "")
    first, *usage = done.stderr.splitlines()
    assert first == f"Error: {message}"
    assert usage[0].startswith("Everything that needs a GPU")
    assert usage[-1].startswith("Exit code 0")


@no_gpu
def test_without_a_gpu_it_says_so_and_installs_nothing(tmp_path: Path) -> None:
    done = shell("--python", sys.executable, "--venv", str(tmp_path / "venv"), "--output", str(tmp_path / "out.json"))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the" if "CUDA error" in done.stderr else "Error: there is no NVIDIA driver")
    assert "Vulkan" in done.stderr
    assert list(tmp_path.iterdir()) == []


@no_gpu
def test_without_a_gpu_the_check_itself_says_so_too(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Error: there is no GPU to check: " in done.stderr
    assert list(tmp_path.iterdir()) == []


class Machine:
    """A machine on which commands take their time by a clock of its own, and leave what the real ones leave.

    Attributes:
        works: what works by the doctor.
        costs: seconds of a command, by its name.
        says: exit code and stderr of a command that fails, by its name, or by its name and a word of it.
        tests: what the processes of the tests write, one after the other, and their exit codes.
        commands: the names of those that ran, with the last part of their first path.
    """

    def __init__(self, output: Path, *works: str) -> None:
        self.output, self.works = output, works
        self.now, self.costs = 0.0, dict[str, float]()
        self.says: dict[str, tuple[int, str]] = {}
        self.tests: list[tuple[list[Any], int]] = [([*PASSED, SKIPPED], 0)]
        self.commands: list[str] = []
        self.words: list[list[str]] = []
        self.is_software = False

    def doctor(self) -> dict[str, Any]:
        names = [
            ("export", "onnx"),
            ("build", "rtx"),
            ("build", "trt"),
            *(("run", name) for name in ("ort-cuda", "trt-rtx", "trt", "ort-webgpu")),
        ]
        verdicts = [
            {"action": action, "what": what, "works": what in self.works, "why": f"{what} says why"} for action, what in names
        ]
        nvidia = bool({"ort-cuda", "trt-rtx", "trt"} & set(self.works))
        adapter = {"index": 0, "name": "Some GPU", "is_software": self.is_software, "vulkan": {"name": "Arc (TM) 7"}}
        return {
            "gpus": [{"name": "A GPU (big)", "compute_capability": "9.0"}] if nvidia else [],
            "why_no_gpu": None if nvidia else "there is no NVIDIA driver",
            "verdicts": verdicts,
            "webgpu_adapters": [adapter] if "ort-webgpu" in self.works else [],
            "tensorrt": {"rtx": {"why_not": None if "rtx" in self.works else "rtx is not installed"}},
        }

    def run(
        self, words: tuple[object, ...], seconds: float, environment: Mapping[str, str], meanwhile: Callable[[], object] | None
    ) -> tuple[str, str, int]:
        texts = [str(word) for word in words]
        self.words.append(texts)
        name = texts[3] if texts[2] == "medusa_export" else texts[2] if texts[1] == "-m" else Path(texts[1]).stem
        where = next((Path(text).name for text in texts[2:] if text.startswith("/")), "")
        self.commands.append(f"{name} {where}".strip())
        if name != "doctor":  # it was written before anything began
            assert json.loads(self.output.read_text(encoding="utf-8"))["summary"]["running"]
        lines, code = self.tests.pop(0) if name == "pytest" else ([], 0)
        if name == "pytest":
            with Path(environment["GPU_CHECK_RESULTS"]).open("a", encoding="utf-8") as log:
                log.writelines(json.dumps(line) + "\n" for line in lines)
        cost = self.costs.get(name, 1.0)
        if name == "gpu" or cost <= seconds:
            self.leave(name, texts)
        self.now += min(cost, seconds)
        if cost > seconds:
            if meanwhile is not None:
                meanwhile()
            raise importlib.import_module("gpu_checking.budget").Overrun("the last line")
        for key, (failure, text) in self.says.items():
            if key.split()[0] == name and set(key.split()[1:]) <= {Path(word).name for word in texts}:
                return "", text, failure
        return self.out(name), "", code

    def leave(self, name: str, texts: list[str]) -> None:
        """Write the files that a command leaves."""
        after = dict(itertools.pairwise(texts))
        if name in {"onnx", "quantize", "trt"}:
            make_bundle(Path(after["-o"]), after.get("--dtype", "fp16"))
        if name == "validate":
            facts = {"status": "passed", "backend": "b", "processor": "A GPU", "precision": "fp16"}
            (Path(texts[4]) / "validation.json").write_text(json.dumps(facts), encoding="utf-8")
        if name == "gpu":
            way = {"webgpu": {}} if after.get("--device") == "gpu" else {"cuda-graphs": {"ms": 1}}
            bundles = {Path(texts[2]).name: way} if "--measure" not in after else {}
            pytorch = {f"fp16 {after['--measure']}": {}} if "--measure" in after else {}
            found = {"prompts": 4, "max_new_tokens": 128, "runs": bundles, "pytorch": pytorch}
            Path(after["-o"]).write_text(json.dumps(found), encoding="utf-8")

    def out(self, name: str) -> str:
        found = {"doctor": json.dumps(self.doctor()), "fetch": "fetching\n/cache/model", "rtx_verdict": '{"SM90": {}}'}
        return found.get(name, "")


def make_bundle(directory: Path, precision: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    facts = {"precision": precision, "validation": {"summary": {"greedy": 0.9}}}
    (directory / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("gpu_check")


@pytest.fixture
def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Result, dict[str, Any]]]:
    """Runs the check on a machine; returns the result, and the report that was written."""
    budget = importlib.import_module("gpu_checking.budget")

    def run_on(machine: Machine, *words: str) -> tuple[Result, dict[str, Any]]:
        monkeypatch.setattr(budget, "run_command", machine.run)
        monkeypatch.setattr(module, "Budget", partial(budget.Budget, now=lambda: machine.now))
        monkeypatch.setattr(module, "ROOT", tmp_path)
        machine.output.parent.mkdir(parents=True, exist_ok=True)
        result = CliRunner().invoke(module.main, list(words))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result, json.loads(machine.output.read_text(encoding="utf-8")) if machine.output.exists() else {}

    return run_on


@pytest.fixture
def nvidia(tmp_path: Path) -> Machine:
    every = ("onnx", "ort-cuda", "trt-rtx", "trt", "rtx", "ort-webgpu")
    return Machine(tmp_path / "bench/results/gpu_a-gpu-big.json", *every)


@pytest.fixture
def other(tmp_path: Path) -> Machine:
    """A machine with another GPU than NVIDIA's."""
    return Machine(tmp_path / "bench/results/gpu_arc-tm-7.json", "onnx", "ort-webgpu")


Run = Callable[..., tuple[Result, dict[str, Any]]]


def test_all_parts_run_in_the_order_of_their_worth(run: Run, nvidia: Machine) -> None:
    result, report = run(nvidia)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[-1] == f"{nvidia.output}: all passed"
    webgpu = ["generate fp16", "validate fp16", "gpu fp16"]
    quantised = [f"{command} {place}" for scheme in ("int4", "int8-blocks") for command, place in (
        ("quantize", "fp16"), ("validate", scheme), ("gpu", scheme))]  # fmt: skip
    others = [
        f"{command} {place}"
        for precision in ("bf16", "fp32")
        for command, place in (
            ("onnx", "model"), ("validate", precision), ("gpu", precision),
            ("trt", precision), ("validate", f"{precision}-rtx"), ("gpu", f"{precision}-rtx"),
            ("trt", precision), ("validate", f"{precision}-tensorrt"), ("gpu", f"{precision}-tensorrt"),
            *((("validate", precision), ("gpu", precision)) if precision == "fp32" else ()),
        )
    ]  # fmt: skip
    assert nvidia.commands == [
        "doctor", "fetch", "onnx model", "validate fp16", "gpu fp16",
        "trt fp16", "validate fp16-rtx", "gpu fp16-rtx", "rtx_verdict", "pytest",
        "trt fp16", "validate fp16-tensorrt", "gpu fp16-tensorrt",
        *webgpu, *quantised, *others, "gpu fp16", "gpu fp16",
    ]  # fmt: skip
    assert report["summary"] == {"running": None, "failed": [], "out_of_time": []}
    assert report["is_software"] is False
    assert report["cuda"]["fp16"]["validation"] == {
        "status": "passed", "backend": "b", "processor": "A GPU", "precision": "fp16", "greedy": 0.9, "seconds": 1.0,
    }  # fmt: skip
    assert report["cuda"]["fp16"]["benchmark"]["cuda-graphs"] == {"ms": 1}
    assert report["rtx"]["fp16"]["build"] == {"compute_capability": "9.0", "seconds": 1.0}
    assert report["webgpu"]["fp16"]["benchmark"]["webgpu"] == {}
    assert report["rtx_verdict"]["SM90"] == {}
    assert report["others"]["bf16"]["webgpu"] == {"left_out": "WebGPU does not run bf16"}
    assert report["pytorch"]["compiled"]["fp16 compiled"] == {}
    assert (report["tests"]["passed"], report["tests"]["skipped"]) == (1, {"t::skipped": "no GPU"})


def test_another_gpu_is_checked_through_webgpu(run: Run, other: Machine) -> None:
    result, report = run(other)
    assert result.exit_code == 0, result.stderr
    assert other.commands == [
        "doctor", "fetch", "onnx model", "pytest", "generate fp16", "validate fp16", "gpu fp16",
        "quantize fp16", "validate int4", "gpu int4", "quantize fp16", "validate int8-blocks", "gpu int8-blocks",
        "onnx model", "validate fp32", "gpu fp32",
    ]  # fmt: skip
    assert report["cuda"] == {"left_out": "ort-cuda says why"}
    assert report["pytorch"] == report["rtx_verdict"] == {"left_out": "there is no NVIDIA driver"}
    assert report["webgpu"]["adapter"] == "Some GPU"
    assert "note" not in report
    assert all(words[words.index("--device") + 1] == "gpu" for words in other.words if "--device" in words)


def test_a_device_without_fp16_gets_a_bundle_in_fp32(run: Run, other: Machine) -> None:
    other.says = {"generate fp16": (1, f"the first step\n{NO_FP16}")}
    result, report = run(other)
    assert result.exit_code == 0, result.stderr
    assert report["webgpu"]["refused"] == {"fp16": NO_FP16}
    assert report["webgpu"]["fp32"]["validation"]["status"] == "passed"
    assert "quantize fp32" in other.commands
    assert other.commands.count("onnx model") == 2
    assert report["others"]["fp32"]["export"]["left_out"] == "nothing here runs it, or it has run already"


def test_a_device_without_fp16_for_whose_bundle_no_time_is_left_has_not_failed(run: Run, other: Machine) -> None:
    other.says = {"generate fp16": (1, NO_FP16)}
    other.costs = {"onnx": 50}
    result, report = run(other, "--minutes", "1.5", "--part", "export", "--part", "webgpu")
    assert result.exit_code == 4
    assert report["summary"]["out_of_time"] == ["webgpu/export", "webgpu"]


def test_a_device_that_runs_nothing_has_failed(run: Run, other: Machine) -> None:
    other.says = {"generate fp16": (1, "Error: the device was lost")}
    result, report = run(other)
    assert result.exit_code == 1
    assert report["summary"]["failed"] == ["webgpu", "quantised"]
    assert report["webgpu"]["failed"] == "exit code 1: Error: the device was lost"


def test_a_driver_in_software_is_checked_only_if_that_is_asked_for(
    run: Run, other: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.is_software = True
    monkeypatch.delenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", raising=False)
    result, report = run(other)
    assert (result.exit_code, report) == (1, {})
    assert "only a driver in software; ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 allows it" in result.stderr
    monkeypatch.setenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
    result, report = run(other)
    assert result.exit_code == 0
    assert report["is_software"] is True
    assert "nothing of any GPU's speed" in report["note"]


def test_a_machine_without_any_gpu_is_refused(run: Run, tmp_path: Path) -> None:
    result, _ = run(Machine(tmp_path / "none.json", "ort-cpu"))
    assert result.exit_code == 1
    assert result.stderr == "Error: there is no GPU to check: there is no NVIDIA driver; ort-webgpu says why\n"


def test_a_dry_run_says_what_would_run_and_writes_nothing(run: Run, other: Machine, tmp_path: Path) -> None:
    result, report = run(other, "--dry-run")
    assert (result.exit_code, report, other.commands) == (0, {}, ["doctor"])
    assert result.stdout.splitlines()[:3] == [
        "export: runs",
        "cuda: left out: ort-cuda says why",
        "rtx: left out: rtx says why",
    ]


def test_what_has_no_time_left_is_recorded_and_told(run: Run, nvidia: Machine) -> None:
    """Of 600 s, doctor, export and CUDA take 102, TensorRT-RTX 102, and the tests half of the rest."""
    nvidia.costs = {"onnx": 30, "validate": 40, "gpu": 30, "trt": 30, "rtx_verdict": 2, "pytest": 1000}
    nvidia.tests = [([*PASSED, *RUNNING], 0)]
    result, report = run(nvidia)
    assert result.exit_code == 4
    assert nvidia.now <= 600
    assert report["summary"]["failed"] == []
    assert report["summary"]["out_of_time"][0] == "tests"
    assert (report["tests"]["passed"], report["tests"]["unfinished"]) == (1, "t::running")
    assert report["tests"]["out_of_time"].startswith("not finished after 198 s, when its time was over: the last line")
    assert report["tests"]["seconds"] == 198
    assert report["tensorrt"]["fp16"]["validation"]["status"] == "passed"
    assert report["pytorch"]["out_of_time"] == "not begun: 0 s are left"
    assert "pytorch out of time" in result.stderr.splitlines()[-1]


def test_what_a_benchmark_measured_before_its_end_is_kept(run: Run, nvidia: Machine) -> None:
    nvidia.costs = {"gpu": 1000}
    result, report = run(nvidia, "--minutes", "2")
    assert result.exit_code == 4
    assert nvidia.now == 120
    assert report["cuda"]["fp16"]["benchmark"]["cuda-graphs"] == {"ms": 1}
    assert "out_of_time" in report["cuda"]["fp16"]["benchmark"]


def test_what_could_not_be_measured_has_failed(run: Run, nvidia: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's failure is in the benchmark's file, not in its exit code; that of a bundle is in both."""
    leave = nvidia.leave

    def leave_failures(name: str, texts: list[str]) -> None:
        leave(name, texts)
        if name == "gpu":
            target = Path(texts[texts.index("-o") + 1])
            found = json.loads(target.read_text(encoding="utf-8"))
            for ways in [*found["runs"].values(), found["pytorch"]]:
                ways.update({name: {"failed": "no memory"} for name in ways})
            target.write_text(json.dumps(found), encoding="utf-8")

    monkeypatch.setattr(nvidia, "leave", leave_failures)
    nvidia.says = {"gpu fp16-rtx": (1, "")}
    result, report = run(nvidia, "--part", "export", "--part", "rtx", "--part", "pytorch")
    assert result.exit_code == 1
    assert report["summary"]["failed"] == ["rtx/fp16/benchmark", "pytorch/eager", "pytorch/compiled"]
    assert report["rtx"]["fp16"]["benchmark"]["failed"] == "cuda-graphs: no memory"
    assert report["pytorch"]["eager"]["failed"] == "fp16 eager: no memory"


def test_a_command_that_hangs_has_failed_and_the_next_one_runs(run: Run, nvidia: Machine) -> None:
    nvidia.costs = {"trt": 1000}
    result, report = run(nvidia, "--timeout", "20", "--minutes", "60")
    assert result.exit_code == 1
    assert report["rtx"]["fp16"] == {"build": {
        "compute_capability": "9.0", "failed": "not finished after 20 s: the last line", "seconds": 20.0}, "seconds": 20.0,
    }  # fmt: skip
    assert report["tests"]["passed"] == 1
    assert "rtx/fp16/build failed" in result.stderr.splitlines()[-1]


def test_a_step_that_fails_is_recorded_and_the_rest_still_runs(run: Run, nvidia: Machine) -> None:
    nvidia.says = {"validate fp16-rtx": (1, "no memory"), "gpu fp16": (1, "Error: no measurement")}
    nvidia.tests = [([*PASSED, *FAILED], 1)]
    result, report = run(nvidia)
    assert result.exit_code == 1
    failed = ["cuda/fp16/benchmark", "rtx/fp16/validation", "tests", "webgpu/fp16/benchmark"]
    assert report["summary"]["failed"][:4] == failed
    assert report["rtx"]["fp16"]["validation"]["failed"] == "exit code 1: no memory"
    assert "status" not in report["rtx"]["fp16"]["validation"]
    assert report["rtx"]["fp16"]["benchmark"]["cuda-graphs"] == {"ms": 1}
    assert report["tests"]["failed"] == "1 tests failed, 1 passed"
    assert report["tests"]["failures"] == {"t::failed": "why"}
    assert report["tensorrt"]["fp16"]["validation"]["status"] == "passed"


def test_a_bundle_that_differs_from_pytorch_has_failed(run: Run, nvidia: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    leave = nvidia.leave

    def leave_differing(name: str, texts: list[str]) -> None:
        leave(name, texts)
        if name == "validate":
            report = Path(texts[4]) / "validation.json"
            report.write_text(report.read_text(encoding="utf-8").replace("passed", "failed"), encoding="utf-8")

    monkeypatch.setattr(nvidia, "leave", leave_differing)
    nvidia.says = {"validate": (3, "")}
    result, report = run(nvidia, "--part", "export", "--part", "cuda")
    assert result.exit_code == 1
    assert report["summary"]["failed"] == ["cuda/fp16/validation"]
    assert report["cuda"]["fp16"]["validation"]["failed"] == "different from PyTorch: failed"
    assert report["cuda"]["fp16"]["validation"]["greedy"] == 0.9
    assert "rtx" not in report


def test_without_a_bundle_the_rest_is_left_out(run: Run, nvidia: Machine) -> None:
    nvidia.says = {"onnx": (1, "Error: no room")}
    result, report = run(nvidia)
    assert result.exit_code == 1
    assert report["summary"]["failed"] == ["export/fp16"]
    assert report["cuda"] == report["webgpu"] == {"left_out": "there is no bundle"}
    assert report["tests"]["passed"] == 1


def test_tests_go_on_after_their_process_has_crashed(run: Run, nvidia: Machine) -> None:
    nvidia.tests = [([*PASSED, *RUNNING], -11), ([SKIPPED | {"test": "t::last", "outcome": "passed"}], 0)]
    result, report = run(nvidia, "--part", "tests")
    assert result.exit_code == 1
    assert (report["tests"]["passed"], report["tests"]["num_failed"]) == (2, 1)
    assert report["tests"]["failures"]["t::running"].startswith("exit code -11")
    assert "unfinished" not in report["tests"]
    again = nvidia.words[-1]
    assert [again[place + 1] for place, word in enumerate(again) if word == "--deselect"] == ["t::passed", "t::running"]


def test_given_bundles_are_tried_in_their_order(run: Run, nvidia: Machine, tmp_path: Path) -> None:
    for name in ("fp16", "bf16"):
        make_bundle(tmp_path / "mine" / name, name)
    words = ("--bundle", str(tmp_path / "mine/bf16"), "--bundle", str(tmp_path / "mine/fp16"), "--limit", "3")
    result, report = run(nvidia, *words, "--max-new-tokens", "9")
    assert result.exit_code == 0, result.stderr
    assert report["export"] == {"left_out": "bundles are given"}
    assert report["cuda"]["bf16"]["validation"] == {"left_out": "no --model is given to compare with"}
    assert "fp16" in report["webgpu"]
    assert list(report["others"]) == ["fp16", "seconds"]
    assert report["pytorch"]["left_out"] == "no --model with --heads is given for the bundles"
    assert not {"fetch", "onnx model"} & set(nvidia.commands)
    [first, *_] = (words for words in nvidia.words if "bench/gpu.py" in words)
    assert first[first.index("--limit") + 1] == "3"
    assert first[first.index("--max-new-tokens") + 1] == "9"


def test_without_pytorch_a_given_bundle_is_measured(run: Run, other: Machine, tmp_path: Path) -> None:
    other.works = ("ort-webgpu",)
    make_bundle(tmp_path / "mine", "fp16")
    result, report = run(
        other, "--bundle", str(tmp_path / "mine"), "--model", str(tmp_path), "--part", "tests", "--part", "webgpu"
    )
    assert result.exit_code == 0, result.stderr
    assert report["tests"] == report["webgpu"]["mine"]["validation"] == {"left_out": "onnx says why"}
    assert report["webgpu"]["mine"]["benchmark"]["webgpu"] == {}


def test_bundles_of_one_name_are_refused(run: Run, nvidia: Machine, tmp_path: Path) -> None:
    (tmp_path / "fp16").mkdir()
    result, _ = run(nvidia, "--bundle", str(tmp_path / "fp16"), "--bundle", f"{tmp_path}/./fp16")
    assert (result.exit_code, nvidia.commands) == (2, [])
    assert "two bundles have the same name" in result.stderr


def test_every_file_of_tests_gpu_is_run(module: ModuleType) -> None:
    assert sorted(module.TESTS) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py"))


def test_the_doctors_failure_is_told(run: Run, nvidia: Machine) -> None:
    nvidia.says = {"doctor": (1, "no such module")}
    result, report = run(nvidia)
    assert (result.exit_code, report) == (1, {})
    assert result.stderr == "Error: medusa-export doctor: exit code 1: no such module\n"


TESTS = """
import os
import pytest

def test_good(): pass
def test_bad(): raise ValueError("the whole text")
@pytest.fixture
def broken():
    yield
    raise KeyError("at its end")
def test_torn_down(broken): pass
@pytest.mark.skip(reason="no GPU")
def test_left(): pass
def test_crash(): os._exit(77)
def test_last(): pass
"""


def test_the_real_pytest_tells_its_results_as_they_come(module: ModuleType, tmp_path: Path) -> None:
    """A process that crashes in the middle, and another for the rest."""
    file = tmp_path / "test_some.py"
    file.write_text(TESTS, encoding="utf-8")
    report: dict[str, Any] = {}
    entry = module.Entry(report, module.Budget(600, 600), lambda: None)
    check = module.Check(entry.budget, {}, tmp_path, [], None, None, [str(file)])
    assert not entry.do("tests", partial(module.run_tests, check))
    tests = report["tests"]
    assert tests["failed"] == "3 tests failed, 2 passed"
    texts = {name.rpartition("::")[2]: text for name, text in tests["failures"].items()}
    assert texts.keys() == {"test_bad", "test_torn_down", "test_crash"}
    assert "the whole text" in texts["test_bad"]
    assert texts["test_crash"].startswith("exit code 77")
    assert [(name.rpartition("::")[2], why) for name, why in tests["skipped"].items()] == [("test_left", "no GPU")]


def test_results_count_what_had_passed_when_a_line_is_half_written(module: ModuleType) -> None:
    counted = importlib.import_module("gpu_checking.pytest_results").counted
    lines = "".join(json.dumps(line) + "\n" for line in [*PASSED, *RUNNING])
    assert counted(lines + '{"test": "t::ru', {}) == {
        "passed": 1, "num_failed": 0, "failures": {}, "skipped": {}, "unfinished": "t::running",
    }  # fmt: skip


def test_what_a_failed_command_says_is_kept(module: ModuleType) -> None:
    budget = module.Budget(600, 600)
    assert budget.run(sys.executable, "-c", "print('well')") == "well\n"
    with pytest.raises(module.Failed, match=r"^exit code 3: why$"):
        budget.run(sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)")


def test_a_command_that_takes_too_long_ends_with_what_it_started(module: ModuleType, tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(module.Failed, match=r"^not finished after 5 s: begun$"):
        module.Budget(600, 5).run(sys.executable, "-c", program)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until whoever takes in orphans has seen that it is gone
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.05)


def test_tensorrt_rtx_answers_for_a_gpu_it_does_not_list() -> None:
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, str(SCRIPTS / "rtx_verdict.py"), "6.1"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["SM61"] == {"builds": False, "loads": False, "says": ["there is no ComputeCapability.SM61"]}
    assert "SM89" in found["lists"]
    assert set(found["CURRENT"]) == {"builds", "loads", "says"}
