"""ONNX Runtime GenAI, with a model made by its own builder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def build(settings: dict[str, Any]) -> None:
    """settings: checkpoint, precision, output."""
    with tempfile.TemporaryDirectory() as scratch:
        words = (
            "-i",
            settings["checkpoint"],
            "-o",
            settings["output"],
            "-p",
            settings["precision"],
            "-e",
            "cpu",
            "-c",
            scratch,
        )
        done = subprocess.run(
            [sys.executable, "-m", "onnxruntime_genai.models.builder", *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    if done.returncode:
        raise SystemExit((done.stderr.strip().splitlines() or ["the model builder failed"])[-1])


def load(settings: dict[str, Any]) -> Callable[[list[int], int, Callable[[list[int]], None]], None]:
    """settings: model, threads."""
    import onnxruntime_genai as og  # noqa: PLC0415 - the builder does not need it

    facts = json.loads((Path(settings["model"]) / "genai_config.json").read_text(encoding="utf-8"))["model"]
    config = og.Config(settings["model"])
    decoder = {"session_options": {"intra_op_num_threads": settings["threads"]}}
    # The only way to decode past an end-of-sequence token is to configure another token as end of sequence.
    config.overlay(json.dumps({"model": {"eos_token_id": facts["vocab_size"] - 1, "decoder": decoder}}))
    model = og.Model(config)

    def decode(token_ids: list[int], max_new_tokens: int, emit: Callable[[list[int]], None]) -> None:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(token_ids) + max_new_tokens, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(token_ids)
        for _ in range(max_new_tokens):
            generator.generate_next_token()
            emit([int(generator.get_next_tokens()[0])])

    return decode
