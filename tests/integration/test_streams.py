"""Commands whose standard streams are closed, broken, full, or of an encoding that cannot hold what is printed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from medusa_export.cli import generate, main
from medusa_export.provenance import provenance

Make = Callable[..., Path]
ASKED = ("-p", "x", "--max-new-tokens", "8")


BUFFERED, UNBUFFERED = {"PYTHONUNBUFFERED": ""}, {"PYTHONUNBUFFERED": "1"}


def shell(*words: object, streams: str = "", **settings: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command by a shell. streams: redirections, and what follows the command."""
    command = shlex.join([sys.executable, "-m", "medusa_export", *map(str, words)])
    return subprocess.run(["bash", "-c", f"{command} {streams}"], capture_output=True, env=os.environ | settings, check=False)


def one_line(stderr: bytes) -> str:
    """The only line of a failure, after Click's usage."""
    *before, last = stderr.decode().splitlines()
    assert all(line.startswith(("Usage: ", "Try ")) or not line for line in before), stderr
    return last


@pytest.mark.parametrize(
    ("words", "buffering"),
    [
        (("generate", "{bundle}", *ASKED), BUFFERED),
        (("doctor",), BUFFERED),
        (("doctor", "--json"), UNBUFFERED),
        (("--help",), BUFFERED),
    ],
)
def test_a_result_that_cannot_be_printed_fails_in_one_line(
    make_bundle: Make, words: tuple[str, ...], buffering: dict[str, str]
) -> None:
    asked = [word.format(bundle=make_bundle()) for word in words]
    closed = shell(*asked, streams=">&-", **buffering)
    assert (closed.returncode, one_line(closed.stderr)) == (1, "Error: stdout: it is closed")
    full = shell(*asked, streams="> /dev/full", **buffering)
    assert full.returncode == 1
    assert one_line(full.stderr) in {"Error: stdout: No space left on device", "Error: No space left on device"}


@pytest.mark.parametrize(
    ("words", "streams", "buffering"),
    [
        (("generate", "{bundle}", *ASKED), "", BUFFERED),
        (("generate", "{bundle}", *ASKED, "--json"), "2>&1", UNBUFFERED),
        (("tree", "show", "{bundle}"), "", UNBUFFERED),
        (("doctor",), "2>&1", BUFFERED),
        (("generate", "--help"), "", BUFFERED),
    ],
)
def test_a_reader_that_goes_away_ends_a_command_without_a_word(
    make_bundle: Make, words: tuple[str, ...], streams: str, buffering: dict[str, str]
) -> None:
    asked = [word.format(bundle=make_bundle()) for word in words]
    done = shell(*asked, streams=streams + ' | (exec <&-; sleep 0); echo "${PIPESTATUS[0]}"', **buffering)
    assert done.stdout == b"141\n"
    assert all(line.startswith(b"  runs with ") for line in done.stderr.splitlines())  # what `tree` notes before


def test_an_error_that_nobody_reads_keeps_its_exit_code() -> None:
    assert shell("generate", "/nowhere", "-p", "x", streams="2> /dev/full").returncode == 1
    assert shell("generate", "/nowhere", "-p", "x", streams="2>&-").returncode == 1


def test_a_closed_stdin_matters_only_to_a_prompt_that_is_read_from_it(make_bundle: Make, tmp_path: Path) -> None:
    open_ = shell("generate", make_bundle(), *ASKED)
    assert open_.returncode == 0
    assert shell("generate", make_bundle(), *ASKED, streams="<&-").stdout == open_.stdout
    assert shell("generate", make_bundle(), "-p", "-", *ASKED[2:], streams="<<< x").returncode == 0
    closed = shell("generate", make_bundle(), "-p", "-", streams="<&-")
    assert closed.returncode == 2
    assert one_line(closed.stderr).startswith("Error: -p - reads the prompt from stdin, and stdin is closed")
    written = shell("generate", make_bundle(), "-p", "-", streams=f"0> {tmp_path / 'file'}")
    assert written.returncode == 2
    assert one_line(written.stderr).endswith("which cannot be read: Bad file descriptor")


def test_a_closed_stderr_loses_the_statistics_alone(make_bundle: Make) -> None:
    done = shell("generate", make_bundle(), *ASKED, streams="2>&-")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == shell("generate", make_bundle(), *ASKED).stdout


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Or else what a library prints is written into the file."""
    program = (
        "import os, sys; from medusa_export.cli import streams; streams.prepare();"
        "file = open(sys.argv[1], 'wb'); os.write(1, b'printed'); os.write(2, b'told'); file.write(b'%d' % file.fileno())"
    )
    words = shlex.join([sys.executable, "-c", program, str(tmp_path / "file")])
    subprocess.run(["bash", "-c", f"{words} <&- >&- 2>&-"], check=True)
    assert int((tmp_path / "file").read_bytes()) > 2


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", "日本é\n".encode()),
        ("latin-1", b"\\u65e5\\u672c\xe9\n"),
        ("ascii", "日本é\n".encode()),  # Click takes ASCII for a locale that nobody has set
    ],
)
def test_letters_that_an_encoding_lacks_are_escaped(make_bundle: Make, encoding: str, printed: bytes) -> None:
    words = ("generate", make_bundle(), "-p", "x", "--choice", "日本é", "--max-new-tokens", "60")
    done = shell(*words, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
    whole = shell(*words, "--json", PYTHONIOENCODING=encoding)
    assert json.loads(whole.stdout.decode(encoding))["text"] == "日本é"


def test_tables_are_drawn_in_any_encoding(make_bundle: Make) -> None:
    for encoding in ("latin-1", "ascii"):
        table = shell("tree", "show", make_bundle(), PYTHONIOENCODING=encoding)
        assert table.returncode == 0
        assert "root: " in table.stdout.decode(encoding)


def test_a_files_name_that_is_no_text_is_printed_as_it_is(make_model: Make, tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/\xff"
    command = [sys.executable, "-m", "medusa_export", "heads", "init", str(make_model()), "--num-heads", "1", "-o", place]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, place + b"\n"), done.stderr


def test_a_files_name_that_is_no_text_can_be_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["medusa-export", "onnx", "a\udcff"])
    assert json.loads(provenance().model_dump_json())["command"] == ["medusa-export", "onnx", r"a\udcff"]


def test_json_has_null_for_numbers_that_json_lacks(make_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = generate._answer

    def with_infinities(*words, **named):
        result = answer(*words, **named)
        [choice] = result.choices
        first = dataclasses.replace(choice.logprobs[0], logprob=-float("inf"))
        return dataclasses.replace(result, choices=[dataclasses.replace(choice, logprobs=[first])])

    monkeypatch.setattr(generate, "_answer", with_infinities)
    done = CliRunner().invoke(main, ["generate", str(make_bundle()), *ASKED, "--json", "--logprobs", "1"])
    assert done.exit_code == 0, done.output
    assert "Infinity" not in done.stdout
    assert json.loads(done.stdout)["logprobs"][0]["logprob"] is None
