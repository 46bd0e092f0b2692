"""docs/tutorial.md, from top to bottom, as a reader types it: one shell, the real model, the heads that come along."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import ROOT, TUTORIAL, Block, Command, blocks
from tests.support.reader import environment, free_port

pytestmark = pytest.mark.e2e

PATIENCE = 60  # seconds until the server is ready


def test_the_tutorial_runs(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, call in {"medusa-export": "-m medusa_export", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {call} "$@"\n')
        (programs / name).chmod(0o755)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    port, found = free_port(), blocks(TUTORIAL)
    script = [f"PATH={shlex.quote(str(programs))}:$PATH", "trap 'kill $SERVER 2>/dev/null || true' EXIT", "SERVER="]
    steps = [step for block in found for step in steps_of(block)]
    for number, (text, _) in enumerate(steps):
        script += [f"echo '@@{number}'", typed(text, port)]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(script)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    printed = dict(re.findall(r"^@@(\d+)\n(.*?)(?=^@@|\Z)", done.stdout, re.MULTILINE | re.DOTALL))
    last = steps[max(map(int, printed), default=0)][0]
    assert done.returncode == 0, f"{last}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for number, (text, command) in enumerate(steps):
        if command is not None:
            assert [line for line in command.printed if line not in printed[str(number)]] == [], text
    plain, medusa = (printed[str(n)] for n, (text, _) in enumerate(steps) if "reverses a string" in text)
    assert plain == medusa
    assert "steps with Medusa" in "".join(printed.values())


def steps_of(block: Block) -> list[tuple[str, Command | None]]:
    """What is typed for a block: each command that is not marked, or a program for Python."""
    if block.language == "python":
        return [(f"python - <<'PROGRAM'\n{block.text}PROGRAM", None)]
    assert block.language == "console", f"{block.page.name}:{block.line}"
    return [(command.text, command) for command in block.commands() if command.mark is None]


def typed(text: str, port: int) -> str:
    """The text for the shell. A server goes into the background, on a port that is free."""
    text = text.replace("localhost:8000", f"localhost:{port}")
    if not text.startswith("medusa-export serve"):
        return text
    log = os.devnull
    ready = f"curl -sf --retry {PATIENCE} --retry-delay 1 --retry-all-errors localhost:{port}/ready"
    return f"{text} --port {port} >{log} 2>&1 & SERVER=$!\n{ready} >{log} 2>&1"
