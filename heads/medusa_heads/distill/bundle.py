"""Answers by an exported bundle, with Medusa decoding: the heads there are speed up the making of data for better ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from medusa_heads.distill.answerer import Answer, Request
from medusa_runtime.engine import DecodingEngine
from medusa_runtime.errors import OptionError


class BundleAnswerer:
    """Greedy answers in batches, one at a time; a batch lasts as long as its longest answer.

    Args:
        engine: the bundle's.
        batch_size: requests decoded side by side.
    """

    def __init__(self, engine: DecodingEngine, batch_size: int = 8) -> None:
        self.engine = engine
        self.batch_size = batch_size

    def answers(self, next_request: Callable[[], Request | None]) -> Iterator[Answer]:
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
