"""The texts that a bundle is calibrated and measured on: the model's own answers, or a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard, cast

from medusa_export.check.builtin_prompts import PROMPTS as CALIBRATION_PROMPTS
from medusa_export.measure.prompt_files import PROMPTS as QUALITY_PROMPTS
from medusa_runtime import DecodingEngine, DecodingOptions, DecodingStats
from medusa_runtime.errors import OptionError
from medusa_runtime.text.codec import Prompt, TextCodec

__all__ = ["CALIBRATION_PROMPTS", "QUALITY_PROMPTS", "answered", "pieces"]

ANSWER_TOKENS = 96
PIECE_TOKENS = 512
MOST_PIECES = 32


def answered(
    engine: DecodingEngine, codec: TextCodec, prompts: Iterable[Prompt | list[int]]
) -> tuple[list[list[int]], DecodingStats]:
    """Token ids of prompts with the model's greedy answers, and the statistics of decoding them."""
    stats, texts = DecodingStats(), []
    longest = engine.backend.manifest.limits.max_seq_len
    options = DecodingOptions(max_new_tokens=min(ANSWER_TOKENS, longest // 2))
    for prompt in prompts:
        text = (prompt if _is_ids(prompt) else codec.encode(cast("Prompt", prompt)))[: longest - longest // 2]
        for [step] in engine.generate([text], options=options, stats=stats):
            text = [*text, *step.token_ids]
        texts.append(text)
    return texts, stats


def _is_ids(prompt: Prompt | list[int]) -> TypeGuard[list[int]]:
    return isinstance(prompt, list) and all(isinstance(part, int) for part in prompt)


def pieces(path: Path, codec: TextCodec, max_seq_len: int) -> list[list[int]]:
    """The first 32 pieces of a text file, each of 512 tokens or the bundle's longest sequence.

    Raises:
        OptionError: the file cannot be read, or is too short.
    """
    try:
        ids = codec.encode(path.read_text(encoding="utf-8-sig"), raw=True)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the text {path}: {error}") from error
    size = min(PIECE_TOKENS, max_seq_len)
    found = [ids[start : start + size] for start in range(0, len(ids), size)][:MOST_PIECES]
    found = [piece for piece in found if len(piece) > 1]
    if not found:
        raise OptionError(f"{path} has {len(ids)} tokens; give a text with at least 2")
    return found
