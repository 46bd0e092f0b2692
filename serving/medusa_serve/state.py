"""The state of a server: the model while it is loaded, used and let go, and the requests that are under way."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from medusa_runtime import Manifest, MedusaLM, MissingExtraError, Placement, ServiceStats
from medusa_serve.errors import ApiError, not_ready
from medusa_serve.prompts import Formats
from medusa_serve.settings import ServerSettings
from medusa_serve.telemetry import BuildInfo

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
        self._idle = asyncio.Event()
        self._idle.set()

    async def load(self) -> None:
        """Load the model and warm it up. If that fails, the phase is "failed"."""
        try:
            self._lm = await asyncio.to_thread(self._opened)
            self._formats = Formats.of(self._lm, self.settings)
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
    def num_under_way(self) -> int:
        """Requests for answers that have not ended."""
        return len(self._under_way)

    @contextmanager
    def under_way(self, answers: Stoppable) -> Iterator[None]:
        """Count answers among those under way."""
        self._under_way.add(answers)
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way.discard(answers)
            if not self._under_way:
                self._idle.set()

    async def drain(self, grace: float) -> None:
        """Take no further requests, wait for those under way, and end those that are left after `grace` seconds."""
        self.phase = "draining"
        log.info("shutting down: %d requests under way have %g s to end", self.num_under_way, grace)
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            log.warning("%d requests did not end in %g s; they are ended now", self.num_under_way, grace)
            self.stop_all()

    def stop_all(self) -> None:
        """End all requests under way."""
        for answers in list(self._under_way):
            answers.stop(ApiError(503, "the server was shut down before the answer's end", code="shutdown"))

    async def close(self) -> None:
        """Let the model go."""
        self.stop_all()
        if self._lm is not None:
            await asyncio.to_thread(self._lm.close)


def warm_up(lm: MedusaLM) -> None:
    """Run what is slow the first time: steps of one and of several answers, the chat template, and a structure."""
    lm.warm_up((1, lm.stats().max_batch_size))
    kept = {"max_new_tokens": 1, "plain_content": True}
    lm.generate("warm", **kept)
    try:
        lm.generate("warm", choice=["a"], max_new_tokens=2)
    except MissingExtraError as error:
        log.warning("answers cannot have a structure: %s", error)
