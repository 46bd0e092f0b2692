"""`scripts/gpu_check.sh` and what it runs, as far as that needs no GPU: options, refusals, and the report of what failed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from medusa_runtime.backends.gpu.devices import find_gpus

SCRIPTS = Path(__file__).parents[2] / "scripts"
no_gpu = pytest.mark.skipif(find_gpus().why_none is None, reason="there is a GPU: it would be checked for minutes")
JUNIT = """<testsuites><testsuite>
<testcase classname="a.b" name="good"/>
<testcase classname="a.b" name="bad"><failure message="short">the whole text</failure></testcase>
<testcase classname="a.b" name="broken"><error message="no fixture"/></testcase>
<testcase classname="a.c" name="left"><skipped message="no GPU">where</skipped></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPTS / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # where its dataclass is looked for
    spec.loader.exec_module(module)
    return module


def shell(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(SCRIPTS / "gpu_check.sh"), *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope"], "there is no option --nope"),
        (["--output"], "--output needs a value"),
        (["--bundle", "b", "--wheels"], "--wheels needs a value"),
        (["--wheels", "/nowhere"], "--wheels /nowhere: there is no such directory"),
        (["--output", "x.json", "--system", "--wheels", "/"], "--wheels and --system exclude each other"),
        (["--python", "no-such-python"], "--python no-such-python: there is no such program"),
    ],
)
def test_wrong_options_are_told_before_any_work(words: list[str], message: str) -> None:
    done = shell(*words)
    assert (done.returncode, done.stdout) == (2, "")
    first, *usage = done.stderr.splitlines()
    assert first == f"Error: {message}"
    assert usage[0].startswith("Everything that needs a GPU")


@no_gpu
def test_without_a_gpu_it_says_so_and_installs_nothing(tmp_path: Path) -> None:
    done = shell("--python", sys.executable, "--venv", str(tmp_path / "venv"), "--output", str(tmp_path / "out.json"))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the" if "finds no GPU" in done.stderr else "Error: there is no NVIDIA driver")
    assert list(tmp_path.iterdir()) == []


