"""`medusa-export tune` and `tree show` as a user types them, and what opening a tuned bundle makes of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from medusa_export.cli import main
from medusa_export.measure.tune import run_tune
from medusa_heads.replay import Evaluation, TreeResult
from medusa_runtime import CandidateTree, DynamicTree, LearnedCosts, Manifest, MedusaLM
from medusa_runtime.bundle.cpu import device_key, num_cores
from medusa_runtime.bundle.manifest import Limits
from medusa_runtime.drafting.corrected import CorrectedCosts
from medusa_runtime.drafting.tuning import DeviceTuning, Tuning
from tests.support.clock import TuningClock

Make = Callable[..., Path]
FLAGS = {  # of `generate` where prompt lookup was found to pay, and whether it looks up
    (): True,
    ("--prompt-lookup",): True,
    ("--no-prompt-lookup",): False,
    ("--no-medusa",): False,
    ("--no-medusa", "--prompt-lookup"): True,
}
ROOT = Path(__file__).parents[2]
QUICK = ("--quick", "--max-nodes", 8, "--max-new-tokens", 16)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def fails(result: Result, exit_code: int, message: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last


@pytest.fixture(scope="module")
def tuned_bundle(make_bundle: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("tuned") / "bundle"
    shutil.copytree(make_bundle(), bundle)
    with pytest.MonkeyPatch.context() as patch:
        TuningClock().install(patch)
        result = run("tune", bundle, *QUICK, "--json", bundle.parent / "tuning.json")
    assert result.exit_code == 0, result.output
    (bundle.parent / "told.txt").write_text(result.stdout)
    return bundle


@pytest.fixture
def copy(tuned_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned_bundle, tmp_path / "bundle"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TuningClock:
    """Makes tuning independent of how fast this machine is."""
    found = TuningClock()
    found.install(monkeypatch)
    return found


def evaluation_for(bundle: Path, target: Path, heads: str | None = None) -> Path:
    tree = TreeResult(nodes=4, tokens_per_step=2.4, expected=2.4, tree={"parents": [-1, 0, 1, 2], "ranks": [0, 0, 0, 0]})
    facts = {"base_model": "", "data": "", "answers": 3, "tokens": 90}
    digest = heads or Manifest.load(bundle).heads.sha256
    accuracy = [[0.9, 0.05], [0.8, 0.1], [0.7, 0.1]]
    target.write_text(Evaluation(heads=digest, accuracy=accuracy, trees=[tree], **facts).model_dump_json())
    return target


def test_tuning_is_shown_and_kept(tuned_bundle: Path) -> None:
    told = (tuned_bundle.parent / "told.txt").read_text()
    assert told.startswith(f"{device_key('ort-cpu')}; acceptance from built-in prompts (16 answers, ")
    words = (
        "static",
        "dynamic",
        "ratio",
        "batch 1, ",
        "batch 4, ",
        "measured",
        "predicted",
        "machine: quiet",
        "prompt lookup: ",
    )
    for word in words:
        assert word in told
    found = Tuning.load(tuned_bundle).devices[device_key("ort-cpu")]
    assert found.costs.batch_sizes == [batch.batch_size for batch in found.batches] == [1, 4]
    assert (found.costs.widths, found.costs.capacities) == ([1, 2, 4, 8], [136])
    assert len(found.costs.host_seconds) == 2
    assert (found.measurement.rounds, found.measurement.is_quiet) == (3, True)
    assert "NOT AS PREDICTED" not in told
    for batch in found.batches:
        assert batch.check.measured_tokens_per_second > 0
        assert abs(batch.check.error) <= 0.15
        assert batch.as_predicted
        assert CandidateTree.from_json(batch.static.tree).num_nodes == batch.static.nodes <= 8
    lookup = found.lookup_check
    assert 1 <= lookup.prompts <= 8
    assert min(lookup.tokens_per_second, lookup.tokens_per_second_without) > 0
    assert found.prompt_lookup == (lookup.ratio >= 0.97)
    assert told.splitlines()[-1].startswith(f"prompt lookup: {'on' if found.prompt_lookup else 'off'}; measured ")
    assert json.loads((tuned_bundle.parent / "tuning.json").read_text())["costs"]["batch_sizes"] == [1, 4]
    assert found.provenance.command[:2] != []


def test_a_tuned_bundle_is_opened_with_what_was_tuned(copy: Path) -> None:
    found = Tuning.load(copy).devices[device_key("ort-cpu")]
    with MedusaLM.from_bundle(copy, max_batch_size=4) as lm:
        assert isinstance(lm.engine.costs, CorrectedCosts)
        assert (lm.engine.tree, lm.engine.costs.table) == found.choice(4, 16 * found.prompt_lookup)
        assert lm.engine.prompt_lookup == found.prompt_lookup
        tuned_answer = lm.generate("a fox", max_new_tokens=12).token_ids
    with MedusaLM.from_bundle(copy, tree=DynamicTree(5)) as lm:
        assert (lm.engine.tree, lm.engine.costs.table) == (DynamicTree(5), found.costs)
    with MedusaLM.from_bundle(copy, costs="learn") as lm:
        assert isinstance(lm.engine.costs, LearnedCosts)
        assert lm.engine.tree == DynamicTree(16)
        assert lm.generate("a fox", max_new_tokens=12).token_ids == tuned_answer
    with MedusaLM.from_bundle(copy, costs=None) as lm:
        assert (lm.engine.tree, lm.engine.costs) == (DynamicTree(16), None)


def with_lookup(bundle: Path, *, wanted: bool) -> DeviceTuning:
    """Say that prompt lookup pays here, or not, beside a small dynamic tree."""
    tuning, device = Tuning.load(bundle), device_key("ort-cpu")
    small = tuning.devices[device].batches[0]
    small = small.model_copy(update={"best": "dynamic", "dynamic": small.dynamic.model_copy(update={"nodes": 3})})
    found = tuning.devices[device].model_copy(update={"prompt_lookup": wanted, "batches": [small]})
    Tuning(bundle=tuning.bundle, devices={device: found}).save(bundle)
    return found


@pytest.mark.parametrize("wanted", [True, False])
def test_prompt_lookup_is_what_was_tuned_unless_the_caller_says(copy: Path, wanted: bool) -> None:
    with_lookup(copy, wanted=wanted)
    for said in (None, True, False):
        with MedusaLM.from_bundle(copy, prompt_lookup=said) as lm:
            is_on = wanted if said is None else said
            assert lm.engine.prompt_lookup == is_on
            assert lm.engine.tree == DynamicTree(16 if is_on else 3)
    with MedusaLM.from_bundle(copy, costs="learn") as lm:
        assert not lm.engine.prompt_lookup
    with MedusaLM.from_bundle(copy, tree=DynamicTree(5)) as lm:
        assert (lm.engine.tree, lm.engine.prompt_lookup) == (DynamicTree(5), wanted)


def test_a_tree_for_prompt_lookup_is_no_larger_than_the_bundle_takes(copy: Path) -> None:
    with_lookup(copy, wanted=True)
    manifest = Manifest.load(copy)
    manifest.limits = Limits(**manifest.limits.model_dump() | {"max_tree_nodes": 6})
    manifest.save(copy)
    tuning = Tuning.load(copy)
    Tuning(bundle=manifest.content_digest(), devices=tuning.devices).save(copy)
    with MedusaLM.from_bundle(copy) as lm:
        assert (lm.engine.tree, lm.engine.prompt_lookup) == (DynamicTree(6), True)


def test_the_command_line_overrides_a_tuning(copy: Path) -> None:
    tuned = with_lookup(copy, wanted=True)
    cheap = dataclasses.replace(
        tuned.costs,
        step_seconds=[[[0.01 + width / 1e6 for width in tuned.costs.widths] for _ in tuned.costs.batch_sizes]],
        host_seconds=[],
    )
    tuning = Tuning.load(copy)
    Tuning(bundle=tuning.bundle, devices={device_key("ort-cpu"): tuned.model_copy(update={"costs": cheap})}).save(copy)
    words = ["generate", copy, "-p", "fox fox fox", "--max-new-tokens", 40, "--ignore-eos", "--json"]
    words += ["--logit-bias", "60=9", "--logit-bias", "61=9"]  # so that it repeats itself
    found = {flags: json.loads(run(*words, *flags).stdout) for flags in FLAGS}
    assert {flags: answer["stats"]["num_looked_up_tokens"] > 0 for flags, answer in found.items()} == FLAGS
    assert len({tuple(answer["token_ids"]) for answer in found.values()}) == 1


def test_what_does_not_fit_is_told_once_and_learned_instead(copy: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("medusa_runtime")
    log.addHandler(handler)
    try:
        for change in ("another device", "other files", "damage"):
            if change == "other files":
                data = json.loads((copy / "tuning.json").read_text())
                (copy / "tuning.json").write_text(json.dumps(data | {"bundle": "0" * 64}))
            if change == "damage":
                (copy / "tuning.json").write_text("{")
            with MedusaLM.from_bundle(copy, num_threads=num_cores() + 1 if change == "another device" else 0) as lm:
                assert isinstance(lm.engine.costs, LearnedCosts)
                assert lm.generate("a fox", max_new_tokens=4).token_ids
    finally:
        log.removeHandler(handler)
    assert len(lines) == 3
    assert f"{num_cores() + 1} threads" in lines[0]
    assert "of other files" in lines[1]
    assert "damaged" in lines[2]
    assert all(f"medusa-export tune {copy}" in line for line in lines)


@pytest.mark.parametrize(("factor", "error"), [(2.0, "-50%"), (0.4, "+150%")])
def test_a_tuning_that_does_not_hold_is_not_kept(
    copy: Path, clock: TuningClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float, error: str
) -> None:
    """Another program begins or ends after the costs were measured. So decoding is slower or faster than predicted."""
    _change(monkeypatch, clock, lambda _: (1.0, factor))
    before = (copy / "tuning.json").read_bytes()
    words = (*QUICK, "--max-new-tokens", 32, "--batch-sizes", 1)
    result = run("tune", copy, *words, "--json", tmp_path / "found.json")
    assert result.exit_code == 3
    assert "NOT AS PREDICTED" in result.stdout
    assert error in result.stdout
    assert f"predicted at batch size 1 ({error}); the costs are measured once more" in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert f"at batch size 1 ({error})" in line
    assert f"{copy / 'tuning.json'} stays as it was" in line
    assert (copy / "tuning.json").read_bytes() == before
    assert not json.loads((tmp_path / "found.json").read_text())["batches"][0]["as_predicted"]

    (copy / "tuning.json").unlink()
    assert run("tune", copy, *words).exit_code == 3
    assert not (copy / "tuning.json").exists()


def _change(monkeypatch: pytest.MonkeyPatch, clock: TuningClock, factors: Callable[[int], tuple[float, float]]) -> None:
    """Steps take so many times as long while the costs are measured for the n-th time, and after that."""
    whole, times = run_tune.measure_grid, itertools.count(1)

    def measure(*args: Any, **options: Any) -> Any:
        clock.factor, after = factors(next(times))
        found = whole(*args, **options)
        clock.factor = after
        return found

    monkeypatch.setattr(run_tune, "measure_grid", measure)


@pytest.mark.parametrize("factor", [2.0, 0.4])
def test_costs_of_a_machine_that_has_changed_are_measured_again(
    copy: Path, clock: TuningClock, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Another program begins or ends after the costs were measured, and nothing changes after that."""
    _change(monkeypatch, clock, lambda time: (1.0 if time == 1 else factor, factor))
    (copy / "tuning.json").unlink()
    result = run("tune", copy, *QUICK, "--max-new-tokens", 32, "--batch-sizes", 1)
    assert result.exit_code == 0, result.output
    assert "the costs are measured once more" in result.stderr
    [device] = json.loads((copy / "tuning.json").read_text())["devices"].values()
    assert device["batches"][0]["as_predicted"]


