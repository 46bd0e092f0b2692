"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from medusa_runtime import MedusaError
from medusa_serve.endpoints.shared import Call, read
from medusa_serve.errors import ApiError
from medusa_serve.protocol.tokens import DetokenizeRequest, TokenizeRequest
from medusa_serve.spelling import Speller


async def tokenize(request: Request) -> JSONResponse:
    """The tokens of a text or of a conversation, as the endpoints that answer read them."""
    asked = await read(request, TokenizeRequest)
    call = Call.of(request, asked.model, "tok")

    def encoded() -> list[int]:
        if asked.prompt is not None:
            return call.reader.text(asked.prompt)
        return call.reader.messages(
            asked.messages or [],
            tools=[tool.model_dump(exclude_none=True) for tool in asked.tools or []],
            template=asked.chat_template,
            template_options=asked.chat_template_kwargs,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
        )

    try:
        ids = await asyncio.to_thread(encoded)
    except MedusaError as error:
        raise ApiError.of(error) from error
    told: dict[str, Any] = {"count": len(ids), "max_model_len": call.lm.manifest.limits.max_seq_len, "tokens": ids}
    if asked.return_token_strs:
        told["token_strs"] = [Speller(call.lm.codec).text(token_id) for token_id in ids]
    return JSONResponse(told)


async def detokenize(request: Request) -> JSONResponse:
    """The text of tokens."""
    asked = await read(request, DetokenizeRequest)
    call = Call.of(request, asked.model, "tok")
    vocab_size = call.lm.manifest.model.vocab_size
    if (highest := max(asked.tokens, default=0)) >= vocab_size:
        raise ApiError(
            400, f"'tokens' holds {highest}; the vocabulary has {vocab_size} tokens", param="tokens", code="invalid_value"
        )
    text = await asyncio.to_thread(call.lm.codec.decode, asked.tokens, skip_special_tokens=asked.skip_special_tokens)
    return JSONResponse({"prompt": text})
