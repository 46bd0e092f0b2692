"""The answers to one request, while they are decoded: one handle of the runtime for each of its prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

from medusa_runtime import GenerationChunk, GenerationOptions, GenerationResult, Handle, MedusaError, MedusaLM
from medusa_serve.errors import CLIENT_GONE, ApiError
from medusa_serve.record import RequestRecord

Prompt = str | Sequence[dict[str, Any]] | Sequence[int]
FINISH = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "abort", "error": "error"}  # vLLM's names


class Answers:
    """Answers under way. The answers to the first prompt come first: answer `i` belongs to prompt `i // n`.

    Use `begin`. Leaving its `async with` cancels what has not ended, so that its slots are free before the next step.
    """

    def __init__(self, handles: Sequence[Handle], n: int, record: RequestRecord) -> None:
        self.handles, self.n, self._record = handles, n, record
        self.stopped: ApiError | None = None  # why the server ended them
        self._last: dict[int, float] = {}  # when the last chunk of each answer came
        record.n = n
        record.prompt_tokens = sum(len(handle.prompt_ids) for handle in handles)

    @classmethod
    async def begin(cls, lm: MedusaLM, prompts: Sequence[Prompt], options: GenerationOptions, record: RequestRecord) -> Answers:
        """Queue a request.

        Raises:
            ApiError: it can never be answered, or there is no room for it now.
        """
        if (count := len(prompts) * options.n) > lm.max_under_way:
            told = (
                f"{count} answers are asked for, to {len(prompts)} prompts; this server has room for {lm.max_under_way} at most"
            )
            raise ApiError(400, told, param="n" if len(prompts) == 1 else "prompt", code="too_much")
        handles: list[Handle] = []
        try:
            for prompt in prompts:  # one after the other, so that they are queued in their order
                handles.append(await lm.asubmit(prompt, options))  # noqa: PERF401 - those queued are cancelled if one fails
        except BaseException as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, MedusaError):
                raise ApiError.of(error) from error
            raise
        return cls(handles, options.n, record)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for handle in self.handles:
            handle.cancel()
        if not self._record.finish_reasons:  # they have not come to their end
            has_failed = isinstance(error, ApiError) and error.status != CLIENT_GONE
            self._record.finish_reasons = ["error" if has_failed else "abort"] * self.num_answers

    @property
    def num_answers(self) -> int:
        """How many answers there will be."""
        return len(self.handles) * self.n

    def stop(self, error: ApiError) -> None:
        """End the answers. `chunks` and `results` raise the error once they have ended."""
        self.stopped = error
        for handle in self.handles:
            handle.cancel()

    def end(self, index: int) -> None:
        """End the prompt of one answer early, because nothing after it counts. Only for requests of one answer a prompt."""
        assert self.n == 1
        self.handles[index].cancel()

    async def chunks(self) -> AsyncIterator[tuple[int, GenerationChunk]]:
        """The chunks of all answers as they come, each with the number of its answer.

        Raises:
            ApiError: decoding failed, or the server ended the answers.
        """
        try:
            source = self._of(0) if len(self.handles) == 1 else self._merged()
            async for place, chunk in source:
                if self.stopped is not None and chunk.finish_reason == "cancelled":
                    break
                self._note(place * self.n + chunk.index, chunk)
                yield place * self.n + chunk.index, chunk
        except MedusaError as error:
            raise ApiError.of(error, while_decoding=True) from error
        if self.stopped is not None:
            raise self.stopped
        self._note_results([handle.result() for handle in self.handles])

    async def results(self) -> list[GenerationResult]:
        """The whole answers, one result a prompt. Errors as for `chunks`."""
        try:
            results = [await handle.aresult() for handle in self.handles]
        except MedusaError as error:
            raise ApiError.of(error, while_decoding=True) from error
        if self.stopped is not None:
            raise self.stopped
        self._record.answer_tokens = 0
        for place, handle in enumerate(self.handles):
            for chunk in handle:
                self._note(place * self.n + chunk.index, chunk)
        self._note_results(results)
        return results

    async def _of(self, place: int) -> AsyncIterator[tuple[int, GenerationChunk]]:
        async for chunk in self.handles[place]:
            yield place, chunk

    async def _merged(self) -> AsyncIterator[tuple[int, GenerationChunk]]:
        """The chunks of several handles, in the order in which they come."""
        news: asyncio.Queue[tuple[int, GenerationChunk] | BaseException | None] = asyncio.Queue(len(self.handles))

        async def forward(place: int) -> None:
            try:
                async for found in self._of(place):
                    await news.put(found)
                await news.put(None)
            except MedusaError as error:
                await news.put(error)

        tasks = [asyncio.create_task(forward(place)) for place in range(len(self.handles))]
        num_open = len(tasks)
        try:
            while num_open:
                found = await news.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    num_open -= 1
                else:
                    yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note(self, index: int, chunk: GenerationChunk) -> None:
        """Note in the record when a chunk came."""
        record = self._record
        record.answer_tokens += len(chunk.token_ids)
        if index in self._last:
            record.gaps.append(chunk.seconds - self._last[index])
        elif record.first_token_seconds is None:
            record.first_token_seconds = time.time() - record.since if record.streamed else chunk.seconds
        self._last[index] = chunk.seconds

    def _note_results(self, results: Sequence[GenerationResult]) -> None:
        choices = [choice for result in results for choice in result.choices]
        self._record.stats = [choice.stats for choice in choices]
        self._record.finish_reasons = [FINISH[choice.finish_reason] for choice in choices]
        self._record.cached_tokens = sum(result.choices[0].stats.num_cached_tokens for result in results)
