"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from medusa_runtime import Choice, GenerationChunk, GenerationResult
from medusa_serve.answers import FINISH, Answers
from medusa_serve.endpoints.shared import Call, as_event, begin, failed_event, read, stream, whole
from medusa_serve.protocol.completions import CompletionRequest
from medusa_serve.spelling import Speller, TokenTexts, told_step


async def completions(request: Request) -> Response:
    """Continue texts."""
    asked = await read(request, CompletionRequest)
    call = Call.of(request, asked.model, "cmpl", asked.request_id)
    call.record.streamed = bool(asked.stream)
    completion = CompletionCall(call, asked)
    answers = await begin(call, completion.prompt_ids, completion.options())
    if asked.stream:
        return stream(call, answers, completion.events(answers), failed=failed_event)
    return await whole(request, call, answers, completion.response)


class CompletionCall:
    """One request, on its way from fields to options, and from answers to a response."""

    def __init__(self, call: Call, asked: CompletionRequest) -> None:
        self._call, self._asked = call, asked
        self._speller = Speller(call.lm.codec)
        self._scores_prompt = asked.echo and asked.logprobs is not None

    def prompt_ids(self) -> list[list[int]]:
        """The prompts' tokens."""
        return [self._call.reader.text(one) if isinstance(one, str) else list(one) for one in self._asked.prompts]

    def options(self) -> dict[str, Any]:
        """Fields of the runtime's options."""
        asked = self._asked
        options = asked.sampling_options(self._call.lm.manifest) | {"logprobs": asked.logprobs}
        if self._scores_prompt:
            options["prompt_logprobs"] = max(asked.logprobs or 0, asked.prompt_logprobs or 0)
        return options

    def response(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The whole response."""
        choices = [
            self._choice(place * self._asked.n + index, result, choice)
            for place, result in enumerate(results)
            for index, choice in enumerate(result.choices)
        ]
        self._call.record.finish_reasons = [choice["finish_reason"] for choice in choices]
        self._call.note_texts([result.prompt_ids for result in results], [choice["text"] for choice in choices])
        return self._call.head("text_completion") | {"choices": choices} | self._call.counts()

    def _choice(self, place: int, result: GenerationResult, choice: Choice) -> dict[str, Any]:
        told: dict[str, Any] = {
            "index": place,
            "text": (self._echoed(result.prompt_ids) if self._asked.echo else "") + choice.text,
            "logprobs": None if choice.logprobs is None else self._logprobs(result, choice),
            "finish_reason": FINISH[choice.finish_reason],
            "stop_reason": choice.stop_reason,
        }
        if self._asked.prompt_logprobs is not None and result.prompt_logprobs is not None:
            told["prompt_logprobs"] = self._speller.prompt_logprobs(result.prompt_logprobs)
        return told

    def _logprobs(self, result: GenerationResult, choice: Choice) -> dict[str, Any]:
        token_ids, logprobs = list(choice.token_ids), [*(choice.logprobs or [])]
        if not self._scores_prompt:
            return self._speller.completion_logprobs(logprobs, token_ids, 0)
        scored = [None, *(result.prompt_logprobs or [])]
        return self._speller.completion_logprobs([*scored, *logprobs], [*result.prompt_ids, *token_ids], 0)

    def _echoed(self, prompt_ids: Sequence[int]) -> str:
        return self._call.lm.codec.decode(prompt_ids, skip_special_tokens=self._asked.skip_special_tokens)

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        """The response as events."""
        call, asked, head = self._call, self._asked, self._call.head("text_completion")
        texts = [""] * answers.num_answers
        pieces = [TokenTexts(call.lm.codec) for _ in texts]
        begun: set[int] = set()
        async for index, chunk in answers.chunks():
            opening = ""
            if asked.echo and index not in begun:
                begun.add(index)
                opening = self._echoed(answers.handles[index // answers.n].prompt_ids)
            if (told := self._chunk(index, chunk, opening, len(texts[index]), pieces[index])) is not None:
                yield as_event(head | told)
            texts[index] += opening + chunk.text
        call.note_texts([handle.prompt_ids for handle in answers.handles], texts)
        if asked.usage_is_streamed:
            yield as_event(head | {"choices": []} | call.counts())

    def _chunk(
        self, index: int, chunk: GenerationChunk, opening: str, offset: int, pieces: TokenTexts
    ) -> dict[str, Any] | None:
        """What a chunk becomes; None if it has nothing to tell yet."""
        asked = self._asked
        if not (chunk.text or opening or chunk.finish_reason or chunk.logprobs or asked.medusa.drafts):
            return None
        logprobs = None
        if chunk.logprobs is not None:
            logprobs = self._speller.completion_logprobs(chunk.logprobs, chunk.token_ids, offset + len(opening))
        choice = {
            "index": index,
            "text": opening + chunk.text,
            "logprobs": logprobs,
            "finish_reason": None if chunk.finish_reason is None else FINISH[chunk.finish_reason],
            "stop_reason": chunk.stop_reason,
        }
        told: dict[str, Any] = {"choices": [choice]}
        options = asked.stream_options
        if options is not None and options.continuous_usage_stats:
            told["usage"] = self._call.usage()
        if asked.medusa.drafts:
            texts = pieces.push(chunk.token_ids, is_last=chunk.finish_reason is not None)
            told["medusa"] = told_step(index, chunk, texts, self._speller)
        return told
