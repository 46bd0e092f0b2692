"""An artifact records the command that made it, but not the folders of the machine."""

from __future__ import annotations

import sys

import pytest

from medusa_export.provenance import provenance


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/me/models/smollm2", "smollm2"),
        ("data=[/srv/a.jsonl, /srv/deep/b.jsonl]", "data=[a.jsonl, b.jsonl]"),
        ("build/heads", "build/heads"),
        ("../other/heads", "heads"),
        ("http://localhost:8000/v1/chat", "http://localhost:8000/v1/chat"),
        ("org/model", "org/model"),
        ("../data/train/answers.jsonl", "answers.jsonl"),
        ("data=[../../a/b.jsonl, ./c/d.jsonl]", "data=[b.jsonl, ./c/d.jsonl]"),
    ],
)
def test_paths_to_elsewhere_are_cut(monkeypatch: pytest.MonkeyPatch, word: str, kept: str) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/medusa-export", "train", word])
    assert provenance().command == ["medusa-export", "train", kept]
