"""The benchmark's arithmetic, its processes and its choice of peers."""

from __future__ import annotations

import ast
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medusa_export.measure.bench import peers, process
from medusa_export.measure.bench.bench_options import Sources
from medusa_export.measure.bench.bench_prompts import BenchPrompt, load_prompts, of_length, spread
from medusa_export.measure.bench.contest import Answer, Contestant, rotated
from medusa_export.measure.bench.own import Clock
from medusa_export.measure.bench.peers import PEERS, choose_peers
from medusa_export.measure.bench.process import WorkerError, WorkerProcess
from medusa_export.measure.bench.result import slower_than_plain
from medusa_export.measure.bench.summary import agreement, bootstrap, by_category, first_divergence, ratio, summarize
from medusa_export.measure.bench.workers.request_loop import timed
from medusa_runtime import DecodingEngine
from medusa_runtime.errors import OptionError
from tests.support.fake_backend import FakeBackend


def answer(prompt: int, sizes: list[int], seconds: list[float], number: int = 0, **parts: float) -> Answer:
    return Answer("x", prompt, number, list(range(sum(sizes))), sizes, seconds, parts)


def steady(prompt: int, rate: float, number: int = 0) -> Answer:
    """An answer with eight tokens after the first, at `rate` tokens per second."""
    return answer(prompt, [1] * 9, [0.5 + place / rate for place in range(9)], number)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 8, 10, 79])
