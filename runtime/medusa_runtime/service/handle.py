"""The handle of a request: it gives the chunks as they come, or the result, and cancels the request."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from medusa_runtime.decoding.checks import DecodingRequest
from medusa_runtime.drafting.guide import Guide
from medusa_runtime.errors import ClosedError, MedusaError, OptionError
from medusa_runtime.service.answer import Answer
from medusa_runtime.service.results import GenerationChunk, GenerationResult
from medusa_runtime.text.codec import TextCodec


@dataclass
class Request:
    """A request that was checked, ready to be decoded."""

    decoding: DecodingRequest
    guides: list[Guide | None]  # one per answer
    stop: Sequence[str] = ()
    special_stops: Mapping[int, str] = field(default_factory=dict)  # stop texts that are special tokens, by token
    since: float = field(default_factory=time.perf_counter)  # when the request was made
    skip_special_tokens: bool = True  # leave them out of the text


class Job:
    """A request under way, shared by the worker and the handle."""

    def __init__(self, request: Request, codec: TextCodec) -> None:
        self.request = request
        self.answers = [
            Answer(
                index,
                codec,
                stop=request.stop,
                special_stops=request.special_stops,
                with_logprobs=request.decoding.options.logprobs is not None,
                skip_special_tokens=request.skip_special_tokens,
            )
            for index in range(len(request.guides))
        ]
        self.chunks: deque[GenerationChunk] = deque()
        self.error: MedusaError | None = None
        self.is_done = False
        self.news = threading.Condition()
        self.wakes: set[Callable[[], object]] = set()  # they wake the event loops that wait
        self._process = os.getpid()

    def tell(self, chunk: GenerationChunk | None = None, error: MedusaError | None = None) -> None:
        """Hand out a chunk or an error, and note whether it is the last."""
        with self.news:
            if chunk is not None:
                self.chunks.append(chunk)
            self.error = self.error or error
            self.is_done = self.error is not None or all(answer.finish_reason is not None for answer in self.answers)
            self.news.notify_all()
            wakes = list(self.wakes)
        for wake in wakes:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so it no longer waits
                wake()

    def require_same_process(self) -> None:
        """Refuse to wait in a forked process, which lacks the thread that decodes."""
        if os.getpid() != self._process:
            raise ClosedError("this request was made before a fork, in another process; ask for its result there")


class Handle:
    """A request that was submitted.

    Iterate over it with `for` or `async for` to get the chunks as they come, each once; or ask for the result. A handle that
    is dropped before its request is done cancels the request. So does leaving its `with` or `async with`.
    """

    def __init__(self, job: Job, cancel: Callable[[Job], None]) -> None:
        self.owner: object = None  # kept alive as long as this handle
        self._job = job
        self._cancel = weakref.finalize(self, cancel, job)
        self._cancel.atexit = False

    @property
    def is_done(self) -> bool:
        """Whether the request has ended."""
        return self._job.is_done

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids, as the request is decoded."""
        return list(self._job.request.decoding.prompt_ids)

    def cancel(self) -> None:
        """End the request before its next step. Its result is the answer so far. If it is done already, nothing happens."""
        self._cancel()

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait until the request is done.

        Args:
            timeout: the longest wait in seconds; None or infinity for no limit.

        Raises:
            TimeoutError: it was not done in time. It goes on.
            RequestError: it failed.
            ClosedError: its service was closed.
            OptionError: the timeout is not a number of at least 0.
        """
        seconds = _checked_timeout(timeout)
        job = self._job
        job.require_same_process()
        with job.news:
            if not job.news.wait_for(lambda: job.is_done, seconds):
                raise TimeoutError(f"the request is not done after {timeout} s")
        return self._whole()

    async def aresult(self, *, cancels: bool = True) -> GenerationResult:
        """As `result`, for asyncio.

        Args:
            cancels: whether the request is cancelled if the task is cancelled while it waits here. If not, the request goes
                on, and `aresult` can be called again.
        """
        import asyncio  # noqa: PLC0415 - only callers of asyncio need it

        try:
            await self._wait(lambda: self._job.is_done)
        except asyncio.CancelledError:
            if cancels:
                self.cancel()
            raise
        return self._whole()

    def __iter__(self) -> Iterator[GenerationChunk]:
        return self

    def __next__(self) -> GenerationChunk:
        job = self._job
        job.require_same_process()
        with job.news:
            job.news.wait_for(lambda: job.chunks or job.is_done)
            if job.chunks:
                return job.chunks.popleft()
        if job.error is not None:
            raise job.error.with_traceback(None)
        raise StopIteration

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        job = self._job
        try:
            while True:
                await self._wait(lambda: bool(job.chunks) or job.is_done)
                if not job.chunks:
                    break
                yield job.chunks.popleft()
        finally:
            self.cancel()
        if job.error is not None:
            raise job.error.with_traceback(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def _wait(self, ready: Callable[[], bool]) -> None:
        import asyncio  # noqa: PLC0415 - only callers of asyncio need it

        self._job.require_same_process()
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(event.set)

        try:
            while True:
                with self._job.news:
                    self._job.wakes.add(wake)
                    if ready():
                        return
                await event.wait()
                event.clear()
        finally:
            with self._job.news:
                self._job.wakes.discard(wake)

    def _whole(self) -> GenerationResult:
        job = self._job
        if job.error is not None:
            raise job.error.with_traceback(None)
        first = job.answers[0].sequence
        scores = first.prompt_logprobs if first is not None and first.options.prompt_logprobs is not None else None
        return GenerationResult([answer.choice() for answer in job.answers], list(job.request.decoding.prompt_ids), scores)


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is None or timeout == math.inf:
        return None
    if not isinstance(timeout, int | float) or not timeout >= 0:
        raise OptionError(f"the timeout is {timeout!r}; it must be a number of seconds of at least 0, or None")
    return min(timeout, threading.TIMEOUT_MAX)
