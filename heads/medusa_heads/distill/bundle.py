"""Answers by an exported bundle, with Medusa decoding: the heads there are speed up the making of data for better ones."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Tokens

from medusa_heads.distill.answerer import Answer, Request
from medusa_runtime.decoding.engine import DecodingEngine
from medusa_runtime.decoding.sequence import DecodingSequence
from medusa_runtime.errors import OptionError
from medusa_runtime.options import DecodingOptions
from medusa_runtime.text.codec import Message, TextCodec


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

    def encode(self, prompt: Tokens[Message]) -> list[int]:
        """Token ids of messages through the chat template, up to where the answer starts."""
        return self.text.encode(prompt)

    def decode(self, token_ids: Tokens[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.text.decode(token_ids)

    def opening(self) -> list[int]:
        """Refuse: what a chat template puts before the user's words is known of a checkpoint only."""
        raise OptionError("a bundle's model cannot prompt itself; take its checkpoint, or give prompts")


class BundleAnswerer:
    """Answers by continuous batching: whoever ends makes room for the next.

    Args:
        engine: the bundle's, used by nobody else meanwhile.
    """

    def __init__(self, engine: DecodingEngine) -> None:
        self.engine = engine

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer, None, None]:
        """Answer until there is no request."""
        under_way: dict[DecodingSequence, Request] = {}
        try:
            while True:
                while len(under_way) < self.engine.max_batch_size and (request := next_request()) is not None:
                    under_way[self.engine.add(request.prompt_ids, _options(request))] = request
                if not under_way:
                    return
                for sequence in self.engine.step():
                    if sequence.error is not None:
                        raise sequence.error
                    if sequence.finish_reason in {"stop", "length"}:
                        yield Answer(under_way.pop(sequence), sequence.token_ids, sequence.finish_reason)
        finally:
            for sequence in under_way:
                self.engine.end(sequence)


def _options(request: Request) -> DecodingOptions:
    return DecodingOptions.of(max_new_tokens=request.max_new_tokens, temperature=request.temperature, seed=request.seed)
