"""Timed decoding: measures the host's share of a step, and checks predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from medusa_runtime.backends.base import Backend
from medusa_runtime.decoding.engine import DecodingEngine
from medusa_runtime.decoding.stats import DecodingStats
from medusa_runtime.drafting.costs import StepCosts
from medusa_runtime.drafting.ngrams import NGrams
from medusa_runtime.drafting.rounds import low
from medusa_runtime.drafting.tree import DynamicTree
from medusa_runtime.drafting.tuning import LookupCheck
from medusa_runtime.options import DecodingOptions

Thing = TypeVar("Thing")
HOST_NODES, HOST_TOKENS, HOST_STEPS = 8, 64, 16  # tree nodes, new tokens and steps when measuring the host's share
Pair = tuple[Sequence["TimedStep"], Sequence["TimedStep"]]  # the same prompts, decoded in two ways


@dataclass(frozen=True)
class TimedStep:
    """One step of a full batch."""

    tokens: int
    seconds: float
    engine_seconds: float


def full_steps(
    engine: DecodingEngine, prompts: Sequence[Sequence[int]], options: DecodingOptions, most: int | None = None
) -> list[TimedStep]:
    """Decode prompts, and return the timed steps that decode a full batch.

    Args:
        engine: an idle engine.
        prompts: token ids; at least as many prompts as the engine's batch size.
        options: decoding options.
        most: the largest number of steps to time.
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
    """Decode prompts with two engines, in groups of their batch size. The engines alternate in going first.

    Args:
        engines: two idle engines of the same batch size. They may share a backend.
        prompts: token ids; a multiple of the batch size.
        options: decoding options.
        tell: called with the number of prompts done.

    Returns:
        For each group, the full steps of each engine.
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
    """The gain from prompt lookup; None if no group was decoded long enough.

    Args:
        pairs: steps without and with prompt lookup.
        size: prompts per pair.
    """
    timed = [pair for pair in pairs if all(pair)]
    if not timed:
        return None
    without, with_it = (rate([step for pair in timed for step in pair[way]]) for way in (0, 1))
    return LookupCheck(
        prompts=size * len(timed),
        tokens_per_second=with_it,
        tokens_per_second_without=without,
        ratio=with_it / without,
    )


def rate(steps: Sequence[TimedStep]) -> float:
    """Tokens per second over all steps."""
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)


def with_host_seconds(
    backend: Backend, costs: StepCosts, prompts: Sequence[Sequence[int]], ngrams: NGrams | None = None
) -> StepCosts:
    """The costs plus the host's share of a step, without drafts and with the heads' drafts.

    Both are measured at the smallest and the largest batch and interpolated linearly.

    Args:
        backend: the backend; nothing else may use it meanwhile.
        costs: the backend's costs.
        prompts: token ids of at least one prompt.
        ngrams: what corrects the heads' guesses.
    """
    ends = (costs.batch_sizes[0], costs.batch_sizes[-1])
    plain, drafted = zip(
        *(_host_seconds(backend, min(HOST_NODES, costs.widths[-1]), cycled(prompts, batch), ngrams) for batch in ends),
        strict=True,
    )

    def between(measured: Sequence[float]) -> list[float]:
        slope = (measured[1] - measured[0]) / max(1, ends[1] - ends[0])
        return [max(0.0, measured[0] + slope * (batch - ends[0])) for batch in costs.batch_sizes]

    drafts = [max(0.0, after - before) for before, after in zip(plain, drafted, strict=True)]
    return dataclasses.replace(costs, host_seconds=between(plain), draft_seconds=between(drafts))


def _host_seconds(backend: Backend, nodes: int, prompts: Sequence[Sequence[int]], ngrams: NGrams | None) -> tuple[float, float]:
    """The host's work in a step without drafts, and with trees of `nodes` nodes. All prompts are decoded at a time."""
    found = []
    for medusa in (False, True):
        engine = DecodingEngine(backend, DynamicTree(nodes), max_batch_size=len(prompts), reuse_prefixes=False, ngrams=ngrams)
        options = DecodingOptions(max_new_tokens=HOST_TOKENS, ignore_eos=True, medusa=medusa)
        steps = full_steps(engine, prompts, options, HOST_STEPS)
        found.append(float(low([step.seconds - step.engine_seconds for step in steps])) if steps else 0.0)
    return found[0], found[1]


def cycled(things: Sequence[Thing], count: int) -> list[Thing]:
    """`count` of them. After the last, it starts again from the first."""
    return [things[number % len(things)] for number in range(count)]


def _difference(before: DecodingStats, after: DecodingStats) -> TimedStep:
    return TimedStep(
        after.num_decoded_tokens - before.num_decoded_tokens,
        after.decode_seconds - before.decode_seconds,
        after.engine_seconds - before.engine_seconds,
    )
