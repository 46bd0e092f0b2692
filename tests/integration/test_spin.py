"""The option spin: it reaches the sessions that decode, from wherever it is given, and changes no answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from medusa_export.cli import main
from medusa_export.measure.bench import run_bench
from medusa_runtime import Manifest, MedusaLM, OptionError, open_backend
from medusa_runtime.backends import ort_cpu, ort_sessions
from medusa_runtime.backends.ort_cpu import OrtCpuBackend
from medusa_runtime.bundle.cpu import SPINS, device_key

Make = Callable[..., Path]
KEYS = ("session.intra_op.allow_spinning", "session.intra_op.spin_duration_us")
PROMPT = [5, 6, 7, 8, 5, 6, 7]
SETTINGS = {"auto": [None, "50"], "on": ["1", None], "off": ["0", None]}


def settings(session: ort.InferenceSession) -> list[str | None]:
    """A session's settings for idle threads; None for ONNX Runtime's own."""

    def setting(key: str) -> str | None:
        try:
            value: str = session.get_session_options().get_session_config_entry(key)
        except RuntimeError:
            return None
        return value

    return [setting(key) for key in KEYS]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The `spin` of each session that is opened."""
    found: list[str] = []
    whole = ort_sessions.open_graph

    def open_graph(*arguments: Any) -> ort.InferenceSession:
        found.append(arguments[5])
        return whole(*arguments)

    for module in (ort_sessions, ort_cpu):
        monkeypatch.setattr(module, "open_graph", open_graph)
    return found


def run(*words: object) -> None:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("spin", SPINS)
def test_every_session_waits_as_asked(make_bundle: Make, spin: Any) -> None:
    bundle = make_bundle()
    backend = open_backend(bundle, Manifest.load(bundle), "ort-cpu", spin=spin)
    assert isinstance(backend, OrtCpuBackend)
    steps = backend._open_steps()
    assert settings(steps.session) == settings(backend._heads_session) == SETTINGS[spin]
    backend.resize(2, 64)
    rows = np.repeat(np.arange(4)[None], 2, axis=0)
    while not steps.runs_several:  # the graph for several sequences, opened later
        backend.step(rows + 5, rows, np.ones((2, 1, 1), bool) & np.tri(4, dtype=bool), np.zeros(2, np.int64), rows)
    assert settings(steps.session) == SETTINGS[spin]
    backend.close()


def test_answers_are_the_same(make_bundle: Make, asked: list[str]) -> None:
    found = []
    for spin in SPINS:
        with MedusaLM.from_bundle(make_bundle(), "ort-cpu", spin=spin) as lm:
            found.append(lm.generate(PROMPT, max_new_tokens=16).token_ids)
    assert found == [found[0]] * 3
    assert asked == [spin for spin in SPINS for _ in ("step", "heads")]


def test_an_unknown_way_is_refused_at_once(make_bundle: Make, asked: list[str]) -> None:
    with pytest.raises(OptionError, match="spin is 'sometimes'; there are: auto, on, off"):
        MedusaLM.from_bundle(make_bundle(), spin="sometimes")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="spin is None"):
        OrtCpuBackend(make_bundle(), Manifest.load(make_bundle()), spin=None)  # type: ignore[arg-type]
    assert asked == []


def test_generate_and_validate_take_it(make_bundle: Make, make_model: Make, tmp_path: Path, asked: list[str]) -> None:
    shutil.copytree(make_bundle(), tmp_path / "bundle")
    run("generate", tmp_path / "bundle", "-p", "a fox", "--max-new-tokens", 4, "--spin", "off")
    assert asked == ["off"] * 2
    asked.clear()
    run("validate", tmp_path / "bundle", "--reference", make_model(), "--max-new-tokens", 4, "--spin", "on")
    assert set(asked) == {"on"}


def test_tune_takes_it_and_keeps_what_it_finds_apart(make_bundle: Make, tmp_path: Path, asked: list[str]) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(make_bundle(), bundle)
    words = ("--quick", "--max-nodes", 4, "--max-seconds", 0, "--max-new-tokens", 8, "--batch-sizes", 1)
    result = CliRunner().invoke(main, ["tune", str(bundle), "--spin", "off", *map(str, words)])
    assert result.exit_code in (0, 3), result.output  # 3: on a busy machine the check may be off, and nothing is kept
    assert set(asked) == {"off"}
    assert device_key("ort-cpu", spin="off") in result.output.replace("\n", " ")
    assert len({device_key("ort-cpu", spin=spin) for spin in SPINS}) == 3
    assert device_key("ort-cpu", spin="auto") == device_key("ort-cpu")
    assert device_key("x", spin="off", processor="A GPU") == "x, A GPU"  # the CPU beside it does not count


def test_bench_gives_it_to_our_processes(make_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):  # noqa: N818 - it ends the command
        pass

    def start(_: str, command: list[str], __: object) -> None:
        raise Started(json.loads(command[-1])["spin"])

    monkeypatch.setattr(run_bench, "WorkerProcess", start)
    result = CliRunner().invoke(main, ["bench", str(make_bundle()), "--spin", "on", "--modes", "plain"])
    assert isinstance(result.exception, Started)
    assert result.exception.args == ("on",)


def test_serve_takes_it(make_bundle: Make, monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    run_module = pytest.importorskip("medusa_serve.run", reason="the extra serve is not installed", exc_type=ImportError)
    monkeypatch.setattr(run_module, "serve", lambda _, served, __: served.load().close())
    run("serve", make_bundle(), "--spin", "off")
    assert asked == ["off"] * 2


def test_replicas_take_it(make_bundle: Make, asked: list[str]) -> None:
    ray_app = pytest.importorskip("medusa_serve.ray_app", reason="Ray is not installed (extra ray)", exc_type=ImportError)
    settings = ray_app.RaySettings(bundle=make_bundle(), spin="on", threads=1)
    ray_app.served_bundle(settings).load().close()
    assert asked == ["on"] * 2