@no_gpu
def test_without_a_gpu_the_check_itself_says_so_too(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Error: there is no GPU to check: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_tests_are_counted_with_their_texts(check: ModuleType) -> None:
    assert check.counted(JUNIT) == {
        "passed": 1,
        "num_failed": 2,
        "failures": {"a.b::bad": "the whole text", "a.b::broken": "no fixture"},
        "skipped": {"a.c::left": "no GPU"},
    }


def test_what_a_failed_command_says_is_kept(check: ModuleType) -> None:
    report: dict[str, Any] = {}
    written: list[set[str]] = []
    write = lambda: written.append(set(report))  # noqa: E731
    with check.record_part(report, write, "fine") as found:
        found["said"] = check.run_command(sys.executable, "-c", "print('well')", timeout=60)
    with check.record_part(report, write, "bad"):
        check.run_command(sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)", timeout=60)
    assert written == [{"fine"}, {"fine", "bad"}]
    assert report["fine"]["said"] == "well\n"
    assert "failed" not in report["fine"]
    assert report["bad"]["failed"] == "exit code 3: why"


def test_a_command_that_takes_too_long_ends_with_what_it_started(check: ModuleType, tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(check.Failed, match=r"^not finished after 5 s: begun$"):
        check.run_command(sys.executable, "-c", program, timeout=5)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until whoever takes in orphans has seen that it is gone
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.05)


def bundle_in(directory: Path, status: str) -> Path:
    """A bundle's validation result."""
    directory.mkdir()
    facts = {"status": status, "backend": "ort-cuda", "processor": "A GPU", "precision": "fp16"}
    (directory / "validation.json").write_text(json.dumps(facts))
    (directory / "manifest.json").write_text(json.dumps({"validation": {"summary": {"greedy": 0.9}}}))
    return directory


def test_a_bundle_that_cannot_be_compared_does_not_keep_the_others_from_it(check: ModuleType, tmp_path: Path) -> None:
    bundles = [bundle_in(tmp_path / name, status) for name, status in (("a", "passed"), ("b", "failed"), ("c", "passed"))]

    def run(*words: object, ends_with: tuple[int, ...]) -> str:
        assert ends_with == (0, 3)
        if bundles[0] in words:
            raise check.Failed("exit code 1: no memory")
        return ""

    found: dict[str, Any] = {}
    with pytest.raises(check.Failed, match=r"^different from PyTorch: a \(not compared\), b \(failed\)$"):
        check.validated(run, found, bundles, "model")
    assert found["a"] == {"failed": "exit code 1: no memory"}  # and not what an earlier validation left there
    assert (found["b"]["status"], found["c"]["status"], found["c"]["greedy"]) == ("failed", "passed", 0.9)
    (tmp_path / "c" / "validation.json").write_text("{")
    with pytest.raises(check.Failed, match=r"c \(not compared\)$"):
        check.validated(run, {}, bundles[1:], "model")


GOOD = {"cuda-graphs": {"failed": "cannot be captured"}, "no-cuda-graphs": {"backend": "ort-cuda"}}


def verdict(action: str, what: str, *, works: bool) -> dict[str, Any]:
    return {"action": action, "what": what, "works": works, "why": f"{what} says why"}


def test_a_part_that_fails_is_recorded_and_the_rest_still_runs(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU on which TensorRT-RTX runs nothing, no full TensorRT, and tests that fail."""
    verdicts = [verdict("build", "rtx", works=True), verdict("build", "trt", works=False)]
    verdicts += [verdict("run", name, works=name == "ort-cuda") for name in ("ort-cuda", "trt", "trt-rtx")]
    doctor = {"gpus": [{"name": "A GPU (big)", "compute_capability": "9.0"}], "verdicts": verdicts}
    asked: list[tuple[str, ...]] = []

    def run(*words: object, timeout: float, ends_with: tuple[int, ...] = (0,)) -> str:
        texts = tuple(str(word) for word in words)
        asked.append(texts)
        if "doctor" in texts:
            return json.dumps(doctor)
        if "pytest" in texts:
            raise check.Failed("exit code 4: no tests")
        assert timeout == 7
        if "scripts/rtx_verdict.py" in texts:
            assert json.loads(output.read_text())["tests"]["failed"] == "exit code 4: no tests"  # whatever happens now
            return json.dumps({"CURRENT": {"builds": False}})
        assert "bench/gpu.py" in texts
        Path(texts[-1]).write_text(json.dumps({"runs": {"bad": {"cuda-graphs": {"failed": "no memory"}}, "good": GOOD}}))
        return ""

    output = tmp_path / "bench" / "results" / "gpu_a-gpu-big.json"
    monkeypatch.setattr(check, "run_command", run)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    result = CliRunner().invoke(check.main, ["--bundle", str(tmp_path), "--limit", "3", "--timeout", "7"])
    assert result.exit_code == 1
    report = json.loads(output.read_text())
    assert report["tests"]["failed"] == "exit code 4: no tests"
    assert report["rtx_verdict"]["CURRENT"] == {"builds": False}
    assert report["build_rtx"] == {"left_out": "trt-rtx says why"}
    assert report["build_tensorrt"] == {"left_out": "trt says why"}
    assert report["benchmark"]["failed"] == "not measured: bad"
    assert report["benchmark"]["runs"]["bad"]["cuda-graphs"]["failed"] == "no memory"
    assert ("--limit", "3") in zip(asked[-1], asked[-1][1:], strict=False)
    assert "tests failed, benchmark failed" in result.stderr


def test_tensorrt_rtx_answers_for_a_gpu_it_does_not_list() -> None:
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, str(SCRIPTS / "rtx_verdict.py"), "6.1"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["SM61"] == {"builds": False, "loads": False, "says": ["there is no ComputeCapability.SM61"]}
    assert "SM89" in found["lists"]
    assert set(found["CURRENT"]) == {"builds", "loads", "says"}
