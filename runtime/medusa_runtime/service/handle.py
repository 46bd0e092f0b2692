"""What a caller holds of a request: its chunks as they come, its result, and the way to cancel it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from medusa_runtime.errors import MedusaError
from medusa_runtime.service.answer import Answer, Request
from medusa_runtime.service.results import GenerationChunk, GenerationResult
from medusa_runtime.text.codec import TextCodec


class Job:
    """A request under way, shared by the worker and the handle."""

    def __init__(self, request: Request, codec: TextCodec) -> None:
        self.request = request
        self.answers = [Answer(index, codec, request.options) for index in range(request.options.n)]
        self.chunks: deque[GenerationChunk] = deque()
        self.error: MedusaError | None = None
        self.is_done = False
        self.news = threading.Condition()
        self.wakes: set[Callable[[], object]] = set()  # of event loops that wait

    def tell(self, chunk: GenerationChunk | None = None, error: MedusaError | None = None) -> None:
        """Hand something out, and note where nothing more will come."""
        with self.news:
            if chunk is not None:
                self.chunks.append(chunk)
            self.error = self.error or error
            self.is_done = self.error is not None or all(answer.finish_reason is not None for answer in self.answers)
            self.news.notify_all()
            wakes = list(self.wakes)
        for wake in wakes:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                wake()


class Handle:
    """A request that was submitted: its chunks as they come, its result, and the way to cancel it.

    Iterate over it, with `for` or with `async for`, or ask for the result; each chunk is given out once. A handle that is
    dropped before its request is done cancels it. So does leaving its `with`.
    """

    def __init__(self, job: Job, cancel: Callable[[Job], None]) -> None:
        self.owner: object = None  # what must live as long as this
        self._job = job
        self._cancel = weakref.finalize(self, cancel, job)
        self._cancel.atexit = False

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be decided."""
        return self._job.is_done

    def cancel(self) -> None:
        """Have the request end before its next step; its result then is what there is. Nothing happens where it is done."""
        self._cancel()

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait until the request is done.

        Args:
            timeout: seconds; none to wait as long as it takes.

        Raises:
            TimeoutError: it was not done in time. It goes on.
            RequestError: it failed.
            ClosedError: its service was closed.
        """
        with self._job.news:
            if not self._job.news.wait_for(lambda: self._job.is_done, timeout):
                raise TimeoutError(f"the request is not done after {timeout} s")
        return self._whole()

    async def aresult(self) -> GenerationResult:
        """As `result`, without a thread that waits. A task that is cancelled here cancels the request."""
        try:
            await self._wait(lambda: self._job.is_done)
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._whole()

    def __iter__(self) -> Iterator[GenerationChunk]:
        return self

    def __next__(self) -> GenerationChunk:
        job = self._job
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

    async def _wait(self, ready: Callable[[], bool]) -> None:
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
        if self._job.error is not None:
            raise self._job.error.with_traceback(None)
        with_logprobs = self._job.request.options.logprobs is not None
        return GenerationResult([answer.choice(with_logprobs=with_logprobs) for answer in self._job.answers])
