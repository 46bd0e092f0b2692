"""Real decoding, timed: what the host adds to a step, and whether the prediction holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from medusa_runtime.backends.base import Backend
from medusa_runtime.decoding.engine import DecodingEngine
from medusa_runtime.decoding.stats import DecodingStats
from medusa_runtime.drafting.costs import StepCosts
from medusa_runtime.drafting.tree import DynamicTree
from medusa_runtime.drafting.tuning import LookupCheck
from medusa_runtime.options import DecodingOptions

Thing = TypeVar("Thing")
HOST_NODES, HOST_TOKENS, HOST_STEPS = 8, 64, 16  # of the runs that tell the host's work
Pair = tuple[Sequence["TimedStep"], Sequence["TimedStep"]]  # of the same prompts, decoded in two ways


@dataclass(frozen=True)
class TimedStep:
    """One step of a full batch."""

    tokens: int
    seconds: float
    engine_seconds: float


def full_steps(
    engine: DecodingEngine, prompts: Sequence[Sequence[int]], options: DecodingOptions, most: int | None = None
) -> list[TimedStep]:
    """Decode prompts, and time the steps in which the engine decodes as many sequences as it can.

    Args:
        engine: idle.
        prompts: token ids; at least as many as the engine decodes at a time.
        options: how they are decoded.
        most: steps to time.
    """
    sequences = [engine.add(prompt, options) for prompt in prompts]
    found: list[TimedStep] = []
    while not engine.is_idle:
        decoding = sum(bool(sequence.token_ids) and not sequence.is_finished for sequence in sequences)
        before = dataclasses.replace(engine.stats)
        engine.step()
        if decoding == engine.max_batch_size:
            found.append(_difference(before, engine.stats))
        can_be_full = engine.num_active + engine.num_waiting >= engine.max_batch_size
        if len(found) == most or not can_be_full:
            for sequence in sequences:
                engine.end(sequence)
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    return found


def in_turn(
    engines: tuple[DecodingEngine, DecodingEngine],
    prompts: Sequence[Sequence[int]],
    options: DecodingOptions,
    tell: Callable[[int], None] = lambda _: None,
) -> list[Pair]:
    """Decode prompts with two engines, group by group of as many as they decode at a time, each the first in every other one.

    Args:
        engines: idle, of one batch size; they may have one backend.
        prompts: token ids; a number of whole groups.
        options: how they are decoded.
        tell: told how many prompts are done.

    Returns:
        The full steps of each group by each engine.
    """
    pairs: list[Pair] = []
    size = engines[0].max_batch_size
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        if len(pairs) % 2:
            second = full_steps(engines[1], group, options)
            pairs.append((full_steps(engines[0], group, options), second))
        else:
            pairs.append((full_steps(engines[0], group, options), full_steps(engines[1], group, options)))
        tell(start + len(group))
    return pairs


def lookup_check(pairs: Sequence[Pair], size: int) -> LookupCheck | None:
    """What prompt lookup gives; none where no group was decoded long enough.

    Args:
        pairs: steps without it and with it.
        size: prompts of each pair.
    """
    timed = [pair for pair in pairs if all(pair)]
    if not timed:
        return None
    without, with_it = ([step for pair in timed for step in pair[way]] for way in (0, 1))
    return LookupCheck(
        prompts=size * len(timed),
        tokens_per_second=rate(with_it),
        tokens_per_second_without=rate(without),
        ratio=median(rate(after) / rate(before) for before, after in timed),
    )


def rate(steps: Sequence[TimedStep]) -> float:
    """Tokens a second, over all steps together."""
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)


def with_host_seconds(backend: Backend, costs: StepCosts, prompts: Sequence[Sequence[int]]) -> StepCosts:
    """The costs with what the host adds to a step: measured for the smallest and the largest batch, in between by a line.

    Args:
        backend: nobody else may use it meanwhile.
        costs: of the backend.
        prompts: token ids; at least one.
    """
    ends = (costs.batch_sizes[0], costs.batch_sizes[-1])
    measured = []
    for batch in ends:
        tree = DynamicTree(min(HOST_NODES, costs.widths[-1]))
        engine = DecodingEngine(backend, tree, max_batch_size=batch, reuse_prefixes=False)
        options = DecodingOptions(max_new_tokens=HOST_TOKENS, ignore_eos=True)
        steps = full_steps(engine, cycled(prompts, batch), options, HOST_STEPS)
        measured.append(median(step.seconds - step.engine_seconds for step in steps) if steps else 0.0)
    slope = (measured[1] - measured[0]) / max(1, ends[1] - ends[0])
    return dataclasses.replace(
        costs, host_seconds=[max(0.0, measured[0] + slope * (batch - ends[0])) for batch in costs.batch_sizes]
    )


def cycled(things: Sequence[Thing], count: int) -> list[Thing]:
    """So many of them, from the first again where there are too few."""
    return [things[number % len(things)] for number in range(count)]


def _difference(before: DecodingStats, after: DecodingStats) -> TimedStep:
    return TimedStep(
        after.num_decoded_tokens - before.num_decoded_tokens,
        after.decode_seconds - before.decode_seconds,
        after.engine_seconds - before.engine_seconds,
    )
