"""Checks a prediction: decodes some prompts with the tree that was chosen, and without Medusa."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from medusa_export.measure.tune.decode import TimedStep, cycled, full_steps
from medusa_export.measure.tune.search import EvaluatedAcceptance, Place, RecordedAcceptance
from medusa_runtime.backends.base import Backend
from medusa_runtime.decoding.engine import DecodingEngine
from medusa_runtime.drafting.rounds import low
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.drafting.tuning import Check, TunedBatch
from medusa_runtime.options import DecodingOptions

TOLERANCE = 0.15  # largest relative error of a prediction
CHECKED = 3  # fewest prompts that a check decodes
LEAST_ROUNDS, MOST_ROUNDS = 3, 5  # of a check that is too slow
Prompts = Sequence[Sequence[int]]  # token ids
Timed = dict[str, list[TimedStep]]  # the steps of one round, by the way of decoding


@dataclass(frozen=True)
class Checker:
    """Decodes prompts on a backend to check predictions.

    Args:
        backend: the backend; nothing else may use it meanwhile.
        prompts: token ids.
        new_tokens: the longest answer.
        max_seconds: after this time, no more than `LEAST_ROUNDS` are made.
    """

    backend: Backend
    prompts: Prompts
    new_tokens: int
    max_seconds: float

    def check(self, place: Place, found: TunedBatch, acceptance: RecordedAcceptance | EvaluatedAcceptance) -> Check | None:
        """Compare the speed of the best way to decode with its prediction. None if the answers are too short to fill the batch.

        Other programs only make steps slower. So a check that is too slow is repeated, and each step counts as in the fastest
        quarter of the rounds.
        """
        count = -(-CHECKED // place.batch_size) * place.batch_size
        answers = cycled(range(len(self.prompts)), count)
        predicted = _predicted(place, found, acceptance, answers)
        plain = DecodingOptions(max_new_tokens=self.new_tokens, medusa=False)
        # warm up: the first run may include preparation
        full_steps(self._engine(place, found), [self.prompts[answer] for answer in answers[: place.batch_size]], plain, 1)
        rounds: list[Timed] = []
        started = time.perf_counter()
        while True:
            rounds.append(self._round(place, found, answers))
            if not all(rounds[-1].values()):
                return None
            check = Check(
                prompts=count,
                steps=len(rounds[-1][found.best]),
                rounds=len(rounds),
                predicted_tokens_per_second=predicted,
                measured_tokens_per_second=_speed(rounds, found.best),
                plain_predicted_tokens_per_second=found.plain.tokens_per_second,
                plain_measured_tokens_per_second=_speed(rounds, "plain"),
                same_prompts=isinstance(acceptance, RecordedAcceptance),
            )
            is_late = len(rounds) == MOST_ROUNDS or time.perf_counter() - started >= self.max_seconds
            if check.error >= -TOLERANCE or (is_late and len(rounds) >= LEAST_ROUNDS):
                return check

    def _round(self, place: Place, found: TunedBatch, answers: Sequence[int]) -> Timed:
        """Decode the answers once each way, in groups that take turns."""
        engine = self._engine(place, found)
        tree = CandidateTree.from_json(found.static.tree) if found.best == "static" else None
        ways = {"plain": DecodingOptions(max_new_tokens=self.new_tokens, medusa=False)}
        if found.best != "plain":
            ways[found.best] = DecodingOptions(max_new_tokens=self.new_tokens, tree=tree)
        steps: Timed = {way: [] for way in ways}
        for start in range(0, len(answers), place.batch_size):
            group = [self.prompts[answer] for answer in answers[start : start + place.batch_size]]
            for way, decoding in ways.items():
                steps[way] += full_steps(engine, group, decoding)
        return steps

    def _engine(self, place: Place, found: TunedBatch) -> DecodingEngine:
        tree = DynamicTree(found.dynamic.nodes)
        return DecodingEngine(self.backend, tree, max_batch_size=place.batch_size, costs=place.costs, reuse_prefixes=False)


def _predicted(
    place: Place, found: TunedBatch, acceptance: RecordedAcceptance | EvaluatedAcceptance, answers: Sequence[int]
) -> float:
    """Tokens per second of the best way to decode; for these answers, if they were recorded."""
    best = {"plain": found.plain, "static": found.static, "dynamic": found.dynamic}[found.best]
    if isinstance(acceptance, RecordedAcceptance) and found.best != "plain":
        tree = CandidateTree.from_json(found.static.tree) if found.best == "static" else best.nodes
        best = acceptance.replayed(place, tree, answers)
    return best.tokens_per_second


def _speed(rounds: Sequence[Timed], way: str) -> float:
    """Tokens per second if each step takes what it took in the fastest quarter of the rounds, as in the table of costs.

    All rounds make the same steps: they decode greedily, and the costs that decide about the drafts stay the same.
    """
    count = min(len(steps[way]) for steps in rounds)
    seconds = low([[step.seconds for step in steps[way][:count]] for steps in rounds])  # [count]
    return sum(step.tokens for step in rounds[0][way][:count]) / float(seconds.sum())
