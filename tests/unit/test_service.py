"""The service around the engine: many callers, threads and tasks, and what each of them may do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from medusa_runtime import (
    BackendError,
    CapacityError,
    ClosedError,
    DecodingEngine,
    DeviceLostError,
    DynamicTree,
    GenerationOptions,
    MedusaLM,
    OptionError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    StepCosts,
)
from medusa_runtime.backends.base import cache_entry_bytes
from tests.support.fake_backend import FakeBackend, fake_manifest, greedy, logits_after
from tests.support.logs import recorded
from tests.support.patience import PATIENCE

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
    lengths = {"a": 290} | {LETTERS[number]: 3 for number in range(1, 12)}
    backend = FakeBackend("never", fake_manifest(max_seq_len=300))
    backend.fails = lambda _: time.sleep(0.005)
    with service(max_batch_size=2, max_queue=0, backend=backend) as lm:
        requests = [lm._request(prompt, GenerationOptions(max_new_tokens=count)) for prompt, count in lengths.items()]
        handles = [lm._submit(request, waits=True) for request in requests]
        assert [handle.result(30).text for handle in handles[1:]] == [text_of(prompt, 3) for prompt in list(lengths)[1:]]
        assert not handles[0].is_done
        assert handles[0].result(30).text == text_of("a", 290)


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
        monkeypatch.setattr(lm.engine._slots, "release", lambda *_, **__: 1 / 0)
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


def test_a_lost_device_ends_all_requests_and_the_service() -> None:
    gate, backend = gated(num_free_steps=2)
    with service(backend=backend) as lm:
        handles = [lm.submit(letter, max_new_tokens=150) for letter in "ab"]
        assert gate.arrived.wait(30)

        def fail(_: FakeBackend) -> None:
            raise DeviceLostError("the device was lost; open the model again")

        backend.fails = fail
        gate.is_open.set()
        for handle in handles:
            with pytest.raises(DeviceLostError, match="open the model again"):
                handle.result(30)
        health = lm.health()
        assert (health.is_alive, health.why_not) == (False, "the device was lost; open the model again")
        with pytest.raises(ClosedError, match="the device was lost"):
            lm.generate("a", max_new_tokens=5)
        assert lm.stats().num_failed == 2


def test_a_lost_device_leaves_nothing_in_tracebacks() -> None:
    """What lived on the device must be gone before a new one is opened, even if the caller keeps the error."""
    backend = FakeBackend("never")
    buffers = []

    def fail(_: FakeBackend) -> None:
        buffer = np.zeros(3)
        buffers.append(weakref.ref(buffer))
        try:
            raise RuntimeError("gone")
        except RuntimeError as error:
            raise DeviceLostError("lost") from error

    backend.fails = fail
    with service(backend=backend) as lm, pytest.raises(DeviceLostError) as kept:
        lm.generate("a", max_new_tokens=5)
    assert str(kept.value) == "lost"
    assert buffers[0]() is None


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


# The life of the worker


def test_a_program_that_ends_while_it_decodes_ends_cleanly() -> None:
    """The thread that decodes is stopped first: killed inside a forward pass, it would abort the process."""
    program = """
import sys, time
from tests.support.fake_backend import FakeBackend, fake_manifest
from tests.unit.test_service import service
backend = FakeBackend("never", fake_manifest(max_seq_len=300))
backend.fails = lambda _: time.sleep(0.01)
lm = service(backend=backend)
for chunk in lm.stream("abc", max_new_tokens=290):
    print("a chunk", flush=True)
    {leave}
