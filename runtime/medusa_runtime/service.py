"""Many requests on one engine: a thread that decodes, and handles through which answers come back."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Self

from medusa_runtime.engine import DecodingEngine
from medusa_runtime.errors import CapacityError, ClosedError, MedusaError, QueueFullError, RequestError, first_line
from medusa_runtime.options import GenerationOptions
from medusa_runtime.results import Choice, GenerationChunk, GenerationResult, ServiceStats
from medusa_runtime.sampling import Guide
from medusa_runtime.sequence import RANDOM_SEEDS, FinishReason, Sequence, SequenceStep, TokenLogprob
from medusa_runtime.stats import DecodingStats
from medusa_runtime.text import StopStrings, TextCodec, TextStream


@dataclass
class Request:
    """What a worker is asked to answer."""

    prompt_ids: list[int]
    options: GenerationOptions
    guides: list[Guide | None]  # one an answer


class _Answer:
    """One answer of a job: tokens become text, and stop strings end it."""

    def __init__(self, index: int, codec: TextCodec, options: GenerationOptions) -> None:
        self.index = index
        self.text, self.token_ids, self.logprobs = "", list[int](), list[TokenLogprob]()
        self.finish_reason: FinishReason | None = None
        self.sequence: Sequence | None = None
        self.is_counted = True  # among those under way
        self._stream = TextStream(codec)
        self._stops = StopStrings(options.stop)
        self._one_by_one = bool(options.stop)  # a stop string may end within a step

    def push(self, step: SequenceStep) -> GenerationChunk | None:
        """Take a step's tokens. None where the answer had ended before."""
        if self.finish_reason is not None:
            return None
        text, taken, stopped = "", 0, False
        for piece in [[token] for token in step.token_ids] if self._one_by_one else [step.token_ids]:
            certain, stopped = self._stops.push(self._stream.push(piece))
            text, taken = text + certain, taken + len(piece)
            if stopped:
                break
        reason: FinishReason | None = "stop" if stopped else step.finish_reason
        if reason is not None and not stopped:
            rest, stopped = self._stops.push(self._stream.finish())
            text += rest if stopped else rest + self._stops.finish()
        logprobs = step.logprobs[:taken] if step.logprobs is not None else None
        self.text, self.finish_reason = self.text + text, reason
        self.token_ids += step.token_ids[:taken]
        self.logprobs += logprobs or []
        return GenerationChunk(text, step.token_ids[:taken], min(step.num_accepted, taken), reason, self.index, logprobs)

    def choice(self, *, with_logprobs: bool) -> Choice:
        """The whole answer, once it has ended."""
        assert self.sequence is not None
        assert self.finish_reason is not None
        logprobs = self.logprobs if with_logprobs else None
        return Choice(self.text, self.token_ids, self.finish_reason, self.sequence.stats, self.sequence.seed, logprobs)


class _Job:
    """A request under way, shared by the worker and the handle."""

    def __init__(self, request: Request, codec: TextCodec) -> None:
        self.request = request
        self.answers = [_Answer(index, codec, request.options) for index in range(request.options.n)]
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

    def __init__(self, job: _Job, cancel: Callable[[_Job], None]) -> None:
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


@dataclass
class _Counts:
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    latency: DecodingStats = field(default_factory=DecodingStats)  # of the completed answers


