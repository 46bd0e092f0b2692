"""`medusa-export trt`: its help, its dry run, Ctrl-C, and a look at what it built."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from medusa_export.bundle.export import export_bundle
from medusa_export.cli import main
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.engine import build
from medusa_runtime.bundle.manifest import Manifest
from tests.support.models import VOCAB_SIZE, save_random_heads, save_tiny_model

pytest.importorskip("tensorrt_rtx")

SMALL = ("--max-seq-len", "64", "--max-prefill-tokens", "32", "--max-tree-nodes", "16", "--max-batch-size", "2")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    model = save_tiny_model(root / "model", "llama", num_hidden_layers=2)
    heads = save_random_heads(model, root / "heads")
    export_bundle(ExportOptions(str(model), heads, root / "bundle", precision="fp16"))
    return root / "bundle"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Path:
    output = bundle.parent / "engine"
    assert run("trt", bundle, "-o", output, *SMALL).exit_code == 0
    return output


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_both_commands_are_in_the_help() -> None:
    told = run("trt", "--help").stdout
    assert "medusa-export trt BUNDLE -o ENGINE" in told
    assert "\n  inspect " in told
    assert "--compute-capability" in told
    assert "--json" in run("trt", "inspect", "--help").stdout


def test_a_bundle_is_built_with_the_command_named_or_not(bundle: Path, engine: Path, tmp_path: Path) -> None:
    done = run("trt", "build", bundle, "-o", tmp_path / "engine", *SMALL)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'engine'}\n"
    assert Manifest.load(tmp_path / "engine").graphs == Manifest.load(engine).graphs


def test_a_dry_run_builds_nothing_and_tells_sizes(bundle: Path, engine: Path, tmp_path: Path) -> None:
    done = run("trt", bundle, "-o", tmp_path / "engine", "--dry-run", *SMALL)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "engine").exists()
    assert "verify" in done.stdout
    assert "KV cache = 2 sequences · (4 of [2, S, 16] float16), S = 128 entries" in done.stdout
    facts = Manifest.load(engine)
    assert facts.engine is not None
    memory = facts.engine.device_memory
    told = json.loads(run("trt", bundle, "-o", tmp_path / "engine", "--dry-run", "--json", *SMALL).stdout)
    assert told["device_memory"].keys() == memory.keys()
    assert told["profiles"].keys() == facts.engine.profiles.keys()
    assert memory["kv_cache"] == 2 * 2 * 2 * 2 * 128 * 16 * 2
    logits, hidden, greedy = 2 * 16 * VOCAB_SIZE * 2, 2 * 16 * 64 * 2, 2 * 16 * 8
    prompt = 2 * 2 * 32 * 8 + 2 * 32 * 32 + 2 * 8 + 2 * 16 * 8  # ids and positions, mask, lengths, rows
    heads = 2 * 64 * 2 + 2 * 8 + 2 * 3 * facts.heads.top_k * (8 + 4)  # states and roots, candidates
    accepted = 2 * 8 + 2 * 8 + 2 * 64 * 2  # rows, ids, states
    assert memory["inputs_and_outputs"] == logits + hidden + greedy + accepted + prompt + heads
    external = {  # the LM head is in both engines
        (name, value.name): value.const_value.nbytes
        for name in ("step", "heads")
        for value in ir.load(bundle / f"{name}.onnx").graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert sum(external.values()) <= memory["weights"] < 1.03 * sum(external.values())
    assert 2 * 32 * 96 * 2 < memory["activations"] < 100 * 2 * 32 * 96 * 2
    told = dict(line.split("│")[1:3] for line in done.stdout.splitlines() if ".plan" in line)
    for name, size in told.items():
        assert float(size) == pytest.approx(facts.files[name.strip()].size / 1e6, rel=0.25)


def test_rounded_weights_are_estimated_smaller(bundle: Path, tmp_path: Path) -> None:
    def weights(kind: str) -> float:
        done = run("trt", bundle, "-o", tmp_path / "engine", "--dry-run", "--weights", kind)
        assert done.exit_code == 0, done.output
        return float(next(line for line in done.stdout.splitlines() if "weights" in line).split("│")[2])

    assert weights("as-is") > weights("int8") >= weights("int4")


def test_ctrl_c_stops_a_build_and_leaves_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []

    @contextmanager
    def stage(_: str) -> Iterator[Callable[[str], None]]:
        def tell(phase: str) -> None:
            phases.append(phase)
            signal.raise_signal(signal.SIGINT)

        yield tell

    monkeypatch.setattr(build, "stage", stage)
    done = run("trt", bundle, "-o", tmp_path / "engine", *SMALL)
    assert done.exit_code == 1
    assert "Aborted!" in done.stderr
    assert len(phases) == 1
    assert " of " in phases[0]
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_inspect_tells_what_the_manifest_and_the_plans_say(engine: Path) -> None:
    done = run("trt", "inspect", engine)
    assert done.exit_code == 0, done.output
    for told in (
        "built with: rtx ",
        "for GPUs of: 8.9",
        "header of step: ",
        "loads here: ",
        "past.0.key",
        "prefill",
        "heads.plan",
    ):
        assert told in done.stdout
    found = json.loads(run("trt", "inspect", engine, "--json").stdout)
    facts = Manifest.load(engine)
    assert facts.engine is not None
    assert found["engine"]["aliases"] == facts.engine.aliases
    assert found["graphs"] == json.loads(facts.model_dump_json())["graphs"]
    assert found["file_sizes"] == {name: file.size for name, file in facts.files.items()}
    assert set(found["headers"]) == {"step", "heads"}
    assert "malformed" not in str(found["headers"])


def test_inspect_works_without_tensorrt(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    done = run("trt", "inspect", engine)
    assert done.exit_code == 0, done.output
    assert "loads here: no: tensorrt_rtx is not installed" in done.stdout


def test_inspect_tells_an_engine_of_another_version(engine: Path, tmp_path: Path) -> None:
    other = copy(engine, tmp_path)
    facts = Manifest.load(other)
    assert facts.engine is not None
    facts.engine.tensorrt_version = "1.6.0.1"
    facts.save(other)
    assert "no: " in (told := run("trt", "inspect", other).stdout)
    assert "was built with TensorRT-RTX 1.6.0.1, this machine has " in told


def test_inspect_refuses_damaged_engines_in_one_line(bundle: Path, engine: Path, tmp_path: Path) -> None:
    other = copy(engine, tmp_path)
    plan = (other / "step.plan").read_bytes()
    for content, message in (
        (plan[:1000], "step.plan has 1000 bytes, the manifest says "),
        (plan[:-1] + bytes([plan[-1] ^ 1]), "step.plan has sha256 "),
    ):
        (other / "step.plan").write_bytes(content)
        done = run("trt", "inspect", other)
        assert done.exit_code == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = run("trt", "inspect", bundle)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "has no engines; build them from it with: medusa-export trt" in done.stderr


def copy(engine: Path, directory: Path) -> Path:
    other = directory / "other"
    other.mkdir()
    for path in engine.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    return other
