"""The ASGI application: routes, what stands before them, and the life of the model."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from medusa_serve.endpoints import service
from medusa_serve.endpoints.chat import chat_completions
from medusa_serve.endpoints.completions import completions
from medusa_serve.endpoints.responses import responses
from medusa_serve.endpoints.tokens import detokenize, tokenize
from medusa_serve.errors import ApiError
from medusa_serve.guards.keys import Keys
from medusa_serve.observers import Observers
from medusa_serve.page import routes
from medusa_serve.recorder import FILES, Doors, Errors, Recorder
from medusa_serve.settings import ServerSettings
from medusa_serve.state import ServedBundle, ServerState

API = (  # what needs a key
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/models", service.models, methods=["GET"]),
    Route("/v1/models/{name:path}", service.model, methods=["GET"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
)
OPEN = (
    Route("/health", service.health, methods=["GET"]),
    Route("/ready", service.ready, methods=["GET"]),
    Route("/version", service.version, methods=["GET"]),
    Route("/openapi.json", service.openapi, methods=["GET"]),
    Route("/metrics", service.metrics, methods=["GET"]),
)
NUM_THREADS = 8  # that read prompts; see `ServerState.turn`
log = logging.getLogger(__name__)


def create_app(settings: ServerSettings, served: ServedBundle, *, on_failure: Callable[[], None] = lambda: None) -> Starlette:
    """The application of a server. It loads the model once it is started, and lets it go when it is stopped.

    ``app.state.server`` is its `ServerState`.

    Args:
        settings: the operator's.
        served: the bundle.
        on_failure: called if the model cannot be loaded.

    Raises:
        OptionError: the file of API keys, or the access log, cannot be used.
        MissingExtraError: traces are asked for, and OpenTelemetry is not installed.
    """
    keys = Keys.from_file(settings.api_key_file) if settings.api_key_file is not None else Keys()
    shown = routes() if settings.page else []
    paths = [*(route.path for route in (*API, *OPEN)), "/", FILES]
    app = Starlette(routes=[*API, *OPEN, *shown], exception_handlers={HTTPException: _no_route}, lifespan=_lifespan(on_failure))
    state = app.state.server = ServerState(settings, served)
    observers = app.state.observers = Observers.open(state, paths)
    app.router.redirect_slashes = False
    app.state.is_loading = False  # at the end: the thread that loads the model still runs
    open_paths = [route.path for route in (*OPEN, *shown)]
    app.user_middleware = [
        Middleware(Recorder, paths=paths, is_ending=lambda: state.is_ending, report=observers.report),
        *_cors(settings),
        Middleware(Errors, with_texts=settings.log_texts),
        Middleware(Doors, trusted_hosts=settings.trusted_hosts, keys=keys, open_paths=open_paths),
    ]
    return app


def _cors(settings: ServerSettings) -> list[Middleware]:
    if not settings.cors_origin:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # OpenAI's client for browsers sends many of its own
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    ]


def _lifespan(on_failure: Callable[[], None]) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        """Load the model beside the event loop, so that /health and /ready answer meanwhile."""
        state: ServerState = app.state.server

        async def load() -> None:
            try:
                await state.load()
            except Exception:  # noqa: BLE001 - `state.failure` has it
                on_failure()

        asyncio.get_running_loop().set_default_executor(_threads())
        loading = asyncio.create_task(load())
        try:
            yield
        finally:
            app.state.is_loading = not loading.done()
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await state.close()
            await asyncio.to_thread(app.state.observers.close)

    return lifespan


def _threads() -> ThreadPoolExecutor:
    """Threads that have all been started, so that the process holds no more of them later."""
    pool, all_started = ThreadPoolExecutor(NUM_THREADS, "medusa-serve"), threading.Barrier(NUM_THREADS)
    for _ in range(NUM_THREADS):
        pool.submit(all_started.wait)
    return pool


async def _no_route(request: Request, error: Exception) -> Response:
    """Nothing is here, or not for this method."""
    assert isinstance(error, HTTPException)
    told = "there is nothing here" if error.status_code == 404 else f"this path does not take {request.method}"
    raise ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {told}", headers=dict(error.headers or {}))
