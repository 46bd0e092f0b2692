"""`medusa-export train` as a user types it, on tiny random models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from medusa_export.cli import main
from medusa_export.model.checkpoint import load_backbone
from medusa_export.model.tokenizer import load_tokenizer
from medusa_heads.formats import load_heads
from medusa_heads.replay import Evaluation
from medusa_heads.tokens import CheckpointCodec
from medusa_heads.train import fit as loop
from medusa_heads.train.checkpoints import WorkDirectory
from medusa_heads.train.examples import Example, read_examples, split
from medusa_heads.train.fit import Stage, fit
from medusa_heads.train.hidden import backbone_digest, cached_hidden_states, response_states
from medusa_heads.train.objective import Losses
from medusa_heads.train.run import Listener, Source, TrainResult, train
from medusa_heads.train.settings import TrainSettings
from tests.support.cli import fails
from tests.support.gguf_file import write_gguf
from tests.support.models import tokenizer

Make = Callable[..., Path]
ANSWER = "the quick brown fox jumps over the lazy dog while a small model learns to speak"
EXACT = ("--mixed-precision", "no", "--backbone-dtype", "fp32", "--threads", 1)
SHORT = (
    *EXACT,
    "--soft-targets",
    0,
    "--max-length",
    128,
    "--batch-tokens",
    64,
    "--held-out",
    0.25,
    "--epochs",
    3,
    "--num-heads",
    2,
)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Restore accelerate's state and PyTorch's number of threads after each test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The same answer to many questions, which heads can learn by heart."""
    return write_data(tmp_path / "data.jsonl")


def write_data(path: Path, num_rows: int = 12, question: str = "say") -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{n} {question}"}, {"role": "assistant", "content": ANSWER}]}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: object) -> Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    return CliRunner().invoke(main, ["train", *(str(word) for word in words)])


def works(result: Result) -> None:
    assert result.exit_code == 0, result.output


