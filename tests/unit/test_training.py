"""The parts of training, each tested on its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - as everybody names it
from transformers import AutoModelForCausalLM

from medusa_heads.config import HeadsConfig
from medusa_heads.distill.store import AnswerStore, DataFacts, Row, Settings
from medusa_heads.modules import MedusaHeads
from medusa_heads.tokens import CheckpointCodec
from medusa_heads.train.batches import row_batches, sequence_batches
from medusa_heads.train.checkpoints import WorkDirectory
from medusa_heads.train.examples import Example, digest, read_examples, split
from medusa_heads.train.hidden import HiddenStates, response_states
from medusa_heads.train.objective import HeadsObjective, JointObjective, LmHead, heads_losses, lm_head_of
from medusa_heads.train.schedule import learning_rate_factor, weight_factor
from medusa_runtime import OptionError
from medusa_runtime.bundle.manifest import Provenance
from tests.support.models import VOCAB_SIZE, save_tiny_model, tokenizer

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


# --- the order of data


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 5), st.integers(0, 3))
def test_rows_come_once_an_epoch_in_batches_of_one_size(num_rows, size, seed, epoch) -> None:
    batches = row_batches(num_rows, size, seed, epoch)
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == len(rows)
    assert {len(batch) for batch in batches} == {min(size, num_rows)}
    assert num_rows - len(rows) < min(size, num_rows)  # what is left over fills no batch
    assert all((a == b).all() for a, b in zip(batches, row_batches(num_rows, size, seed, epoch), strict=True))


def test_the_order_changes_with_seed_and_epoch() -> None:
    orders = [np.concatenate(row_batches(100, 10, seed, epoch)).tolist() for seed in range(2) for epoch in range(2)]
    orders += [np.concatenate(sequence_batches([5] * 100, 50, seed, epoch)).tolist() for seed in range(2) for epoch in range(2)]
    assert len(set(map(tuple, orders))) == len(orders)


@given(LENGTHS, st.integers(1, 100), st.integers(0, 5), st.integers(0, 3))
def test_sequences_come_once_an_epoch_within_the_budget(lengths, budget, seed, epoch) -> None:
    batches = sequence_batches(lengths, budget, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= budget
    again = sequence_batches(lengths, budget, seed, epoch)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]


# --- rates and weights


@given(st.integers(1, 300), st.floats(0, 0.99))
def test_the_rate_rises_to_its_height_and_falls_to_nothing(num_steps, warmup) -> None:
    rates = [learning_rate_factor(step, num_steps, warmup) for step in range(num_steps)]
    rising = math.ceil(warmup * num_steps)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: rising + 1] == sorted(rates[: rising + 1])
    assert rates[max(0, rising - 1)] == 1
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    assert learning_rate_factor(num_steps, num_steps, warmup) == pytest.approx(0 if rising < num_steps else 1)


def test_the_weight_of_the_heads_comes_up_as_asked() -> None:
    assert {weight_factor(step, 10, "constant") for step in range(10)} == {1.0}
    for schedule in ("linear", "sine"):
        factors = [weight_factor(step, 10, schedule) for step in range(10)]
        assert (factors[0], factors[-1]) == (0, 1)
        assert factors == sorted(factors)
    assert weight_factor(5, 11, "linear") == 0.5
    assert weight_factor(5, 11, "sine") == pytest.approx(math.sqrt(0.5))


# --- targets


def states_of(*answers: list[int], width: int = 4) -> HiddenStates:
    examples = [Example(str(n), (1,), tuple(answer)) for n, answer in enumerate(answers)]
    rows = np.random.default_rng(0).normal(size=(sum(map(len, answers)), width)).astype(np.float16)
    return HiddenStates(rows, examples)


def test_targets_end_with_their_answer() -> None:
    states = states_of([10, 11, 12], [20], [30, 31])
    assert states.starts.tolist() == [0, 3, 4]
    assert states.targets(np.arange(6), 3).tolist() == [
        [11, 12, -1],
        [12, -1, -1],
        [-1, -1, -1],
        [-1, -1, -1],
        [31, -1, -1],
        [-1, -1, -1],
    ]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 5))
def test_targets_are_the_tokens_that_follow(answers, num_heads) -> None:
    found = states_of(*answers).targets(np.arange(sum(map(len, answers))), num_heads).tolist()
    wanted = [(answer[n + 1 :] + [-1] * num_heads)[:num_heads] for answer in answers for n in range(len(answer))]
    assert found == wanted


# --- examples


@pytest.fixture(scope="module")
def codec() -> CheckpointCodec:
    return CheckpointCodec(tokenizer())


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def conversation(answer: str = "a fox", question: str = "who?") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_messages_alone_become_token_ids(codec, tmp_path: Path) -> None:
    [example] = read_examples([lines(tmp_path / "a.jsonl", "", conversation())], codec, max_length=100)
    assert codec.tokenizer.decode(example.prompt_ids) == "<|user|>who?<|end|><|assistant|>"
    assert codec.tokenizer.decode(example.response_ids) == "a fox<|end|>"
    assert (example.key, example.num_tokens) == ("a-2", len(example.prompt_ids) + len(example.response_ids))


def test_token_ids_in_the_data_are_taken_as_they_are(codec, tmp_path: Path) -> None:
    pieces = [codec.text_ids(letter)[0] for letter in "fox"]  # not how the tokenizer would spell it
    row = conversation("fox") | {"response_token_ids": pieces, "prompt_token_ids": [7, 8]}
    [example] = read_examples([lines(tmp_path / "a.jsonl", row)], codec, max_length=100)
    assert (example.prompt_ids, example.response_ids) == ((7, 8), tuple(pieces))


def store(path: Path, tokenizer_digest: str) -> Path:
    settings = Settings(
        model="tiny", tokenizer=tokenizer_digest, backend="transformers", dtype="fp32", prompts="b" * 64,
        prompt_temperature=0.8, max_new_tokens=8, temperature=0.0, seed=0, max_prompt_tokens=32,
    )  # fmt: skip
    with AnswerStore(path, DataFacts(settings=settings, provenance=Provenance(command=[], versions={}, created=""))) as made:
        made.append(
            Row(
                key="p-1",
                messages=conversation()["messages"],
                prompt_token_ids=[3, 4],
                response_token_ids=[5, 6, 7],
                finish_reason="stop",
            )
        )
    return path


def test_distilled_data_is_read_and_that_of_another_tokenizer_refused(codec, tmp_path: Path) -> None:
    assert read_examples([store(tmp_path / "own", codec.digest)], codec, max_length=100) == [
        Example("p-1", (3, 4), (5, 6, 7), "who?")
    ]
    with pytest.raises(OptionError, match="was made with another tokenizer; distil it again"):
        read_examples([store(tmp_path / "other", "a" * 64)], codec, max_length=100)


def test_several_sources_are_read_in_their_order(codec, tmp_path: Path) -> None:
    sources = [lines(tmp_path / "b.jsonl", conversation()), store(tmp_path / "own", codec.digest)]
    assert [example.key for example in read_examples(sources, codec, max_length=100)] == ["b-1", "p-1"]


def test_answers_are_cut_at_the_longest_length_and_dropped_where_nothing_is_left(codec, tmp_path: Path) -> None:
    path = store(tmp_path / "own", codec.digest)
    assert read_examples([path], codec, max_length=4) == [Example("p-1", (3, 4), (5, 6), "who?")]
    with pytest.raises(OptionError, match="no answers to learn from"):
        read_examples([path], codec, max_length=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([1], "is not a JSON object"),
        ({"prompt": "x"}, "has no list of messages that ends with an answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "has no list of messages that ends with an answer"),
        ({"messages": ["x", "y"]}, "has no list of messages that ends with an answer"),
        ({"messages": [conversation()["messages"][0]] * 2}, "the last message must be an answer of the assistant"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}, "the last message must be"),
        (conversation() | {"response_token_ids": [1, VOCAB_SIZE]}, f"must be a list of token ids below {VOCAB_SIZE}"),
        (conversation() | {"response_token_ids": [True]}, "response_token_ids must be a list of token ids"),
        (conversation() | {"response_token_ids": "12"}, "response_token_ids must be a list of token ids"),
        (conversation() | {"prompt_token_ids": [-1]}, "prompt_token_ids must be a list of token ids"),
        (conversation() | {"response_token_ids": [40, 41]}, "the token ids do not decode to the answer"),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_by_its_number(codec, row, message, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", conversation(), "", row)
    with pytest.raises(OptionError) as caught:
        read_examples([path], codec, max_length=100)
    assert f"{path}, row 3" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_that_the_template_refuses_is_told_by_its_number(codec, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", conversation(), {"messages": [{}, {"role": "assistant", "content": "x"}]})
    template = codec.tokenizer.chat_template
    codec.tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper + 1 }}{% endfor %}"
    try:
        with pytest.raises(OptionError, match=r"data\.jsonl, row 1: the chat template refuses"):
            read_examples([path], codec, max_length=100)
    finally:
        codec.tokenizer.chat_template = template


def test_data_that_is_no_data_is_refused(codec, tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("nothing", "there is no data at"),
        ("binary.jsonl", "is not UTF-8 text"),
        ("empty.jsonl", "no answers to learn from"),
        ("folder", "is not data of `medusa-export distill`"),
    ):
        with pytest.raises(OptionError, match=message):
            read_examples([tmp_path / name], codec, max_length=100)


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=60), st.floats(0, 0.9))
def test_the_split_depends_on_each_prompt_alone(prompts, held_out) -> None:
    examples = [Example(str(n), (n, 1), (n,)) for n in sorted(prompts)]
    training, kept = split(examples, held_out)
    assert sorted([*training, *kept], key=lambda e: e.prompt_ids) == examples
    for example in examples:
        assert (example in kept) == (split([example], held_out)[1] == [example])
    same_prompt = [Example("other", example.prompt_ids, (9, 9)) for example in kept]
    assert split(same_prompt, held_out) == ([], same_prompt)


def test_the_split_takes_about_the_part_asked_for() -> None:
    examples = [Example(str(n), (n, 2), (n,)) for n in range(4000)]
    assert len(split(examples, 0.1)[1]) == pytest.approx(400, rel=0.2)
    assert split(examples, 0.0)[1] == []


def test_turns_of_one_conversation_stay_together() -> None:
    first = [Example(f"{n}.0", (n, 1), (n,), opening=f"question {n}") for n in range(200)]
    later = [Example(f"{n}.1", (n, 1, n, 5), (n,), opening=f"question {n}") for n in range(200)]
    training, kept = split([*first, *later], 0.3)
    assert {e.opening for e in training}.isdisjoint({e.opening for e in kept})
    assert len(kept) == 2 * len({e.opening for e in kept}) > 0


def test_the_digest_knows_every_token_and_the_order() -> None:
    one, two = Example("a", (1, 2), (3,)), Example("b", (1,), (2, 3))
    assert len({digest(found) for found in ([one], [two], [one, two], [two, one], [Example("a", (1, 2), (4,))])}) == 5
    assert digest([one]) == digest([Example("named otherwise", (1, 2), (3,))])


# --- losses

C, V, K, N = 8, 13, 3, 20


def random_heads(*, shared: bool = True, reads_root: bool = False) -> MedusaHeads:
    torch.manual_seed(2)
    sizes = {"num_heads": K, "num_layers": 2, "hidden_size": C, "vocab_size": V}
    heads = MedusaHeads(HeadsConfig(base_model="", shared_lm_head=shared, reads_root=reads_root, **sizes))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(0, 0.5)
    return heads


def plain_root(weight: torch.Tensor, token: int, kept: list[int]) -> torch.Tensor:
    """The embedding of a root that heads read: its row, scaled to mean square 1. [C]"""
    if token not in kept:
        return torch.zeros(C)
    return torch.tensor(
        [value / (sum(x * x for x in weight[token].tolist()) / C + 1e-6) ** 0.5 for value in weight[token].tolist()]
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kept", [None, [0, 3, 4, 7, 11, 12]])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reads_root", [True, False])
def test_losses_of_the_heads_equal_a_plain_computation(shared, kept, with_bias, reads_root) -> None:
    heads = random_heads(shared=shared, reads_root=reads_root)
    weight, bias = torch.randn(V, C), torch.randn(V) if with_bias else None
    hidden, targets, root_ids = torch.randn(N, C), torch.randint(-1, V, (N, K)), torch.randint(0, V, (N,))
    targets[:, 2] = -1  # a head that nothing is asked of
    lm_head = LmHead(weight, bias, None if kept is None else torch.tensor(kept))
    found = heads_losses(heads, lm_head, hidden, root_ids, targets)

    ids = list(range(V)) if kept is None else kept
    roots = torch.stack([plain_root(weight, root, ids) for root in root_ids.tolist()])
    for k, head in enumerate(heads.heads):
        matrix, offset = (weight, bias) if shared else (head.lm_head.weight, None)
        losses = []
        for row, root, target in zip(hidden, roots, targets[:, k].tolist(), strict=True):
            if target in ids:
                features = head(row[None], root[None] if reads_root else None)[0]
                logits = matrix[ids] @ features + (0 if offset is None else offset[ids])
                losses.append((logits.exp().sum().log() - logits[ids.index(target)]).item())
        assert found[k].item() == pytest.approx(np.mean(losses) if losses else 0, abs=1e-4)

    total, told, _ = HeadsObjective(heads, lm_head, 0.5)(hidden, root_ids, targets)
    torch.testing.assert_close(total, 0.5 * found[0] + 0.25 * found[1] + 0.125 * found[2])
    assert not told.requires_grad
    total.backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())  # also of the idle head: DDP waits for it


def test_tokens_that_count_are_found_in_the_lm_head() -> None:
    lm_head = LmHead(torch.randn(V, C), None, torch.tensor([2, 5]))
    assert lm_head.weight.shape == (2, C)
    assert lm_head.places(torch.tensor([[5, 2], [3, -1]])).tolist() == [[1, 0], [-100, -100]]


@pytest.fixture(scope="module")
def backbone(make_model) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_model(), dtype=torch.float32)


def joint_batch(backbone: Any) -> tuple[list[Example], tuple[torch.Tensor, ...]]:
    """A batch of two conversations of different lengths, for the second stage."""
    from medusa_heads.train.joint import _Loader
    from medusa_heads.train.settings import TrainSettings

    examples = [Example("a", (5, 6, 7), tuple(range(10, 19))), Example("b", (8,), (30, 31, 32))]
    rows = torch.cat(response_states(backbone.eval(), examples)).to(torch.float16).numpy()
    loader = _Loader(examples, HiddenStates(rows, examples), TrainSettings(), 2, torch.device("cpu"))
    inputs, num_tokens = loader(np.array([0, 1]), 0, 10)
    assert num_tokens == 12
    return examples, inputs


def heads_for(backbone: Any) -> MedusaHeads:
    torch.manual_seed(0)
    config = HeadsConfig(base_model="", num_heads=2, hidden_size=64, vocab_size=VOCAB_SIZE, reads_root=True)
    heads = MedusaHeads(config)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return heads


@pytest.mark.parametrize("learns", [True, False])
def test_the_joint_loss_equals_a_plain_computation(backbone, learns, monkeypatch) -> None:
    monkeypatch.setattr("medusa_heads.train.objective.KL_ROWS", 5)  # 12 rows: whole parts and a rest
    examples, inputs = joint_batch(backbone)
    heads, original = heads_for(backbone), lm_head_of(backbone, torch.float32)
    for parameter in backbone.parameters():
        parameter.requires_grad_(learns)
    some = lm_head_of(backbone, torch.float32, torch.tensor([11, 12, 13, 31, 32]))
    kl = JointObjective(backbone, heads, some, original, 0.8, "kl")
    start = kl(*inputs)
    assert abs(start.backbone.item()) < 1e-5  # nothing has changed yet, but that float16 rounds, and a sum may be below 0
    torch.testing.assert_close(
        start.heads, heads_losses(heads, some, torch.cat(response_states(backbone, examples)), *inputs[2:4])
    )

    before = [parameter.detach().clone() for parameter in backbone.parameters()]
    with torch.no_grad():
        torch.manual_seed(5)
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    try:
        found = kl(*inputs)
        hidden = torch.cat(response_states(backbone, examples))
        q = backbone.lm_head(hidden).log_softmax(-1)
        p = F.linear(inputs[4].float(), original.weight).log_softmax(-1)
        naive = (p.exp() * (p - q)).sum(-1).mean()
        torch.testing.assert_close(found.backbone, naive, rtol=1e-4, atol=1e-6)
        assert naive.item() > 1e-3
        now = lm_head_of(backbone, torch.float32, some.token_ids)
        losses = heads_losses(heads, now if learns else some, hidden, *inputs[2:4])  # a head reads the LM head that learns
        torch.testing.assert_close(found.heads, losses.detach())
        torch.testing.assert_close(found.total, found.backbone + 0.2 * (0.8 * losses[0] + 0.64 * losses[1]))

        ce = JointObjective(backbone, heads, some, original, 0.8, "ce")(*inputs)
        answers = torch.tensor([token for example in examples for token in example.response_ids])
        torch.testing.assert_close(ce.backbone, F.cross_entropy(backbone.lm_head(hidden), answers))
    finally:
        with torch.no_grad():
            for parameter, value in zip(backbone.parameters(), before, strict=True):
                parameter.copy_(value)


# --- the work directory


def alone() -> Any:
    return SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, save_state=lambda path: Path(path).mkdir())


def test_a_run_goes_on_only_under_its_settings(tmp_path: Path) -> None:
    identity = {"epochs": 3.0, "seed": 0, "data": "abc"}
    WorkDirectory(tmp_path / "work", identity, alone())
    WorkDirectory(tmp_path / "work", identity, alone())
    with pytest.raises(
        OptionError, match=r"other settings \(epochs was 3\.0, is 2\.0; seed was 0, is 1\); continue with those"
    ):
        WorkDirectory(tmp_path / "work", identity | {"epochs": 2.0, "seed": 1}, alone())
    for damaged in ("{", "[1]", ""):
        (tmp_path / "work" / "run.json").write_text(damaged)
        with pytest.raises(OptionError, match=r"run\.json is damaged; delete .*work to start again"):
            WorkDirectory(tmp_path / "work", identity, alone())


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OptionError, match="has other files in it; choose another --work"):
        WorkDirectory(tmp_path, {}, alone())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_log_goes_on_where_the_checkpoint_stands(tmp_path: Path) -> None:
    accelerator = alone()
    accelerator.load_state = lambda _: None
    work = WorkDirectory(tmp_path / "work", {}, accelerator)
    assert work.stage is None
    for step in (1, 2, 3):
        work.log(stage="heads", step=step)
        if step == 2:
            work.save("heads", step)
    with (work.path / "log.jsonl").open("a") as file:
        file.write('{"stage": "hea')  # a run that was killed as it wrote
    assert (work.stage, work.resume("heads")) == ("heads", 2)
    assert [entry["step"] for entry in work.entries()] == [1, 2]
    work.log(stage="joint", step=1)
    assert work.resume("joint") == 0
    assert [(entry["stage"], entry["step"]) for entry in work.entries()] == [("heads", 1), ("heads", 2)]


def test_a_run_killed_between_two_renames_has_its_checkpoint(tmp_path: Path) -> None:
    accelerator = alone()
    accelerator.load_state = lambda _: None
    work = WorkDirectory(tmp_path / "work", {}, accelerator)
    work.save("heads", 4)
    (work.path / "checkpoint").rename(work.path / "checkpoint.old")
    assert work.resume("heads") == 4
    work.save("heads", 6)
    (work.path / "checkpoint.old").mkdir(exist_ok=True)
    (work.path / "checkpoint.old" / "left").touch()  # killed before it was removed
    work.save("heads", 8)
    assert work.resume("heads") == 8
    assert sorted(path.name for path in work.path.iterdir()) == ["checkpoint", "log.jsonl", "run.json"]


# --- soft targets


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 3))
def test_blocks_keep_neighbours_together_and_take_every_row_once(num_rows, block, epoch) -> None:
    [order] = row_batches(num_rows, num_rows, 0, epoch, block)
    assert sorted(order) == list(range(num_rows))
    breaks = int((np.diff(order) != 1).sum())
    assert breaks <= -(-num_rows // block)  # a block more than fit, where they begin shifted
    assert (row_batches(num_rows, num_rows, 0, epoch, block)[0] == order).all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("part", [0.25, 1.0])
@pytest.mark.parametrize("reads_root", [True, False])
def test_soft_targets_equal_a_plain_computation(shared, part, reads_root) -> None:
    heads, weight, bias = random_heads(shared=shared, reads_root=reads_root), torch.randn(V, C), torch.randn(V)
    kept = [0, 3, 4, 7, 11, 12]
    lm_head = LmHead(weight, bias, torch.tensor(kept))
    hidden, ahead = torch.randn(N, C), torch.randn(N + K, C)
    targets, places, root_ids = torch.randint(-1, V, (N, K)), torch.randint(0, N + K, (N, K)), torch.randint(0, V, (N,))
    roots = torch.stack([plain_root(weight, root, kept) for root in root_ids.tolist()])
    targets[:, 2] = -1  # a head that nothing is asked of
    total, told, _ = HeadsObjective(heads, lm_head, 0.5, part)(hidden, root_ids, targets, ahead, places)
    for k, head in enumerate(heads.heads):
        matrix, offset = (weight, bias) if shared else (head.lm_head.weight, torch.zeros(V))
        losses = []
        for row, root, target, place in zip(hidden, roots, targets[:, k].tolist(), places[:, k], strict=True):
            if target in kept:
                features = head(row[None], root[None] if reads_root else None)[0]
                wanted = part * (weight[kept] @ ahead[place] + bias[kept]).softmax(0)
                wanted[kept.index(target)] += 1 - part
                losses.append(-(wanted * (matrix[kept] @ features + offset[kept]).log_softmax(0)).sum().item())
        assert told[k].item() == pytest.approx(np.mean(losses) if losses else 0, abs=1e-4)
    torch.testing.assert_close(total.detach(), 0.5 * told[0] + 0.25 * told[1] + 0.125 * told[2])
    total.backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere2", {"logit_scale": 0.0625}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
    ],
)
def test_soft_targets_are_the_models_own_distribution(model_type: str, changed: dict[str, float], tmp_path: Path) -> None:
    """Of models that scale or cap their logits, too."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model", model_type, **changed)).eval()
    with torch.no_grad():
        output = model(torch.tensor([[5, 9, 14, 21]]), output_hidden_states=True)
        found = lm_head_of(model, torch.float32).distribution(output.hidden_states[-1][0])
    torch.testing.assert_close(found, output.logits[0].softmax(-1), rtol=1e-4, atol=1e-7)


def test_soft_targets_of_no_weight_are_the_tokens_alone() -> None:
    heads, lm_head = random_heads(shared=True), LmHead(torch.randn(V, C), None)
    hidden, root_ids, targets = torch.randn(N, C), torch.randint(0, V, (N,)), torch.randint(-1, V, (N, K))
    hard = HeadsObjective(heads, lm_head, 0.8)(hidden, root_ids, targets)
    soft = HeadsObjective(heads, lm_head, 0.8, 0.0)(
        hidden, root_ids, targets, torch.randn(3, C), torch.zeros(N, K, dtype=torch.int64)
    )
    torch.testing.assert_close(soft, hard)
