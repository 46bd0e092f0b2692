"""Answers by an exported bundle, with Medusa decoding: the heads there are speed up the making of data for better ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from medusa_heads.distill.answerer import Answer, Request
from medusa_runtime.engine import DecodingEngine
from medusa_runtime.errors import OptionError
from medusa_runtime.text import Message, TextCodec


class BundleCodec:
    """Messages to token ids and back, by a bundle's own tokenizer and chat template.

    Raises:
        OptionError: the bundle has no chat template.
    """

    def __init__(self, text: TextCodec) -> None:
        self.text = text
        if not text.has_chat_template:
            raise OptionError(
                "this bundle has no chat template, so it cannot be asked anything; take an instruction-tuned model's"
            )

    def encode(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids of messages through the chat template, up to where the answer starts."""
        return self.text.encode(prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.text.decode(token_ids)

    def opening(self) -> list[int]:
        """Refuse: prompts of the model's own need a temperature."""
        raise OptionError("a bundle decodes greedily, so its model cannot prompt itself")


class BundleAnswerer:
    """Greedy answers in batches, one at a time; a batch lasts as long as its longest answer.

    Args:
        engine: the bundle's.
        batch_size: requests decoded side by side.
    """

    def __init__(self, engine: DecodingEngine, batch_size: int = 8) -> None:
        self.engine = engine
        self.batch_size = batch_size

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer, None, None]:
        """Answer until there is no request.

        Raises:
            OptionError: a request has a temperature: a bundle decodes greedily.
        """
        while batch := self._gather(next_request):
            if warm := [request.key for request in batch if request.temperature > 0]:
                raise OptionError(f"{warm[0]}: a bundle decodes greedily, so its answers have no temperature")
            token_ids: list[list[int]] = [[] for _ in batch]
            steps = self.engine.generate([request.prompt_ids for request in batch], batch[0].max_new_tokens)
            for decided in steps:
                for step in decided:
                    token_ids[step.sequence] += step.token_ids
                    if step.finish_reason is not None:
                        yield Answer(batch[step.sequence], token_ids[step.sequence], step.finish_reason)

    def _gather(self, next_request: Callable[[], Request | None]) -> list[Request]:
        """Up to a batch of requests that want equally many tokens."""
        batch: list[Request] = []
        while len(batch) < self.batch_size and (request := next_request()) is not None:
            batch.append(request)
        return batch