def entries(path: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """A run's log without the fields that differ from run to run."""
    found = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return found if timed else [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in found]


def losses(path: Path, stage: str = "heads") -> list[float]:
    return [entry["loss"] for entry in entries(path) if entry["stage"] == stage and "loss" in entry]


def stop_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Interrupt the next run when it reports a step."""
    news = loop.News

    def telling(*values: Any) -> Any:
        if values[:2] == (stage, step):
            monkeypatch.setattr(loop, "News", news)
            raise KeyboardInterrupt
        return news(*values)

    monkeypatch.setattr(loop, "News", telling)


# --- Medusa-1


def test_heads_learn_and_say_how_they_were_made(make_model: Make, data: Path, tmp_path: Path) -> None:
    write_data(data, 60, 4 * ANSWER)  # so that the numbers before hardly matter
    words = (make_model(), "--data", data, *SHORT, "--log-every", 1)
    works(run(*words, "-o", tmp_path / "start", "--max-steps", 1, "--learning-rate", 1e-9))
    start = Evaluation.model_validate_json((tmp_path / "start" / "evaluation.json").read_text())
    result = run(*words, "-o", tmp_path / "heads", "--epochs", 20, "--learning-rate", 0.01, "--plot")
    works(result)
    assert result.stdout == f"{tmp_path / 'heads'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "heads", "start"]  # no work directory is left

    log = entries(tmp_path / "heads", timed=True)
    told = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in told] == list(range(1, len(told) + 1))
    assert told[-1]["loss"] < 0.2 * told[0]["loss"]
    assert all(len(entry["head_losses"]) == 2 for entry in told)
    assert told[-1]["tokens"] == 64 * len(told)
    held_out = [entry["held_out_top1"] for entry in log if "held_out_top1" in entry]
    assert len(held_out) == 20
    assert max(start.top(0, 1), start.top(1, 1)) < 0.2
    assert min(held_out[-1]) > 0.7

    found = Evaluation.model_validate_json((tmp_path / "heads" / "evaluation.json").read_text())
    heads = load_heads(tmp_path / "heads")
    assert found.heads == heads.digest()
    assert heads.heads[0].blocks[0].linear.weight.dtype == torch.float16
    assert (heads.config.num_heads, heads.config.base_model) == (2, make_model().name)
    assert min(found.top(0, 1), found.top(1, 1)) > 0.7
    assert max(tree.tokens_per_step for tree in found.trees) > 2.5
    facts = json.loads((tmp_path / "heads" / "run.json").read_text())
    assert facts["backbone_unchanged"] is True
    assert facts["answers"]["training"] + facts["answers"]["held_out"] == 60
    assert facts["tokens"]["held_out"] == found.tokens
    assert facts["settings"]["learning_rate"] == 0.01
    assert (tmp_path / "heads" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("method", ["medusa-1", "medusa-2"])
def test_training_in_bf16_goes_as_in_fp32(method: str, make_model: Make, data: Path, tmp_path: Path) -> None:
    words = (make_model(), "--data", data, *SHORT, "--log-every", 1, "--method", method, "--learning-rate", 0.003)
    works(run(*words, "-o", tmp_path / "fp32"))
    own = ("--backbone-dtype", "bf16") if method == "medusa-1" else ()  # a backbone that learns is in fp32
    works(run(*words, "-o", tmp_path / "bf16", "--mixed-precision", "bf16", *own, "--plot"))
    for stage in {entry["stage"] for entry in entries(tmp_path / "fp32")}:
        assert losses(tmp_path / "bf16", stage) == pytest.approx(losses(tmp_path / "fp32", stage), rel=0.05)
    assert json.loads((tmp_path / "bf16" / "run.json").read_text())["mixed_precision"] == "bf16"
    assert (tmp_path / "bf16" / "curves.png").stat().st_size > 10_000


def prepared(make_model: Make, data: Path, **settings: Any) -> tuple[Source, list[Example], TrainSettings]:
    model = str(make_model())
    examples = read_examples([data], CheckpointCodec(load_tokenizer(model)), max_length=128)
    source = Source("tiny", load_backbone(model, attention="sdpa").model, lambda: load_backbone(model, attention="sdpa").model)
    sizes = {"batch_tokens": 64, "held_out": 0.25, "num_heads": 2, "learning_rate": 0.01}
    return source, examples, TrainSettings(**(sizes | settings))


def trained(source: Source, examples: list[Example], settings: TrainSettings, work: Path) -> TrainResult:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=settings.gradient_accumulation)
    result = train(source, examples, settings, work, work / "hidden", accelerator, Listener())
    assert result is not None
    return result


def test_medusa_1_leaves_the_backbone_bit_for_bit(make_model: Make, data: Path, tmp_path: Path) -> None:
    source, examples, settings = prepared(make_model, data)
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    result = trained(source, examples, settings, tmp_path / "work")
    after = source.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.facts["backbone_sha256"] == backbone_digest(source.model)
    assert any(parameter.abs().max() > 0 for parameter in result.heads.parameters())
    assert all(parameter.grad is None for parameter in source.model.parameters())


def test_own_lm_heads_start_from_the_models(make_model: Make, data: Path, tmp_path: Path) -> None:
    words = (
        *SHORT,
        "--own-lm-head",
        "--learning-rate",
        1e-9,
        "--max-steps",
        1,
        "--heads-dtype",
        "fp32",
        "--min-token-count",
        1,
    )
    works(run(make_model(), "--data", data, "-o", tmp_path / "heads", *words))
    heads = load_heads(tmp_path / "heads")
    output = load_backbone(str(make_model())).model.get_output_embeddings()
    torch.testing.assert_close(heads.heads[1].lm_head.weight, output.weight, atol=1e-6, rtol=0)


def test_heads_can_be_trained_on(make_model: Make, make_heads: Make, data: Path, tmp_path: Path) -> None:
    given = make_heads(num_heads=2, num_layers=1)
    words = (*SHORT, "--start-from", given, "--heads-dtype", "fp32")
    works(run(make_model(), "--data", data, "-o", tmp_path / "heads", *words, "--learning-rate", 1e-9, "--max-steps", 1))
    for name, tensor in load_heads(tmp_path / "heads").state_dict().items():
        torch.testing.assert_close(tensor, load_heads(given).state_dict()[name], atol=1e-6, rtol=0)
    assert load_heads(tmp_path / "heads").config.base_model == make_model().name
    other = run(make_model(), "--data", data, "-o", tmp_path / "other", *words, "--num-heads", 3)
    fails(other, 1, f"the heads in {given} have num_heads 2, but this run needs 3")


# --- hidden states


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "cohere2"])
def test_hidden_states_equal_a_plain_forward_pass(model_type: str, make_model: Make, tmp_path: Path) -> None:
    model = load_backbone(str(make_model(model_type)), attention="sdpa").model
    generator = np.random.default_rng(0)
    examples = [
        Example(
            str(n), tuple(generator.integers(6, 300, n + 1).tolist()), tuple(generator.integers(6, 300, 3 * n + 1).tolist())
        )
        for n in range(7)
    ]
    states = cached_hidden_states(model, examples, tmp_path / "hidden", identity="x")
    for example, start in zip(examples, states.starts, strict=True):
        ids = torch.tensor([[*example.prompt_ids, *example.response_ids]])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        rows = slice(start, start + len(example.response_ids))
        wanted = output.hidden_states[-1][0, len(example.prompt_ids) - 1 : -1]
        np.testing.assert_allclose(states.rows[rows], wanted.numpy(), atol=2e-3, rtol=2e-3)  # float16
        assert states.next_ids[rows].tolist() == list(example.response_ids)


def test_hidden_states_are_computed_once(make_model: Make, data: Path, tmp_path: Path, monkeypatch) -> None:
    source, examples, _ = prepared(make_model, data)
    calls: list[list[Example]] = []
    monkeypatch.setattr("medusa_heads.train.hidden.FORWARD_TOKENS", 100)
    monkeypatch.setattr(
        "medusa_heads.train.hidden.response_states",
        lambda model, group: calls.append(list(group)) or response_states(model, group),
    )

    def stop(done: int) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_hidden_states(source.model, examples, tmp_path / "a", identity="x", tell=stop)
    told: list[int] = []
    states = cached_hidden_states(source.model, examples, tmp_path / "a", identity="x", tell=told.append)
    assert sorted(example.key for group in calls for example in group) == sorted(example.key for example in examples)
    assert told[0] > 0
    assert told == sorted(told)
    assert told[-1] == len(states.next_ids)

    calls.clear()
    again = cached_hidden_states(source.model, examples, tmp_path / "a", identity="x")
    assert calls == []
    assert (again.rows == states.rows).all()
    cached_hidden_states(source.model, examples, tmp_path / "b", identity="x", rank=0, world=2)
    assert np.load(tmp_path / "b" / "done.npy").tolist() == [place % 2 == 0 for place in range(len(examples))]
    shared = cached_hidden_states(source.model, examples, tmp_path / "b", identity="x", rank=1, world=2)
    np.testing.assert_allclose(shared.rows, states.rows, atol=2e-3, rtol=2e-3)
    calls.clear()
    cached_hidden_states(source.model, examples, tmp_path / "a", identity="another")
    assert calls  # another backbone's rows are no use


# --- going on


@pytest.mark.parametrize(
    ("stage", "step", "words"),
    [
        ("heads", 5, ()),
        ("heads", 5, ("--method", "medusa-2", "--heads-first", 3)),
        ("joint", 2, ("--method", "medusa-2", "--lora-dropout", 0.2)),
        ("joint", 5, ("--method", "medusa-2", "--lora-dropout", 0.2)),
        ("joint", 5, ("--method", "medusa-2", "--backbone", "full")),
    ],
)
def test_a_stopped_run_goes_on_exactly(stage, step, words, make_model: Make, data: Path, tmp_path: Path, monkeypatch) -> None:
    words = (make_model(), "--data", data, *SHORT, "--log-every", 2, "--checkpoint-every", 3, *words)
    works(run(*words, "-o", tmp_path / "whole"))
    stop_at(monkeypatch, stage, step)
    assert run(*words, "-o", tmp_path / "stopped").exit_code == 1
    assert not (tmp_path / "stopped").exists()
    works(run(*words, "-o", tmp_path / "stopped"))
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(files) == (2 if "medusa-2" in words else 1)
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()
    assert entries(tmp_path / "whole") == entries(tmp_path / "stopped")
    assert (tmp_path / "whole" / "evaluation.json").read_text() == (tmp_path / "stopped" / "evaluation.json").read_text()


def test_a_finished_stage_is_not_done_again(make_model: Make, data: Path, tmp_path: Path, monkeypatch) -> None:
    words = (make_model(), "--data", data, "-o", tmp_path / "heads", *SHORT, "--method", "medusa-2")
    stop_at(monkeypatch, "joint", 1)
    assert run(*words).exit_code == 1
    stop_at(monkeypatch, "heads", 1)  # is never told of
    works(run(*words))


def test_other_settings_are_refused(make_model: Make, data: Path, tmp_path: Path) -> None:
    words = (make_model(), "--data", data, "-o", tmp_path / "heads", "--work", tmp_path / "work", *SHORT, "--max-steps", 1)
    works(run(*words))
    assert (tmp_path / "work" / "checkpoint").is_dir()
    fails(run(*words, "--force", "--seed", 3, "--warmup", 0.5), 2, "other settings (warmup was 0.02, is 0.5; seed was 0, is 3)")
    fails(run(*words), 2, "exists; choose another output, or replace it with --force")
    works(run(*words, "--force", "--heads-dtype", "fp32", "--log-every", 7))  # which decide nothing of the run
    data.write_text(data.read_text().replace("3 say", "three say"))
    fails(run(*words, "--force"), 2, "other settings (data was ")


def test_other_heads_under_the_same_path_are_refused(make_model: Make, data: Path, tmp_path: Path) -> None:
    begun = (make_model(), "--data", data, "-o", tmp_path / "begun", *SHORT, "--max-steps", 1)
    works(run(*begun))
    words = (make_model(), "--data", data, "-o", tmp_path / "heads", "--work", tmp_path / "work", *SHORT, "--max-steps", 1)
    words = (*words, "--start-from", tmp_path / "begun")
    works(run(*words))
    works(run(*begun, "--seed", 5, "--force"))
    fails(run(*words, "--force"), 2, "other settings (start_from_sha256 was ")


def test_accumulated_batches_equal_one_of_their_size(tmp_path: Path) -> None:
    inputs, wanted = torch.randn(16, 3), torch.randn(16, 1)

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Losses:
            loss = ((self.linear(x) - y) ** 2).mean()
            return Losses(loss, loss.detach()[None])

    results = []
    uneven = [np.array(part) for part in ([0], [1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15])]
    for size, accumulation, parts in ((8, 1, None), (4, 2, None), (2, 4, None), (3, 2, uneven)):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        objective = Objective()
        stage = Stage(
            name="toy",
            objective=objective,
            groups=[{"params": list(objective.parameters()), "lr": 0.1}],
            epochs=2,
            batches=lambda epoch, size=size, parts=parts: parts or np.arange(16).reshape(-1, size),
            load=lambda batch, *_: ((inputs[batch], wanted[batch]), len(batch)),
        )
        work = WorkDirectory(tmp_path / str(size), {}, accelerator)
        settings = TrainSettings(gradient_accumulation=accumulation, log_every=1, max_grad_norm=0.5)
        fit(stage, accelerator, work, settings, lambda _: None)
        results.append((objective.linear.weight.detach().clone(), [entry["loss"] for entry in work.entries()]))
        assert [entry["tokens"] for entry in work.entries()] == [8, 16, 24, 32]
    for weight, told in results[1:]:
        torch.testing.assert_close(weight, results[0][0])
        assert told == pytest.approx(results[0][1], abs=1e-5)


def test_an_epoch_may_make_fewer_batches_than_the_first(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    objective = torch.nn.Linear(1, 1)
    taken: list[int] = []

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = objective

        def forward(self, x: torch.Tensor) -> Losses:
            loss = self.linear(x).mean()
            return Losses(loss, loss.detach()[None])

    def load(batch: Any, step: int, num_steps: int) -> tuple[tuple[Any, ...], int]:
        taken.append(int(batch[0]))
        return (torch.ones(1, 1),), 1

    stage = Stage(
        name="toy",
        objective=Objective(),
        groups=[{"params": list(objective.parameters()), "lr": 0.1}],
        epochs=2,
        batches=lambda epoch: [np.array([place]) for place in range(3 - epoch)],
        load=load,
    )
    fit(stage, accelerator, WorkDirectory(tmp_path / "work", {}, accelerator), TrainSettings(), lambda _: None)
    assert taken == [0, 1, 2, 0, 1, 0]


# --- what goes wrong


def test_a_loss_that_is_no_number_stops_the_run(make_model: Make, data: Path, tmp_path: Path) -> None:
    words = (make_model(), "--data", data, "-o", tmp_path / "heads", "--hidden", tmp_path / "hidden", *SHORT)
    words = (*words, "--work", tmp_path / "work", "--checkpoint-every", 1)
    works(run(*words))
    rows = np.load(tmp_path / "hidden" / "train" / "hidden.npy")
    good, rows[len(rows) // 2] = rows.copy(), np.nan
    np.save(tmp_path / "hidden" / "train" / "hidden.npy", rows)
    shutil.rmtree(tmp_path / "work")
    failed = run(*words, "--force")
    fails(failed, 1, "the loss is nan at step ")
    step = int(failed.stderr.split("nan at step ")[1].split()[0])
    assert "with a lower --learning-rate" in failed.stderr
    assert step > 1  # else there would be no checkpoint to keep
    assert f"the checkpoint after step {step - 1} of heads is kept in {tmp_path / 'work'}" in failed.stderr
    assert json.loads((tmp_path / "work" / "checkpoint" / "place.json").read_text())["step"] == step - 1
    assert load_heads(tmp_path / "heads").config.num_heads == 2  # the heads before are still there
    np.save(tmp_path / "hidden" / "train" / "hidden.npy", good)
    works(run(*words, "--force"))  # and it can go on


def test_a_rate_that_is_too_high_stops_the_run(make_model: Make, data: Path, tmp_path: Path) -> None:
    words = (make_model(), "--data", data, "-o", tmp_path / "heads", *SHORT)
    fails(run(*words, "--learning-rate", 1e37), 1, "there is no checkpoint yet. Start again with a lower --learning-rate")
    shutil.rmtree(tmp_path / "heads.work")
    fails(run(*words, "--learning-rate", 1e6), 1, "the heads' weights overflow in fp16; use another --heads-dtype")
    assert not (tmp_path / "heads").exists()


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (
            ("{model}", "--data", "/nowhere.jsonl"),
            2,
            "there is no data at /nowhere.jsonl; make some with: medusa-export distill",
        ),
        (("{model}", "--data", "{empty}"), 2, "no answers to learn from in"),
        (("{model}", "--data", "{bad}"), 2, "bad.jsonl, row 2 is not JSON"),
        (("/nowhere", "--data", "{data}"), 1, "'/nowhere'"),
        (("{model}", "--data", "{data}", "--start-from", "/nowhere"), 1, "there are no heads at /nowhere"),
        (("{model}", "--data", "{data}", "--held-out", 0.999999), 2, "all conversations are held out; lower --held-out"),
        (("{model}", "--data", "{data}", "--max-length", 4096), 2, "is 4096, but the model takes at most 256 tokens; lower it"),
        (("{model}", "--data", "{data}", "--min-token-count", 9999), 2, "no token occurs 9999 times in the data"),
        (("{model}", "--data", "{data}", "--gradient-accumulation", 99), 2, "a step needs 99; lower --batch-tokens"),
        (("{model}", "--data", "{data}", "--mixed-precision", "fp16"), 2, "--mixed-precision fp16 needs a GPU"),
        (("{model}", "--data", "{data}", "--device", "cuda:7"), 2, "--device cuda:7: this machine has no such device"),
        (("{model}", "--data", "{data}", "--load-in-4bit", "--method", "medusa-2"), 2, "--load-in-4bit is only for medusa-1"),
        (("{model}", "--data", "{data}", "--lora-rank", 8), 2, "--lora-rank has no effect with these settings"),
        (
            ("{model}", "--data", "{data}", "--method", "medusa-2", "--backbone-dtype", "bf16"),
            2,
            "backbone-dtype has no effect",
        ),
        (("{model}", "--data", "{data}", "--backbone", "full", "--save-backbone", "adapter"), 2, "needs --backbone lora"),
        (("{model}", "--data", "{data}", "--epochs", 0), 2, "Invalid value for '--epochs'"),
        (("{model}", "--data", "{data}", "--method", "medusa-3"), 2, "Invalid value for '--method'"),
        (("{model}",), 2, "Missing option '--data'"),
    ],
)
def test_bad_input_gets_one_line(words, exit_code, message, make_model: Make, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text(data.read_text().splitlines()[0] + "\n{\n")
    places = {"model": make_model(), "data": data, "empty": tmp_path / "empty.jsonl", "bad": tmp_path / "bad.jsonl"}
    words = [str(word).format(**places) for word in words]
    settings = SHORT if "--max-length" not in words else EXACT
    fails(run(words[0], "-o", tmp_path / "heads", *settings, *words[1:]), exit_code, message)
    assert not (tmp_path / "heads").exists()


def test_data_of_another_tokenizer_is_refused(make_model: Make, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER}]}
    ids = tokenizer()(ANSWER, add_special_tokens=False).input_ids[::-1]
    (tmp_path / "data.jsonl").write_text(json.dumps(row | {"response_token_ids": ids}) + "\n")
    result = run(make_model(), "--data", tmp_path / "data.jsonl", "-o", tmp_path / "heads", *SHORT)
    fails(result, 2, "row 1: the token ids do not decode to the answer, so another tokenizer made them")


# --- Medusa-2


@pytest.mark.parametrize(("backbone", "saved"), [("lora", "merged"), ("lora", "adapter"), ("full", "merged")])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_was_trained(backbone, saved, tied, make_model: Make, data: Path, tmp_path: Path) -> None:
    def make() -> Path:
        return make_model("llama", tie_word_embeddings=tied)

    source, examples, settings = prepared(make, data, method="medusa-2", backbone=backbone, epochs=2, held_out=0.25)
    result = trained(source, examples, settings, tmp_path / "work")
    joint = result.joint
    assert joint is not None
    held_out = split(examples, 0.25)[1]
    original = response_states(source.reload(), held_out)
    live = response_states(source.model, held_out)  # the very module that learned
    now = response_states(joint.model, held_out)
    torch.testing.assert_close(now, live, atol=1e-4, rtol=1e-4)
    assert max((a - b).abs().max() for a, b in zip(now, original, strict=True)) > 1e-2
    joint.save(tmp_path / "saved", saved, str(make()))
    loaded = load_backbone(str(tmp_path / "saved"))
    torch.testing.assert_close(response_states(loaded.model, held_out), now, atol=1e-4, rtol=1e-4)
    assert loaded.has_tied_embeddings == tied
    assert result.facts["perplexity"]["original"] != result.facts["perplexity"]["trained"]
    assert result.facts["backbone_unchanged"] is False


@pytest.mark.parametrize("saved", ["merged", "adapter"])
def test_medusa_2_makes_a_model_that_exports(saved, make_model: Make, data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(make_model().parent)  # the model by a name that holds only here
    words = ("--method", "medusa-2", "--save-backbone", saved, "--log-every", 1)
    works(run(make_model().name, "--data", data, "-o", tmp_path / "heads", *SHORT, *words))
    monkeypatch.chdir(tmp_path)
    joint = losses(tmp_path / "heads", "joint")
    assert joint[-1] < joint[0]
    assert all("backbone_loss" in entry for entry in entries(tmp_path / "heads") if entry["stage"] == "joint")
    if saved == "adapter":
        config = json.loads((tmp_path / "heads" / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(make_model().resolve())
        assert set(load_file(tmp_path / "heads" / "adapter" / "adapter_model.safetensors"))
    exporting = ["onnx", f"heads/{saved}", "--heads", "heads", "-o", "bundle"]
    exported = CliRunner().invoke(main, exporting)
    assert exported.exit_code == 0, exported.output
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["validation"]["status"] == "passed"
    works(run(make_model(), "--data", data, "-o", "heads", *SHORT, "--force"))  # such heads may be replaced


@pytest.mark.parametrize("saved", ["merged", "adapter"])
def test_the_model_may_be_a_gguf_file(saved, make_model: Make, data: Path, tmp_path: Path, monkeypatch) -> None:
    place = write_gguf(make_model(), tmp_path / "gguf" / "tiny.gguf")
    (tmp_path / "gguf" / "other.gguf").touch()  # so that the directory alone would not say which
    monkeypatch.chdir(tmp_path)
    words = ("--method", "medusa-2", "--save-backbone", saved, "--epochs", 1)
    works(run("gguf/tiny.gguf", "--data", data, "-o", "heads", *SHORT, *words))
    monkeypatch.chdir("/")
    output = str(tmp_path / "heads" / saved)
    examples = read_examples([data], CheckpointCodec(load_tokenizer(output)), max_length=128)[:2]
    [learned, *_], [original, *_] = (response_states(load_backbone(source).model, examples) for source in (output, str(place)))
    assert (learned - original).abs().max() > 1e-3
    assert (learned - original).abs().mean() < original.abs().mean()
    if saved == "adapter":
        config = json.loads((tmp_path / "heads" / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(place.resolve())
