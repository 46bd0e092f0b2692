"""`medusa-export bench` on tiny models: our modes, PyTorch as a peer, and the results of an interrupted run."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from medusa_export.bundle.export import export_bundle
from medusa_export.cli import main
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.measure.bench import peers
from medusa_export.measure.bench.contest import Contestant
from medusa_export.measure.bench.floor import read_bandwidth, step_weight_bytes
from medusa_heads.formats import load_heads, save_heads
from medusa_runtime.bundle.manifest import Manifest
from tests.support.cli import fails

Make = Callable[..., Path]
NO_SECTIONS = ("--steps", "none", "--prefill", "none", "--context", "none")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["bench", *(str(word) for word in words)])


def measured(target: Path, *words: object) -> dict[str, Any]:
    result = run(*words, "--json", target)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(target.read_text())
    assert found["complete"]
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"category": f"kind {n // 2}", "turns": [f"the fox number {n}", "and the dog?"]} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


def test_our_modes(make_bundle: Make, prompts: Path, tmp_path: Path) -> None:
    result = measured(
        tmp_path / "out.json", make_bundle(), "--prompts", prompts, "--limit", 4, "--rounds", 2, "--max-new-tokens", 20,
        "--modes", "plain,static,dynamic,tuned,heads,lookup", "--steps", "1,4", "--prefill", "16,32,5000", "--context", "32",
        "--csv", tmp_path / "out.csv", "--plot", tmp_path / "plots", "--threads", 1,
    )  # fmt: skip
    modes = {one["mode"]: one for one in result["contestants"]}
    assert list(modes) == ["plain", "static", "dynamic", "tuned", "heads", "lookup"]
    assert result["prompts"]["categories"] == {f"kind {n}": 1 for n in range(4)}
    for one in modes.values():
        assert one["agreement"] == {
            "num_answers": 4, "num_equal": 4, "first_divergence_min": None, "first_divergence_median": None
        }  # fmt: skip
        assert len(one["answers"]) == 8
        parts = dict(one["ms_per_step_parts"])
        del parts["text"]
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(one["ms_per_step"], abs=1e-3)
        assert one["memory_mb"]["peak_mb"] > 20
    assert modes["plain"]["tokens_per_step"] == 1.0
    assert modes["plain"]["ms_per_step_parts"]["propose"] == 0.0
    assert {answer["num_steps"] for answer in modes["plain"]["answers"]} == {19}
    assert [(pair["above"], pair["below"]) for pair in result["ratios"]] == [
        (f"bundle {mode}", "bundle plain") for mode in ("static", "dynamic", "tuned", "heads", "lookup")
    ]
    assert result["steps"]["by_bundle"]["bundle"]["step_ms"].keys() == {"1", "4"}
    assert result["lengths"]["first_token_ms"]["bundle plain"].keys() == {"16", "32"}
    assert result["context"]["used"]["bundle"].keys() == {"32"}
    assert result["floors"]["bundle"]["ms"] > 0

    [header, *rows] = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert [row[header.index("mode")] for row in rows] == list(modes)
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    assert pictures == {"tokens_per_second.png", "step_cost.png", "context.png", "prefill.png"}


def test_two_bundles_of_one_model(make_bundle: Make, tmp_path: Path) -> None:
    result = measured(
        tmp_path / "out.json", make_bundle(), make_bundle(tree_nodes=5), "--limit", 1, "--max-new-tokens", 6, *NO_SECTIONS
    )
    names = [one["bundle"] for one in result["contestants"]]
    assert len(set(names)) == 2
    assert all(one["agreement"]["num_equal"] == 1 for one in result["contestants"])
    compared = {one["name"]: one["compared_with"] for one in result["contestants"]}
    first, second = dict.fromkeys(names)
    assert (compared[f"{first} tuned"], compared[f"{second} tuned"]) == (f"{first} plain", f"{second} plain")
    assert compared[f"{second} plain"] == f"{first} plain"
    assert len(result["ratios"]) == 6


def test_pytorch_gives_the_same_tokens_in_the_same_steps(
    make_model: Make, make_heads: Make, prompts: Path, tmp_path: Path
) -> None:
    """The loop in PyTorch is an independent program, so if both agree in every step, both decode correctly."""
    heads, bundle = load_heads(make_heads()), tmp_path / "bundle"
    heads.draft_ids = list(range(0, 320, 2))  # so roots are read that the heads know, and others
    save_heads(heads, tmp_path / "heads")
    # so large that random heads are right now and then
    export_bundle(ExportOptions(str(make_model()), tmp_path / "heads", bundle, tree_nodes=160, head_top_k=120))
    result = measured(
        tmp_path / "out.json", bundle, "--modes", "plain,static", "--prompts", prompts, "--limit", 3,
        "--max-new-tokens", 24, "--threads", 1, "--peers", "transformers-fp32,transformers-lookup,torch-medusa",
        "--checkpoint", make_model(), "--heads", tmp_path / "heads", *NO_SECTIONS,
    )  # fmt: skip
    by_name = {one["name"]: one for one in result["contestants"]}
    assert by_name.keys() == {
        "bundle plain", "bundle static", "transformers-fp32", "transformers-lookup", "torch-medusa-fp32"
    }  # fmt: skip
    assert all(one["agreement"]["num_equal"] == 3 for one in by_name.values())
    steps = {name: [answer["num_steps"] for answer in one["answers"]] for name, one in by_name.items()}
    assert sorted(steps["torch-medusa-fp32"]) == sorted(steps["bundle static"])
    assert sum(steps["bundle static"]) < sum(steps["bundle plain"]) == sum(steps["transformers-fp32"])
    assert {pair["below"] for pair in result["ratios"]} == by_name.keys() - {"bundle static"}
    assert result["peer_versions"]["torch"] == torch.__version__


FAKE = """
def load(settings):
    asked = 0
    def decode(token_ids, max_new_tokens, emit):
        nonlocal asked
        asked += 1
        if asked > settings["patience"]:
            raise RuntimeError("enough")
        for token in range(max_new_tokens):
            emit([token])
    if settings["patience"] == 0:
        raise RuntimeError("not today")
    return decode
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peers that fail after a number of requests."""
    (tmp_path / "fake_peer.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = tuple(
        peers.Peer("fake", str(patience), (), "fake_peer", ("gguf",), {"patience": patience}) for patience in (0, 3, 99)
    )
    monkeypatch.setattr(peers, "PEERS", made)
    return


@pytest.mark.usefixtures("fakes")
def test_a_peer_that_fails_is_left_out_and_the_others_go_on(make_bundle: Make, tmp_path: Path) -> None:
    words = (make_bundle(), "--modes", "plain", "--limit", 4, "--max-new-tokens", 5, "--gguf", tmp_path, *NO_SECTIONS)
    result = measured(tmp_path / "out.json", *words, "--peers", "all")
    answered = {one["name"]: one["num_answers"] for one in result["contestants"]}
    assert answered == {"bundle plain": 4, "fake-3": 2, "fake-99": 4}  # one of three was for warming up
    assert result["failed"] == {"fake-0": "fake-0: RuntimeError: not today", "fake-3": "fake-3: RuntimeError: enough"}
    agreement = {one["name"]: one["agreement"]["num_equal"] for one in result["contestants"]}
    assert agreement["fake-99"] == 0

    named = run(*words, "--peers", "fake-0")
    fails(named, 1, "fake-0: RuntimeError: not today")


def test_interrupted_it_keeps_what_there_is(make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, asked = Contestant.generate, []

    def interrupted(self: Contestant, *arguments: Any) -> dict[str, Any]:
        asked.append(self.name)
        if len(asked) == 6:  # two to warm up, and in the middle of the second prompt
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(Contestant, "generate", interrupted)
    target = tmp_path / "out.json"
    result = run(make_bundle(), "--modes", "plain,tuned", "--max-new-tokens", 6, "--json", target, "--csv", tmp_path / "o.csv")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == f"Error: interrupted after 3 answers; the measurements so far are in {target}"
    assert "incomplete" in result.stdout
    kept = json.loads(target.read_text())
    assert kept["complete"] is False
    assert sorted(one["num_answers"] for one in kept["contestants"]) == [1, 2]
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_all_its_processes(make_bundle: Make, tmp_path: Path, number: int) -> None:
    target = tmp_path / "out.json"
    words = (str(make_bundle()), "--rounds", "1000000", "--max-new-tokens", "6", "--json", str(target))
    command = [sys.executable, "-m", "medusa_export", "bench", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as bench:
        assert bench.stderr is not None
        assert any("warm up" in line for line in bench.stderr)
        [child] = map(int, Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split())
        time.sleep(0.2)  # an answer or two, though it is right without any
        bench.send_signal(number)
        assert bench.wait(60) == 130
    assert not Path(f"/proc/{child}").exists()
    assert json.loads(target.read_text())["complete"] is False


def test_the_floor_counts_what_a_step_reads(make_bundle: Make, make_model: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model())
    weights = {name: tensor.numel() * 4 for name, tensor in model.state_dict().items()}
    read = sum(weights.values()) - weights["model.embed_tokens.weight"]
    counted = step_weight_bytes(make_bundle(), Manifest.load(make_bundle()))
    assert counted is not None
    assert read <= counted < 1.01 * read  # what the trace adds is small
    assert read_bandwidth(counted, 1) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modes", "fast"), "there is no mode 'fast'; use some of: plain, static, dynamic, tuned"),
        (("--peers", "vllm"), "there is no peer 'vllm'"),
        (
            ("--max-new-tokens", 250),
            "no prompt leaves room for 250 new tokens within the bundle's limit of 256; lower --max-new-tokens",
        ),
        (("--checkpoint", "gemma-3-270m"), "gemma-3-270m is not fetched yet; run: medusa-export fetch gemma-3-270m"),
        (("--gguf", "nowhere.gguf"), "--gguf nowhere.gguf: there is nothing there"),
        (("--json", "nowhere/out.json"), "nowhere/out.json cannot be written"),
        (("--steps", "0,3"), "'0,3': it must be whole numbers from 1 on, separated by commas, or none"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
    ],
)
def test_bad_options_are_one_line(
    make_bundle: Make, words: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path))
    fails(run(make_bundle(), *words), 1 if "fetched" in message else 2, message)


def test_bundles_must_be_of_one_model(make_bundle: Make, make_model: Make, tmp_path: Path) -> None:
    fails(run(make_bundle(), make_bundle()), 2, "a bundle is given twice")
    fails(run(make_model()), 1, "is not a bundle")
    other = tmp_path / "other"
    other.mkdir()
    manifest = Manifest.load(make_bundle())
    manifest.files["tokenizer.json"].sha256 = "0" * 64
    manifest.save(other)
    fails(run(make_bundle(), other), 2, "have different tokenizers; give bundles of one model")