"""
    for leave, code in (("sys.exit(3)", 3), ("1 / 0", 1), ("raise KeyboardInterrupt", -signal.SIGINT)):
        done = subprocess.run(
            [sys.executable, "-c", program.format(leave=leave)], capture_output=True, timeout=PATIENCE, check=False
        )
        assert (done.stdout, done.returncode) == (b"a chunk\n", code)


class Panic(BaseException):
    """Like a panic of a library written in Rust: no `Exception`."""


def test_whatever_is_raised_on_the_thread_is_told_to_all_who_wait() -> None:
    with recorded() as records:
        tell_all_who_wait()
    assert [record.levelname for record in records].count("ERROR") == 1


def tell_all_who_wait() -> None:
    gate, backend = gated()
    lm = service(max_batch_size=1, backend=backend)
    handles = [lm.submit("a", max_new_tokens=count) for count in (3, 200)]
    assert gate.arrived.wait(30)

    def panic(_: FakeBackend) -> None:
        raise Panic("at the disco")

    backend.fails = panic
    gate.is_open.set()
    for handle in handles:
        with pytest.raises(RequestError, match="Panic: at the disco"):
            handle.result(30)
    with pytest.raises(ClosedError, match=r"the thread that decodes has died .Panic: at the disco"):
        lm.generate("a", max_new_tokens=3)
    health = lm.health()
    assert (health.is_alive, "at the disco" in health.why_not) == (False, True)
    assert health.since <= time.time()


def test_a_panic_in_one_requests_text_ends_it_alone() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with service() as lm:
        whole = lm.codec.decode
        lm.codec.decode = lambda ids: whole(ids) if LETTERS.index("Q") not in ids else (_ for _ in ()).throw(panic("no"))
        texts = {}
        for prompt in LETTERS[:20]:
            with contextlib.suppress(RequestError):
                texts[prompt] = lm.generate(prompt, max_new_tokens=30).text
        assert lm.health().is_alive
    assert 0 < len(texts) < 20
    assert texts == {prompt: text_of(prompt, 30) for prompt in texts}


def test_a_dead_thread_is_noticed() -> None:
    lm = service()
    lm.generate("a", max_new_tokens=3)
    lm._worker._thread = threading.Thread(target=int)  # never started, so it is not alive
    with pytest.raises(ClosedError, match="the thread that decodes has died"):
        lm.generate("a", max_new_tokens=3)
    assert not lm.health().is_alive


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_a_fork_is_refused() -> None:
    program = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from tests.unit.test_service import service, LETTERS
from medusa_runtime import ClosedError
lm = service()
handle = lm.submit("abc", max_new_tokens=5)
handle.result()
pid = os.fork()
if pid == 0:
    told = []
    for ask in (lambda: lm.generate("a"), lambda: handle.result(), lambda: next(lm.stream("a"))):
        try:
            ask()
        except ClosedError as error:
            told.append(str(error))
    print(len(told), lm.health().is_alive, told[0], flush=True)
    raise SystemExit
os.waitpid(pid, 0)
print(lm.generate("abc", max_new_tokens=5).finish_reason)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    first, last = done.stdout.splitlines()
    assert first.startswith("3 False this model was opened before a fork, in another process")
    assert last == "length"


def test_health_says_whether_requests_are_taken() -> None:
    before = time.time()
    lm = service()
    assert (lm.health().is_alive, lm.health().why_not) == (True, None)
    assert before <= lm.health().since <= time.time()
    lm.close()
    assert (lm.health().is_alive, lm.health().why_not) == (False, "this model is closed")


def test_failed_requests_are_logged_once_each() -> None:
    backend = FakeBackend("sometimes")

    def fail(_: FakeBackend) -> None:
        raise BackendError("the device is gone")

    backend.fails = fail
    with recorded() as records, service(backend=backend) as lm:
        for _ in range(2):
            with pytest.raises(BackendError):
                lm.generate("a", max_new_tokens=5)
    assert [record.getMessage() for record in records] == ["a request failed: the device is gone"] * 2


# State that outlives an error


def test_heads_without_numbers_cost_their_drafts_and_nothing_else() -> None:
    costs = StepCosts(
        [1, 8], [1, 4, 16], [64], [[[1.0, 1.1, 1.6], [1.5, 3.0, 9.0]]], [0.1, 0.3]
    )  # not this machine's: trees follow
    backend = FakeBackend("always", fake_manifest(max_seq_len=300))
    whole = backend.propose

    def propose(rows, root_ids):
        output = whole(rows, root_ids)
        for row, contexts in enumerate(backend.contexts):
            if LETTERS.index("z") in contexts[rows[row]]:
                output.log_probs[row] = np.nan
        return output

    backend.propose = propose
    with recorded() as records, service(backend=backend, costs=costs) as lm:
        before = lm.generate("abc", max_new_tokens=60).stats.tokens_per_step
        ill = lm.generate("z", max_new_tokens=60)
        after = [lm.generate("abc", max_new_tokens=60).stats.tokens_per_step for _ in range(3)]
    assert ill.text == text_of("z", 60)
    assert ill.stats.tokens_per_step == 1.0
    assert min(after) > 0.8 * before > 1.5
    assert sum("no numbers (NaN)" in record.getMessage() for record in records) == 1


def test_a_model_without_numbers_is_an_error_and_leaves_nothing_to_others() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=300))
    whole = backend.step

    def step(*args, **kwargs):
        output = whole(*args, **kwargs)
        finite = np.array([[len(row) <= 30 or row[0] != LETTERS.index("z") for row in rows] for rows in backend.contexts])
        return dataclasses.replace(output, finite=finite)

    backend.step = step
    prompt = "zabcdefghijklmnopqrst"
    with service(backend=backend, max_batch_size=2) as lm:
        beside = lm.submit("abc", max_new_tokens=50)
        with pytest.raises(BackendError, match="not finite"):
            lm.generate(prompt, max_new_tokens=60)
        assert beside.result(30).text == text_of("abc", 50)
        again = lm.generate(prompt, max_new_tokens=5)
        assert again.stats.num_cached_tokens == 0  # entries of an answer that failed are not used again
        with pytest.raises(BackendError, match="not finite"):
            lm.generate(prompt + "uvwxyzabcdefg" * 2, max_new_tokens=1)


@pytest.mark.parametrize("beside", [False, True])
def test_a_device_that_does_not_tell_whether_numbers_are_finite_is_found_out_by_its_heads(beside) -> None:
    """On GPUs, greedy decoding sees token ids alone. The heads read the model's numbers, so they have none either."""
    backend = FakeBackend("always", fake_manifest(max_seq_len=300))
    step, propose = backend.step, backend.propose

    def is_ill(context) -> bool:
        return context[0] == LETTERS.index("z") and len(context) > 30

    def ill_step(*args, **kwargs):
        output = step(*args, **kwargs)
        for row, contexts in enumerate(backend.contexts):
            for place in [place for place, context in enumerate(contexts) if is_ill(context)]:
                output.greedy_ids[row, place] = 0
                if output.logits is not None:
                    output.logits[row, place] = np.nan
        return output

    def ill_propose(rows, root_ids):
        output = propose(rows, root_ids)
        for row, contexts in enumerate(backend.contexts):
            if is_ill(contexts[rows[row]]):
                output.log_probs[row] = np.nan
        return output

    backend.step, backend.propose = ill_step, ill_propose
    prompt = "zabcdefghijklmnopqrst"
    with service(backend=backend, max_batch_size=2) as lm:
        other = lm.submit("abc", max_new_tokens=100) if beside else None
        with pytest.raises(BackendError, match="not finite"):
            lm.generate(prompt, max_new_tokens=60)
        assert lm.generate(prompt, max_new_tokens=5).stats.num_cached_tokens == 0
        with pytest.raises(BackendError, match="not finite"):
            lm.generate(prompt + "uvwxyzabcdefg", max_new_tokens=60)  # already in the prompt
        assert other is None or other.result(30).text == text_of("abc", 100)


