"""The container file's steps make a server that answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.programs import ROOT

pytestmark = pytest.mark.release


def test_the_steps_of_the_container_file_make_a_server_that_answers(make_bundle: Callable[..., Path]) -> None:
    command = [sys.executable, ROOT / "scripts/container_steps.py", ROOT / "deploy/Containerfile", make_bundle()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Containerfile answered '" in done.stdout.splitlines()[-1]
