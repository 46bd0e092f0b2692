"""A service: MedusaLM in FastAPI. All requests share one model and are decoded in the same steps.

MEDUSA_BUNDLE=build/smollm2-135m-instruct-fp32 uvicorn --app-dir examples fastapi_service:app
curl localhost:8000/generate --json '{"prompt": "Why is the sky blue?", "max_new_tokens": 64}'
curl -N localhost:8000/stream --json '{"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0.7}'
curl localhost:8000/health
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, TypeAdapter

from medusa_runtime import (
    CapacityError,
    ClosedError,
    DeviceLostError,
    GenerationChunk,
    GenerationResult,
    Handle,
    Health,
    Manifest,
    MedusaError,
    MedusaLM,
    Message,
    OptionError,
    QueueFullError,
    QueueTimeoutError,
    ServiceStats,
    TreeError,
)

STATUS = {
    OptionError: 422,
    TreeError: 422,
    CapacityError: 413,
    QueueFullError: 429,
    QueueTimeoutError: 503,
    ClosedError: 503,
    DeviceLostError: 503,
}
RETRIED_LATER = (QueueFullError, QueueTimeoutError)
CHUNK = TypeAdapter(GenerationChunk)


def named_bundle() -> str:
    """The bundle's directory. Without one, the program ends with one line before the server starts."""
    if (bundle := os.environ.get("MEDUSA_BUNDLE")) is None:
        raise SystemExit("Error: set MEDUSA_BUNDLE to the directory of a bundle")
    try:
        Manifest.load(bundle)
    except MedusaError as error:
        raise SystemExit(f"Error: {error}") from error
    return bundle


BUNDLE = named_bundle()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with MedusaLM.from_bundle(BUNDLE) as app.state.lm:
        yield


app = FastAPI(title="medusa", lifespan=lifespan)


@app.exception_handler(MedusaError)
async def refuse(_: Request, error: MedusaError) -> JSONResponse:
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    return JSONResponse({"error": str(error)}, status, {"Retry-After": "1"} if isinstance(error, RETRIED_LATER) else None)


def loaded(request: Request) -> MedusaLM:
    lm: MedusaLM = request.app.state.lm
    return lm


Model = Annotated[MedusaLM, Depends(loaded)]


class Asked(BaseModel):
    """A prompt or messages. All other keys are fields of `GenerationOptions`, which checks them."""

    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    messages: list[Message] | None = None

    async def submit(self, lm: MedusaLM) -> Handle:
        given = [one for one in (self.prompt, self.messages) if one is not None]
        if len(given) != 1:
            raise OptionError("a request must have either a prompt or messages")
        return await lm.asubmit(given[0], **(self.model_extra or {}))  # the event loop goes on while the prompt is tokenised


@app.post("/generate")
async def generate(asked: Asked, lm: Model) -> GenerationResult:
    return await (await asked.submit(lm)).aresult()


@app.post("/stream")
async def stream(asked: Asked, lm: Model) -> StreamingResponse:
    """JSON lines with the fields of GenerationChunk, one line per step."""
    handle = await asked.submit(lm)  # raises here if the request is refused, while the status code can still be set
    return StreamingResponse(lines(handle), media_type="application/x-ndjson")


async def lines(handle: Handle) -> AsyncIterator[bytes]:
    async with handle:  # if the client disconnects, this generator ends and cancels the request
        try:
            async for chunk in handle:
                yield CHUNK.dump_json(chunk) + b"\n"
        except MedusaError as error:  # too late for a status code
            yield json.dumps({"error": str(error)}).encode() + b"\n"


@app.get("/health")
async def health(lm: Model, response: Response) -> Health:
    """Status 200 if requests are taken; else 503, and the process should be replaced."""
    found = lm.health()
    response.status_code = 200 if found.is_alive else 503
    return found


@app.get("/stats")
async def stats(lm: Model) -> ServiceStats:
    return lm.stats()
