"""Copies of evaluation texts in training data are found, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_heads.train.overlap import WORDS, Overlap
from medusa_runtime.errors import OptionError

LONG = "compose an engaging travel blog post about a recent trip to the islands and name three sights worth seeing"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    path = tmp_path / "eval.jsonl"
    rows = [
        {"category": "writing", "turns": [LONG, "Now rewrite it."]},
        {"deep": {"question": "How many clips did Natalia sell?"}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LONG, True),
        (
            "Please do this! " + " ".join(LONG.split()[3 : 3 + WORDS]).upper() + ", and more.",
            True,
        ),  # 13 words out of the middle
        (" ".join(LONG.split()[: WORDS - 1]) + " something else entirely now", False),  # 12 of them
        ("so: how many clips did natalia sell", True),  # a short text as a whole, whatever its field
        ("How many clips did Natalia buy?", False),
        ("Now rewrite it.", False),  # too short to mean anything
        ("", False),
    ],
)
def test_finds_runs_of_words(files: Path, text: str, found: bool) -> None:
    assert Overlap([files]).found_in(text) is found


def test_plain_text_counts_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "eval.txt"
    path.write_text("one two three four five six\nseven eight nine ten eleven twelve\n")
    overlap = Overlap([path])
    assert overlap.found_in("one two three four five six")
    assert not overlap.found_in("four five six seven eight nine")


@pytest.mark.parametrize(("content", "message"), [("{bad", "row 1 is not JSON"), ('{"a": "two words"}', "has no text")])
def test_a_bad_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(content)
    with pytest.raises(OptionError, match=message):
        Overlap([path])
    with pytest.raises(OptionError, match="cannot be read"):
        Overlap([tmp_path / "none.jsonl"])
