"""The recipe of the heads that come with the project, at a small size: from PyPI to a validated bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from medusa_export.cli import main
from medusa_runtime import Manifest

pytestmark = pytest.mark.e2e

SMALL = {
    "distill.self_prompts": 16,
    "distill.max_new_tokens": 48,
    "distill.batch_size": 16,
    "train.epochs": 20,
    "train.max_steps": 25,
    "train.log_every": 5,
    "train.batch_tokens": 64,
    "train.held_out": 0.3,
    "validate.max_new_tokens": 8,
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_command_goes_from_the_model_to_a_validated_bundle(tmp_path: Path) -> None:
    words = ["recipes", "run", "smollm2-135m-instruct", "--output", str(tmp_path / "run")]
    for field, value in SMALL.items():
        words += ["--set", f"{field}={value}"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(tmp_path / "run" / "bundle")
    assert manifest.validation.status == "passed"
    assert (manifest.heads.num_heads, manifest.heads.num_layers) == (4, 2)
    entries = [json.loads(line) for line in (tmp_path / "run" / "heads" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    assert again.output.count("already done") == 5
