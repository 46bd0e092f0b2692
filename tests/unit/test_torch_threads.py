"""How PyTorch's threads wait, and how many there are: set by the commands before PyTorch is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medusa_export.cli.torch_threads import SLEEP, share_cores
from tests.support.patience import PATIENCE
from tests.unit.test_cpu import tree

COMMANDS = ("distill", "train", "heads", "onnx", "validate", "quantize", "recipes")  # they import PyTorch
# What the environment says at the moment when a command imports PyTorch, of which this is a stand-in
STAND_IN = "import os, sys\nsys.stderr.write(f'found {os.environ.get(\"OMP_WAIT_POLICY\")}')\nsys.stderr.flush()\nos._exit(9)\n"


def test_idle_threads_sleep() -> None:
    environment: dict[str, str] = {}
    share_cores(environment)
    assert environment.items() >= SLEEP.items()


@pytest.mark.parametrize(
    "given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"KMP_BLOCKTIME": "200"}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": ""}]
)
def test_what_the_user_says_about_waiting_is_kept(given: dict[str, str], tmp_path: Path) -> None:
    environment = dict(given)
    share_cores(environment, tree(tmp_path, "0::/", {"cpu.max": "max 100000"}))
    assert environment == given


@pytest.mark.parametrize(
    ("groups", "files", "threads"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, "3"),
        ("1:cpu:/box", {"cpu/box/cpu.cfs_quota_us": "100000", "cpu/box/cpu.cfs_period_us": "100000"}, "1"),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "1600000 100000"}, None),  # all cores: PyTorch finds their number itself
    ],
)
def test_a_quota_limits_their_number(
    groups: str, files: dict[str, str], threads: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    environment: dict[str, str] = {}
    share_cores(environment, tree(tmp_path, groups, files))
    assert environment.get("OMP_NUM_THREADS") == threads
    environment = {"OMP_NUM_THREADS": "5"}
    share_cores(environment, tmp_path)
    assert environment["OMP_NUM_THREADS"] == "5"


def run(*words: str, **variables: str) -> str:
    """What a process of its own writes to stderr. Variables of this process that say how threads wait are left out."""
    known = {name: value for name, value in os.environ.items() if name not in (*SLEEP, "GOMP_SPINCOUNT")}
    command = [sys.executable, *words]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False, timeout=PATIENCE, env=known | variables
    ).stderr


@pytest.mark.parametrize("given", [None, "ACTIVE"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_it_before_they_import_pytorch(command: str, given: str | None, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(STAND_IN, encoding="utf-8")
    importing = f"from medusa_export.cli import main; main.get_command(None, {command!r}); import torch"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": path} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    assert run("-c", importing, **variables) == f"found {given or 'PASSIVE'}"


def test_a_whole_command_does_so(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(STAND_IN, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = ("-m", "medusa_export", "heads", "init", "no-model", "-o", str(tmp_path / "heads"))
    assert run(*words, PYTHONPATH=path) == "found PASSIVE"


def test_other_engines_are_measured_as_they_come() -> None:
    looking = "import os; from medusa_export.cli import main; main.get_command(None, 'bench'); import sys; "
    assert run("-c", looking + "sys.stderr.write(repr(os.environ.get('OMP_WAIT_POLICY')))") == "None"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP tells what it found; PyTorch has it on Linux")
def test_pytorchs_openmp_hears_it() -> None:
    importing = "from medusa_export.cli import main; main.get_command(None, 'onnx'); import torch"
    told = run("-c", importing, OMP_DISPLAY_ENV="VERBOSE")
    assert re.findall("GOMP_SPINCOUNT = '(.*)'", told) == ["0"]
    told = run("-c", "import torch", OMP_DISPLAY_ENV="VERBOSE")  # what it does on its own
    assert re.findall("GOMP_SPINCOUNT = '(.*)'", told) != ["0"]
