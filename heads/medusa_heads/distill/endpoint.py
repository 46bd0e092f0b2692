"""Answers by any OpenAI-compatible endpoint (vLLM, llama.cpp's server, TGI …): text comes back and becomes token ids here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from typing import Any
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError

from medusa_heads.distill.answerer import Answer, Request
from medusa_heads.errors import EndpointError
from medusa_runtime.errors import OptionError

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_RETRIES = 5  # about 15 seconds of an endpoint that is away
MAX_REASON = 200  # characters of what an endpoint says
ADVICE = {
    400: "lower --max-prompt-tokens or --max-new-tokens, or leave this prompt out",
    401: f"set {KEY_VARIABLE} to a key that it takes",
    403: f"set {KEY_VARIABLE} to a key that it takes",
    404: "check --base-url, which mostly ends in /v1, and --served-model",
    422: "leave this prompt out",
}


class EndpointAnswerer:
    """Answers requests by an endpoint's chat completions, `batch_size` of them under way at once.

    Passing troubles (no connection, 429, 5xx …) are tried again by the client, later and later. The key is that of the
    environment variable OPENAI_API_KEY; any, where there is none.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        served_model: the endpoint's name for the model.
        text_ids: the model's tokenizer, without special tokens.
        eos_token_id: what ends an answer.
        batch_size: requests under way at once.
        max_retries: of a request.

    Raises:
        OptionError: the address or the key is none.
    """

    def __init__(
        self,
        base_url: str,
        served_model: str,
        text_ids: Callable[[str], list[int]],
        eos_token_id: int | None,
        batch_size: int = 64,
        max_retries: int | None = None,
    ) -> None:
        self.base_url, self.served_model = base_url, served_model
        self.text_ids, self.eos_token_id = text_ids, eos_token_id
        self.batch_size = batch_size
        self.max_retries = MAX_RETRIES if max_retries is None else max_retries
        self.key = _key()
        _require_address(base_url)

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer, None, None]:
        """Answer until there is no request and none is under way. The event loop runs while an answer is waited for.

        Raises:
            EndpointError: the endpoint cannot be reached, or refuses a request. What else has been answered comes first.
        """
        under_way: set[asyncio.Task[Answer]] = set()
        with asyncio.Runner() as runner:
            client = AsyncOpenAI(base_url=self.base_url, api_key=self.key, max_retries=self.max_retries)
            try:
                while True:
                    while len(under_way) < self.batch_size and (request := next_request()) is not None:
                        under_way.add(runner.get_loop().create_task(self._ask(client, request)))
                    if not under_way:
                        return
                    done, _ = runner.run(asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED))
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        under_way.remove(task)
                        yield task.result()
            finally:
                runner.run(_give_up(client, under_way))

    async def _ask(self, client: AsyncOpenAI, request: Request) -> Answer:
        messages: Any = list(request.messages)
        try:
            completion = await client.chat.completions.create(
                model=self.served_model,
                messages=messages,
                max_tokens=request.max_new_tokens,
                temperature=request.temperature,
                seed=request.seed,
            )
        except APIStatusError as error:
            said = f"{error.status_code}, {_reason(error)}; {ADVICE.get(error.status_code, 'run the same command again later')}"
            raise EndpointError(f"{self.base_url} refuses {request.key} (model {self.served_model!r}): {said}") from error
        except APITimeoutError as error:
            raise EndpointError(f"{self.base_url} gives no answer in time; lower --batch-size") from error
        except APIConnectionError as error:
            cause = _one_line(str(error.__cause__ or error))
            raise EndpointError(
                f"{self.base_url} cannot be reached ({cause}); start the server, or check --base-url"
            ) from error
        except (OpenAIError, ValueError) as error:
            raise self._foreign(_one_line(str(error))) from error
        try:
            choice = completion.choices[0]
            text, stopped = choice.message.content or "", choice.finish_reason == "stop"
        except (AttributeError, IndexError, TypeError) as error:
            raise self._foreign(_one_line(str(completion))) from error
        return self._answer(request, text, stopped=stopped)

    def _answer(self, request: Request, text: str, *, stopped: bool) -> Answer:
        token_ids = self.text_ids(text)
        if stopped and self.eos_token_id is not None:
            token_ids.append(self.eos_token_id)
        if len(token_ids) > request.max_new_tokens:  # the endpoint's tokens were others than the tokenizer makes of their text
            token_ids, stopped = token_ids[: request.max_new_tokens], False
        return Answer(request, token_ids, "stop" if stopped else "length")

    def _foreign(self, said: str) -> EndpointError:
        return EndpointError(
            f"{self.base_url} answers otherwise than OpenAI's API ({said}); check --base-url, which mostly ends in /v1"
        )


async def _give_up(client: AsyncOpenAI, tasks: set[asyncio.Task[Answer]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip() or "none"
    if not key.isascii() or not key.isprintable():
        raise OptionError(f"{KEY_VARIABLE} holds other characters than a key can have; set it again")
    return key


def _require_address(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        usable = False
    if not usable or not base_url.isprintable() or " " in base_url:
        raise OptionError(f"--base-url is {base_url!r}; it must be like http://localhost:8000/v1")


def _reason(error: APIStatusError) -> str:
    """What the endpoint says: OpenAI's `error.message`, or whatever it sent."""
    said: Any = error.body
    while isinstance(said, dict):
        said = next((said[name] for name in ("message", "detail", "error") if said.get(name)), str(said))
    return _one_line(str(said or error.response.reason_phrase or "no reason given"))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + " …"
