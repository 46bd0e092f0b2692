"""The service around the engine: many callers, threads and tasks, and what each of them may do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from medusa_runtime import (
    BackendError,
    CapacityError,
    ClosedError,
    DecodingEngine,
    DynamicTree,
    GenerationOptions,
    MedusaLM,
    OptionError,
    QueueFullError,
    RequestError,
)
from tests.support.fake_backend import FakeBackend, fake_manifest, greedy

LETTERS = "".join(chr(ord("a") + number % 26) if number < 26 else chr(ord("A") + number % 26) for number in range(50))


class LetterCodec:
    """A token is a letter."""

    def encode(self, prompt, **_):
        return [LETTERS.index(letter) for letter in prompt]

    def decode(self, token_ids):
        return "".join(LETTERS[token] for token in token_ids)

    def special_token_id(self, text):
        return None


def text_of(prompt: str, num_tokens: int) -> str:
    return "".join(LETTERS[token] for token in greedy([LETTERS.index(letter) for letter in prompt], num_tokens))


class Gate:
    """Holds a backend's steps, after the first few, until it is opened."""

    def __init__(self, num_free_steps: int = 0) -> None:
        self.is_open = threading.Event()
        self.arrived = threading.Event()
        self._num_free_steps = num_free_steps

    def __call__(self, _: FakeBackend) -> None:
        if self._num_free_steps > 0:
            self._num_free_steps -= 1
            return
        self.arrived.set()
        assert self.is_open.wait(30)


def gated(num_free_steps: int = 0) -> tuple[Gate, FakeBackend]:
    gate, backend = Gate(num_free_steps), FakeBackend("never", fake_manifest(max_seq_len=300))
    backend.fails = gate
    return gate, backend


def service(max_batch_size: int = 4, max_queue: int = 100, backend: FakeBackend | None = None, **settings) -> MedusaLM:
    backend = backend or FakeBackend("sometimes", fake_manifest(max_seq_len=300))
    return MedusaLM(DecodingEngine(backend, max_batch_size=max_batch_size, **settings), LetterCodec(), max_queue=max_queue)


def test_many_threads_get_what_each_would_get_alone() -> None:
    prompts = ["".join(random.Random(seed).choices(LETTERS, k=1 + seed % 9)) for seed in range(60)]
    with service() as lm, ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda prompt: lm.generate(prompt, max_new_tokens=20).text, prompts))
        stats = lm.stats()
    assert texts == [text_of(prompt, 20) for prompt in prompts]
    assert (stats.num_completed, stats.num_failed, stats.num_cancelled, stats.num_refused) == (60, 0, 0, 0)
    assert (stats.num_active, stats.num_waiting) == (0, 0)
    assert stats.decoding.num_generated_tokens == 60 * 20


def test_many_tasks_get_what_each_would_get_alone() -> None:
    async def run(lm: MedusaLM) -> tuple[list[str], list[str]]:
        async def streamed(prompt: str) -> str:
            return "".join([chunk.text async for chunk in lm.astream(prompt, max_new_tokens=15)])

        prompts = [LETTERS[number : number + 3] for number in range(20)]
        wholes = asyncio.gather(*(lm.agenerate(prompt, max_new_tokens=15) for prompt in prompts))
        streams = asyncio.gather(*(streamed(prompt) for prompt in prompts))
        return [result.text for result in await wholes], await streams

    with service() as lm:
        wholes, streams = asyncio.run(run(lm))
    assert wholes == streams == [text_of(LETTERS[number : number + 3], 15) for number in range(20)]


def test_a_task_that_is_cancelled_frees_its_slot() -> None:
    gate, backend = gated()

    async def run(lm: MedusaLM) -> None:
        task = asyncio.create_task(lm.agenerate("abc", max_new_tokens=100))
        while not gate.arrived.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.is_open.set()
        assert (await lm.agenerate("xyz", max_new_tokens=5)).text == text_of("xyz", 5)

    with service(max_batch_size=1, backend=backend) as lm:
        asyncio.run(run(lm))
        assert lm.stats().num_cancelled == 1
        assert lm.stats().num_active == 0


def test_leaving_an_async_stream_cancels_its_request() -> None:
    gate, backend = gated(num_free_steps=2)

    async def run(lm: MedusaLM) -> None:
        stream = aiter(lm.astream("abc", max_new_tokens=250))
        await anext(stream)
        await stream.aclose()
        gate.is_open.set()
        assert (await lm.agenerate("xyz", max_new_tokens=5)).text == text_of("xyz", 5)

    with service(max_batch_size=1, backend=backend) as lm:
        asyncio.run(run(lm))
        assert (lm.stats().num_cancelled, lm.stats().num_completed) == (1, 1)


