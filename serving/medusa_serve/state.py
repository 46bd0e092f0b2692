"""The state of a server: the model while it is loaded, used and let go, and the requests that are under way."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, cast

from medusa_runtime import Manifest, MedusaLM, MissingExtraError, OptionError, Placement, ServiceStats
from medusa_serve.errors import ApiError, not_ready
from medusa_serve.guards.body import Budget
from medusa_serve.prompts import Formats
from medusa_serve.settings import ServerSettings
from medusa_serve.telemetry import BuildInfo

Result = TypeVar("Result")
NUM_HEAVY = 2  # heavy requests that are read at a time
NUM_BODIES = 64  # of the largest size, for which there is room at a time
LAST_SECONDS = 5  # for the last events to reach their clients, once requests are ended
Phase = Literal["loading", "ready", "draining", "failed"]
log = logging.getLogger(__name__)


class Stoppable(Protocol):
    """Answers under way."""

    def stop(self, error: ApiError) -> None:
        """End them; their client is told why."""


@dataclass(frozen=True)
class ServedBundle:
    """The bundle of a server: what is known of it before it is loaded, and how it is loaded."""

    manifest: Manifest
    placement: Placement
    load: Callable[[], MedusaLM]  # called once, in a thread of its own

    def __post_init__(self) -> None:
        if not self.manifest.has_text:
            raise OptionError(f"{self.manifest.model.name} has no tokenizer, and clients send text; it cannot be served")


class Turn:
    """A heavy request's turn to be read.

    Args:
        release: lets the next one have its turn.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._is_over = False

    def end(self) -> None:
        """The request has been read. This may be called again."""
        if not self._is_over:
            self._is_over = True
            self._release()


