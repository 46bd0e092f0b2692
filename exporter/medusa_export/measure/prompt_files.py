"""The default prompts of tuning, and a reader for files of prompts."""

from __future__ import annotations

import json
from pathlib import Path

from medusa_runtime.errors import OptionError

PROMPTS = (
    "Explain how a rainbow comes about, so that a child of ten understands it.",
    "Write a Python function that counts how often each word occurs in a text, with an example of its use.",
    "Write a short letter to a neighbour, asking him to water the plants for two weeks.",
    "A shop sells pencils at 35 cents and pens at 1.20. What do 12 pencils and 5 pens cost? Show each step.",
    "List eight things to check before a long journey by car, with a reason for each.",
    "Tell a story about a clockmaker who repairs a clock that runs backwards.",
    "Compare trains and aeroplanes for a journey of 500 kilometres: time, price, comfort.",
    "Write an SQL query that finds the ten customers who spent most last year, and explain it.",
    "Summarise what happened in the French Revolution in about five sentences.",
    "Give a recipe for a vegetable soup, with quantities for four people.",
    "What are the duties of a project manager? Answer in a table with a short description of each.",
    "Write a JSON object that describes a book with its title, author, year, chapters and reviews.",
    "Rewrite more politely: I want my money back now, the lamp you sold me never worked.",
    "Why do the seasons change, and why are they opposite on the two halves of the Earth?",
    "Act as a guide in a museum and describe a painting of a harbour at night.",
    "Write a bash script that renames all files in a directory to lower case, and say how it works.",
)


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file with one per line, or from JSON lines with `prompt` or `turns` (the first turn is used).

    Raises:
        OptionError: the file cannot be read, or has no prompts.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the prompts {path}: {error}") from error
    prompts = [_from_json(path, number, line) for number, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines
    if not prompts:
        raise OptionError(f"{path} has no prompts; write one per line")
    return prompts


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
        prompt = row["prompt"] if "prompt" in row else row["turns"][0]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        prompt = None
    if not isinstance(prompt, str) or not prompt:
        raise OptionError(f'{path}, line {number}: no prompt; a line must be {{"prompt": "…"}} or {{"turns": ["…"]}}')
    return prompt
