"""AMX is left out if the user says so: ONNX Runtime must not get it, and others may get it later."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import medusa_runtime
from medusa_runtime import OptionError
from medusa_runtime.bundle import amx
from medusa_runtime.bundle.cpu import cpu_name
from tests.support.patience import PATIENCE

RUNTIME = Path(medusa_runtime.__file__).parent
HAS_AMX = "amx_int8" in cpu_name()
ON_LINUX = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="AMX is asked for on Linux on x86-64 alone",
)
PROGRAM = """
import ctypes
from medusa_runtime.bundle.amx import _Stack, _is_granted, may_use_amx
from medusa_runtime.bundle.cpu import cpu_name
def stack():
    found = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.start, found.flags, found.size
before = stack()
{first}
print("amx_int8" in cpu_name(), may_use_amx())
from medusa_runtime.backends.ort_library import ort
print(_is_granted(), stack() == before)
print("amx_int8" in cpu_name(), may_use_amx())
"""


def run(value: str, first: str = "") -> tuple[list[str], str]:
    """The lines that a new process prints, and what it warns of."""
    command = [sys.executable, "-c", PROGRAM.replace("{first}", first)]
    done = subprocess.run(
        command, env=os.environ | {"MEDUSA_AMX": value}, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=True
    )
    return done.stdout.splitlines(), done.stderr


@ON_LINUX
@pytest.mark.parametrize("first", ["", "import faulthandler; faulthandler.enable(); before = stack()"])
def test_onnx_runtime_gets_no_amx_if_it_is_off(first: str) -> None:
    """With a stack for signal handlers already or without one, which is there again afterwards."""
    assert run("off", first) == (["False False", "False True", "False False"], "")


@pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX, or the system refuses it")
def test_onnx_runtime_gets_it_otherwise() -> None:
    for value in ("on", ""):
        assert run(value) == (["True True", "True True", "True True"], "")


@pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX, or the system refuses it")
def test_too_late_is_said_and_the_device_keeps_its_name() -> None:
    lines, warned = run("off", "import onnxruntime")
    assert lines == ["True True", "True True", "True True"]
    assert "MEDUSA_AMX=off comes too late: this process got AMX before ONNX Runtime was imported by medusa_runtime" in warned


@pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX, or the system refuses it")
def test_pytorch_may_get_it_afterwards_and_the_device_keeps_its_name() -> None:
    lines, _ = run(
        "off", "from medusa_runtime.backends.ort_library import ort; from medusa_runtime.bundle.amx import _asks; _asks()"
    )
    assert lines == ["False False", "True True", "False False"]


def test_another_value_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_AMX", "no")
    with pytest.raises(OptionError, match=r"^the variable MEDUSA_AMX is 'no'; it must be on or off$"):
        amx.is_wanted()


def test_elsewhere_the_variable_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_AMX", "off")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(amx.log, "warning", lambda *_: pytest.fail("there is nothing to warn of"))
    with amx.as_wanted():
        pass


@ON_LINUX
def test_commands_leave_it_out_whatever_they_import_first() -> None:
    command = [sys.executable, "-m", "medusa_export", "doctor"]
    done = subprocess.run(
        command, env=os.environ | {"MEDUSA_AMX": "off"}, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=True
    )
    assert "MEDUSA_AMX" not in done.stderr


def test_the_runtime_imports_onnx_runtime_in_one_place() -> None:
    """Whoever imports it first gives it AMX, so nothing else may."""
    imports = re.compile(r"^\s*(import onnxruntime\b|from onnxruntime\b)|import_module\(.onnxruntime.\)", re.MULTILINE)
    found = [path.name for path in RUNTIME.rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))]
    assert found == ["ort_library.py"]
