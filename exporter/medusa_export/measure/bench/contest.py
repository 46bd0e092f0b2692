"""The contest: all contestants answer each prompt in turn, so that changes of the machine's speed affect all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medusa_export.measure.bench.bench_prompts import BenchPrompt
from medusa_export.measure.bench.process import WorkerError, WorkerProcess

WARM_UP_TOKENS = 48


@dataclass(eq=False)
class Contestant:
    """One way to decode: one of our modes on a bundle, or another engine."""

    name: str
    process: WorkerProcess
    arguments: dict[str, Any] = field(default_factory=dict)  # arguments of its requests
    bundle: str | None = None
    mode: str | None = None
    drafts: bool = False  # whether it verifies several tokens per step
    failure: str | None = None

    @property
    def kind(self) -> Literal["own", "peer"]:
        """Whether it is one of ours or another engine."""
        return "own" if self.bundle is not None else "peer"

    def generate(self, token_ids: list[int], max_new_tokens: int) -> dict[str, Any]:
        """Decode greedily. See `workers.request_loop.timed`."""
        result: dict[str, Any] = self.process.ask(
            "generate", token_ids=token_ids, max_new_tokens=max_new_tokens, **self.arguments
        )
        return result

    def attempt(self, token_ids: list[int], max_new_tokens: int) -> dict[str, Any] | None:
        """Like `generate`, but returns None for another engine that fails or has failed before.

        Raises:
            WorkerError: one of our own contestants failed.
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
    """A contestant's answer to a prompt, with its times."""

    contestant: str
    prompt: int
    round: int
    token_ids: list[int]
    sizes: list[int]  # number of tokens of each piece, in order of arrival
    seconds: list[float]  # seconds from the request to each piece
    parts: dict[str, float]  # seconds of decoding by part, if the contestant reports them

    @classmethod
    def of(cls, contestant: str, prompt: int, number: int, result: dict[str, Any]) -> Answer:
        """An answer from the result of a contestant's process."""
        pieces, seconds = result["pieces"], result["seconds"]
        token_ids = [token for piece in pieces for token in piece]
        return cls(contestant, prompt, number, token_ids, [len(piece) for piece in pieces], seconds, result.get("parts", {}))

    @property
    def num_steps(self) -> int:
        """Number of steps, without the one that read the prompt."""
        return len(self.sizes) - 1

    @property
    def num_decoded(self) -> int:
        """Number of tokens from these steps."""
        return len(self.token_ids) - self.sizes[0]

    @property
    def decode_seconds(self) -> float:
        """Seconds from the first token to the last."""
        return self.seconds[-1] - self.seconds[0]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding, without the prompt and the tokens that came from reading it."""
        return self.num_decoded / self.decode_seconds

    @property
    def whole_tokens_per_second(self) -> float:
        """Tokens per second, including the prompt's time."""
        return len(self.token_ids) / self.seconds[-1]


def warm_up(contestants: Sequence[Contestant], prompts: Sequence[BenchPrompt], max_new_tokens: int) -> None:
    """Let each contestant decode one short answer that is not counted."""
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
    """Let all contestants answer all prompts. Another one begins with each prompt.

    If another engine fails, it is left out from then on; its answers so far are kept.

    Args:
        contestants: the contestants.
        prompts: the prompts.
        answers: receives each answer at once, so that none is lost if the contest is interrupted.
        rounds: how often each prompt is answered.
        max_new_tokens: exact length of each answer.
        tell: a function from `progress.count_stage`.

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
    """The contestants in rotated order."""
    start = by % len(contestants)
    return [*contestants[start:], *contestants[:start]]
