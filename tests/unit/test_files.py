"""Directories that appear whole or not at all, and what --force may replace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medusa_heads import directories
from medusa_heads.directories import new_directory, require_new
from medusa_runtime import OptionError
from medusa_runtime.bundle.files import json_text, replacing, write_whole

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


def test_a_file_has_the_mode_of_any_new_file_or_of_the_one_it_replaces(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a.json", "1")
        with new_directory(tmp_path / "out", is_ours) as directory:
            (directory / "a").write_text("1")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    (tmp_path / "a.json").chmod(0o444)
    write_whole(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o444
    assert (tmp_path / "a.json").read_text() == "2"


def test_text_is_utf_8_with_line_feeds(tmp_path) -> None:
    write_whole(tmp_path / "a.txt", "\u00e9\uff5c\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\xef\xbd\x9c\n"


def test_a_failure_leaves_the_file_as_it_was(tmp_path) -> None:
    write_whole(tmp_path / "a", "1")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_what_cannot_be_written_is_named_as_the_user_knows_it(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "nowhere" / "a", "1")
    assert caught.value.filename == str(tmp_path / "nowhere" / "a")
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "directory", "1")
    assert caught.value.filename == str(tmp_path / "directory")
    assert names(tmp_path) == ["directory"]


WRITER = """
import sys
from pathlib import Path
from unittest.mock import patch
from medusa_runtime.bundle.files import write_whole
with patch("os.getpid", lambda: 1):  # as in two containers
    for _ in range(150):
        write_whole(Path(sys.argv[1]), sys.argv[2] * 20_000)
"""


def test_several_processes_of_one_number_write_one_file_and_none_is_torn(tmp_path) -> None:
    """As containers on one volume do: each of their first processes has the number 1."""
    target = tmp_path / "a"
    write_whole(target, "0" * 20_000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(target), letter]) for letter in "12"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        text = target.read_text()
        assert len(text) == 20_000
        assert len(set(text)) == 1
        seen.add(text[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen >= {"1", "2"}
    assert names(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        told.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def move(source, target) -> None:
        told.append("moved")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    write_whole(tmp_path / "a", "1")
    file, moved, directory = told
    assert (Path(file).parent, moved, directory) == (tmp_path, "moved", str(tmp_path))
    told.clear()
    with new_directory(tmp_path / "out", is_ours) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("1")
        (temporary / "b").write_text("1")
    *within, moved, directory = told
    assert set(within) == {str(temporary / name) for name in (".", "b", "sub", "sub/b")}
    assert (moved, directory) == ("moved", str(tmp_path))


def test_old_leftovers_of_a_file_are_removed_and_nothing_else(tmp_path) -> None:
    old, new, earlier = (tmp_path / f".a.partial-{end}" for end in ("0123456789abcdef", "fedcba9876543210", "4711"))
    others = [tmp_path / name for name in (".a.partial-thesis", ".b.partial-4711", "a.partial-4711", ".a.partial-47110.txt")]
    for file in (old, new, earlier, *others):
        file.write_text("1")
    for file in (old, earlier, *others):
        os.utime(file, (1, 1))
    (tmp_path / ".a.partial-1").mkdir()
    os.utime(tmp_path / ".a.partial-1", (1, 1))
    write_whole(tmp_path / "a", "1")
    assert names(tmp_path) == sorted(["a", new.name, ".a.partial-1", *(file.name for file in others)])


def test_a_pipe_is_written_and_stays_one(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        write_whole(tmp_path / "pipe", "text")
        assert reader.communicate()[0] == b"text"
    assert names(tmp_path) == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_directory_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, lost = directories._lock, []

    def late(directory: Path, *, wait: bool = False) -> int | None:
        if not lost:
            lost.append(directory)
            directory.rmdir()  # by another run's sweep
        return lock(directory, wait=wait)

    monkeypatch.setattr(directories, "_lock", late)
    with new_directory(tmp_path / "out", is_ours) as directory:
        assert directory not in lost
        (directory / "a").write_text("1")
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"a": [1.5, float("nan")], "b": float("inf")}, '{"a": [1.5, null], "b": null}'),
        ((-float("inf"), True, None, "NaN", 1), '[null, true, null, "NaN", 1]'),
    ],
)
def test_json_has_no_numbers_that_json_has_not(data: object, text: str) -> None:
    assert json_text(data) == text