def test_a_cache_that_cannot_shrink_stays() -> None:
    backend = FakeBackend("sometimes", fake_manifest(max_seq_len=2000))
    engine = DecodingEngine(backend, max_batch_size=2)
    whole = backend.resize

    def resize(num_slots, capacity, lengths=()):
        if capacity < backend.capacity:
            raise CapacityError("no memory")
        whole(num_slots, capacity, lengths)

    backend.resize = resize
    with MedusaLM(engine, LetterCodec()) as lm:
        lm.generate(list(range(40)) * 30, max_new_tokens=2)
        for _ in range(30):
            assert lm.generate("abc", max_new_tokens=4).text == text_of("abc", 4)


# Time and memory


def test_a_deadline_ends_an_answer_with_what_it_has() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=300))
    backend.fails = lambda _: time.sleep(0.01)
    with service(backend=backend) as lm:
        result = lm.generate("abc", max_new_tokens=290, deadline_seconds=0.3)
        stats = lm.stats()
    assert result.finish_reason == "deadline"
    assert 0 < len(result.token_ids) < 60
    assert text_of("abc", 290).startswith(result.text)
    assert (stats.num_overdue, stats.num_completed, stats.num_active) == (1, 0, 0)


def test_a_request_waits_no_longer_than_it_wants_to() -> None:
    backend = FakeBackend("never", fake_manifest(max_seq_len=300))
    backend.fails = lambda _: time.sleep(0.01)
    with service(max_batch_size=1, backend=backend) as lm:
        running = lm.submit("a", max_new_tokens=60)
        next(running)
        with pytest.raises(QueueTimeoutError, match=r"waited 0.1 s for a slot"):
            lm.generate("b", max_new_tokens=5, max_queue_seconds=0.1)
        assert lm.generate("c", max_new_tokens=5, max_queue_seconds=30).text == text_of("c", 5)
        assert running.result(30).text == text_of("a", 60)
        stats = lm.stats()
    assert (stats.num_timed_out, stats.num_failed, stats.num_completed) == (1, 0, 2)


