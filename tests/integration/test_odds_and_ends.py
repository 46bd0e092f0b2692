"""Commands that are ended, disks that are full or read-only, linked files, and the same bytes every time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_export.bundle.read_graph import read_graph
from medusa_export.bundle.writable import require_writable
from medusa_export.check import validation
from medusa_export.check.builtin_prompts import label
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.engine.monitor import interruptible
from medusa_export.measure.prompt_files import read_prompts
from medusa_export.quantize import quantize_bundle
from medusa_runtime import Manifest, OptionError
from medusa_runtime.bundle.files import is_leftover
from medusa_runtime.bundle.manifest import WEIGHTS_NAME
from medusa_runtime.errors import BundleError
from tests.integration.test_cli import run
from tests.support.cli import fails

Make = Callable[..., Path]


# --- SIGTERM


def test_sigterm_leaves_nothing_behind(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    """The command is ended while it writes, which a file of its scratch directory shows."""
    words = ["onnx", make_model(), "--heads", make_heads(), "-o", tmp_path / "new", "--no-validate"]
    slow = "import time, medusa_export.bundle.export as e; w = e.write_graphs\n"
    slow += "def write(*a, **k):\n    found = w(*a, **k); time.sleep(60); return found\n"
    slow += "e.write_graphs = write\nfrom medusa_export.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, words)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(f".new.partial-*/{WEIGHTS_NAME}")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert process.stderr is not None
    process.stderr.close()
    assert list(tmp_path.iterdir()) == []


def test_sigterm_in_a_build_waits_until_it_is_safe() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, interruptible() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(5)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


# --- disks


def test_a_report_that_cannot_be_written_is_an_error(
    make_bundle: Make, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(make_bundle(), tmp_path / "bundle")

    def full(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(validation, "write_whole", full)
    result = run("validate", tmp_path / "bundle", "--reference", make_model(), "--max-new-tokens", 2)
    assert result.exit_code == 1
    assert "bundle is not validated: the result cannot be written (" in result.stderr.splitlines()[-1]
    assert "No space left on device)" in result.stderr.splitlines()[-1]
    assert Manifest.load(tmp_path / "bundle").validation.status == "not run"


def test_a_read_only_place_is_refused_before_work(make_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, opened = make_bundle(), os.open

    def read_only(path: object, flags: int, *more: int) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(bundle)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)
    message = "cannot be written (Read-only file system), and"
    fails(run("validate", bundle, "--reference", "no such model"), 2, f"{message} validation.json is to be written there")
    fails(run("tune", bundle), 2, f"{message} tuning.json is to be written there")


def test_a_writable_place_is_left_as_it_was(tmp_path: Path) -> None:
    require_writable(tmp_path, "file")
    require_writable(tmp_path / "missing", "file")
    assert list(tmp_path.iterdir()) == []
    assert is_leftover(".file.partial-0123456789abcdef"), "a run that is killed here leaves what others know"


# --- links


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_linked_files_are_read_as_any(link: Callable[[Path, Path], None], make_bundle: Make, tmp_path: Path) -> None:
    whole, linked = tmp_path / "whole", tmp_path / "linked"
    shutil.copytree(make_bundle(), whole)
    linked.mkdir()
    for path in whole.iterdir():
        link(path, linked / path.name)
    for name in ("whole", "linked"):
        quantize_bundle(QuantizeOptions(tmp_path / name, tmp_path / f"{name}-int8"))
    ours, theirs = (Manifest.load(tmp_path / f"{name}-int8") for name in ("linked", "whole"))
    assert ours.files == theirs.files


def test_a_graph_cannot_name_a_file_elsewhere(make_bundle: Make, tmp_path: Path) -> None:
    shutil.copytree(make_bundle(), tmp_path / "bundle")
    path = tmp_path / "bundle" / "step.onnx"
    name = WEIGHTS_NAME.encode()
    path.write_bytes(path.read_bytes().replace(name, b"../secret.."[: len(name)]))
    with pytest.raises(BundleError, match="which is not a file beside it"):
        read_graph(path)


# --- prompts


def test_every_command_reads_prompts_alike(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    rows = [{"prompt": "one"}, {"turns": ["two", "three"]}, {"messages": messages}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(tmp_path / "p.jsonl")
    assert found == ["one", "two", messages]
    assert [label(prompt) for prompt in found] == ["one", "two", "be brief\nwhy?"]


def test_validate_reads_json_lines(make_bundle: Make, make_model: Make, tmp_path: Path) -> None:
    shutil.copytree(make_bundle(), tmp_path / "bundle")
    (tmp_path / "p.jsonl").write_text('{"turns": ["a fox", "and a dog"]}\n')
    words = ("--reference", make_model(), "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 2)
    result = run("validate", tmp_path / "bundle", *words)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "bundle" / "validation.json").read_text())
    assert [row["prompt"] for row in report["greedy"]] == ["a fox"]


# --- the same inputs, the same bytes


EXPORTS = (("llama", "int8"), ("gemma3_text", "float"))
RUN_ALL = """import json, sys
from medusa_export.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["medusa-export", *words]  # bundles record their command
    main(words, standalone_mode=False)"""


def test_the_same_inputs_give_the_same_bytes(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    """In two processes, with the checkpoint at two places. Gemma 3 runs a loop over a set."""
    made = {model_type: (make_model(model_type), make_heads(model_type)) for model_type, _ in EXPORTS}
    for place, seed in (("here", "1"), ("elsewhere", "2")):
        commands = []
        for model_type, name in EXPORTS:
            folder = tmp_path / place / model_type
            if not folder.exists():
                for source, copy in zip(made[model_type], ("model", "heads"), strict=True):
                    shutil.copytree(source, folder / copy)
            words = ["onnx", str(folder / "model"), "--heads", str(folder / "heads"), "-o", str(folder / name), "--no-validate"]
            commands.append(words if name == "float" else [*words, "--quantize", name])
        subprocess.run(  # one process imports PyTorch once
            [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
            env=os.environ | {"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": "1700000000"},
            check=True, capture_output=True, timeout=1200,
        )  # fmt: skip
    for model_type, name in EXPORTS:
        one, other = tmp_path / "here" / model_type / name, tmp_path / "elsewhere" / model_type / name
        files = sorted(path.name for path in one.iterdir())
        assert files == sorted(path.name for path in other.iterdir())
        for file in files:
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
        assert Manifest.load(one).provenance.created == "2023-11-14T22:13:20+00:00"


def test_a_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_export.provenance import provenance

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(OptionError, match="SOURCE_DATE_EPOCH is 'yesterday'"):
        provenance()
