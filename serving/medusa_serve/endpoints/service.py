"""What is asked about the server itself: `/health`, `/ready`, `/version`, `/metrics` and `/v1/models`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from medusa_serve.errors import ApiError, not_ready
from medusa_serve.protocol.openapi import describe
from medusa_serve.state import ServerState


async def health(request: Request) -> JSONResponse:
    """Whether the process is of use: 503 if it should be replaced. A model that is still loading is of use."""
    state: ServerState = request.app.state.server
    why = state.why_not_alive()
    return JSONResponse({"status": "ok" if why is None else "failed", "reason": why}, 200 if why is None else 503)


async def ready(request: Request) -> JSONResponse:
    """Whether requests are taken now: loaded, warm, and not shutting down."""
    state: ServerState = request.app.state.server
    why = state.why_not_ready()
    if why is not None:
        return not_ready(why).response()
    return JSONResponse({"status": "ready"})


async def version(request: Request) -> JSONResponse:
    """The version of this package."""
    state: ServerState = request.app.state.server
    return JSONResponse({"version": state.version})


async def openapi(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    state: ServerState = request.app.state.server
    return JSONResponse(describe(state.version))


async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    text, kind = request.app.state.observers.metrics.exposition(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": kind})


async def models(request: Request) -> JSONResponse:
    """The names of the model."""
    state: ServerState = request.app.state.server
    return JSONResponse({"object": "list", "data": [_model(state, name) for name in state.names]})


async def model(request: Request) -> JSONResponse:
    """One name of the model."""
    state: ServerState = request.app.state.server
    name = request.path_params["name"]
    if name not in state.names:
        raise ApiError(404, f"The model '{name[:200]}' does not exist", param="model", code="model_not_found")
    return JSONResponse(_model(state, name))


def _model(state: ServerState, name: str) -> dict[str, Any]:
    manifest, where = state.manifest, state.served.placement
    return {
        "id": name,
        "object": "model",
        "created": int(state.since),
        "owned_by": "medusa-export",
        "root": manifest.model.name,
        "max_model_len": manifest.limits.max_seq_len,
        "medusa": {
            "num_heads": manifest.heads.num_heads,
            "top_k": manifest.heads.top_k,
            "backend": where.backend,
            "device": where.device,
            "precision": manifest.precision,
            "quantization": manifest.quantization.scheme if manifest.quantization is not None else None,
        },
    }
