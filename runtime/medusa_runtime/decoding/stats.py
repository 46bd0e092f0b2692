"""Counts and seconds of decoding: of one answer, or of all answers of an engine."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from medusa_runtime.drafting.draft import Draft


@dataclass(frozen=True)
class StepCounts:
    """What one verification step of one sequence drafted and gave out."""

    drafted: list[int]  # drafts verified at depth 1, 2 …
    looked_up: list[int]  # those of them that prompt lookup named, alone or with the heads
    accepted: list[bool]  # for each accepted draft that is given out, from depth 1 on: whether prompt lookup named it
    num_given: int  # tokens given out
    is_forced: bool = False  # the sequence's guide alone made the draft

    @classmethod
    def of(cls, draft: Draft, nodes: Sequence[int], num_given: int, *, is_forced: bool = False) -> StepCounts:
        """Count a step.

        Args:
            draft: what was verified.
            nodes: the accepted nodes that are given out, without the root.
            num_given: tokens given out.
            is_forced: whether the sequence's guide alone made the draft.
        """
        depths, looked_up = draft.depths.tolist(), draft.looked_up.tolist()
        named = [depth for depth, is_named in zip(depths, looked_up, strict=True) if is_named]
        return cls(_by_depth(depths), _by_depth(named), [looked_up[node] for node in nodes], num_given, is_forced)

    def without_last(self, count: int) -> StepCounts:
        """The same step if it had not given out its last `count` tokens."""
        num_given = self.num_given - count
        return dataclasses.replace(self, accepted=self.accepted[:num_given], num_given=num_given)


@dataclass
class DecodingStats:
    """Counts and seconds of one generation, over all its sequences.

    A draft at depth d is a guess of head d, unless prompt lookup named it or a guide forced it: these draft at any depth.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens that an earlier request had left in the cache
    num_generated_tokens: int = 0  # tokens given out, those that prefill gives included
    num_decoded_tokens: int = 0  # tokens that verification steps gave
    num_steps: int = 0  # verification steps, counted for each sequence that took part
    num_draft_tokens: int = 0  # drafts verified
    num_accepted_tokens: int = 0  # drafts accepted and given out
    num_looked_up_tokens: int = 0  # accepted drafts that prompt lookup proposed, alone or with the heads
    num_passes: int = 0  # forward passes that verified drafts; one pass verifies a step of every sequence that decodes
    num_preemptions: int = 0  # times a sequence lost its slot, and had to wait, because there was no memory for all
    drafted_by_depth: list[int] = field(default_factory=list)  # drafts verified at depth 1, 2 …
    accepted_by_depth: list[int] = field(default_factory=list)  # drafts accepted at depth 1, 2 …
    drafted_by_lookup: list[int] = field(default_factory=list)  # those that prompt lookup named, at depth 1, 2 …
    accepted_by_lookup: list[int] = field(default_factory=list)
    drafted_by_guide: list[int] = field(default_factory=list)  # those that a guide forced, at depth 1, 2 …
    accepted_by_guide: list[int] = field(default_factory=list)
    steps_by_drafted: list[int] = field(default_factory=list)  # steps that verified 0, 1, 2 … drafts
    steps_by_accepted: list[int] = field(default_factory=list)  # steps that gave out 0, 1, 2 … accepted drafts
    queue_seconds: float = 0.0  # from the request, as its caller made it, to the start of its prefill
    prefill_seconds: float = 0.0  # from the start of the prefill to the first token
    decode_seconds: float = 0.0  # from the first token to the last
    engine_seconds: float = 0.0  # the part of decode_seconds spent in the backend's step and heads

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per verification step and sequence: the acceptance length, bonus token included."""
        return self.num_decoded_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second of decoding. Prefill and the token that it gives do not count."""
        return self.num_decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def first_token_seconds(self) -> float:
        """Time to first token, from the request on, with its wait in the queue."""
        return self.queue_seconds + self.prefill_seconds

    @property
    def seconds_per_token(self) -> float:
        """Time per output token after the first."""
        return self.decode_seconds / self.num_decoded_tokens if self.num_decoded_tokens else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Fraction of steps whose accepted path reached depth 1, 2 …: each head's share of the speed.

        With prompt lookup or structures, paths can be deeper than there are heads.
        """
        return [accepted / self.num_steps for accepted in self.accepted_by_depth] if self.num_steps else []

    @property
    def drafted_by_head(self) -> list[int]:
        """Drafts verified that head 1, 2 … alone named: without those of prompt lookup and of guides."""
        return _less(_less(self.drafted_by_depth, self.drafted_by_lookup), self.drafted_by_guide)

    @property
    def accepted_by_head(self) -> list[int]:
        """Drafts accepted that head 1, 2 … alone named: without those of prompt lookup and of guides."""
        return _less(_less(self.accepted_by_depth, self.accepted_by_lookup), self.accepted_by_guide)

    def add(self, other: DecodingStats) -> None:
        """Add the counts and seconds of another object to these."""
        for name in (entry.name for entry in dataclasses.fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                mine[:] = [a + b for a, b in itertools.zip_longest(mine, theirs, fillvalue=0)]
            else:
                setattr(self, name, mine + theirs)

    def count_step(self, step: StepCounts, sign: int = 1) -> None:
        """Count one verification step of one sequence; with sign -1, count it no longer."""
        num_accepted, num_looked_up = len(step.accepted), sum(step.accepted)
        self.num_steps += sign
        self.num_draft_tokens += sign * sum(step.drafted)
        self.num_accepted_tokens += sign * num_accepted
        self.num_looked_up_tokens += sign * num_looked_up
        self.num_decoded_tokens += sign * step.num_given
        self.num_generated_tokens += sign * step.num_given
        _add(self.drafted_by_depth, step.drafted, sign)
        _add(self.accepted_by_depth, [1] * num_accepted + [0] * (len(step.drafted) - num_accepted), sign)
        if step.looked_up:
            _add(self.drafted_by_lookup, step.looked_up, sign)
            _add(self.accepted_by_lookup, step.accepted, sign)
        if step.is_forced:
            _add(self.drafted_by_guide, step.drafted, sign)
            _add(self.accepted_by_guide, [1] * num_accepted, sign)
        _count(self.steps_by_drafted, sum(step.drafted), sign)
        _count(self.steps_by_accepted, num_accepted, sign)

    def take_back(self, step: StepCounts, num_unused: int) -> None:
        """Take back the last `num_unused` tokens of a step that was counted: a stop text ended the answer before them."""
        self.count_step(step, -1)
        self.count_step(step.without_last(num_unused))


def _by_depth(depths: Sequence[int]) -> list[int]:
    """How many nodes are 1, 2 … deep."""
    counts = [0] * max(depths, default=0)
    for depth in depths:
        if depth:
            counts[depth - 1] += 1
    return counts


def _add(counts: list[int], more: Sequence[int], sign: int) -> None:
    """Add to each count, from the first on."""
    counts += [0] * (len(more) - len(counts))
    for place, count in enumerate(more):
        counts[place] += sign * count


def _count(counts: list[int], place: int, sign: int) -> None:
    """Add one to the count at a place."""
    counts += [0] * (place + 1 - len(counts))
    counts[place] += sign


def _less(counts: list[int], fewer: list[int]) -> list[int]:
    """The difference of two lists of counts, of which the second may be shorter."""
    return [a - b for a, b in itertools.zip_longest(counts, fewer[: len(counts)], fillvalue=0)]
