"""The distillation loop, with a model whose answer is a function of the prompt."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from medusa_heads.distill import loop
from medusa_heads.distill.answerer import Answer, Refusal, Request
from medusa_heads.distill.loop import AnswerOptions, Progress, distill
from medusa_heads.distill.prompts import Conversation, self_prompted
from medusa_heads.distill.store import AnswerStore, DataFacts, Row, Settings, read_rows
from medusa_runtime import OptionError
from medusa_runtime.bundle.manifest import Provenance
from medusa_runtime.text.codec import Message

EOS = 0
FACTS = DataFacts(
    settings=Settings(
        model="fake", tokenizer="", backend="fake", dtype="", prompts="", prompt_temperature=0.8, max_new_tokens=8,
        temperature=0.0, seed=0, max_prompt_tokens=200,
    ),
    provenance=Provenance(command=[], versions={}, created=""),
)  # fmt: skip
OPTIONS = AnswerOptions(max_new_tokens=8, max_prompt_tokens=200)


class FakeCodec:
    """A codec in which each character is a token and each line a message."""

    is_chat = True

    def encode(self, prompt: Sequence[Message]) -> list[int]:
        if any(message["content"] == "forbidden" for message in prompt):
            raise OptionError("the chat template refuses it")
        return [*map(ord, "".join(f"{message['role']}: {message['content']}\n" for message in prompt))]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token != EOS)

    def user_words(self, token_ids: Sequence[int], *, ended: bool) -> str | None:
        words, sign, _ = self.decode(token_ids).partition("@")
        return words if sign or ended or not self.is_chat else None

    def opening(self, messages: Sequence[Message] = (), start: str = "") -> list[int]:
        return [*self.encode(messages), *map(ord, f"user: {start}")]


class FakeAnswerer:
    """Answers `batch_size` requests at the same time and finishes them in a random order that depends on the seed."""

    def __init__(self, batch_size: int = 3, order: int = 0, speak: Callable[[Request], str] | None = None) -> None:
        self.batch_size = batch_size
        self.random = random.Random(order)
        self.speak = speak or (lambda request: f"{zlib.crc32(repr((request.prompt_ids, request.seed)).encode()):x}"[:7])
        self.requests: list[Request] = []
        self.closed = False

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer, None, None]:
        under_way: list[Request] = []
        try:
            while True:
                while len(under_way) < self.batch_size and (request := next_request()) is not None:
                    under_way.append(request)
                    self.requests.append(request)
                if not under_way:
                    return
                request = under_way.pop(self.random.randrange(len(under_way)))
                yield self._answer(request)
        finally:
            self.closed = True

    def _answer(self, request: Request) -> Answer:
        token_ids = [*map(ord, self.speak(request)), EOS]
        if len(token_ids) > request.max_new_tokens:
            return Answer(request, token_ids[: request.max_new_tokens], "length")
        return Answer(request, token_ids, "stop")


def asks(*turns: str, key: str = "p-1", source: str = "") -> Conversation:
    return Conversation(key, tuple(({"role": "user", "content": turn},) for turn in turns), source)


def run(path: Path, conversations, answerer: FakeAnswerer, options: AnswerOptions = OPTIONS, stop_after: int | None = None):
    """Have conversations answered, or begin to. Returns the rows there are, by key, and how far it went."""
    with AnswerStore(path, FACTS) as store:
        steps = distill(conversations, answerer, FakeCodec(), store, options)
        progress = Progress(0)
        for number, told in enumerate(steps):
            progress = told
            if number == stop_after:
                steps.close()
    rows = list(read_rows(path)) if (path / "answers.jsonl").exists() else []
    assert len({row.key for row in rows}) == len(rows)  # none twice
    return {row.key: row for row in rows}, progress


MIXED = [
    *(asks(f"question {n}", key=f"a-{n}", source="a") for n in range(4)),
    *(asks(f"first {n}", "second", "third", key=f"b-{n}") for n in range(3)),
    *self_prompted(3),
]
NUM_ANSWERS = 4 + 3 * 3 + 3


def test_follow_ups_see_the_models_own_earlier_answers(tmp_path: Path) -> None:
    answerer = FakeAnswerer()
    rows, progress = run(tmp_path, [asks("why?", "and then?", source="talk")], answerer)
    first, second = rows["p-1.0"], rows["p-1.1"]
    said = first.messages[-1]["content"]
    assert first.messages == [{"role": "user", "content": "why?"}, {"role": "assistant", "content": said}]
    assert second.messages[:-1] == [*first.messages, {"role": "user", "content": "and then?"}]
    assert second.prompt_token_ids == FakeCodec().encode(second.messages[:-1]) == list(answerer.requests[1].prompt_ids)
    assert (first.source, first.finish_reason, first.response_token_ids[-1]) == ("talk", "stop", EOS)
    num_tokens = len(first.response_token_ids + second.response_token_ids)
    assert (progress.done, progress.total, progress.skipped, progress.new_tokens) == (2, 2, 0, num_tokens)


def test_the_model_prompts_itself(tmp_path: Path) -> None:
    answerer = FakeAnswerer()
    rows, _ = run(tmp_path, self_prompted(2), answerer)
    own = [request for request in answerer.requests if request.key.endswith(".prompt")]
    assert [(list(request.prompt_ids), request.temperature) for request in own] == [(FakeCodec().opening(), 0.8)] * 2
    for request in own:
        row = rows[request.key.removesuffix(".prompt")]
        assert row.messages[0] == {"role": "user", "content": answerer.speak(request)}
        assert row.source == "self"


def test_the_model_goes_on_with_the_first_words_of_a_prompt(tmp_path: Path) -> None:
    answerer = FakeAnswerer()
    rows, _ = run(tmp_path, self_prompted(4, starts=["Translate ", "Add "]), answerer)
    own = {request.key: request for request in answerer.requests if request.key.endswith(".prompt")}
    begun = [FakeCodec().decode(request.prompt_ids).removeprefix("user: ") for request in own.values()]
    assert sorted(begun) == ["Add ", "Add ", "Translate ", "Translate "]
    for key, request in own.items():
        start = FakeCodec().decode(request.prompt_ids).removeprefix("user: ")
        assert rows[key.removesuffix(".prompt")].messages[0]["content"] == start + answerer.speak(request)


def test_first_words_can_be_the_whole_prompt_once(tmp_path: Path) -> None:
    answerer = FakeAnswerer(1, speak=lambda request: "" if request.key.endswith(".prompt") else "so")
    rows, progress = run(tmp_path, self_prompted(2, starts=["Why?"]), answerer)
    assert [row.messages[0]["content"] for row in rows.values()] == ["Why?"]
    assert (progress.done, progress.skipped) == (1, 1)


def test_the_model_writes_several_turns_of_a_conversation(tmp_path: Path) -> None:
    answerer = FakeAnswerer()
    rows, progress = run(tmp_path / "whole", own := self_prompted(2, starts=["Why "], turns=2), answerer)
    second = rows["self-0.1"]
    roles = [message["role"] for message in second.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert second.messages[:2] == rows["self-0.0"].messages
    asked = next(request for request in answerer.requests if request.key == "self-0.1.prompt")
    assert list(asked.prompt_ids) == FakeCodec().opening(second.messages[:2])
    assert second.messages[2]["content"] == answerer.speak(asked)  # without first words
    assert (progress.done, progress.total) == (4, 4)
    run(tmp_path / "stopped", own, FakeAnswerer(), stop_after=2)
    assert run(tmp_path / "stopped", own, FakeAnswerer())[0] == rows


def test_turns_after_an_unusable_one_are_not_asked(tmp_path: Path) -> None:
    answerer = FakeAnswerer(
        speak=lambda request: " " if request.key.endswith("1.prompt") else "yes"[: 2 + len(request.key) % 2]
    )
    rows, progress = run(tmp_path, self_prompted(1, turns=3), answerer)
    assert list(rows) == ["self-0.0"]
    assert (progress.done, progress.skipped) == (1, 2)


def test_first_words_and_turns_are_part_of_the_digest() -> None:
    plain = self_prompted(2)
    others = [self_prompted(2, starts=["Why "]), self_prompted(2, turns=2), self_prompted(2, starts=["How "])]
    assert len({loop.digest(own) for own in [plain, *others]}) == 4


@pytest.mark.parametrize(("batch_size", "order"), [(1, 0), (2, 1), (5, 2), (100, 3)])
def test_answers_do_not_depend_on_order_nor_on_batches(batch_size, order, tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "one", MIXED, FakeAnswerer(1))
    rows, progress = run(tmp_path / "other", MIXED, FakeAnswerer(batch_size, order))
    assert rows == expected
    assert len(rows) == progress.done == progress.total == NUM_ANSWERS


def test_each_answer_has_a_seed_of_its_own(tmp_path: Path) -> None:
    def seeds(path: Path, seed: int) -> dict[str, int]:
        run(path, MIXED, answerer := FakeAnswerer(), AnswerOptions(8, 200, temperature=1.0, seed=seed))
        return {request.key: request.seed for request in answerer.requests}

    seven, eight = seeds(tmp_path / "7", 7), seeds(tmp_path / "8", 8)
    assert len({*seven.values(), *eight.values()}) == 2 * (NUM_ANSWERS + 3)


@pytest.mark.parametrize("order", range(3))
def test_a_run_interrupted_anywhere_goes_on_as_if_it_had_not_been(order, tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "whole", MIXED, FakeAnswerer())
    for stop_after in range(NUM_ANSWERS + 3 + 1):
        path = tmp_path / str(stop_after)
        before, _ = run(path, MIXED, FakeAnswerer(3, order), stop_after=stop_after)
        assert before.items() <= expected.items()
        later = FakeAnswerer(2, order + 1)
        rows, progress = run(path, MIXED, later)
        assert rows == expected
        assert not before.keys() & {request.key for request in later.requests}  # what there was is not asked again
        assert (progress.done, progress.resumed) == (NUM_ANSWERS, len(before))
        again, _ = run(path, MIXED, idle := FakeAnswerer())
        assert (again, idle.requests) == (expected, [])


def test_a_run_interrupted_again_and_again_comes_to_its_end(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "whole", MIXED, FakeAnswerer())
    for order in range(100):
        rows, _ = run(tmp_path / "pieces", MIXED, FakeAnswerer(3, order), stop_after=2)
        if rows == expected:
            return
    pytest.fail("it never ended")


def test_stopping_gives_up_what_is_under_way(tmp_path: Path) -> None:
    run(tmp_path, MIXED, answerer := FakeAnswerer(), stop_after=2)
    assert answerer.closed


def test_own_prompts_that_come_to_nothing_are_skipped(tmp_path: Path) -> None:
    said = {"self-0.0.prompt": "why?", "self-1.0.prompt": "why?", "self-2.0.prompt": " ", "self-3.0.prompt": "x" * 300}
    answerer = FakeAnswerer(1, speak=lambda request: said.get(request.key, "so."))
    rows, progress = run(tmp_path, self_prompted(4), answerer)
    [row] = rows.values()
    assert [message["content"] for message in row.messages] == ["why?", "so."]
    assert (progress.done, progress.skipped, progress.total) == (1, 3, 4)
    rows, progress = run(tmp_path, self_prompted(4), FakeAnswerer(4, speak=answerer.speak))  # nor is one repeated later
    assert len(rows) == 1
    assert (progress.done, progress.skipped, progress.resumed) == (1, 3, 1)


def test_a_base_model_begins_texts_that_need_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCodec, "is_chat", False)
    answerer = FakeAnswerer(1, speak=lambda request: "once upon a time" * 9 if request.key.endswith(".prompt") else "so.")
    rows, progress = run(tmp_path, self_prompted(1), answerer)
    [row] = rows.values()
    assert row.messages[0]["content"] == ("once upon a time" * 2)[: loop.OWN_BEGINNING_TOKENS]
    assert (progress.done, progress.skipped) == (1, 0)


def test_too_long_prompts_are_skipped_with_the_turns_after_them(tmp_path: Path) -> None:
    conversations = [asks("short", key="a"), asks("x" * 300, key="b"), asks("short", "y" * 300, "never asked", key="c")]
    rows, progress = run(tmp_path, conversations, FakeAnswerer())
    assert sorted(rows) == ["a.0", "c.0"]
    assert (progress.done, progress.skipped, progress.total) == (2, 3, 5)


def test_a_prompt_may_be_just_as_long_as_the_limit(tmp_path: Path) -> None:
    length = len(FakeCodec().encode([{"role": "user", "content": "why?"}]))
    for limit, num_answers in ((length, 1), (length - 1, 0)):
        rows, _ = run(tmp_path / str(limit), [asks("why?")], FakeAnswerer(), AnswerOptions(8, limit))
        assert len(rows) == num_answers


def test_an_own_prompt_is_no_longer_than_prompts_may_be(tmp_path: Path) -> None:
    run(tmp_path, self_prompted(1), answerer := FakeAnswerer(), AnswerOptions(8, 20))
    assert answerer.requests[0].max_new_tokens == 20 - len(FakeCodec().opening())
    with pytest.raises(OptionError, match="there are 6 tokens before the words that it writes"):
        run(tmp_path, self_prompted(1), FakeAnswerer(), AnswerOptions(8, 6))


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    conversations = [asks("fine", key="p-1"), asks("fine", "forbidden", key="p-7")]
    told = r"^p-7\.1: the chat template refuses it; use --skip-refused to leave such prompts out$"
    with pytest.raises(OptionError, match=told):
        run(tmp_path, conversations, FakeAnswerer(1))
    assert {row.key for row in read_rows(tmp_path)} >= {"p-7.0"}


@pytest.mark.parametrize("by_template", [True, False])
def test_refused_prompts_can_be_skipped(by_template: bool, tmp_path: Path) -> None:
    class Refusing(FakeAnswerer):
        def _answer(self, request: Request) -> Answer | Refusal:
            return Refusal(request, "no") if "bad" in request.messages[-1]["content"] else super()._answer(request)

    bad = "forbidden" if by_template else "bad"
    conversations = [asks("fine", bad, "and then?", key="a"), asks("fine", key="b"), asks(bad, key="c")]
    with pytest.raises(OptionError, match="use --skip-refused"):
        run(tmp_path, conversations, Refusing(1))
    rows, progress = run(tmp_path, conversations, Refusing(1), AnswerOptions(8, 200, skip_refused=True))
    assert rows.keys() == {"a.0", "b.0"}
    assert progress.refused == dict.fromkeys(("a.1", "c.0"), "the chat template refuses it" if by_template else "no")
    assert (progress.done, progress.skipped, progress.skipped_refused, progress.total) == (2, 3, 3, 5)


def test_an_answer_after_an_own_prompt_is_no_part_of_it(tmp_path: Path) -> None:
    answerer = FakeAnswerer(speak=lambda request: "why?@be" if request.key.endswith(".prompt") else "so")
    rows, _ = run(tmp_path, self_prompted(1), answerer)
    assert [message["content"] for message in rows["self-0.0"].messages] == ["why?", "so"]


def test_neighbours_are_alike_within_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WINDOW", 4)
    conversations = [asks("x" * (n * 7 % 10 + 1), key=str(n)) for n in range(10)]
    run(tmp_path, conversations, answerer := FakeAnswerer(1))
    lengths = [len(request.prompt_ids) for request in answerer.requests]
    assert [lengths[:4], lengths[4:8], lengths[8:]] == [
        sorted(part, reverse=True) for part in (lengths[:4], lengths[4:8], lengths[8:])
    ]
    assert {request.key for request in answerer.requests[:4]} == {f"{n}.0" for n in range(4)}


def test_a_row_is_whole(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, [asks("why?", source="s")], FakeAnswerer(speak=lambda _: "much too long an answer"))
    assert rows["p-1.0"] == Row(
        key="p-1.0",
        source="s",
        messages=[{"role": "user", "content": "why?"}, {"role": "assistant", "content": "much too"}],
        prompt_token_ids=FakeCodec().encode([{"role": "user", "content": "why?"}]),
        response_token_ids=[*map(ord, "much too")],
        finish_reason="length",
    )


def test_the_digest_tells_prompts_and_their_order_apart() -> None:
    one, other = asks("a", key="1"), asks("b", key="2")
    digests = {loop.digest(chosen) for chosen in ([one, other], [other, one], [one], [asks("a", key="2"), other])}
    assert len(digests) == 4
    assert loop.digest([one, other]) == loop.digest([one, other])
