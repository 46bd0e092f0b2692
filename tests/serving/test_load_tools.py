"""GuideLLM and AIPerf against a tiny server. Both live in environments of their own; see scripts/load_test.sh."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE
from tests.support.server import Running

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    """The command of a tool: the variable of its name, its environment beside this checkout, or the path's."""
    beside = ROOT / f".venv-{name}" / "bin" / name
    found = os.environ.get(name.upper()) or (str(beside) if beside.exists() else shutil.which(name))
    if found is None:
        pytest.skip(f"{name} is not installed: set {name.upper()}, or make .venv-{name} as scripts/load_test.sh says")
    return found


def load(server: Running, output: Path, **variables: str) -> None:
    environment = os.environ | {"STREAMS": "2", "REQUESTS": "6", "OUTPUT": str(output)} | variables
    command = ["bash", str(ROOT / "scripts/load_test.sh"), f"tiny={server.url}"]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_guidellm_measures_the_server(server: Running, tmp_path: Path) -> None:
    load(server, tmp_path, GUIDELLM=tool("guidellm"), AIPERF="/nonexistent")
    told = json.loads((tmp_path / "tiny/guidellm-2.json").read_text(encoding="utf-8"))
    [benchmark] = told["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == 6
    assert not requests["errored"]
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {96}


def test_aiperf_takes_what_the_server_tells_of_speculative_decoding(
    server: Running, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    load(server, tmp_path, GUIDELLM="true", AIPERF=tool("aiperf"), TOKENIZER=str(make_model()))
    told = json.loads((tmp_path / "tiny/aiperf-2/profile_export_aiperf.json").read_text(encoding="utf-8"))
    assert told["request_count"]["avg"] == 6
    assert told["spec_decode_acceptance_length"]["count"] == 6
    assert told["total_spec_decode_steps"]["avg"] > 0
    assert told["osl_mismatch_count"]["avg"] == 0


def test_the_tools_have_the_prompts_of_the_benchmarks() -> None:
    code = ast.parse((ROOT / "bench/serving.py").read_text(encoding="utf-8")).body
    [value] = [one.value for one in code if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "PROMPTS"]
    lines = (ROOT / "scripts/load_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == list(ast.literal_eval(value))


def test_a_missing_tool_is_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"GUIDELLM": str(tmp_path / "guidellm"), "OUTPUT": str(tmp_path)}
    command = ["bash", str(ROOT / "scripts/load_test.sh"), "http://localhost:1"]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "install it as" in done.stderr
