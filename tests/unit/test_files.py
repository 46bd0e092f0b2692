"""Directories that appear whole or not at all."""

from __future__ import annotations

import pytest

from medusa_runtime import OptionError
from medusa_runtime.files import new_directory, require_new


def test_a_directory_appears_with_all_its_files(tmp_path) -> None:
    with new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_leaves_nothing(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_with_force_keeps_what_was_there(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out", force=True):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "old").read_text() == "1"
    with new_directory(tmp_path / "out", force=True) as directory:
        (directory / "new").write_text("2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_what_a_killed_run_left_is_swept_away(tmp_path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("1")
    with new_directory(tmp_path / "out") as directory:
        (directory / "fresh").write_text("2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fresh"]


def test_an_existing_output_is_refused_before_the_work(tmp_path) -> None:
    with pytest.raises(OptionError, match="--force"):
        require_new(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="not a directory"):
        require_new(tmp_path / "file", force=True)