def test_a_cancelled_request_gives_what_it_has() -> None:
    gate, backend = gated(num_free_steps=4)
    with service(backend=backend) as lm:
        handle = lm.submit("abc", max_new_tokens=290)
        first = next(handle)
        assert gate.arrived.wait(30)
        handle.cancel()
        gate.is_open.set()
        result = handle.result(timeout=30)
        assert result.finish_reason == "cancelled"
        assert result.text.startswith(first.text)
        assert text_of("abc", 290).startswith(result.text)
        assert "".join(chunk.text for chunk in handle) == result.text[len(first.text) :]
        handle.cancel()  # again: nothing happens
        assert handle.is_done


def test_a_request_that_waits_can_be_cancelled() -> None:
    gate, backend = gated()
    with service(max_batch_size=1, backend=backend) as lm:
        running, waiting = lm.submit("a", max_new_tokens=5), lm.submit("b", max_new_tokens=5)
        assert gate.arrived.wait(30)
        waiting.cancel()
        gate.is_open.set()
        assert (waiting.result(30).finish_reason, waiting.result().token_ids) == ("cancelled", [])
        assert running.result(30).text == text_of("a", 5)


def test_a_handle_that_is_dropped_cancels_its_request() -> None:
    gate, backend = gated()
    with service(max_batch_size=1, backend=backend) as lm:
        handle = lm.submit("a", max_new_tokens=150)
        assert gate.arrived.wait(30)
        del handle
        gc.collect()
        gate.is_open.set()
        assert lm.generate("b", max_new_tokens=5).text == text_of("b", 5)
        assert lm.stats().num_cancelled == 1


def test_a_full_queue_refuses_at_once() -> None:
    gate, backend = gated()
    with service(max_batch_size=1, max_queue=2, backend=backend) as lm:
        handles = [lm.submit("a", max_new_tokens=3) for _ in range(3)]
        with pytest.raises(
            QueueFullError, match=r"the queue is full: 3 of 3 answers under way \(max_batch_size 1 \+ max_queue 2\), 1 more"
        ):
            lm.submit("a", max_new_tokens=3)
        assert lm.stats().num_refused == 1
        with pytest.raises(CapacityError, match="n is 4; there is never room for more than 3 answers"):
            lm.submit("a", n=4)
        gate.is_open.set()
        assert [handle.result(30).text for handle in handles] == [text_of("a", 3)] * 3


def test_a_batch_may_be_larger_than_the_queue() -> None:
    prompts = [LETTERS[number] for number in range(50)]
    with service(max_batch_size=2, max_queue=1) as lm:
        results = lm.generate_batch(prompts, max_new_tokens=7)
        stats = lm.stats()
    assert [result.text for result in results] == [text_of(prompt, 7) for prompt in prompts]
    assert (stats.num_refused, stats.num_completed) == (0, 50)  # its own waiting is no refusal


def test_a_batch_larger_than_the_queue_takes_any_room_there_is() -> None:
    """The first answer is long: the others do not wait for it."""
    lengths = {"a": 200} | {LETTERS[number]: 3 for number in range(1, 12)}
    gate, backend = gated(num_free_steps=60)
    with service(max_batch_size=2, max_queue=0, backend=backend) as lm:
        requests = [lm._request(prompt, GenerationOptions(max_new_tokens=count)) for prompt, count in lengths.items()]
        handles = [lm._submit(request, waits=True) for request in requests]
        assert [handle.result(30).text for handle in handles[1:]] == [text_of(prompt, 3) for prompt in list(lengths)[1:]]
        assert not handles[0].is_done
        gate.is_open.set()
        assert handles[0].result(30).text == text_of("a", 200)


def test_a_closed_service_ends_what_is_under_way_and_refuses_more() -> None:
    gate, backend = gated()
    lm = service(max_batch_size=1, backend=backend)
    running, waiting = lm.submit("a", max_new_tokens=150), lm.submit("b", max_new_tokens=150)
    assert gate.arrived.wait(30)
    closing = threading.Thread(target=lm.close)
    closing.start()
    gate.is_open.set()
    closing.join(30)
    for handle in (running, waiting):
        with pytest.raises(ClosedError, match="closed while the request was under way"):
            handle.result(30)
    with pytest.raises(ClosedError):
        list(running)
    with pytest.raises(ClosedError, match="this model is closed"):
        lm.submit("a")
    lm.close()  # again: nothing happens
    service().close()  # before any request


def test_a_service_that_is_dropped_ends_its_thread() -> None:
    before = set(threading.enumerate())
    lm = service()
    lm.generate("a", max_new_tokens=3)
    [worker] = set(threading.enumerate()) - before
    del lm
    gc.collect()
    worker.join(30)
    assert not worker.is_alive()


