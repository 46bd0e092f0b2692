"""The contest: every prompt is put to all contestants in turn, so that drift of the machine hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medusa_export.bench.process import WorkerError, WorkerProcess
from medusa_export.bench.prompts import BenchPrompt

WARM_UP_TOKENS = 48


@dataclass(eq=False)
class Contestant:
    """Something that decodes: one of our modes on a bundle, or another engine."""

    name: str
    process: WorkerProcess
    arguments: dict[str, Any] = field(default_factory=dict)  # of its requests
    bundle: str | None = None
    mode: str | None = None
    drafts: bool = False  # whether it verifies several tokens a step
    failure: str | None = None

    @property
    def kind(self) -> Literal["own", "peer"]:
        """Whether it is ours."""
        return "own" if self.bundle is not None else "peer"

    def generate(self, token_ids: list[int], max_new_tokens: int) -> dict[str, Any]:
        """Decode greedily. See `workers.serve.timed`."""
        result: dict[str, Any] = self.process.ask(
            "generate", token_ids=token_ids, max_new_tokens=max_new_tokens, **self.arguments
        )
        return result

    def attempt(self, token_ids: list[int], max_new_tokens: int) -> dict[str, Any] | None:
        """`generate`, or none for another engine that fails, or has failed before.

        Raises:
            WorkerError: it is one of our own that fails.
        """
        if self.failure is not None:
            return None
        try:
            return self.generate(token_ids, max_new_tokens)
        except WorkerError as error:
            if self.kind == "own":
                raise
            self.failure = str(error)
            return None


@dataclass(frozen=True)
class Answer:
    """What a contestant gave for a prompt, and when."""

    contestant: str
    prompt: int
    round: int
    token_ids: list[int]
    sizes: list[int]  # tokens of each piece, in the order they came
    seconds: list[float]  # from the request to each piece
    parts: dict[str, float]  # seconds of decoding by what they were spent on, where it tells

    @classmethod
    def of(cls, contestant: str, prompt: int, number: int, result: dict[str, Any]) -> Answer:
        """An answer from what the contestant's process said."""
        pieces, seconds = result["pieces"], result["seconds"]
        token_ids = [token for piece in pieces for token in piece]
        return cls(contestant, prompt, number, token_ids, [len(piece) for piece in pieces], seconds, result.get("parts", {}))

    @property
    def num_steps(self) -> int:
        """Steps after the one that read the prompt."""
        return len(self.sizes) - 1

    @property
    def num_decoded(self) -> int:
        """Tokens that those steps gave."""
        return len(self.token_ids) - self.sizes[0]

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last."""
        return self.seconds[-1] - self.seconds[0]

    @property
    def tokens_per_second(self) -> float:
        """While decoding: the prompt, and the tokens that reading it gave, left out."""
        return self.num_decoded / self.decode_seconds

    @property
    def whole_tokens_per_second(self) -> float:
        """The prompt's time included."""
        return len(self.token_ids) / self.seconds[-1]


def warm_up(contestants: Sequence[Contestant], prompts: Sequence[BenchPrompt], max_new_tokens: int) -> None:
    """One short answer of each, which counts for nothing."""
    for contestant in contestants:
        contestant.attempt(prompts[0].token_ids, min(WARM_UP_TOKENS, max_new_tokens))


def contest(
    contestants: Sequence[Contestant],
    prompts: Sequence[BenchPrompt],
    answers: list[Answer],
    *,
    rounds: int,
    max_new_tokens: int,
    tell: Callable[..., None],
) -> None:
    """Have all contestants answer all prompts. Who begins changes with each prompt.

    Another engine that fails is left out from then on; what it had answered stays.

    Args:
        contestants: those to ask.
        prompts: what to ask.
        answers: filled as they come, so that what is there when the contest is interrupted is not lost.
        rounds: how often each prompt is put.
        max_new_tokens: of each answer, neither more nor less.
        tell: `progress.count_stage`'s.

    Raises:
        WorkerError: one of our own failed.
    """
    turns = [(number, place) for number in range(rounds) for place in range(len(prompts))]
    for done, (number, place) in enumerate(turns):
        tell(done, 0, 0, len(turns))
        for contestant in rotated(contestants, number + place):
            result = contestant.attempt(prompts[place].token_ids, max_new_tokens)
            if result is not None:
                answers.append(Answer.of(contestant.name, place, number, result))
    tell(len(turns), 0, 0, len(turns))


def rotated(contestants: Sequence[Contestant], by: int) -> list[Contestant]:
    """The contestants, another one first."""
    start = by % len(contestants)
    return [*contestants[start:], *contestants[:start]]
