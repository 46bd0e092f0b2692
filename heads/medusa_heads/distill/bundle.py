"""Answers from an exported bundle, with Medusa decoding: existing heads speed up making data for better ones."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Tokens

from medusa_heads.distill.answerer import Answer, Made, Request
from medusa_heads.distill.prompts import only_text
from medusa_runtime.decoding.engine import DecodingEngine
from medusa_runtime.decoding.sequence import DecodingSequence
from medusa_runtime.errors import OptionError
from medusa_runtime.options import DecodingOptions
from medusa_runtime.text.codec import Message, TextCodec


class BundleCodec:
    """Converts messages to token ids and back, with a bundle's own tokenizer and chat template, if it has one."""

    def __init__(self, text: TextCodec) -> None:
        self.text = text

    @property
    def is_chat(self) -> bool:
        """Whether the bundle has a chat template."""
        return self.text.has_chat_template

    def encode(self, prompt: Tokens[Message]) -> list[int]:
        """Token ids of messages in the chat template, up to the start of the answer. Without one, those of the only message."""
        return self.text.encode(prompt) if self.is_chat else self.text.encode(only_text(prompt), raw=True)

    def decode(self, token_ids: Tokens[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.text.decode(token_ids)

    def opening(self, messages: Tokens[Message] = (), start: str = "") -> list[int]:  # noqa: ARG002 - the interface has them
        """Not supported: finding the text before the user's words needs a checkpoint's tokenizer."""
        raise OptionError("--self-prompts does not work with a bundle; use its checkpoint, or give --prompts")

    def user_words(self, token_ids: Tokens[int], *, ended: bool) -> str | None:  # noqa: ARG002 - the interface has them
        """Not supported, as `opening` is not."""
        raise OptionError("--self-prompts does not work with a bundle; use its checkpoint, or give --prompts")


class BundleAnswerer:
    """Answers with continuous batching: a finished answer makes room for the next request.

    Args:
        engine: the bundle's engine. Nothing else may use it meanwhile.
    """

    def __init__(self, engine: DecodingEngine) -> None:
        self.engine = engine

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer | Made, None, None]:
        """Answer until there are no more requests. Each step also tells how many tokens it made."""
        under_way: dict[DecodingSequence, Request] = {}
        try:
            while True:
                while len(under_way) < self.engine.max_batch_size and (request := next_request()) is not None:
                    under_way[self.engine.add(request.prompt_ids, _options(request))] = request
                if not under_way:
                    return
                stepped = self.engine.step()
                yield Made(sum(len(step.token_ids) for sequence in stepped for step in sequence.take_steps()))
                for sequence in stepped:
                    if sequence.error is not None:
                        raise sequence.error
                    if sequence.finish_reason in {"stop", "length"}:
                        yield Answer(under_way.pop(sequence), sequence.token_ids, sequence.finish_reason)
        finally:
            for sequence in under_way:
                self.engine.end(sequence)


def _options(request: Request) -> DecodingOptions:
    return DecodingOptions.of(max_new_tokens=request.max_new_tokens, temperature=request.temperature, seed=request.seed)