def test_a_limit_spreads_over_the_whole_file(limit: int) -> None:
    places = spread(80, limit)
    assert len(places) == len(set(places)) == limit
    assert places == sorted(places)
    if limit >= 8:  # eight categories of ten, one after the other
        assert {place // 10 for place in places} == set(range(8))


def test_no_limit_takes_all() -> None:
    assert spread(5, None) == spread(5, 5) == spread(5, 9) == [0, 1, 2, 3, 4]


def test_a_long_prompt_is_made_of_the_prompts() -> None:
    prompts = [BenchPrompt("a", "all", [1, 2]), BenchPrompt("b", "all", [3])]
    assert of_length(prompts, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert of_length(prompts, 4, start=2) == [3, 1, 2, 3]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_rates_leave_the_prompt_and_its_token_out() -> None:
    one = answer(0, [1, 3, 2], [2.0, 2.5, 3.0])
    assert (one.num_steps, one.num_decoded, one.decode_seconds) == (2, 5, 1.0)
    assert one.tokens_per_second == 5.0
    assert one.whole_tokens_per_second == 2.0


def test_a_summary_is_of_prompts_not_of_rounds() -> None:
    answers = [steady(0, 10.0), steady(1, 20.0), *(steady(2, 90.0, number) for number in range(5)), steady(2, 1.0, 5)]
    found = summarize(answers)
    assert found["tokens_per_second"] == 20.0  # of 10, 20 and 90, whose bad round does not count
    assert found["first_token_ms"] == 500.0
    assert found["tokens_per_step"] == 1.0
    assert found["num_answers"] == 8
    assert found["ms_per_step_parts"] is None


def test_the_parts_of_a_step_add_up() -> None:
    found = summarize([answer(0, [1, 2, 2], [1.0, 1.1, 1.2], step=0.15, propose=0.02, commit=0.01, text=0.004)])
    parts = found["ms_per_step_parts"]
    assert parts == {"step": 75.0, "propose": 10.0, "commit": 5.0, "other": 10.0, "text": 2.0}
    assert sum(parts.values()) - parts["text"] == found["ms_per_step"] == 100.0


def test_ratios_compare_prompt_by_prompt() -> None:
    ours = [steady(prompt, 2.0 * rate) for prompt, rate in enumerate((10.0, 40.0, 15.0))]
    theirs = [steady(prompt, rate) for prompt, rate in enumerate((10.0, 40.0, 15.0, 1000.0))]
    found = ratio(ours, theirs)
    assert found == {"ratio": 2.0, "low": 2.0, "high": 2.0, "num_prompts": 3}
    assert ratio(ours, [steady(7, 1.0)]) is None


def test_the_bootstrap_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = bootstrap(rng.normal(1.3, 0.2, 30))
        covered += low <= 1.3 <= high
    assert 180 <= covered <= 199


def test_categories_have_numbers_of_their_own() -> None:
    found = by_category([steady(0, 10.0), steady(1, 30.0)], ["code", "essays"])
    assert {name: one["tokens_per_second"] for name, one in found.items()} == {"code": 10.0, "essays": 30.0}


def test_divergence() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2
    same, other = steady(0, 1.0), Answer("x", 1, 0, [0, 1, 7], [1, 1, 1], [0, 1, 2], {})
    found = agreement([same, other], [steady(0, 2.0), steady(1, 2.0)])
    assert (found["num_equal"], found["num_answers"], found["first_divergence_min"]) == (1, 2, 2)


def test_every_contestant_begins_as_often_as_the_others() -> None:
    names = ["a", "b", "c"]
    assert [rotated(names, by)[0] for by in range(6)] == ["a", "b", "c", "a", "b", "c"]
    assert all(sorted(rotated(names, by)) == names for by in range(6))


def test_it_says_where_medusa_does_not_pay() -> None:
    def contestant(name: str, mode: str | None, bundle: str | None) -> dict[str, object]:
        return {"name": name, "mode": mode, "bundle": bundle}

    pair = {"above": "b tuned", "below": "b plain", "ratio": 0.9, "low": 0.85, "high": 0.95}
    peer = {"above": "b plain", "below": "other", "ratio": 0.5, "low": 0.4, "high": 0.6}
    result = {
        "contestants": [
            contestant("b tuned", "tuned", "b"),
            contestant("b plain", "plain", "b"),
            contestant("other", None, None),
        ],
        "ratios": [pair, peer],
    }
    line = slower_than_plain(result)
    assert line is not None
    assert "b tuned (0.90 times as fast, 0.85 to 0.95)" in line
    assert "other" not in line
    assert slower_than_plain(result | {"ratios": [pair | {"ratio": 1.1}, peer]}) is None


# --- processes -------------------------------------------------------------------------------------------------------

FAKE = """
import os, sys

def load(settings):
    if settings.get("refuses"):
        raise RuntimeError("no such model\\nand more")
    def decode(token_ids, max_new_tokens, emit):
        print("a library that talks")
        os.write(1, b"from below\\n")
        if token_ids == [13]:
            raise ValueError("unlucky")
        if token_ids == [6, 6, 6]:
            print("it hurts", file=sys.stderr)
            os._exit(3)
        for token in range(max_new_tokens):
            emit([token + token_ids[0]])
    return decode
"""


def start(directory: Path, **settings: object) -> WorkerProcess:
    (directory / "fake_peer.py").write_text(FAKE)
    command = [sys.executable, str(process.REQUEST_LOOP), "fake_peer", json.dumps(settings)]
    return WorkerProcess("fake", command, {"PYTHONPATH": str(directory)})


def test_a_process_answers_whatever_its_library_prints(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        contestant = Contestant("fake", worker)
        for first in (4, 7):
            found = contestant.generate([first], 3)
            assert found["pieces"] == [[first], [first + 1], [first + 2]]
            assert found["seconds"] == sorted(found["seconds"])
        assert worker.ask("memory")["peak_mb"] > 1


def test_a_request_that_fails_is_one_line_and_the_next_one_works(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        contestant = Contestant("fake", worker)
        with pytest.raises(WorkerError, match=r"^fake: ValueError: unlucky$"):
            contestant.generate([13], 3)
        assert len(contestant.generate([1], 3)["pieces"]) == 3


def test_a_process_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    with start(tmp_path) as worker, pytest.raises(WorkerError, match=r"^fake ended with exit code 3: it hurts$"):
        Contestant("fake", worker).generate([6, 6, 6], 3)


def test_a_process_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^fake: RuntimeError: no such model and more$"):
        start(tmp_path, refuses=True)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_is_stopped_while_it_is_not_asked(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        status = Path(f"/proc/{worker.pid}/status")
        for _ in range(20):
            assert "State:\tT (stopped)" in status.read_text()
            worker.ask("memory")
    assert not status.exists()


def test_answers_have_exactly_the_length_asked_for() -> None:
    def decode(token_ids: list[int], count: int, emit: object) -> None:
        for piece in ([1, 2], [3, 4], [5, 6]):
            emit(piece)

    assert timed(decode)([0], 3)["pieces"] == [[1, 2], [3]]
    with pytest.raises(RuntimeError, match=r"6 tokens instead of 7"):
        timed(decode)([0], 7)


def test_workers_import_nothing_of_ours() -> None:
    packages = {
        "numpy", "torch", "transformers", "safetensors", "onnxruntime_genai", "openvino", "openvino_genai", "llama_cpp"
    }  # fmt: skip
    for file in process.WORKERS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= packages | sys.stdlib_module_names, file


# --- peers -----------------------------------------------------------------------------------------------------------


def python_with(directory: Path, *packages: str) -> Path:
    """A program in place of Python that always reports these packages."""
    script = directory / "python"
    script.write_text(f"#!/bin/sh\necho '{json.dumps(dict.fromkeys(packages, '1'))}'\n")
    script.chmod(0o755)
    return script


def test_all_takes_what_is_there_and_says_what_is_not(tmp_path: Path) -> None:
    sources = Sources(checkpoint=tmp_path, gguf=tmp_path)
    chosen = choose_peers(["all"], sources, python_with(tmp_path, "torch", "transformers", "accelerate", "llama-cpp-python"))
    assert {peer.family for peer in chosen.peers} == {"transformers", "llama.cpp"}
    assert {peer.name for peer in chosen.peers} | chosen.absent.keys() == {peer.name for peer in PEERS}
    assert "pip install onnxruntime-genai" in chosen.absent["onnxruntime-genai-int4"]
    assert "pip install openvino-genai openvino-tokenizers" in chosen.absent["openvino-genai-gguf"]


def test_what_is_named_must_be_there(tmp_path: Path) -> None:
    python = python_with(tmp_path, "onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers")
    with pytest.raises(
        OptionError, match=r"^llama.cpp-q8_0: llama-cpp-python is not installed; .*pip install llama-cpp-python$"
    ):
        choose_peers(["llama.cpp-q8_0"], Sources(gguf=tmp_path), python)
    with pytest.raises(OptionError, match=r"^onnxruntime-genai: it needs --checkpoint$"):
        choose_peers(["onnxruntime-genai"], Sources(), python)
    with pytest.raises(OptionError, match=r"there is no peer 'vllm'; use all, or some of: transformers"):
        choose_peers(["vllm"], Sources(), python)
    with pytest.raises(OptionError, match=r"--peers-python .*nowhere cannot be run as Python"):
        choose_peers(["all"], Sources(), tmp_path / "nowhere")
    chosen = choose_peers(["onnxruntime-genai"], Sources(checkpoint=tmp_path), python)
    assert [peer.name for peer in chosen.peers] == [f"onnxruntime-genai-{kind}" for kind in ("fp32", "int8", "int4")]


def test_a_built_model_is_kept_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, models = tmp_path / "model.bin", tmp_path / "models"
    source.write_text("weights")
    (tmp_path / "fake_builder.py").write_text(
        "from pathlib import Path\n"
        "def build(settings):\n"
        "    if Path(settings['gguf']).read_text() == 'bad': raise SystemExit('cannot read it')\n"
        "    Path(settings['output']).write_text(Path(settings['gguf']).read_text() + settings['precision'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peer = peers.Peer("fake", "q8", (), "fake_peer", ("gguf",), {"precision": "q8"}, builder="fake_builder")

    def model() -> Path:
        command = peers.peer_command(peer, Sources(gguf=source), None, models, threads=1)
        return Path(json.loads(command[-1])["model"])

    first = model()
    assert first.read_text() == "weightsq8"
    first.write_text("built")
    assert model().read_text() == "built"
    source.write_text("other weights")
    assert model().read_text() == "other weightsq8"
    source.write_text("bad")
    with pytest.raises(peers.MedusaError, match=r"^fake-q8: its model cannot be built: cannot read it$"):
        model()
    assert len(list(models.iterdir())) == 2


# --- our own decoding ------------------------------------------------------------------------------------------------


def test_the_clock_counts_the_calls_of_an_engine_that_was_there_before() -> None:
    class SlowBackend(FakeBackend):
        num_proposals = 0

        def step(self, *args, **kwargs):
            time.sleep(0.002)
            return super().step(*args, **kwargs)

        def propose(self, *args):
            self.num_proposals += 1
            time.sleep(0.001)
            return super().propose(*args)

    backend = SlowBackend()
    engine = DecodingEngine(backend, reuse_prefixes=False)
    clock = Clock(backend)
    list(engine.generate([[1, 2, 3]], 30))
    assert backend.num_proposals >= engine.stats.num_steps > 5
    assert clock.seconds["step"] >= 0.002 * len(backend.steps)
    assert clock.seconds["propose"] >= 0.001 * backend.num_proposals
    assert clock.seconds["commit"] > 0


def test_json_goes_to_stdout_in_place_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from medusa_export.cli.bench import _publish

    _publish({"complete": True, "seconds": 1.5}, Path("-"), None, None)
    assert json.loads(capsys.readouterr().out) == {"complete": True, "seconds": 1.5}


def test_a_users_only_message_is_text_which_models_without_a_chat_template_read(tmp_path: Path) -> None:
    path, seen = tmp_path / "prompts.jsonl", []
    system = {"role": "system", "content": "short"}
    rows = [{"prompt": "one"}, {"turns": ["two", "three"]}, {"messages": [system, {"role": "user", "content": "four"}]}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    class Codec:
        def encode(self, prompt: object) -> list[int]:
            seen.append(prompt)
            return [1]

    load_prompts(path, None, Codec())  # type: ignore[arg-type]
    assert seen == ["one", "two", [system, {"role": "user", "content": "four"}]]
