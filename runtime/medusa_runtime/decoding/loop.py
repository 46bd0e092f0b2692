"""Decoding some prompts to their end in a plain loop: for tests, tuning and benchmarks. Services use `service.worker`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from medusa_runtime.decoding.checks import DecodingRequest
from medusa_runtime.decoding.sequence import SequenceStep
from medusa_runtime.decoding.stats import DecodingStats
from medusa_runtime.errors import OptionError
from medusa_runtime.options import DecodingOptions

if TYPE_CHECKING:
    from medusa_runtime.decoding.engine import DecodingEngine


def generate(
    engine: DecodingEngine, prompts: Sequence[Sequence[int]], options: DecodingOptions, stats: DecodingStats | None = None
) -> Iterator[list[SequenceStep]]:
    """Decode prompts side by side, and yield after each step the tokens decided. `SequenceStep.sequence` is a prompt's index.

    Args:
        engine: must not be used by anything else meanwhile.
        prompts: lists of token ids.
        options: how the prompts are decoded.
        stats: an object that the counts are added to.

    Raises:
        OptionError, CapacityError, TreeError: at the call, before any work; see `checks.check_request`.
    """
    if not prompts:
        raise OptionError("there is no prompt")
    requests = [engine.check(prompt, options) for prompt in prompts]
    return _steps(engine, requests, stats if stats is not None else DecodingStats())


def _steps(engine: DecodingEngine, requests: Sequence[DecodingRequest], stats: DecodingStats) -> Iterator[list[SequenceStep]]:
    sequences = [engine.begin(request) for request in requests]
    clock = _shared(engine.stats)
    try:
        while not all(sequence.is_finished for sequence in sequences):
            engine.step()
            if steps := [
                dataclasses.replace(step, sequence=index)
                for index, sequence in enumerate(sequences)
                for step in sequence.take_steps()
            ]:
                yield steps
            for sequence in sequences:
                if sequence.error is not None:
                    raise sequence.error
    finally:
        for sequence in sequences:
            engine.end(sequence)
            own: dict[str, Any] = dict.fromkeys(clock, 0)
            stats.add(dataclasses.replace(sequence.stats, **own))
        for name, now in _shared(engine.stats).items():  # of the batch, not the sum over its sequences
            setattr(stats, name, getattr(stats, name) + now - clock[name])


def _shared(stats: DecodingStats) -> dict[str, Any]:
    """What the sequences of a batch share: seconds and passes of the engine."""
    return {name: getattr(stats, name) for name in ("prefill_seconds", "decode_seconds", "engine_seconds", "num_passes")}
