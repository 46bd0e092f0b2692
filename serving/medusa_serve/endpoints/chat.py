"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from medusa_runtime import Choice, GenerationChunk, GenerationResult
from medusa_serve.answers import FINISH, Answers
from medusa_serve.endpoints.messages import MessageReader
from medusa_serve.endpoints.shared import Call, as_event, begin, failed_event, read, stream, whole
from medusa_serve.parsing import Delta, ToolCall
from medusa_serve.protocol.chat import ChatRequest
from medusa_serve.spelling import Speller, TokenTexts, told_step


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    asked = await read(request, ChatRequest)
    call = Call.of(request, asked.model, "chatcmpl", asked.request_id)
    call.record.streamed = bool(asked.stream)
    chat = ChatCall(call, asked)
    answers = await begin(call, lambda: [chat.prompt_ids()], chat.options())
    chat.messages.look_at(answers.handles[0].prompt_ids)
    if asked.stream:
        return stream(call, answers, chat.events(answers), failed=failed_event)
    return await whole(request, call, answers, chat.response)


class ChatCall:
    """One request, on its way from fields to options, and from answers to a response."""

    def __init__(self, call: Call, asked: ChatRequest) -> None:
        self.call, self.asked = call, asked
        self.speller = Speller(call.lm.codec)
        self.messages = MessageReader(call, asked.tool_fields)
        self.opening = _final_text(asked.messages) if asked.echo else ""

    def prompt_ids(self) -> list[int]:
        """The conversation's tokens, by the chat template."""
        asked = self.asked
        return self.call.reader.messages(
            asked.messages,
            tools=[tool.model_dump(exclude_none=True) for tool in asked.tool_fields.offered],
            documents=asked.documents or (),
            template=asked.chat_template,
            template_options=asked.template_options,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
        )

    def options(self) -> dict[str, Any]:
        """Fields of the runtime's options."""
        options = self.asked.sampling_options(self.call.lm.manifest) | self.messages.options()
        return options | {"max_new_tokens": self.asked.most_tokens, "logprobs": self.num_likely}

    @property
    def num_likely(self) -> int | None:
        """How many likely tokens are told with each token; None if log-probabilities are not asked for."""
        return (self.asked.top_logprobs or 0) if self.asked.logprobs else None

    def response(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The whole response."""
        [result] = results
        choices = [self._choice(place, choice) for place, choice in enumerate(result.choices)]
        self.call.record.finish_reasons = [choice["finish_reason"] for choice in choices]
        self.call.note_texts([result.prompt_ids], [choice.text for choice in result.choices])
        told = self.call.head("chat.completion") | {"choices": choices} | self.call.counts()
        if result.prompt_logprobs is not None:
            told["prompt_logprobs"] = self.speller.prompt_logprobs(result.prompt_logprobs)
        return told

    def _choice(self, place: int, choice: Choice) -> dict[str, Any]:
        message = self.messages.whole(choice.text)
        content = self.opening + message.content
        told: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not message.tool_calls else None,
            "refusal": None,
        }
        if message.reasoning and self.asked.include_reasoning:
            told["reasoning_content"] = message.reasoning
        if message.tool_calls:
            told["tool_calls"] = [_as_json(one) for one in message.tool_calls]
        logprobs = None if choice.logprobs is None else self.speller.chat_logprobs(choice.logprobs, self.num_likely or 0)
        return {
            "index": place,
            "message": told,
            "logprobs": logprobs,
            "finish_reason": self.messages.finish_reason(FINISH[choice.finish_reason], has_calls=bool(message.tool_calls)),
            "stop_reason": choice.stop_reason,
        }

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        """The response as events."""
        head = self.call.head("chat.completion.chunk")
        streams = [ChatStream(self, index) for index in range(answers.num_answers)]
        async for index, chunk in answers.chunks():
            one = streams[index]
            if one.is_over:  # it was ended after its only call
                continue
            if (told := one.push(chunk)) is not None:
                yield as_event(head | told | self._usage_so_far())
            if one.is_over and answers.n == 1 and chunk.finish_reason is None:
                answers.end(index)
        self.call.record.finish_reasons = [one.finish_reason or "abort" for one in streams]
        self.call.note_texts([answers.handles[0].prompt_ids], [one.text for one in streams])
        if self.asked.usage_is_streamed:
            yield as_event(head | {"choices": []} | self.call.counts())

    def _usage_so_far(self) -> dict[str, Any]:
        options = self.asked.stream_options
        return {"usage": self.call.usage()} if options is not None and options.continuous_usage_stats else {}


class ChatStream:
    """One answer of a stream."""

    def __init__(self, chat: ChatCall, index: int) -> None:
        self._chat, self._index = chat, index
        self._parser = chat.messages.parser()
        self._texts = TokenTexts(chat.call.lm.codec)
        self._is_first = True
        self.finish_reason: str | None = None
        self.text = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing of the answer that still comes counts."""
        return self.finish_reason is not None

    def push(self, chunk: GenerationChunk) -> dict[str, Any] | None:
        """What a chunk becomes; None if it has nothing to tell yet."""
        asked = self._chat.asked
        self.text += chunk.text
        delta = self._parsed(chunk)
        choice: dict[str, Any] = {"index": self._index, "delta": delta, "finish_reason": self.finish_reason}
        if chunk.logprobs is not None:
            choice["logprobs"] = self._chat.speller.chat_logprobs(chunk.logprobs, self._chat.num_likely or 0)
        if self.is_over:
            choice["stop_reason"] = chunk.stop_reason
        if not (delta or self.is_over or chunk.logprobs or asked.medusa.drafts):
            return None
        told: dict[str, Any] = {"choices": [choice]}
        if asked.medusa.drafts:
            texts = self._texts.push(chunk.token_ids, is_last=chunk.finish_reason is not None)
            told["medusa"] = told_step(self._index, chunk, texts, self._chat.speller)
        return told

    def _parsed(self, chunk: GenerationChunk) -> dict[str, Any]:
        """The delta of a chunk's text."""
        added = self._parser.push(chunk.text)
        if chunk.finish_reason is not None:
            rest = self._parser.finish()
            added = Delta(added.content + rest.content, added.reasoning + rest.reasoning, added.tool_calls + rest.tool_calls)
        if chunk.finish_reason is not None or self._parser.is_complete:
            reason = "stop" if chunk.finish_reason is None else FINISH[chunk.finish_reason]
            self.finish_reason = self._chat.messages.finish_reason(reason, has_calls=self._parser.has_tool_calls)
        delta = _told(added, with_reasoning=self._chat.asked.include_reasoning)
        if self._is_first:
            self._is_first = False
            delta = {"role": "assistant", "content": self._chat.opening + delta.pop("content", "")} | delta
        return delta


def _told(delta: Delta, *, with_reasoning: bool) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if delta.content:
        told["content"] = delta.content
    if delta.reasoning and with_reasoning:
        told["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        told["tool_calls"] = [
            {"index": one.index}
            | ({} if one.id is None else {"id": one.id, "type": "function"})
            | {"function": ({} if one.name is None else {"name": one.name}) | {"arguments": one.arguments}}
            for one in delta.tool_calls
        ]
    return told


def _as_json(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _final_text(messages: Sequence[dict[str, Any]]) -> str:
    content = messages[-1].get("content")
    return content if isinstance(content, str) else ""
