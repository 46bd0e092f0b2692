"""`POST /v1/responses`."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from medusa_runtime import GenerationResult
from medusa_serve.answers import FINISH, Answers
from medusa_serve.endpoints.items import Items
from medusa_serve.endpoints.messages import MessageReader
from medusa_serve.endpoints.shared import Call, as_event, begin, read, stream, whole
from medusa_serve.errors import ApiError
from medusa_serve.protocol.base import FieldError
from medusa_serve.protocol.responses import ResponsesRequest

STATUS = {"length": "incomplete", "stop": "completed", "abort": "incomplete"}


async def responses(request: Request) -> Response:
    """Answer an input."""
    asked = await read(request, ResponsesRequest)
    call = Call.of(request, asked.model, "resp")
    call.record.streamed = bool(asked.stream)
    response = ResponseCall(call, asked)
    answers = await begin(call, lambda: [response.prompt_ids()], response.options())
    response.messages.look_at(answers.handles[0].prompt_ids)
    if asked.stream:
        return stream(call, answers, response.events(answers), failed=response.failed, last=b"")
    return await whole(request, call, answers, response.response)


class ResponseCall:
    """One request, on its way from fields to options, and from an answer to a response."""

    def __init__(self, call: Call, asked: ResponsesRequest) -> None:
        self._call, self._asked = call, asked
        self.messages = MessageReader(call, asked.tool_fields)
        self._numbers = itertools.count()
        self._items = Items(call.record.request_id)
        try:
            self._input = asked.messages
        except FieldError as error:
            raise ApiError(400, str(error), param=error.param, code=error.code) from error

    def prompt_ids(self) -> list[int]:
        """The input's tokens, by the chat template."""
        tools = [tool.model_dump(exclude_none=True) for tool in self._asked.tool_fields.offered]
        return self._call.reader.messages(self._input, tools=tools, template_options=self._asked.template_options)

    def options(self) -> dict[str, Any]:
        """Fields of the runtime's options."""
        return self._asked.options(self._call.lm.manifest) | self.messages.options()

    def response(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The whole response."""
        [result] = results
        parser = self.messages.parser()
        for delta in (parser.push(result.text), parser.finish()):
            for _ in self._items.push(delta):
                pass  # nobody is told of the parts
        return self._ended(FINISH[result.finish_reason], result.text, result.prompt_ids)

    def _ended(self, reason: str, text: str, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """The response of an answer that has ended."""
        status = STATUS.get(reason, "completed")
        for _ in self._items.close("incomplete" if status == "incomplete" else "completed"):
            pass
        self._call.record.finish_reasons = ["tool_calls" if self._items.has_calls and reason == "stop" else reason]
        self._call.note_texts([prompt_ids], [text])
        usage = self._call.usage()
        return self._object(status) | {
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items.done,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens()},
                "total_tokens": usage["total_tokens"],
            },
            "metrics": self._call.metrics(),
        }

    def _num_reasoning_tokens(self) -> int:
        """Tokens of the reasoning, found by tokenising its text again: the model may have written it in others."""
        texts = [part["text"] for item in self._items.done if item["type"] == "reasoning" for part in item["content"]]
        tokenizer = self._call.lm.codec.tokenizer
        count = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        return min(count, self._call.record.answer_tokens)

    def _object(self, status: str) -> dict[str, Any]:
        """The response's fields that do not depend on the answer."""
        asked, call = self._asked, self._call
        shown = asked.model_dump(mode="json", by_alias=True, exclude_none=True)
        return {
            "id": call.id,
            "object": "response",
            "created_at": call.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": call.model,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "store": False,
            "background": False,
            "temperature": asked.options(call.lm.manifest)["temperature"],
            "text": shown["text"],
            "tool_choice": shown.get("tool_choice", "auto"),
            "tools": [{"description": None, "parameters": None, "strict": None} | tool for tool in shown.get("tools", [])],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
        }

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        """The response as events."""
        for name in ("response.created", "response.in_progress"):
            yield self._event({"type": name, "response": self._object("in_progress")})
        parser, text, reason = self.messages.parser(), "", "abort"
        async for index, chunk in answers.chunks():
            text += chunk.text
            for event in self._items.push(parser.push(chunk.text)):
                yield self._event(event)
            if chunk.finish_reason is not None:
                reason = "stop" if parser.is_complete else FINISH[chunk.finish_reason]
            elif parser.is_complete:
                answers.end(index)
        for event in self._rest(parser.finish(), reason):
            yield self._event(event)
        ended = self._ended(reason, text, answers.handles[0].prompt_ids)
        yield self._event({"type": f"response.{ended['status']}", "response": ended})

    def _rest(self, delta: Any, reason: str) -> Iterator[dict[str, Any]]:
        yield from self._items.push(delta)
        yield from self._items.close("completed" if STATUS.get(reason) != "incomplete" else "incomplete")

    def failed(self, error: ApiError) -> bytes:
        """The last event of a response that failed."""
        told = {"code": "server_error", "message": error.message}
        return self._event({"type": "response.failed", "response": self._object("failed") | {"error": told}})

    def _event(self, event: dict[str, Any]) -> bytes:
        return as_event({"type": event["type"], "sequence_number": next(self._numbers)} | event, event["type"])