def test_a_free_slot_is_not_refused_however_short_the_wait_may_be() -> None:
    prompt = "abcdefghij" * 8
    with service(max_batch_size=2) as lm:
        one = lm.generate(prompt, max_new_tokens=5, max_queue_seconds=0)
        lm.generate("k" * 80, max_new_tokens=1)
        both = lm.generate(prompt[::-1], max_new_tokens=5, max_queue_seconds=0, n=2)  # the second waits for the first's prompt
        assert lm.stats().num_timed_out == 0
    assert one.text == text_of(prompt, 5)
    assert [choice.text for choice in both.choices] == [text_of(prompt[::-1], 5)] * 2


def test_the_wait_before_the_worker_looks_counts() -> None:
    gate, backend = gated()
    with service(max_batch_size=1, backend=backend) as lm:
        begun = time.perf_counter()
        first, second = lm.submit("a", max_new_tokens=3), lm.submit("b", max_new_tokens=3)
        assert gate.arrived.wait(30)
        arrived = time.perf_counter() - begun
        third = lm.submit("c", max_new_tokens=3)  # the worker is inside a step, and does not look
        time.sleep(0.3)
        gate.is_open.set()
        waits = [handle.result(30).stats.queue_seconds for handle in (first, second, third)]
    assert waits[0] <= arrived
    assert min(waits[1:]) >= 0.3


def test_answers_that_need_more_cache_than_there_is_wait_for_each_other() -> None:
    manifest = fake_manifest(max_seq_len=300)
    entry = cache_entry_bytes(manifest)
    backend = FakeBackend("sometimes", manifest)
    prompts = ["abc", "bcd", "cde"]
    with service(max_batch_size=3, backend=backend, max_cache_bytes=entry * 3 * 128) as lm:
        handles = [lm.submit(prompt, max_new_tokens=200) for prompt in prompts]
        results = [handle.result(60) for handle in handles]
        stats = lm.stats()
    assert [result.text for result in results] == [text_of(prompt, 200) for prompt in prompts]
    assert (stats.num_failed, stats.num_completed) == (0, 3)
    assert stats.decoding.num_preemptions == sum(result.stats.num_preemptions for result in results) > 0
    assert len(backend.entries) * 256 <= 3 * 128  # all three slots did not fit together
    with service(max_batch_size=3, max_cache_bytes=entry * 64) as lm, pytest.raises(CapacityError, match="max_cache_bytes"):
        lm.generate("abc", max_new_tokens=200)


# Prompts and results


def test_token_ids_are_a_prompt() -> None:
    with service() as lm:
        result = lm.generate([0, 1, 2], max_new_tokens=9)
        batch = lm.generate_batch([[0, 1, 2], "abc"], max_new_tokens=9)
    assert (result.text, result.prompt_ids) == (text_of("abc", 9), [0, 1, 2])
    assert [one.text for one in batch] == [text_of("abc", 9)] * 2


def test_token_ids_may_be_numpys() -> None:
    with service() as lm:
        result = lm.generate(list(np.array([0, 1, 2])), max_new_tokens=9)
    assert (result.text, result.prompt_ids) == (text_of("abc", 9), [0, 1, 2])
    assert {type(token) for token in result.prompt_ids} == {int}


@pytest.mark.parametrize("prompts", ["hello", [1, 2], list(np.array([1, 2])), [{"role": "user", "content": "a"}]])
def test_one_prompt_is_no_batch(prompts) -> None:
    with service() as lm, pytest.raises(OptionError, match="generate_batch takes a list of prompts"):
        lm.generate_batch(prompts)


def test_a_prompt_is_scored() -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    with service() as lm:
        lm.generate(prompt, max_new_tokens=1)  # its entries are cached now, but scoring reads all
        scored = lm.generate(prompt, max_new_tokens=0, prompt_logprobs=2)
        both = lm.generate(prompt * 20, max_new_tokens=4, prompt_logprobs=0, logprobs=0)
    assert (scored.token_ids, scored.finish_reason, scored.text) == ([], "length", "")
    assert [one.token_id for one in scored.prompt_logprobs] == prompt[1:]
    for place, one in enumerate(scored.prompt_logprobs, start=1):
        logits = logits_after(prompt[:place])
        expected = logits - np.log(np.exp(logits).sum())
        assert one.logprob == pytest.approx(float(expected[prompt[place]]), abs=1e-4)
        assert [token for token, _ in one.top] == np.argsort(-logits)[:2].tolist()
    assert len(both.prompt_logprobs) == 159
    assert both.token_ids == greedy(prompt * 20, 4)
    assert len(both.logprobs) == 4


