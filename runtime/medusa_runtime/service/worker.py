"""Many requests on one engine: a thread that decodes, and handles through which answers come back."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import deque
from dataclasses import dataclass, field

from medusa_runtime.decoding.engine import DecodingEngine
from medusa_runtime.decoding.sequence import RANDOM_SEEDS, Sequence
from medusa_runtime.decoding.stats import DecodingStats
from medusa_runtime.errors import CapacityError, ClosedError, MedusaError, QueueFullError, RequestError, first_line
from medusa_runtime.service.answer import Answer, Request
from medusa_runtime.service.handle import Handle, Job
from medusa_runtime.service.results import ServiceStats
from medusa_runtime.text.codec import TextCodec


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
        self._inbox: deque[Job] = deque()
        self._cancelled: deque[Job] = deque()
        self._under_way: dict[int, tuple[Job, Answer]] = {}  # by sequence
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
        job, num_answers = Job(request, self._codec), request.options.n
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

    def _cancel(self, job: Job) -> None:
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

    def _start(self, job: Job) -> None:
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

    def _end(self, job: Job, error: MedusaError) -> None:
        for answer in job.answers:
            if answer.sequence is not None:
                self._engine.cancel(answer.sequence)
            self._close(answer, "failed")
        job.tell(error=error)

    def _close(self, answer: Answer, outcome: str) -> None:
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