class ServerState:
    """What all endpoints share.

    Args:
        settings: the operator's.
        served: the bundle.
    """

    def __init__(self, settings: ServerSettings, served: ServedBundle) -> None:
        self.settings, self.served, self.manifest = settings, served, served.manifest
        self.phase: Phase = "loading"
        self.since = time.time()  # when the server was started
        self.version = importlib.metadata.version("medusa-export")
        self.failure: BaseException | None = None  # why the model could not be loaded
        self._lm: MedusaLM | None = None
        self._formats = Formats(None, None)
        self._under_way: set[Stoppable] = set()
        self._num_begun = 0  # requests that were taken, and whose answers are not under way yet
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped: ApiError | None = None  # why no answer goes on
        self.bodies = Budget(NUM_BODIES * settings.max_body_bytes)
        self._heavy = asyncio.Semaphore(NUM_HEAVY)
        self._opening = threading.Lock()  # guards the two below, which the thread that loads uses
        self._loaded: MedusaLM | None = None
        self._is_closed = False

    async def load(self) -> None:
        """Load the model and warm it up. If that fails, the phase is "failed".

        The thread that loads cannot be stopped. If this is cancelled, the thread goes on, and closes the model.
        """
        try:
            self._lm = await in_daemon(self._opened)
            self._formats = Formats.of(self._lm, self.settings)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.failure, self.phase = error, "failed"
            raise
        if self.phase == "loading":
            self.phase = "ready"

    def _opened(self) -> MedusaLM:
        lm = self.served.load()
        try:
            warm_up(lm)
        except BaseException:
            lm.close()
            raise
        with self._opening:
            self._loaded = lm
            is_closed = self._is_closed
        if is_closed:
            lm.close()
        return lm

    @property
    def lm(self) -> MedusaLM:
        """The model.

        Raises:
            ApiError: it is not loaded yet, or the server takes no requests any more.
        """
        if self.phase == "draining":
            raise not_ready("the server is shutting down; use another one")
        if self._lm is None:
            raise not_ready("the model is being loaded" if self.phase == "loading" else "the model could not be loaded")
        return self._lm

    @property
    def formats(self) -> Formats:
        """How the model writes calls and reasoning."""
        return self._formats

    @property
    def name(self) -> str:
        """The name of the model in responses and metrics."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which requests may ask for the model."""
        return self.settings.served_model_name or (self.manifest.model.name,)

    def why_not_alive(self) -> str | None:
        """Why the process should be replaced; None if it should not."""
        if self.phase == "failed":
            return f"the model could not be loaded: {self.failure}"
        return None if self._lm is None else self._lm.health().why_not

    def why_not_ready(self) -> str | None:
        """Why requests are not taken now; None if they are."""
        if (why := self.why_not_alive()) is not None:
            return why
        return {"loading": "the model is being loaded", "draining": "the server is shutting down"}.get(self.phase)

    def stats(self) -> ServiceStats | None:
        """The counts of the model; None while it is not loaded."""
        return None if self._lm is None else self._lm.stats()

    def build(self) -> BuildInfo | None:
        """What is run, for the metrics; None while the model is not loaded."""
        if self._lm is None:
            return None
        where = self.served.placement
        return BuildInfo(self.version, where.backend, where.processor or where.device, self.manifest.content_digest())

    @property
    def is_ending(self) -> bool:
        """Whether the server is shutting down."""
        return self.phase == "draining" or self._stopped is not None

    @property
    def num_under_way(self) -> int:
        """Requests for answers that have not ended."""
        return len(self._under_way)

    @contextmanager
    def under_way(self, answers: Stoppable) -> Iterator[None]:
        """Count answers among those under way. If the server has ended all answers meanwhile, it ends these."""
        self._under_way.add(answers)
        self._idle.clear()
        if self._stopped is not None:
            answers.stop(self._stopped)
        try:
            yield
        finally:
            self._under_way.discard(answers)
            self._note_idle()

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Count a request that was taken, so that the server does not end before its answers are under way."""
        self._num_begun += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_begun -= 1
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._under_way and not self._num_begun:
            self._idle.set()

    async def turn(self) -> Turn:
        """Wait until a heavy request may be read. Few are read at a time: so they take neither all threads nor all memory."""
        await self._heavy.acquire()
        return Turn(self._heavy.release)

    async def drain(self, grace: float) -> None:
        """Take no further requests, wait for those under way, and end those that are left after `grace` seconds."""
        self.phase = "draining"
        log.info("shutting down: %d requests under way have %g s to end", self.num_under_way, grace)
        if not await self._ended_within(grace):
            log.warning("%d requests did not end in %g s; they are ended now", self.num_under_way, grace)
            self.stop_all()
            await self._ended_within(LAST_SECONDS)

    async def _ended_within(self, seconds: float) -> bool:
        """Wait until no request is under way, but not for longer than this."""
        try:
            async with asyncio.timeout(seconds):
                while self._under_way or self._num_begun:
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def stop_all(self) -> None:
        """End all requests under way."""
        self._stopped = ApiError(503, "the server was shut down before the answer's end", code="shutdown")
        for answers in list(self._under_way):
            answers.stop(self._stopped)

    async def close(self) -> None:
        """Let the model go."""
        self.stop_all()
        with self._opening:
            self._is_closed, loaded = True, self._loaded
        if loaded is not None:
            await in_daemon(loaded.close)


async def in_daemon(work: Callable[[], Result]) -> Result:
    """Do some work in a thread that the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def tell(result: Result | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast("Result", result))

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:  # noqa: BLE001 - the caller gets it
            error = caught
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="medusa-serve-model", daemon=True).start()
    return await done


def warm_up(lm: MedusaLM) -> None:
    """Run what is slow the first time: steps of one and of several answers, the chat template, and a structure."""
    lm.warm_up((1, lm.stats().max_batch_size))
    kept = {"max_new_tokens": 1, "plain_content": True}
    lm.generate("warm", **kept)
    try:
        lm.generate("warm", choice=["a"], max_new_tokens=2)
    except MissingExtraError as error:
        log.warning("answers cannot have a structure: %s", error)
