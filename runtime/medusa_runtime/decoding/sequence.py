"""One answer while it is decoded."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.decoding.stats import DecodingStats
from medusa_runtime.drafting.draft import Draft
from medusa_runtime.drafting.lookup import Continuation, PromptLookup
from medusa_runtime.drafting.proposals import Candidates, CandidateSet
from medusa_runtime.options import DecodingOptions
from medusa_runtime.sampling.acceptance import Accepted, policy_for
from medusa_runtime.sampling.distribution import Uniforms, chosen_logprob
from medusa_runtime.sampling.shaping import Guide, LogitsShaper

Rows = npt.NDArray[np.floating]  # [N, V]
RANDOM_SEEDS = 1 << 53  # so that every JSON reader can hold them
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, before any of the request's options."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens and their log-probabilities, best first


@dataclass(frozen=True)
class SequenceStep:
    """What one step decided for one sequence."""

    sequence: int
    token_ids: list[int]  # in order; what follows an end-of-sequence token or the limit is cut
    num_accepted: int  # drafts among them
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None  # one a token, where they were asked for


@dataclass(eq=False)
class Sequence:
    """One answer: what was asked, what has been decided, and where its cache is. Make one with `DecodingEngine.add`.

    The last of `token_ids` is decided but not cached: it is the root of the next step's tree.

    Args:
        id: unique within its engine.
        prompt_ids: what is continued.
        options: with `max_new_tokens` set.
        end_ids: tokens that end the answer.
        candidates: what its heads' drafts are chosen from.
        num_nodes: how many nodes a draft has at most.
        looks_up: also draft what followed the same tokens before.
        guide: what restricts its tokens.
        stream: which of several answers to one request, for the random numbers.
        totals: what all sequences of an engine count into.
    """

    id: int
    prompt_ids: list[int]
    options: DecodingOptions
    max_new_tokens: int
    end_ids: frozenset[int]
    candidates: CandidateSet
    num_nodes: int
    looks_up: bool = False
    guide: Guide | None = None
    stream: int = 0
    totals: DecodingStats = field(default_factory=DecodingStats)  # of all sequences of its engine, to count into

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    stats: DecodingStats = field(default_factory=DecodingStats)
    slot: int | None = None
    length: int = 0  # entries in the cache
    head_ids: IntArray | None = None  # [K, M] the heads' candidates for what follows the root
    head_log_probs: FloatArray | None = None  # [K, M]

    def __post_init__(self) -> None:
        self.seed = self.options.seed if self.options.seed is not None else secrets.randbelow(RANDOM_SEEDS)
        self.policy = policy_for(self.options)
        self.shaper = LogitsShaper(self.options, self.prompt_ids, self.end_ids, self.guide)
        self._uniforms = Uniforms(self.seed, self.stream)
        self._lookup = PromptLookup(self.prompt_ids, self.max_new_tokens) if self.looks_up else None
        self._continuations: list[Continuation] = []  # of what has been decided so far
        self._steps: list[SequenceStep] = []
        self._forced: list[int] = []  # what its guide lets follow the root, where that is no choice
        self._since = time.perf_counter()  # when the current phase began: waiting, prefill, decoding

    @property
    def is_finished(self) -> bool:
        """Whether nothing will be decided any more."""
        return self.finish_reason is not None

    @property
    def remaining(self) -> int:
        """Tokens that may still be given out."""
        return self.max_new_tokens - len(self.token_ids)

    @property
    def needs_logits(self) -> bool:
        """Whether the model's most likely tokens alone do not decide: then a step has to give logits."""
        return self.options.is_sampled or not self.shaper.is_identity or self.options.logprobs is not None

    @property
    def has_fixed_tree(self) -> bool:
        """Whether the load may not change the tree: the request brought it, it changes the answer, or a guide dictates it."""
        if self.options.tree is not None or self.is_forced:
            return True
        return self.options.is_sampled and self.options.acceptance == "typical"

    @property
    def is_forced(self) -> bool:
        """Whether its guide alone says what the next draft holds."""
        return bool(self._forced)

    def take_steps(self) -> list[SequenceStep]:
        """What was decided since the last call."""
        steps, self._steps = self._steps, []
        return steps

    def begin(self, num_cached: int) -> None:
        """Its prefill starts, with so many tokens of the prompt in the cache already."""
        self.length = num_cached
        waited = self._lap()
        for stats in (self.stats, self.totals):
            stats.num_prompt_tokens += len(self.prompt_ids)
            stats.num_cached_tokens += num_cached
            stats.queue_seconds += waited

    def decide_first(self, greedy_id: int, logits: Rows | None) -> None:
        """Take the token that follows the prompt. logits: [1, V], where `needs_logits`."""
        prompt_end = Draft.chain(self.prompt_ids[-1:])
        accepted = Accepted([0], greedy_id) if logits is None else self.verdict(prompt_end, logits)
        given, _ = self._give(prompt_end, accepted, logits)
        for stats in (self.stats, self.totals):
            stats.num_generated_tokens += given
        self.stats.prefill_seconds = self._lap()

    def proposals(self) -> Candidates:
        """What may follow the root, by its guide, or else by its heads and its prompt lookup."""
        self._forced = []
        if self.guide is not None and self.num_nodes > 1:
            self._forced = self.guide.forced(self.token_ids)[: min(self.remaining, self.num_nodes) - 1]
        if self._forced:
            return Candidates.chain([self.token_ids[-1], *self._forced])
        previous_id = (self.token_ids[-2:-1] or self.prompt_ids[-1:])[0]
        return self.candidates.candidates(
            self.token_ids[-1], self.head_ids, self.head_log_probs, self.remaining - 1, self._continuations, previous_id
        )

    def draft(self, num_nodes: int, proposals: Candidates) -> Draft:
        """What the next step verifies: the root and the likeliest proposals.

        Args:
            num_nodes: at most so many.
            proposals: from `proposals`, called just before.
        """
        if self.guide is None or self.is_forced:
            return proposals.draft(num_nodes)
        return proposals.draft(num_nodes, partial(self.guide.lets_pass, self.token_ids))

    @property
    def lookup_chances(self) -> FloatArray:
        """Probabilities of the drafts that its prompt lookup alone would give, likeliest first."""
        chances = [np.cumprod(continuation.chances, dtype=np.float32) for continuation in self._continuations]
        if not chances or self.is_forced:
            return np.empty(0, np.float32)
        return np.sort(np.concatenate(chances))[::-1][: self.num_nodes - 1]

    def verdict(self, draft: Draft, logits: Rows) -> Accepted:
        """What its policy accepts of a verified draft. logits: [N, V]."""
        return self.policy.accept(draft, _Target(self, draft, logits))

    def take(self, draft: Draft, accepted: Accepted, logits: Rows | None) -> None:
        """Give out what a step accepted. logits: [N, V], where they were asked for."""
        self.length += len(accepted.nodes)
        given, num_accepted = self._give(draft, accepted, logits)
        for stats in (self.stats, self.totals):
            stats.count_step(np.bincount(draft.depths)[1:].tolist(), num_accepted, given)
            if draft.looked_up is not None:
                stats.num_looked_up_tokens += int(draft.looked_up[accepted.nodes[1 : 1 + num_accepted]].sum())
        self.stats.decode_seconds += self._lap()

    def forget_heads(self) -> None:
        """The heads were not asked what follows the root."""
        self.head_ids = self.head_log_probs = None

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End it before its time."""
        if not self.is_finished:
            self.finish_reason, self.error = reason, error
            self._steps.append(SequenceStep(self.id, [], 0, reason))

    def _give(self, draft: Draft, accepted: Accepted, logits: Rows | None) -> tuple[int, int]:
        """Cut what was accepted at the end of the answer. Returns how many tokens are given out, and drafts among them."""
        tokens = [*draft.tokens[accepted.nodes[1:]].tolist(), accepted.bonus_id]
        kept = tokens[: self.remaining]
        end = next((place for place, token in enumerate(kept) if token in self.end_ids), None)
        if end is not None:
            kept, self.finish_reason = kept[: end + 1], "stop"
        elif len(kept) == self.remaining:
            self.finish_reason = "length"
        logprobs = None
        if self.options.logprobs is not None:
            assert logits is not None  # `needs_logits`
            rows = zip(accepted.nodes, kept, strict=False)
            logprobs = [TokenLogprob(token, *chosen_logprob(logits[row], token, self.options.logprobs)) for row, token in rows]
        self.token_ids += kept
        if self._lookup is not None:
            self._lookup.extend(kept)
            self._continuations = self._lookup.continuations(min(self.remaining, self.num_nodes) - 1)
        num_accepted = min(len(kept), len(tokens) - 1)
        self._steps.append(SequenceStep(self.id, kept, num_accepted, self.finish_reason, logprobs))
        return len(kept), num_accepted

    def uniform(self, depth: int) -> float:
        """The random number of the token that follows a node of that depth."""
        return self._uniforms[len(self.token_ids) + depth]

    def _lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        return elapsed


@dataclass(frozen=True)
class _Target:
    """See `acceptance.Target`."""

    sequence: Sequence
    draft: Draft
    rows: Rows  # [N, V]

    def logits(self, path: Tokens[int]) -> FloatArray:
        row: FloatArray = self.rows[path[-1]].astype(np.float32, copy=False)
        if self.sequence.shaper.is_identity:
            return row
        return self.sequence.shaper.shape(row, [*self.sequence.token_ids, *self.draft.tokens[list(path[1:])].tolist()])

    def uniform(self, depth: int) -> float:
        return self.sequence.uniform(depth)

    def ends_at(self, token_id: int) -> bool:
        return token_id in self.sequence.end_ids