def test_a_collector_may_free_a_service_under_any_lock() -> None:
    lm, other = service(), service()
    lm.generate("a", max_new_tokens=3)
    lm.itself = lm  # only a collector frees it
    changed = lm._worker._changed
    with changed:  # held by the thread that collects
        del lm
        gc.collect()
    other.close()


def test_a_handle_keeps_its_service_open() -> None:
    handle = service().submit("abc", max_new_tokens=20)
    gc.collect()
    assert handle.result(30).text == text_of("abc", 20)


def test_what_is_submitted_as_the_service_closes_is_answered_or_ended() -> None:
    for _ in range(30):
        lm = service()
        handles: list = []

        def submit(lm=lm, handles=handles) -> None:
            with contextlib.suppress(ClosedError):
                while len(handles) < 50:
                    handles.append(lm.submit("a", max_new_tokens=3))

        caller = threading.Thread(target=submit)
        caller.start()
        lm.close()
        caller.join()
        for handle in handles:
            with contextlib.suppress(ClosedError):
                assert handle.result(30).text == text_of("a", 3)


def test_an_engine_that_fails_outside_a_step_lets_nobody_wait_for_ever(monkeypatch) -> None:
    with service(max_batch_size=2) as lm:
        monkeypatch.setattr(lm.engine._slots, "release", lambda _: 1 / 0)
        with lm._worker._changed:  # both are there before the first is begun
            handles = [lm.submit("a", max_new_tokens=count) for count in (3, 200)]
        for handle in handles:
            with pytest.raises(RequestError, match="ZeroDivisionError"):
                handle.result(30)
        with pytest.raises(ClosedError):
            lm.generate("a", max_new_tokens=3)


def test_several_tasks_may_wait_for_one_handle() -> None:
    async def run(lm: MedusaLM) -> list[str]:
        handle = lm.submit("abc", max_new_tokens=30)

        async def chunks() -> str:
            return "".join([chunk.text async for chunk in handle])

        streamed, *results = await asyncio.wait_for(asyncio.gather(chunks(), handle.aresult(), handle.aresult()), 30)
        return [streamed, *(result.text for result in results)]

    with service() as lm:
        assert asyncio.run(run(lm)) == [text_of("abc", 30)] * 3


def test_a_failing_device_fails_its_requests_and_the_service_goes_on() -> None:
    backend = FakeBackend("sometimes")

    def fail(_: FakeBackend) -> None:
        backend.fails = None
        raise BackendError("the device is gone")

    backend.fails = fail
    with service(backend=backend) as lm:
        with pytest.raises(BackendError, match="the device is gone"):
            lm.generate("a", max_new_tokens=5)
        assert lm.generate("a", max_new_tokens=5).text == text_of("a", 5)
        assert (lm.stats().num_failed, lm.stats().num_completed) == (1, 1)


def test_a_strange_error_is_told_as_a_failed_request(monkeypatch) -> None:
    with service() as lm:
        good = lm.submit("a", max_new_tokens=250)
        next(good)
        monkeypatch.setattr(lm.engine.backend, "step", None)
        with pytest.raises(RequestError, match="the request failed: TypeError: "):
            lm.generate("b", max_new_tokens=5)


def test_stop_strings_end_the_answer_before_them_and_are_not_given_out() -> None:
    whole = text_of("abc", 60)
    stop = whole[20:23]
    cut = whole[: whole.index(stop)]
    for tree in (None, DynamicTree(9)):
        with service() as lm:
            handle = lm.submit("abc", max_new_tokens=60, stop=[stop, "no such text"], tree=tree)
            chunks = list(handle)
            result = handle.result()
        assert result.text == "".join(chunk.text for chunk in chunks) == cut
        assert result.finish_reason == chunks[-1].finish_reason == "stop"
        assert len(result.token_ids) == whole.index(stop) + len(stop)  # those of the stop string included
        assert result.stats.num_generated_tokens == len(result.token_ids)
        assert result.stop_reason == chunks[-1].stop_reason == stop
        assert lm.stats().num_completed == 1


def test_what_looks_like_a_stop_string_until_the_end_is_given_out() -> None:
    whole = text_of("abc", 20)
    with service() as lm:
        result = lm.generate("abc", max_new_tokens=20, stop=whole[-2:] + "!")
    assert (result.text, result.finish_reason) == (whole, "length")


