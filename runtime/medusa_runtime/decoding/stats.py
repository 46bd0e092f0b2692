"""Counts and seconds of decoding: of one answer, or of all answers of an engine."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field


@dataclass
class DecodingStats:
    """Counts and seconds of one generation, over all its sequences.

    A draft at depth d is a guess of head d, so counts by depth are counts by head. Prompt lookup guesses at any depth.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens that an earlier request had left in the cache
    num_generated_tokens: int = 0  # tokens given out, those that prefill gives included
    num_decoded_tokens: int = 0  # tokens that verification steps gave
    num_steps: int = 0  # verification steps, counted for each sequence that took part
    num_draft_tokens: int = 0  # drafts verified
    num_accepted_tokens: int = 0  # drafts accepted and given out
    num_looked_up_tokens: int = 0  # accepted drafts that prompt lookup proposed, alone or with the heads
    drafted_by_depth: list[int] = field(default_factory=list)  # drafts verified at depth 1, 2 …
    accepted_by_depth: list[int] = field(default_factory=list)  # drafts accepted at depth 1, 2 …
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
        """Fraction of steps whose accepted path reached depth 1, 2 …: each head's share of the speed."""
        return [accepted / self.num_steps for accepted in self.accepted_by_depth] if self.num_steps else []

    def add(self, other: DecodingStats) -> None:
        """Add the counts and seconds of another object to these."""
        for name in (entry.name for entry in dataclasses.fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                mine[:] = [a + b for a, b in itertools.zip_longest(mine, theirs, fillvalue=0)]
            else:
                setattr(self, name, mine + theirs)

    def count_step(self, drafted: list[int], num_accepted: int, num_given: int, num_looked_up: int) -> None:
        """Count one verification step of one sequence.

        Args:
            drafted: drafts verified at depth 1, 2 ….
            num_accepted: drafts accepted and given out.
            num_given: tokens given out.
            num_looked_up: accepted drafts that prompt lookup named.
        """
        self.num_steps += 1
        self.num_draft_tokens += sum(drafted)
        self.num_accepted_tokens += num_accepted
        self.num_looked_up_tokens += num_looked_up
        self.num_decoded_tokens += num_given
        self.num_generated_tokens += num_given
        missing = len(drafted) - len(self.drafted_by_depth)
        self.drafted_by_depth += [0] * missing
        self.accepted_by_depth += [0] * missing
        for depth, count in enumerate(drafted):
            self.drafted_by_depth[depth] += count
            self.accepted_by_depth[depth] += depth < num_accepted

    def take_back(self, num_given: int, num_accepted: int, num_kept: int, num_looked_up: int) -> None:
        """Take back the last tokens of the last step: a stop text inside the step ended the answer before them.

        Args:
            num_given: tokens that are not given out after all.
            num_accepted: drafts that the step accepted.
            num_kept: drafts among them that are still given out.
            num_looked_up: drafts among the others that prompt lookup named.
        """
        self.num_generated_tokens -= num_given
        self.num_decoded_tokens -= num_given
        self.num_accepted_tokens -= num_accepted - num_kept
        self.num_looked_up_tokens -= num_looked_up
        for depth in range(num_kept, num_accepted):
            self.accepted_by_depth[depth] -= 1