def test_a_noisy_machine_is_measured_for_longer_and_said_to_be_busy(copy: Path, clock: TuningClock, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    advance = clock.advance
    clock.advance = lambda seconds: advance(seconds * (1.0 + 2.0 * rng.random()))  # steps take up to three times as long
    result = run("tune", copy, *QUICK, "--batch-sizes", 1, "--max-seconds", 4, "--json", tmp_path / "found.json")
    assert "machine: BUSY; steps took " in result.stdout
    measurement = json.loads((tmp_path / "found.json").read_text())["measurement"]
    assert measurement["rounds"] > 3
    assert measurement["noise"] > 0.15
    assert not measurement["is_quiet"]


@pytest.mark.usefixtures("clock")
def test_accuracy_comes_from_an_evaluation_where_there_is_one(copy: Path, tmp_path: Path) -> None:
    before, other = Tuning.load(copy), num_cores() + 1  # another number of threads is another device
    evaluation = evaluation_for(copy, tmp_path / "evaluation.json")
    for words in (("--evaluation", evaluation), ("--heads", tmp_path)):
        result = run("tune", copy, *QUICK, *words, "--threads", other)
        assert result.exit_code == 0, result.output
        assert "the heads' evaluation (3 answers, 90 tokens)" in result.stdout
    after = Tuning.load(copy)
    assert after.devices[device_key("ort-cpu")] == before.devices[device_key("ort-cpu")]
    found = after.devices[device_key("ort-cpu", num_threads=other)]
    assert found.accuracy[0] == [0.9, 0.05]


def test_tuning_needs_no_torch(copy: Path) -> None:
    """It is done where the bundle will run."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "onnx", "onnx_ir", "safetensors")))
import pytest
from medusa_export.cli import main
from tests.support.clock import TuningClock
TuningClock().install(pytest.MonkeyPatch())
main(["tune", {str(copy)!r}, "--quick", "--max-nodes", "4", "--batch-sizes", "1"], standalone_mode=False)
main(["tree", "show", {str(copy)!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "batch 1, " in done.stdout
    assert "root: " in done.stdout


@pytest.mark.usefixtures("clock")
def test_prompts_of_ones_own_are_decoded(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "the dog"}\n')
    result = run("tune", copy, *QUICK, "--prompts", tmp_path / "mine.jsonl", "--batch-sizes", "3")
    assert result.exit_code == 0, result.output
    assert "mine.jsonl (2 answers, " in result.stdout
    assert [batch.batch_size for batch in Tuning.load(copy).devices[device_key("ort-cpu")].batches] == [3]


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (("--batch-sizes", "1,x"), 2, "--batch-sizes is '1,x'; it must be numbers"),
        (("--batch-sizes", "0"), 2, "--batch-sizes is '0'"),
        (("--lengths", "-4"), 2, "--lengths is '-4'"),
        (("--prompts", "nowhere.txt"), 2, "nowhere.txt cannot be read"),
        (("--evaluation", "nowhere.json"), 1, "nowhere.json is not an evaluation of heads"),
        (("--evaluation", "a", "--heads", "b"), 2, "exclude each other"),
        (("--json", "nowhere/x.json"), 2, "there is no directory nowhere"),
        (("--max-nodes", 1), 2, "--max-nodes"),
        (("--max-noise", -1), 2, "--max-noise"),
        (("--max-noise", "nan"), 2, "--max-noise is nan; it must be a finite number"),
        (("--max-seconds", "inf"), 2, "--max-seconds is inf; it must be a finite number"),
    ],
)
def test_bad_input_is_refused_before_any_work(make_bundle: Make, words, exit_code, message) -> None:
    result = run("tune", make_bundle(), *words)
    assert result.exit_code == exit_code
    assert message in result.stderr.splitlines()[-1] or exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (make_bundle() / "tuning.json").exists()


def test_what_cannot_be_tuned_is_refused_in_a_line(make_bundle: Make, copy: Path, tmp_path: Path) -> None:
    fails(run("tune", tmp_path), 1, "is not a bundle")
    other = evaluation_for(copy, tmp_path / "other.json", heads="f" * 64)
    fails(run("tune", copy, "--evaluation", other), 1, "belongs to other heads (ffffffffffff…)")
    manifest = Manifest.load(copy)
    manifest.limits.max_batch_size = 2
    manifest.save(copy)
    fails(run("tune", copy, "--batch-sizes", "1,4"), 1, "--batch-sizes has 4, but the bundle's largest batch is 2")
    manifest.validation.status = "failed"
    manifest.save(copy)
    fails(run("tune", copy), 1, "failed its validation")
    (copy / "weights.bin").write_bytes(b"")
    manifest.validation.status = "passed"
    manifest.save(copy)
    fails(run("tune", copy), 1, "does not match its manifest")


def test_tree_show_draws_the_tuned_tree_or_the_bundles_own(make_bundle: Make, copy: Path, tmp_path: Path) -> None:
    found = Tuning.load(copy).devices[device_key("ort-cpu")]
    drawn = run("tree", "show", copy, "--batch-size", 4).stdout
    assert "the best static tree for batch size 4 on this device" in drawn
    assert f"root: {found.batch(4).static.nodes} nodes" in drawn
    own = run("tree", "show", make_bundle()).stdout
    assert "not tuned for this device" in own
    assert own.count("unknown") == 15
    assert "expected" not in own
    evaluation = evaluation_for(copy, tmp_path / "evaluation.json")
    judged = run("tree", "show", make_bundle(), "--evaluation", evaluation).stdout
    assert "0.0  0.720" in judged
    assert "tokens per step expected: " in judged
    facts = json.loads(run("tree", "show", make_bundle(), "--evaluation", evaluation, "--json").stdout)
    assert len(facts["parents"]) == len(facts["acceptance"]) == 16
    assert f"tokens per step expected: {facts['tokens_per_step']:.2f}" in judged


def test_json_goes_to_stdout_in_place_of_the_table(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = Tuning.load(copy)
    assert tuning is not None
    [(device, found)] = tuning.devices.items()
    monkeypatch.setattr("medusa_export.measure.tune.run_tune.tune", lambda _: (device, found))
    result = run("tune", copy, "--json", "-")
    assert DeviceTuning.model_validate_json(result.stdout) == found


def test_tree_show_draws_files_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text("[[0], [0, 3], [1]]")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        result = run("tree", "show", tmp_path / "tree.json", "--plot", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).read_bytes().startswith(start)
    assert [line.strip("│├└─ ") for line in result.stdout.splitlines()[1:]] == [
        "root: 4 nodes, 2 deep",
        "0  unknown",
        "0.3  unknown",
        "1  unknown",
    ]
    fails(run("tree", "show", tmp_path / "tree.json", "--plot", tmp_path / "a.gif"), 2, "must end in .png or .svg")
    fails(run("tree", "show", tmp_path / "tree.json", "--plot", tmp_path / "no" / "a.png"), 2, "there is no directory")
    fails(run("tree", "show", tmp_path / "none.json"), 2, "cannot read the tree")