class Worker:
    """The thread that decodes. It starts with the first request.

    Args:
        engine: this object's alone from the first request on.
        codec: turns tokens into text.
        max_queue: answers that may wait for a slot; further requests are refused.
    """

    def __init__(self, engine: DecodingEngine, codec: TextCodec, max_queue: int) -> None:
        self._engine, self._codec = engine, codec
        self._most = max_queue + engine.max_batch_size
        self._max_queue = max_queue
        self._changed = threading.Condition()  # guards all below
        self._inbox: deque[_Job] = deque()
        self._cancelled: deque[_Job] = deque()
        self._under_way: dict[int, tuple[_Job, _Answer]] = {}  # by sequence
        self._num_open = 0  # answers that have not ended
        self._counts = _Counts()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(self, request: Request) -> Handle:
        """Queue a request.

        Raises:
            QueueFullError: there are too many.
            CapacityError: it asks for more answers than there is ever room for.
            ClosedError: the worker is closed.
        """
        job, num_answers = _Job(request, self._codec), request.options.n
        with self._changed:
            if self._is_closed:
                raise ClosedError("this model is closed")
            if num_answers > self._most:
                raise CapacityError(f"n is {num_answers}; there is never room for more than {self._most} answers")
            if self._num_open + num_answers > self._most:
                self._counts.refused += 1
                raise QueueFullError(
                    f"{self._num_open} answers are under way and {num_answers} more were asked for, "
                    f"there is room for {self._most}: "
                    f"max_batch_size {self._most - self._max_queue} and max_queue {self._max_queue}"
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="medusa-runtime", daemon=True)
                thread.start()
                self._thread = thread
            self._num_open += num_answers
            self._inbox.append(job)
            self._changed.notify()
        return Handle(job, self._cancel)

    def stats(self) -> ServiceStats:
        """See `ServiceStats`."""
        with self._changed:
            counts, decoding = self._counts, DecodingStats()
            latency, completed = counts.latency, max(counts.completed, 1)
            decoding.add(self._engine.stats)
            num_active = self._engine.num_active
            return ServiceStats(
                num_waiting=max(self._num_open - num_active, 0),
                num_active=num_active,
                max_batch_size=self._engine.max_batch_size,
                num_completed=counts.completed,
                num_cancelled=counts.cancelled,
                num_failed=counts.failed,
                num_refused=counts.refused,
                queue_seconds=latency.queue_seconds / completed,
                first_token_seconds=latency.first_token_seconds / completed,
                seconds_per_token=latency.seconds_per_token,
                decoding=decoding,
            )

    def stop(self) -> None:
        """Refuse further requests, and have those under way end with `ClosedError`. It does not wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def join(self) -> None:
        """Wait for the thread to end, after `stop`."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _cancel(self, job: _Job) -> None:
        with self._changed:
            if not job.is_done:
                self._cancelled.append(job)
                self._changed.notify()

    def _run(self) -> None:
        error: MedusaError = ClosedError("this model was closed while the request was under way")
        try:
            while self._take_in():
                for sequence in self._engine.step():
                    self._hand_out(sequence)
        except Exception as failure:  # noqa: BLE001 - of the engine itself: nothing can go on, and nobody may wait for ever
            error = _told(failure)
        with self._changed:
            self._is_closed = True
            jobs = [*(job for job, _ in self._under_way.values()), *self._inbox]
            self._inbox.clear()
        for job in {id(job): job for job in jobs}.values():
            with contextlib.suppress(Exception):  # an engine that failed may fail again
                self._end(job, error)
            job.tell(error=error)

    def _take_in(self) -> bool:
        """Wait for work, and take what is new. Returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._inbox or self._cancelled or not self._engine.is_idle)
            started, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            is_closed = self._is_closed  # now: what comes later is refused, so nothing is left in the inbox
        for job in started:
            self._start(job)
        for job in cancelled:
            for sequence in [answer.sequence for answer in job.answers if answer.sequence is not None]:
                self._engine.cancel(sequence)
                self._hand_out(sequence)
        return not is_closed

    def _start(self, job: _Job) -> None:
        request, options = job.request, job.request.options
        if options.seed is None:  # one for all of its answers, so that it repeats them
            options = options.model_copy(update={"seed": secrets.randbelow(RANDOM_SEEDS)})
        try:
            for stream, (answer, guide) in enumerate(zip(job.answers, request.guides, strict=True)):
                answer.sequence = self._engine.add(request.prompt_ids, options, guide=guide, stream=stream)
                self._under_way[answer.sequence.id] = (job, answer)
        except Exception as error:  # noqa: BLE001 - the request's own; it was checked before, so this is rare
            self._end(job, _told(error))

    def _hand_out(self, sequence: Sequence) -> None:
        """Turn a sequence's steps into chunks. What goes wrong here is its request's alone."""
        if (found := self._under_way.get(sequence.id)) is None:
            return
        job, answer = found
        try:
            for step in sequence.take_steps():
                if step.finish_reason == "error":
                    raise sequence.error or RequestError("the request failed")
                if (chunk := answer.push(step)) is not None:
                    if chunk.finish_reason is not None:
                        self._engine.cancel(sequence, chunk.finish_reason)  # where a stop string ended it
                        self._close(answer, "cancelled" if chunk.finish_reason == "cancelled" else "completed")
                    job.tell(chunk)
        except Exception as error:  # noqa: BLE001 - such as a tokenizer that cannot decode
            self._end(job, _told(error))

    def _end(self, job: _Job, error: MedusaError) -> None:
        for answer in job.answers:
            if answer.sequence is not None:
                self._engine.cancel(answer.sequence)
            self._close(answer, "failed")
        job.tell(error=error)

    def _close(self, answer: _Answer, outcome: str) -> None:
        if answer.sequence is not None:
            self._under_way.pop(answer.sequence.id, None)
        with self._changed:
            if answer.is_counted:
                answer.is_counted = False
                self._num_open -= 1
                setattr(self._counts, outcome, getattr(self._counts, outcome) + 1)
                if outcome == "completed" and answer.sequence is not None:
                    self._counts.latency.add(answer.sequence.stats)


def _told(error: Exception) -> MedusaError:
    """An error as a caller is to see it."""
    if isinstance(error, MedusaError):
        return error
    told = RequestError(f"the request failed: {type(error).__name__}: {first_line(error)}")
    told.__cause__ = error
    return told
