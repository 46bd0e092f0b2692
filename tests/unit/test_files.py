"""Directories that appear whole or not at all, and what --force may replace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medusa_runtime import OptionError
from medusa_runtime.files import new_directory, require_new, write_whole

MARKER = "kind.json"


def fill(path: Path, name: str = MARKER) -> Path:
    path.mkdir(parents=True)
    (path / name).write_text("old")
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_directory_appears_with_all_its_files(tmp_path) -> None:
    with new_directory(tmp_path / "deep" / "out", MARKER) as directory:
        (directory / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert names(tmp_path / "deep") == ["out"]


def test_a_failure_leaves_nothing(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out", MARKER) as directory:
        (directory / "a").write_text("1")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_force_replaces_at_the_very_end(tmp_path) -> None:
    out = fill(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_directory(out, MARKER, force=True):
        raise ZeroDivisionError
    assert names(out) == [MARKER]
    with new_directory(out, MARKER, force=True) as directory:
        (directory / "new").write_text("2")
        assert names(out) == [MARKER]
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_replacement_that_fails_puts_back_what_was_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, moves = fill(tmp_path / "out"), []
    replace = os.replace

    def fail_the_second_time(source, target) -> None:
        moves.append(target)
        if len(moves) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_the_second_time)
    with pytest.raises(OSError, match="No space"), new_directory(out, MARKER, force=True) as directory:
        (directory / "new").write_text("2")
    assert names(out) == [MARKER]
    assert names(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_swept_up_and_a_live_one_is_left_alone(tmp_path) -> None:
    fill(tmp_path / ".out.partial-999999999")
    fill(tmp_path / ".out.partial-1")  # lives as long as the system
    with new_directory(tmp_path / "out", MARKER) as directory:
        (directory / "fresh").write_text("2")
    assert names(tmp_path) == [".out.partial-1", "out"]


def test_an_existing_output_is_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match="--force"):
        require_new(fill(tmp_path / "out"), MARKER)


@pytest.mark.parametrize("kind", ["other files", "a file", "an input", "a parent of an input", "here", "above here"])
def test_force_never_removes_what_is_not_an_earlier_output(kind: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, inputs = tmp_path / "out", ()
    if kind == "a file":
        out.write_text("thesis")
    else:
        fill(out, "thesis.txt" if kind == "other files" else MARKER)
    if kind == "an input":
        inputs = (out,)
    if kind == "a parent of an input":
        inputs = (out / "inside" / "model",)
    if kind == "here":
        monkeypatch.chdir(out)
        out = Path()
    if kind == "above here":
        (out / "sub").mkdir()
        monkeypatch.chdir(out / "sub")
        out = Path("..")
    with pytest.raises(OptionError), new_directory(out, MARKER, force=True, inputs=inputs):
        pass
    kept = tmp_path / "out"
    assert kept.read_text() == "thesis" if kept.is_file() else names(kept)


def test_a_link_is_followed_and_a_dangling_one_refused(tmp_path) -> None:
    (tmp_path / "link").symlink_to(fill(tmp_path / "out"))
    with new_directory(tmp_path / "link", MARKER, force=True) as directory:
        (directory / "new").write_text("2")
    assert names(tmp_path / "out") == ["new"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="symbolic link to nothing"):
        require_new(tmp_path / "dangling", MARKER)


def test_an_output_that_cannot_be_written_is_found_out_before_the_work(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(OptionError, match="cannot be written"):
            require_new(path, MARKER)


def test_a_file_is_written_whole(tmp_path) -> None:
    write_whole(tmp_path / "a.json", "1")
    write_whole(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2"
    assert names(tmp_path) == ["a.json"]
