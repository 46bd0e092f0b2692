"""Answers from an OpenAI-compatible endpoint (vLLM, llama.cpp's server, TGI …). Its text is converted to token ids here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from typing import Any
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError

from medusa_heads.distill.answerer import Answer, Refusal, Request
from medusa_heads.errors import EndpointError
from medusa_runtime.errors import OptionError

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_RETRIES = 5  # about 15 seconds if an endpoint does not respond
MAX_REASON = 200  # most characters quoted from an endpoint's message
REFUSED = {400, 422}  # statuses that say something of one request, not of the endpoint
CHECKED = 8  # answers whose numbers of tokens are compared with the endpoint's
NEAR = 0.1, 2  # a number of tokens may differ from the endpoint's by this part of it and this many more
ADVICE = {
    400: "lower --max-prompt-tokens or --max-new-tokens",
    401: f"set {KEY_VARIABLE} to a valid key",
    403: f"set {KEY_VARIABLE} to a valid key",
    404: "check --base-url (it usually ends in /v1) and --served-model",
}


class EndpointAnswerer:
    """Answers requests with an endpoint's chat completions, `batch_size` requests at the same time.

    After temporary errors (no connection, 429, 5xx …) the client tries again, with growing pauses. The key comes from the
    environment variable OPENAI_API_KEY; without it, a dummy key is sent.

    Args:
        base_url: the endpoint's address, such as ``http://localhost:8000/v1``.
        served_model: the endpoint's name for the model.
        text_ids: converts text to token ids, without special tokens.
        eos_token_id: the token that ends an answer.
        batch_size: number of requests at the same time.
        max_retries: retries of a request.
        tell: called with a line about what seems wrong.

    Raises:
        OptionError: the address or the key is not valid.
    """

    def __init__(
        self,
        base_url: str,
        served_model: str,
        text_ids: Callable[[str], list[int]],
        eos_token_id: int | None,
        batch_size: int = 64,
        max_retries: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.tell = tell
        self.counted: list[tuple[int, int, int, int]] = []  # tokens of prompt and answer, by the endpoint and by this tokenizer
        self.base_url, self.served_model = base_url, served_model
        self.text_ids, self.eos_token_id = text_ids, eos_token_id
        self.batch_size = batch_size
        self.max_retries = MAX_RETRIES if max_retries is None else max_retries
        self.key = _key()
        _require_address(base_url)

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer | Refusal, None, None]:
        """Answer until there are no more requests, new or unfinished. The event loop only runs while waiting for an answer.

        Raises:
            EndpointError: the endpoint cannot be reached, does not let us in, fails, leaves out a part of the answers, or has
                another tokenizer. Other finished answers are yielded first.
        """
        under_way: set[asyncio.Task[Answer | Refusal]] = set()
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

    async def _ask(self, client: AsyncOpenAI, request: Request) -> Answer | Refusal:
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
            if error.status_code in REFUSED:
                advice = f"; {ADVICE[error.status_code]}" if error.status_code in ADVICE else ""
                return Refusal(request, f"{self.base_url} refuses it: {error.status_code}, {_reason(error)}{advice}")
            said = f"{error.status_code}, {_reason(error)}; {ADVICE.get(error.status_code, 'run the same command again later')}"
            raise EndpointError(f"{self.base_url} refuses {request.key} (model {self.served_model!r}): {said}") from error
        except APITimeoutError as error:
            raise EndpointError(f"{self.base_url} did not answer in time; lower --batch-size") from error
        except APIConnectionError as error:
            cause = _one_line(str(error.__cause__ or error))
            raise EndpointError(
                f"{self.base_url} cannot be reached ({cause}); start the server, or check --base-url"
            ) from error
        except (OpenAIError, ValueError) as error:
            raise self._foreign(_one_line(str(error))) from error
        try:
            choice = completion.choices[0]
            message, stopped = choice.message, choice.finish_reason == "stop"
            text: str | None = message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise self._foreign(_one_line(str(completion))) from error
        answer = self._answer(request, self._whole(text, message), stopped=stopped)
        self._compare(completion.usage, answer)
        return answer

    def _whole(self, text: str | None, message: Any) -> str:
        """The text. It is an EndpointError if the text is not all that the model said."""
        if any(getattr(message, name, None) for name in ("reasoning_content", "reasoning")):
            raise EndpointError(
                f"{self.base_url} takes the reasoning out of the answers, but heads must learn the whole answer; "
                "start the server without a reasoning parser"
            )
        if text is None:
            raise EndpointError(
                f"{self.base_url} gives an answer without text; start the server without parsers of reasoning or tool calls"
            )
        return text

    def _compare(self, usage: Any, answer: Answer) -> None:
        """Compare the first answers' numbers of tokens with the endpoint's, as far as it tells them.

        Raises:
            EndpointError: its tokenizer is another one.
        """
        prompt, response = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
        if len(self.counted) == CHECKED or not isinstance(prompt, int) or not isinstance(response, int):
            return
        self.counted.append((prompt, len(answer.request.prompt_ids), response, len(answer.token_ids)))
        if len(self.counted) < CHECKED:
            return
        part, more = NEAR
        if all(abs(theirs - ours) > part * theirs + more for _, _, theirs, ours in self.counted):
            _, _, theirs, ours = self.counted[0]
            raise EndpointError(
                f"{self.base_url} has another tokenizer: it counts {theirs} tokens in an answer that has {ours} here; "
                "give the checkpoint that it serves as MODEL"
            )
        if all(theirs != ours for theirs, ours, _, _ in self.counted):
            theirs, ours, _, _ = self.counted[0]
            self.tell(
                f"the endpoint counts {theirs} tokens in a prompt that has {ours} here, and differs in all of the first "
                f"{CHECKED}: its chat template may be another one"
            )

    def _answer(self, request: Request, text: str, *, stopped: bool) -> Answer:
        token_ids = self.text_ids(text)
        if stopped and self.eos_token_id is not None:
            token_ids.append(self.eos_token_id)
        if len(token_ids) > request.max_new_tokens:  # the tokenizer splits the text differently than the endpoint did
            token_ids, stopped = token_ids[: request.max_new_tokens], False
        return Answer(request, token_ids, "stop" if stopped else "length")

    def _foreign(self, said: str) -> EndpointError:
        return EndpointError(
            f"{self.base_url} does not answer like OpenAI's API ({said}); check --base-url (it usually ends in /v1)"
        )


async def _give_up(client: AsyncOpenAI, tasks: set[asyncio.Task[Answer | Refusal]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip() or "none"
    if not key.isascii() or not key.isprintable():
        raise OptionError(f"{KEY_VARIABLE} has characters that a key cannot have; set it again")
    return key


def _require_address(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or an incomplete IPv6 address
        usable = False
    if not usable or not base_url.isprintable() or " " in base_url:
        raise OptionError(f"--base-url is {base_url!r}; it must be like http://localhost:8000/v1")


def _reason(error: APIStatusError) -> str:
    """The endpoint's message: OpenAI's `error.message`, or the whole response."""
    said: Any = error.body
    while isinstance(said, dict):
        said = next((said[name] for name in ("message", "detail", "error") if said.get(name)), str(said))
    return _one_line(str(said or error.response.reason_phrase or "no reason given"))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + " …"
