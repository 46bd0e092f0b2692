"""Directories that appear whole or not at all, and what --force may replace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medusa_heads.directories import new_directory, require_new
from medusa_runtime import OptionError
from medusa_runtime.bundle.files import write_whole

MARKER = "kind.json"


def is_ours(path: Path) -> bool:
    return names(path) == [MARKER]


def fill(path: Path, name: str = MARKER) -> Path:
    path.mkdir(parents=True)
    (path / name).write_text("old")
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_directory_appears_with_all_its_files(tmp_path) -> None:
    with new_directory(tmp_path / "deep" / "out", is_ours) as directory:
        (directory / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert names(tmp_path / "deep") == ["out"]


def test_a_failure_leaves_nothing(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out", is_ours) as directory:
        (directory / "a").write_text("1")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_force_replaces_at_the_very_end(tmp_path) -> None:
    out = fill(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_directory(out, is_ours, force=True):
        raise ZeroDivisionError
    assert names(out) == [MARKER]
    with new_directory(out, is_ours, force=True) as directory:
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
    with pytest.raises(OSError, match="No space"), new_directory(out, is_ours, force=True) as directory:
        (directory / "new").write_text("2")
    assert names(out) == [MARKER]
    assert names(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_swept_up_and_a_live_one_is_left_alone(tmp_path) -> None:
    name = "out [1]"  # as a pattern it would match nothing
    fill(tmp_path / f".{name}.partial-dead")
    with new_directory(tmp_path / name, is_ours) as first:
        (first / "a").write_text("1")
        program = f"""
from pathlib import Path
from medusa_heads.directories import new_directory
with new_directory({str(tmp_path / name)!r}, lambda _: False) as second:
    print(sorted(entry.name for entry in Path({str(tmp_path)!r}).iterdir()) == sorted([{first.name!r}, second.name]))
    second.rename({str(tmp_path / "elsewhere")!r})
    second.mkdir()
    (second / "b").write_text("2")
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "True\n"
        assert names(tmp_path / name) == ["b"]
        with pytest.raises(OptionError, match="exists"), new_directory(tmp_path / name, is_ours):
            pass
        shutil.rmtree(tmp_path / name)
    assert names(tmp_path / name) == ["a"]
    assert names(tmp_path) == ["elsewhere", name]


def test_an_output_that_appears_during_the_work_is_kept(tmp_path) -> None:
    with pytest.raises(OptionError, match="exists"), new_directory(tmp_path / "out", is_ours):
        fill(tmp_path / "out", "thesis.txt")
    assert names(tmp_path / "out") == ["thesis.txt"]
    assert names(tmp_path) == ["out"]


def test_what_a_run_killed_while_replacing_had_moved_away_is_put_back(tmp_path) -> None:
    fill(tmp_path / ".out.replaced")
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out", is_ours):
        raise ZeroDivisionError
    assert names(tmp_path / "out") == [MARKER]
    assert names(tmp_path) == ["out"]


def test_an_existing_output_is_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match="--force"):
        require_new(fill(tmp_path / "out"), is_ours)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other files", "not an earlier output of this command"),
        ("files beside ours", "not an earlier output of this command"),
        ("a file", "is not a directory"),
        ("an input", "contains .*out, so it cannot be replaced"),
        ("a parent of an input", "contains .*model, so it cannot be replaced"),
        ("here", "so it cannot be replaced"),
        ("above here", "so it cannot be replaced"),
    ],
)
def test_force_never_removes_what_is_not_an_earlier_output(
    kind: str, message: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, inputs = tmp_path / "out", ()
    if kind == "a file":
        out.write_text("thesis")
    else:
        fill(out, "thesis.txt" if kind == "other files" else MARKER)
    if kind == "files beside ours":
        (out / "thesis.txt").write_text("old")
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
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OptionError, match=message), new_directory(out, is_ours, force=True, inputs=inputs):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_is_followed_and_a_dangling_one_refused(tmp_path) -> None:
    (tmp_path / "link").symlink_to(fill(tmp_path / "out"))
    with new_directory(tmp_path / "link", is_ours, force=True) as directory:
        (directory / "new").write_text("2")
    assert names(tmp_path / "out") == ["new"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="symbolic link to a missing file"):
        require_new(tmp_path / "dangling", is_ours)


def test_an_output_that_cannot_be_written_is_found_out_before_the_work(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(OptionError, match="cannot be written"):
            require_new(path, is_ours)


def test_a_file_is_written_whole(tmp_path) -> None:
    write_whole(tmp_path / "a.json", "1")
    write_whole(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2"
    assert names(tmp_path) == ["a.json"]
