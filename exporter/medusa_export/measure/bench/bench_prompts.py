"""The prompts of a benchmark. All contestants get the same token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from medusa_export.measure.prompt_files import as_prompt
from medusa_heads.distill.prompts import Conversation, read_prompts
from medusa_runtime.errors import OptionError
from medusa_runtime.text.codec import Prompt, TextCodec

OWN = (
    ("questions", "What is the capital of Portugal, and what is it known for?"),
    ("code", "Write a Python function that reverses a string."),
    ("lists", "Give me five tips for a healthy breakfast."),
    ("reasoning", "A train leaves at 14:10 and arrives at 17:45. How long does the journey take? Explain each step."),
    ("stories", "Tell me a short story about a lighthouse."),
    ("letters", "Write a short letter to a friend about a week at the sea."),
    ("science", "How do plants make sugar from light?"),
    ("rewriting", "Say in plain words: the party of the first part shall indemnify the party of the second part."),
)


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt, as token ids."""

    key: str
    category: str
    token_ids: list[int]


def load_prompts(path: Path | None, limit: int | None, codec: TextCodec) -> list[BenchPrompt]:
    """The first turns of a file's conversations, or the built-in prompts. At most `limit`, evenly spread over all of them.

    Raises:
        OptionError: the file cannot be read, or has a bad row.
    """
    asked: list[tuple[str, str, Prompt]] = (
        _from_file(path) if path else [(f"own-{number}", *pair) for number, pair in enumerate(OWN, start=1)]
    )
    chosen = [asked[place] for place in spread(len(asked), limit)]
    return [BenchPrompt(key, category, codec.encode(prompt)) for key, category, prompt in chosen]


def spread(count: int, limit: int | None) -> list[int]:
    """The indices 0 … count - 1, or `limit` of them at equal distances, since files are often sorted by category."""
    if limit is None or limit >= count:
        return list(range(count))
    return [place * count // limit + count // (2 * limit) for place in range(limit)]


def of_length(prompts: list[BenchPrompt], length: int, start: int = 0) -> list[int]:
    """`length` token ids: the prompts one after the other, starting with prompt `start` and over again after the last."""
    whole = [token for one in prompts for token in one.token_ids]
    return [whole[place % len(whole)] for place in range(start, start + length)]


def _from_file(path: Path) -> list[tuple[str, str, Prompt]]:
    conversations = read_prompts(path)
    if any(not conversation.turns for conversation in conversations):
        raise OptionError(f"{path} has a conversation without a user's message; remove it")
    categories = _categories(path, conversations)
    return [
        (conversation.key, category, as_prompt(conversation.turns[0]))
        for conversation, category in zip(conversations, categories, strict=True)
    ]


def _categories(path: Path, conversations: list[Conversation]) -> list[str]:
    """The kind of each row: its `category` (as in MT-bench), or else its `source`."""
    if path.suffix.lower() not in {".jsonl", ".json"}:
        return ["all"] * len(conversations)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    return [str(row.get("category") or one.source or "all") for row, one in zip(rows, conversations, strict=True)]
