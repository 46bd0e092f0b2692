"""The server as an application of Ray Serve: each replica runs the same ASGI application, with a model of its own.

serve run medusa_serve.ray_app:app bundle=/models/bundle num_replicas=2 threads=4
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa_runtime import Manifest, MedusaLM, choose_backend
from medusa_serve.app import create_app
from medusa_serve.errors import RETRY_SECONDS, not_ready
from medusa_serve.ray_settings import RaySettings
from medusa_serve.state import ServedBundle, ServerState
from medusa_serve.telemetry.replicas import exposition_of_all

NAME = "medusa"  # of the application and of its deployment
SPARE_REQUESTS = 16  # beyond batch and queue: metrics and the like, and requests that a replica refuses in OpenAI's way
POLL_SECONDS = 0.05
SCRAPE_SECONDS = 5.0  # how long /metrics waits for the other replicas
HEALTH_PERIOD, HEALTH_TIMEOUT = 2.0, 30.0  # seconds
STARTS = 3  # times that a replica may fail to start before Ray gives up


def app(args: RaySettings | dict[str, Any]) -> serve.Application:
    """The application, for `serve run`, for YAML files and for `serve.run`.

    Args:
        args: fields of `RaySettings`.

    Raises:
        ValidationError: a field is unknown, or has a value that it cannot have.
        BundleError: there is no bundle at the path.
    """
    settings = RaySettings.model_validate(args)
    settings = settings.model_copy(update={"bundle": settings.bundle.resolve()})
    Manifest.load(settings.bundle)  # an error here is easier to read than one of a replica
    deployment: serve.Deployment = serve.deployment(name=NAME, **deployment_options(settings))(serve.ingress()(Replica))
    return deployment.bind(settings)


def deployment_options(settings: RaySettings) -> dict[str, Any]:
    """What Ray Serve is told about replicas."""
    most = settings.batch_size + settings.max_queue + SPARE_REQUESTS
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": settings.threads or 1, "num_gpus": settings.gpus},
        "max_ongoing_requests": most,
        "max_queued_requests": most,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        "graceful_shutdown_timeout_s": settings.grace,
        "graceful_shutdown_wait_loop_s": min(1.0, settings.grace),
        "health_check_period_s": HEALTH_PERIOD,
        "health_check_timeout_s": HEALTH_TIMEOUT,
        "max_constructor_retry_count": STARTS,
        "logging_config": LoggingConfig(enable_access_log=False),  # the application writes its own
    }
    if not settings.threads and not settings.gpus:
        options["max_replicas_per_node"] = 1
    if settings.max_replicas is None:
        return options | {"num_replicas": settings.least_replicas}
    return options | {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.least_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing_requests or settings.batch_size,
        )
    }


class Replica:
    """One replica. Ray Serve calls its methods.

    Args:
        settings: the operator's.
    """

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self._app: Starlette | None = None
        self._siblings: Any = None  # a handle to all replicas, made at the first scrape

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application. Its start waits for the model, so Ray sends no requests before."""
        made = self._app = create_app(self._settings, served_bundle(self._settings))
        made.router.lifespan_context = _with_model(made)
        made.router.routes.insert(0, Route("/metrics", self._all_metrics, methods=["GET"]))
        made.user_middleware.insert(0, Middleware(BehindTheProxy, replica_id=serve.get_replica_context().replica_tag))
        return made

    def check_health(self) -> None:
        """Ray replaces a replica for which this fails several times.

        Raises:
            RuntimeError: the model cannot answer any more.
        """
        if self._app is not None and (why := _state(self._app).why_not_alive()) is not None:
            raise RuntimeError(why)

    def families(self) -> tuple[str, list[Metric]]:
        """The name of this replica, and its metrics."""
        assert self._app is not None
        return serve.get_replica_context().replica_tag, self._app.state.observers.metrics.families()

    async def _all_metrics(self, request: Request) -> Response:
        """The metrics of all replicas: the proxy sends a scrape to any of them."""
        if self._siblings is None:
            context = serve.get_replica_context()
            self._siblings = await asyncio.to_thread(serve.get_deployment_handle, context.deployment, context.app_name)
        try:
            asked = self._siblings.broadcast("families")
            found = await asked.results_async(timeout_s=SCRAPE_SECONDS, return_exceptions=True)
        except TimeoutError:
            return not_ready(f"a replica did not tell its metrics within {SCRAPE_SECONDS:g} s").response()
        told = dict(one for one in found if not isinstance(one, BaseException))  # those that fail are gone
        text, kind = exposition_of_all(told, request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": kind})


class BehindTheProxy:
    """What Ray's proxy makes different from a server of its own.

    The replica is named in the header X-Replica-Id of each response; the proxy itself adds X-Request-Id. When a client goes
    away, the proxy cancels its calls, so waiting for the next message of the request fails; the application is then told that
    the client has gone.

    Args:
        app: the layer below.
        replica_id: the name.
    """

    def __init__(self, app: ASGIApp, replica_id: str) -> None:
        self._app, self._replica_id = app, replica_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                del headers["x-request-id"]
                headers["x-replica-id"] = self._replica_id
            await send(message)

        async def receive_or_gone() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_gone, send_named)


def served_bundle(settings: RaySettings) -> ServedBundle:
    """The bundle of a replica, on the device that Ray gave it."""
    manifest = Manifest.load(settings.bundle)
    placement = choose_backend(manifest, settings.backend, "cuda" if settings.gpus else "cpu")

    def open_model() -> MedusaLM:
        return MedusaLM.from_bundle(
            settings.bundle,
            placement.backend,
            device=placement.device,
            max_batch_size=settings.max_batch_size,
            max_queue=settings.max_queue,
            num_threads=settings.threads,
            spin=settings.spin,
            allow_failed=settings.allow_failed,
            allow_engine_code=settings.allow_engine_code,
        )

    return ServedBundle(manifest, placement, open_model)


def _state(application: Starlette) -> ServerState:
    state: ServerState = application.state.server
    return state


def _with_model(made: Starlette) -> Any:
    """The application's own lifespan, which has begun only once the model is ready."""
    own = made.router.lifespan_context

    @asynccontextmanager
    async def lifespan(application: Starlette) -> AsyncIterator[None]:
        async with own(application):
            state = _state(application)
            while state.phase == "loading":
                await asyncio.sleep(POLL_SECONDS)
            if state.failure is not None:
                raise state.failure
            yield

    return lifespan
