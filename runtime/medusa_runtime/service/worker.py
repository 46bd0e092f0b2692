"""Many requests on one engine: a thread that decodes and hands out the answers."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import traceback
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from medusa_runtime.decoding.engine import DecodingEngine
from medusa_runtime.decoding.sequence import DecodingSequence, FinishReason
from medusa_runtime.decoding.stats import DecodingStats
from medusa_runtime.ending import before_the_end
from medusa_runtime.errors import (
    CapacityError,
    ClosedError,
    DeviceLostError,
    MedusaError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    first_line,
    is_failure,
)
from medusa_runtime.service.answer import Answer
from medusa_runtime.service.handle import Handle, Job, Request
from medusa_runtime.service.results import GenerationChunk, Health, ServiceStats
from medusa_runtime.text.codec import TextCodec

Outcome = Literal["completed", "cancelled", "overdue", "timed_out", "failed"]
OUTCOMES: dict[FinishReason, Outcome] = {"cancelled": "cancelled", "deadline": "overdue"}  # all others: completed
log = logging.getLogger(__name__)


@dataclass
class _Counts:
    completed: int = 0
    cancelled: int = 0
    overdue: int = 0
    timed_out: int = 0
    failed: int = 0
    refused: int = 0
    latency: DecodingStats = field(default_factory=DecodingStats)  # of the completed answers


class Worker:
    """The thread that decodes. It starts with the first request, and is stopped before the program ends.

    Args:
        engine: this object's alone from the first request on.
        codec: turns tokens into text.
        max_queue: answers that may wait for a slot; further requests are refused.
    """

    def __init__(self, engine: DecodingEngine, codec: TextCodec, max_queue: int) -> None:
        self._engine, self._codec = engine, codec
        self.most = max_queue + engine.max_batch_size  # answers under way at a time
        self._max_queue = max_queue
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # its lock guards all attributes below
        self._freed = threading.Condition(lock)  # an answer has ended
        self._inbox: deque[Job] = deque()
        self._cancelled: deque[Job] = deque()
        self._under_way: dict[int, tuple[Job, Answer]] = {}  # by sequence
        self._jobs: set[Job] = set()  # that are not done
        self._num_open = 0  # answers that have not ended yet
        self._counts = _Counts()
        self._thread: threading.Thread | None = None
        self._closed: str | None = None  # why no further request is taken
        self._lost: DeviceLostError | None = None  # after which no request can be answered
        self._since = time.time()  # when it was opened, or closed
        self._process = os.getpid()
        _open_workers.add(self)

    def submit(self, request: Request, *, waits: bool = False) -> Handle:
        """Queue a request.

        Args:
            request: a checked request.
            waits: whether to wait for room in the queue instead of raising `QueueFullError`.

        Raises:
            QueueFullError: there are too many requests.
            CapacityError: the request has more answers than there is ever room for.
            ClosedError: the worker is closed, has died, or belongs to another process.
        """
        self._require_same_process()
        job, num_answers = Job(request, self._codec), len(request.guides)
        if num_answers > self.most:
            raise CapacityError(f"n is {num_answers}; there is never room for more than {self.most} answers")
        with self._changed:
            if waits:
                self._freed.wait_for(lambda: self._why_closed() is not None or self._has_room(num_answers))
            if (why := self._why_closed()) is not None:
                raise ClosedError(why)
            if not self._has_room(num_answers):
                self._counts.refused += 1
                raise QueueFullError(
                    f"the queue is full: {self._num_open} of {self.most} answers under way (max_batch_size "
                    f"{self.most - self._max_queue} + max_queue {self._max_queue}), {num_answers} more requested; retry later"
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="medusa-runtime", daemon=True)
                thread.start()
                self._thread = thread
            self._num_open += num_answers
            self._jobs.add(job)
            self._inbox.append(job)
            self._changed.notify_all()
        return Handle(job, self._cancel)

    def stats(self) -> ServiceStats:
        """See `ServiceStats`.

        Raises:
            ClosedError: the worker belongs to another process.
        """
        self._require_same_process()
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
                num_overdue=counts.overdue,
                num_failed=counts.failed,
                num_timed_out=counts.timed_out,
                num_refused=counts.refused,
                queue_seconds=latency.queue_seconds / completed,
                first_token_seconds=latency.first_token_seconds / completed,
                seconds_per_token=latency.seconds_per_token,
                decoding=decoding,
                cache=self._engine.cache,
            )

    def health(self) -> Health:
        """See `Health`."""
        if not self.is_of_this_process:
            return Health(is_alive=False, why_not=FORKED, since=self._since)
        with self._changed:
            why = self._why_closed()
            return Health(is_alive=why is None, why_not=why, since=self._since)

    def stop(self) -> None:
        """Refuse further requests, and have those under way end with `ClosedError`. It does not wait.

        A finalizer may call it while this thread holds any lock.
        """
        if self.is_of_this_process:
            with self._changed:
                self._close_for("this model is closed")

    @property
    def is_of_this_process(self) -> bool:
        """Whether it was made here, and not in a process of which this one is a fork."""
        return os.getpid() == self._process

    def join(self) -> None:
        """Wait for the thread to end, after `stop`."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _why_closed(self) -> str | None:
        """Why no request is taken any more; None if requests are taken."""
        if self._closed is None and self._thread is not None and not self._thread.is_alive():
            self._close_for("the thread that decodes has died; open the model again")
        return self._closed

    def _close_for(self, why: str) -> None:
        if self._closed is None:
            self._closed, self._since = why, time.time()
        self._changed.notify_all()
        self._freed.notify_all()

    def _has_room(self, num_answers: int) -> bool:
        return self._num_open + num_answers <= self.most

    def _require_same_process(self) -> None:
        if not self.is_of_this_process:
            raise ClosedError(FORKED)

    def _cancel(self, job: Job) -> None:
        if not self.is_of_this_process:
            return
        with self._changed:
            if not job.is_done:
                self._cancelled.append(job)
                self._changed.notify_all()

    def _run(self) -> None:
        error: MedusaError = ClosedError("this model was closed while the request was under way")
        try:
            while self._take_in():
                for sequence in self._engine.step():
                    self._hand_out(sequence)
        except BaseException as failure:
            error = as_request_error(failure)
            log.exception("the thread that decodes has died; requests under way fail, and new ones are refused")
            with self._changed:
                self._close_for(f"the thread that decodes has died ({type(failure).__name__}: {first_line(failure)})")
        with self._changed:
            jobs = list(self._jobs)
            self._inbox.clear()
        for job in jobs:
            with contextlib.suppress(Exception):  # an engine that failed may fail again
                self._end(job, self._lost or error)
            job.tell(error=self._lost or error)

    def _take_in(self) -> bool:
        """Wait for work, and take new requests and cancellations. Returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._inbox or self._cancelled or not self._engine.is_idle)
            started, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            is_closed = self._closed is not None  # a later request is refused, so nothing is left in the inbox
        for job in started:
            self._start(job)
        for job in cancelled:
            for sequence in [answer.sequence for answer in job.answers if answer.sequence is not None]:
                self._engine.end(sequence)
                self._hand_out(sequence)
        return not is_closed

    def _start(self, job: Job) -> None:
        request = job.request
        try:
            for stream, (answer, guide) in enumerate(zip(job.answers, request.guides, strict=True)):
                answer.sequence = self._engine.begin(request.decoding, guide=guide, stream=stream, since=request.since)
                self._under_way[answer.sequence.id] = (job, answer)
        except Exception as error:  # noqa: BLE001 - the request's own; it was checked before, so this is rare
            self._end(job, as_request_error(error))

    def _hand_out(self, sequence: DecodingSequence) -> None:
        """Turn a sequence's steps into chunks. A failure in here ends this request and no other."""
        if (found := self._under_way.get(sequence.id)) is None:
            return
        job, answer = found
        try:
            for step in sequence.take_steps():
                if step.finish_reason == "error":
                    raise sequence.error or RequestError("the request failed")
                if (chunk := answer.push(step)) is None:
                    continue
                if chunk.finish_reason is not None:
                    if chunk.finish_reason == "stop" and step.finish_reason != "stop":  # a stop text ended it
                        self._engine.end(sequence, "stop", num_unused=len(step.token_ids) - len(chunk.token_ids))
                    self._close(answer, OUTCOMES.get(chunk.finish_reason, "completed"))
                self._tell(job, chunk)
        except BaseException as error:
            if not is_failure(error):
                raise
            self._end(job, as_request_error(error))

    def _end(self, job: Job, error: MedusaError) -> None:
        if isinstance(error, DeviceLostError):
            forget_frames(error)
            self._lost = error
            with self._changed:
                self._close_for(str(error))
        if not isinstance(error, ClosedError):
            log.warning("a request failed: %s", error)
        for answer in job.answers:
            if answer.sequence is not None:
                self._engine.end(answer.sequence)
            self._close(answer, "timed_out" if isinstance(error, QueueTimeoutError) else "failed")
        self._tell(job, error=error)

    def _tell(self, job: Job, chunk: GenerationChunk | None = None, error: MedusaError | None = None) -> None:
        job.tell(chunk, error)
        if job.is_done:
            with self._changed:
                self._jobs.discard(job)

    def _close(self, answer: Answer, outcome: Outcome) -> None:
        if answer.sequence is not None:
            self._under_way.pop(answer.sequence.id, None)
        with self._changed:
            if answer.is_counted:
                answer.is_counted = False
                self._num_open -= 1
                setattr(self._counts, outcome, getattr(self._counts, outcome) + 1)
                if outcome == "completed" and answer.sequence is not None:
                    self._counts.latency.add(answer.sequence.stats)
                self._freed.notify_all()


FORKED = "this model was opened before a fork, in another process: threads do not survive that; open it in each process"
_open_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@before_the_end
def _stop_all() -> None:
    """Stop all threads before the interpreter ends: one that is still inside a forward pass would abort the process."""
    workers = list(_open_workers)
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.join()


def forget_frames(error: BaseException | None) -> None:
    """Drop the local variables that an error's traceback keeps. Among them may be what lives on a lost device."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def as_request_error(error: BaseException) -> MedusaError:
    """The error that callers get: a `MedusaError` as it is, any other one as the cause of a `RequestError`."""
    if isinstance(error, MedusaError):
        return error
    told = RequestError(f"the request failed: {type(error).__name__}: {first_line(error)}")
    told.__cause__ = error
    return told
