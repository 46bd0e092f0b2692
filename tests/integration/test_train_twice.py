"""One process trains more than once, as a recipe's runs do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from medusa_export.cli import main


def test_a_second_run_may_have_another_precision(make_model: Callable[..., Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na dog\nthe lazy dog\n")
    data = ["distill", str(make_model()), "--prompts", str(prompts), "-o", str(tmp_path / "data"), "--dtype", "fp32"]
    made = CliRunner().invoke(main, [*data, "--max-new-tokens", "16", "--max-prompt-tokens", "60"])
    assert made.exit_code == 0, made.output
    for precision in ("bf16", "no", "bf16"):
        words = ["train", str(make_model()), "--data", str(tmp_path / "data"), "-o", str(tmp_path / "heads"), "--force"]
        words += ["--max-steps", "2", "--batch-tokens", "8", "--held-out", "0", "--max-length", "100"]
        result = CliRunner().invoke(main, [*words, "--mixed-precision", precision])
        assert result.exit_code == 0, result.output