def test_several_answers_to_one_request() -> None:
    with service() as lm:
        result = lm.generate("abc", max_new_tokens=25, n=6, temperature=1.0, seed=5)
        again = lm.generate("abc", max_new_tokens=25, n=6, temperature=1.0, seed=5)
        chunks = list(lm.stream("abc", max_new_tokens=25, n=6, temperature=1.0, seed=5))
        alone = lm.generate("abc", max_new_tokens=25, temperature=1.0, seed=5)
        greedy_ones = lm.generate("abc", max_new_tokens=5, n=3)
    texts = [choice.text for choice in result.choices]
    assert len(set(texts)) == 6
    assert texts == [choice.text for choice in again.choices]
    assert texts == ["".join(chunk.text for chunk in chunks if chunk.index == index) for index in range(6)]
    assert alone.text == texts[0]
    assert [choice.text for choice in greedy_ones.choices] == [text_of("abc", 5)] * 3
    long = "abcdefghij" * 10
    with service() as lm:
        result = lm.generate(long, max_new_tokens=3, n=6, temperature=1.0, seed=5)
    assert sum(choice.stats.num_cached_tokens for choice in result.choices) == 5 * 99  # the prompt is read once


def test_a_random_seed_is_told_and_repeats_the_answer() -> None:
    with service() as lm:
        first = lm.generate("abc", max_new_tokens=30, temperature=1.0)
        other = lm.generate("abc", max_new_tokens=30, temperature=1.0)
        again = lm.generate("abc", max_new_tokens=30, temperature=1.0, seed=first.seed, medusa=False)
        several = lm.generate("abc", max_new_tokens=9, temperature=1.0, n=3)
        repeated = lm.generate("abc", max_new_tokens=9, temperature=1.0, n=3, seed=several.seed)
    assert first.text == again.text != other.text
    assert [choice.text for choice in several.choices] == [choice.text for choice in repeated.choices]


def test_a_timeout_leaves_the_request_running() -> None:
    gate, backend = gated()
    with service(backend=backend) as lm:
        handle = lm.submit("a", max_new_tokens=5)
        with pytest.raises(TimeoutError, match="not done after 0"):
            handle.result(timeout=0.01)
        gate.is_open.set()
        assert handle.result(30).text == text_of("a", 5)


def test_leaving_the_with_of_a_handle_cancels_it() -> None:
    gate, backend = gated(num_free_steps=2)
    with service(max_batch_size=1, backend=backend) as lm:
        with lm.submit("a", max_new_tokens=290) as handle:
            next(handle)
        gate.is_open.set()
        assert handle.result(30).finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"temperature": -1}, OptionError, "temperature is -1; it must be greater than or equal to 0"),
        ({"temprature": 1}, OptionError, "there is no option temprature; did you mean temperature?"),
        ({"max_new_tokens": 400}, CapacityError, "together more than the bundle's 300"),
        ({"stop_token_ids": [50]}, OptionError, "stop_token_ids names the token 50; the vocabulary has 50"),
        ({"logit_bias": {-1: 2.0}}, OptionError, "logit_bias names the token -1"),
        ({"n": 0}, OptionError, "n is 0"),
    ],
)
def test_a_bad_option_is_refused_before_any_work(fields, error, message) -> None:
    with service() as lm:
        with pytest.raises(error, match=message):
            lm.submit("abc", **fields)
        assert lm.engine.backend.steps == []
        with pytest.raises(OptionError, match="the prompt is empty"):
            lm.generate_batch(["a", ""])
        with pytest.raises(OptionError, match="there is no prompt"):
            lm.generate_batch([])
        assert lm.engine.backend.steps == []


def test_statistics_of_a_request() -> None:
    with service() as lm:
        stats = lm.generate("abc", max_new_tokens=40).stats
    assert (stats.num_prompt_tokens, stats.num_generated_tokens, stats.num_decoded_tokens) == (3, 40, 39)
    assert stats.num_accepted_tokens == sum(stats.accepted_by_depth)
    assert stats.num_draft_tokens == sum(stats.drafted_by_depth)
    assert all(0 <= share <= 1 for share in stats.acceptance_by_depth)
    assert stats.acceptance_by_depth == sorted(stats.acceptance_by_depth, reverse=True)
    assert stats.first_token_seconds == stats.queue_seconds + stats.prefill_seconds > 0
    assert 0 < stats.seconds_per_token < stats.decode_seconds
    assert stats.engine_seconds <= stats.decode_seconds


def test_nothing_is_lost_hung_or_wrong_in_a_storm() -> None:
    """Requests with random lengths, cancellations and bad options; `bench/soak.py` sends ten thousand to a real model."""
    from bench.soak import Storm, expectations

    prompts = ["".join(random.Random(seed).choices(LETTERS, k=1 + seed % 20)) for seed in range(60)]
    with service(max_batch_size=1, reuse_prefixes=False) as alone:
        expected = expectations(alone, prompts, longest=40, seed=1)
    with service(max_batch_size=6, max_queue=6) as lm:
        outcome = Storm(lm, expected).run(num_requests=400, seed=1)
    assert outcome["wrong"] == outcome["hung"] == outcome["failed"] == 0
    assert min(outcome[name] for name in ("completed", "cancelled", "dropped", "refused_options", "refused_queue")) > 5
    assert (outcome["slots_in_use"], outcome["waiting"]) == (0, 0)
