"""Training shared by two processes on CPUs: DDP, and FSDP2 as GPUs have it. Each launch imports everything twice."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from medusa_export.head_training.training import TrainOptions, train
from medusa_heads.train.settings import TrainSettings
from tests.support.patience import PATIENCE

Make = Callable[..., Path]
ROOT = Path(__file__).parents[2]
ANSWER = "the quick brown fox jumps over the lazy dog while a small model learns to speak"
SIZES = {
    "max_length": 128, "num_heads": 2, "epochs": 2, "heads_first": 1, "learning_rate": 0.003, "log_every": 1,
    "checkpoint_every": 3, "mixed_precision": "no", "backbone_dtype": "fp32", "held_out": 0.2, "heads_dtype": "fp32",
}  # fmt: skip
DDP = ("--multi_gpu",)  # the flag that starts several processes; where there is no GPU they are CPU processes
FSDP = ("--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": ANSWER}]} for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def launch(
    how: tuple[object, ...], module: str, model: Path, data: Path, output: Path, **settings: Any
) -> tuple[subprocess.CompletedProcess[str], dict[int, str]]:
    """Run two processes. Returns what the launcher did, and all that each rank printed."""
    words: list[object] = ["train", model, "--data", data, "-o", output, "--threads", 1]
    for name, value in (SIZES | settings).items():
        words += [f"--{name.replace('_', '-')}", value]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    logs = output.with_name(f"{output.name}.logs")
    shutil.rmtree(logs, ignore_errors=True)
    launcher = (
        "-m", "accelerate.commands.launch", *how, "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", port, "--tee", 3, "--log_dir", logs, "-m", module,
    )  # fmt: skip
    settled = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}  # a crash tells where it was
    environment = os.environ | settled
    command = [sys.executable, *map(str, (*launcher, *words))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    said = {rank: "".join(path.read_text() for path in sorted(logs.glob(f"*/*/{rank}/*.log"))) for rank in (0, 1)}
    return done, said


def alone(model: Path, data: Path, output: Path, **settings: Any) -> None:
    """The same training by a single process, namely this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    assert train(TrainOptions(str(model), (data,), output, TrainSettings(**(SIZES | settings)), threads=1))
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def head_losses(path: Path) -> list[list[float]]:
    return [entry["head_losses"] for entry in log(path) if "head_losses" in entry]


def close(first: Path, second: Path, tolerance: float) -> None:
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=tolerance, rtol=tolerance)


def test_two_processes_train_heads_as_one_does(make_model: Make, data: Path, tmp_path: Path) -> None:
    done, said = launch(DDP, "medusa_export", make_model(), data, tmp_path / "two", batch_tokens=32)
    assert done.returncode == 0, said[0] + done.stderr
    assert said[1] == ""
    assert f"{tmp_path / 'two'}\n" in said[0]
    assert said[0].count("answers, ") == 1
    alone(make_model(), data, tmp_path / "one", batch_tokens=64)
    two, one = log(tmp_path / "two"), log(tmp_path / "one")
    assert [(entry["step"], entry.get("tokens")) for entry in two] == [(entry["step"], entry.get("tokens")) for entry in one]
    # the same rows a step; but each process takes the mean over its own, some of which have no target
    for first, second in zip(head_losses(tmp_path / "two"), head_losses(tmp_path / "one"), strict=True):
        assert first == pytest.approx(second, rel=0.03)
    assert head_losses(tmp_path / "two")[-1][0] < head_losses(tmp_path / "two")[0][0]
    weights = [
        torch.cat([w.flatten() for w in load_file(tmp_path / name / "heads.safetensors").values()]) for name in ("two", "one")
    ]
    assert torch.cosine_similarity(*weights, dim=0) > 0.97
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (facts["processes"], facts["backbone_unchanged"]) == (2, True)
    assert not (tmp_path / "two.work").exists()


@pytest.mark.parametrize(("backbone", "stopped"), [("lora", False), ("full", True)])
def test_fsdp_trains_heads_and_backbone_as_ddp_does(
    backbone: str, stopped: bool, make_model: Make, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "medusa-2", "backbone": backbone, "batch_tokens": 60}
    if stopped:  # and then goes on from its shards
        with monkeypatch.context() as now:
            now.setenv("STOP_AT", "joint:4")
            done, _ = launch(FSDP, "tests.support.fsdp_on_cpu", make_model(), data, tmp_path / "fsdp", **settings)
        assert done.returncode != 0
        assert json.loads((tmp_path / "fsdp.work" / "checkpoint" / "place.json").read_text()) == {"stage": "joint", "step": 3}
    ways = {"ddp": (DDP, "medusa_export"), "fsdp": (FSDP, "tests.support.fsdp_on_cpu")}
    for name, (how, module) in ways.items():
        done, said = launch(how, module, make_model(), data, tmp_path / name, **settings)
        assert done.returncode == 0, said[0] + done.stderr
        assert said[1] == ""
        joint = [entry["loss"] for entry in log(tmp_path / name) if entry["stage"] == "joint"]
        assert joint[-1] < joint[0]
    for file in ("heads.safetensors", "merged/model.safetensors"):
        close(tmp_path / "ddp" / file, tmp_path / "fsdp" / file, 1e-4)
    assert head_losses(tmp_path / "ddp")[-1] == pytest.approx(head_losses(tmp_path / "fsdp")[-1], abs=1e-4)


def test_fsdp_without_gpus_is_refused(make_model: Make, data: Path, tmp_path: Path) -> None:
    done, said = launch(FSDP, "medusa_export", make_model(), data, tmp_path / "heads")
    assert done.returncode != 0
    assert "Error: FSDP is only supported on GPUs with --fsdp_version 2; use that, or --multi_gpu" in said[0]
    assert "Traceback" not in said[0]
    assert not (tmp_path / "heads").exists()