def test_a_stop_token_is_told_and_is_no_part_of_the_text() -> None:
    whole = greedy([0, 1, 2], 40)
    stop = whole[10]
    end = whole.index(stop)
    with service() as lm:
        result = lm.generate("abc", max_new_tokens=40, stop_token_ids=[stop])
        cut = lm.generate("abc", max_new_tokens=5)
    assert result.token_ids == whole[: end + 1]
    assert result.text == "".join(LETTERS[token] for token in whole[:end])
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert (cut.finish_reason, cut.stop_reason) == ("length", None)


def test_a_stop_text_that_is_a_special_token_stops() -> None:
    class Special(LetterCodec):
        def special_token_id(self, text):
            return 7 if text == "<|end|>" else None

    whole = greedy([0, 1, 2], 200)
    end = whole.index(7)
    backend = FakeBackend("sometimes", fake_manifest(max_seq_len=300))
    with MedusaLM(DecodingEngine(backend), Special()) as lm:
        result = lm.generate("abc", max_new_tokens=200, stop=["<|end|>", "no such text"])
    assert (result.finish_reason, result.stop_reason) == ("stop", "<|end|>")
    assert result.token_ids == whole[: end + 1]
    assert result.text == "".join(LETTERS[token] for token in whole[:end])


@pytest.mark.parametrize("timeout", [-1, float("nan"), "2"])
def test_a_timeout_is_a_number_of_seconds(timeout) -> None:
    with service() as lm:
        handle = lm.submit("abc", max_new_tokens=3)
        with pytest.raises(OptionError, match="the timeout is"):
            handle.result(timeout)
        assert handle.result(float("inf")).text == handle.result(1e12).text == text_of("abc", 3)


def test_warming_up_decodes() -> None:
    with service(max_batch_size=3) as lm:
        lm.warm_up([1, 3])
        assert lm.stats().num_completed == 4
        assert max(batch for batch, _ in lm.engine.backend.steps) == 3


@pytest.mark.parametrize("batch_sizes", [3, "1", [0], [4], [1, 2.0]])
def test_a_batch_that_cannot_be_is_not_warmed_up(batch_sizes) -> None:
    with service(max_batch_size=3) as lm:
        with pytest.raises(OptionError, match="batch_sizes"):
            lm.warm_up(batch_sizes)
        assert not lm.engine.backend.steps


# asyncio


def test_preparing_a_request_does_not_stop_the_event_loop() -> None:
    class Slow(LetterCodec):
        def encode(self, prompt, **_):
            time.sleep(0.5)
            return super().encode(prompt)

    async def run(lm: MedusaLM) -> tuple[int, list[str]]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        result = await lm.agenerate("abc", max_new_tokens=3)
        text = "".join([chunk.text async for chunk in lm.astream("abc", max_new_tokens=3)])
        ticking.cancel()
        return ticks, [result.text, text]

    with MedusaLM(DecodingEngine(FakeBackend()), Slow()) as lm:
        ticks, texts = asyncio.run(run(lm))
    assert texts == [text_of("abc", 3)] * 2
    assert ticks > 30


def test_a_wait_that_is_cancelled_can_leave_the_request_running() -> None:
    async def run() -> str:
        async with service() as lm:
            async with await lm.asubmit("abc", max_new_tokens=200) as handle:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(handle.aresult(cancels=False), 1e-9)
                result = await handle.aresult()
            assert (await lm.agenerate("a", max_new_tokens=1)).text
        with pytest.raises(ClosedError):
            lm.submit("a")
        return result.text

    assert asyncio.run(run()) == text_of("abc", 200)


def test_closing_from_two_threads_closes_the_backend_in_turn() -> None:
    backend, inside, most = FakeBackend(), [], []

    def close() -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()

    backend.close = close
    lm = service(backend=backend)
    with ThreadPoolExecutor(3) as threads:
        for closing in [threads.submit(lm.close) for _ in range(3)]:
            closing.result()
    assert max(most) == 1
