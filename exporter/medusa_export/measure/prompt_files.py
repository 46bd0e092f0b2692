"""The default prompts of tuning, and a reader for files of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medusa_heads.distill.prompts import read_prompts as read_conversations
from medusa_runtime.text.codec import Message, Prompt

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


def read_prompts(path: Path) -> list[Prompt]:
    """The first turn of each row of a file: a user's text, or messages if others come before it.

    The file is one that `medusa_heads.distill.prompts.read_prompts` reads: JSON lines, or text with one prompt per line.

    Raises:
        OptionError: the file cannot be read, is empty, or has a bad row; the message gives the row's number.
    """
    return [as_prompt(conversation.turns[0]) for conversation in read_conversations(path)]


def as_prompt(turn: Sequence[Message]) -> Prompt:
    """A user's only message as text, which models without a chat template can read, too; other turns as messages."""
    return str(turn[0]["content"]) if len(turn) == 1 and turn[0]["role"] == "user" else list(turn)
