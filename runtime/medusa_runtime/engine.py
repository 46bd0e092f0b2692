"""The decoding loop on token ids: propose, verify, accept, commit. It knows nothing of text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medusa_runtime.backends.base import Backend
from medusa_runtime.decoding import accept_greedy, draft_tokens
from medusa_runtime.errors import CapacityError, OptionError, StaleStreamError
from medusa_runtime.tree import CandidateTree, IntArray

FinishReason = Literal["stop", "length"]
PREFILL_CHUNK = 512  # prompt tokens a step takes where the bundle sets no limit


@dataclass
class DecodingStats:
    """Counts and seconds of one generation, over all its sequences."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0  # all that was given out, the prefill's first tokens included
    num_decoded_tokens: int = 0  # those that verification steps gave
    num_steps: int = 0  # verification steps, counted for each sequence that took part
    num_draft_tokens: int = 0  # drafts verified
    num_accepted_tokens: int = 0  # drafts accepted and given out
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    engine_seconds: float = 0.0  # the part of decode_seconds spent in the backend's step and heads

    @property
    def tokens_per_step(self) -> float:
        """Tokens a verification step gave a sequence on average: the acceptance length, bonus token included."""
        return self.num_decoded_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens over decoding time, prefill and the token it gives left out."""
        return self.num_decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class SequenceStep:
    """What one step decided for one sequence."""

    sequence: int
    token_ids: list[int]  # in order; what follows an end-of-sequence token or the limit is cut
    num_accepted: int  # drafts among them
    finish_reason: FinishReason | None = None


@dataclass
class _Sequence:
    prompt_ids: list[int]
    remaining: int
    finish_reason: FinishReason | None = None


@dataclass
class _State:
    """Where B sequences stand between two steps."""

    lengths: IntArray  # [B] entries in the cache
    root_ids: IntArray  # [B] decided, not in the cache yet
    head_ids: IntArray | None = None  # [B, K, M] candidates for what follows the root


class DecodingEngine:
    """Greedy decoding of token ids on a backend, several tokens a step.

    Args:
        backend: where the graphs run.
        tree: the candidate tree; none for the one the bundle names.

    Raises:
        TreeError: the tree is deeper or wider than the bundle's heads.
        CapacityError: the tree has more nodes than the bundle's engines take.
    """

    def __init__(self, backend: Backend, tree: CandidateTree | None = None) -> None:
        self.backend = backend
        self.tree = tree or CandidateTree.from_json(backend.manifest.tree)
        self.check_tree(self.tree)

    def check_tree(self, tree: CandidateTree) -> None:
        """Raise where the bundle cannot verify the tree."""
        heads, limits = self.backend.manifest.heads, self.backend.manifest.limits
        tree.check_fits(heads.num_heads, heads.top_k)
        if limits.max_tree_nodes is not None and tree.num_nodes > limits.max_tree_nodes:
            raise CapacityError(
                f"the tree has {tree.num_nodes} nodes, the engine takes {limits.max_tree_nodes}; "
                f"rebuild it with --max-tree-nodes {tree.num_nodes}"
            )

    def check_request(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Refuse what cannot be decoded to its end, before any work.

        Raises:
            OptionError: there is no prompt, a prompt is empty or holds an id outside the vocabulary, or
                max_new_tokens is below 1.
            CapacityError: a prompt with its answer is longer than the bundle allows, or there are too many prompts.
        """
        limits, vocab_size = self.backend.manifest.limits, self.backend.manifest.model.vocab_size
        if max_new_tokens < 1:
            raise OptionError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if not prompts:
            raise OptionError("there is no prompt")
        if limits.max_batch_size is not None and len(prompts) > limits.max_batch_size:
            raise CapacityError(f"{len(prompts)} prompts at once, the bundle takes {limits.max_batch_size}")
        for prompt in prompts:
            if not prompt:
                raise OptionError("the prompt is empty")
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise OptionError(f"the prompt holds a token id outside the vocabulary of {vocab_size}")
            if len(prompt) + max_new_tokens > limits.max_seq_len:
                raise CapacityError(
                    f"the prompt has {len(prompt)} tokens and {max_new_tokens} new ones were asked for, together more "
                    f"than the bundle's {limits.max_seq_len}; shorten the prompt or lower max_new_tokens"
                )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        medusa: bool = True,
        tree: CandidateTree | None = None,
        eos_token_ids: Sequence[int] | None = None,
        stats: DecodingStats | None = None,
    ) -> Iterator[list[SequenceStep]]:
        """Decode B prompts side by side and yield, after each step, what it decided for the unfinished sequences.

        The first yield comes from the prefill. Every sequence gets exactly the tokens that greedy decoding without
        Medusa gives it.

        Args:
            prompts: B lists of token ids.
            max_new_tokens: a limit for each sequence, end-of-sequence token included.
            medusa: False for plain autoregressive decoding.
            tree: instead of the engine's own.
            eos_token_ids: instead of the model's own; empty to go on to the limit.
            stats: an object to count into.

        Raises:
            OptionError, CapacityError, TreeError: at the call, before any work; see `check_request`.
            StaleStreamError: on reading on after a later call has begun to decode: they share one cache.
        """
        tree = (tree or self.tree) if medusa else CandidateTree.root_only()
        self.check_tree(tree)
        self.check_request(prompts, max_new_tokens)
        eos = frozenset(self.backend.manifest.model.eos_token_ids if eos_token_ids is None else eos_token_ids)
        sequences = [_Sequence(list(prompt), max_new_tokens) for prompt in prompts]
        return self._run(sequences, tree, eos, stats if stats is not None else DecodingStats())

    def _run(
        self, sequences: list[_Sequence], tree: CandidateTree, eos: frozenset[int], stats: DecodingStats
    ) -> Iterator[list[SequenceStep]]:
        started = time.perf_counter()
        state = self._prefill(sequences, tree, stats)
        epoch = self.backend.epoch
        steps = _emit(sequences, [[int(token)] for token in state.root_ids], eos)
        stats.num_generated_tokens += len(steps)
        stats.prefill_seconds += time.perf_counter() - started
        yield steps
        while remaining := max((s.remaining for s in sequences if s.finish_reason is None), default=0):
            if epoch != self.backend.epoch:
                raise StaleStreamError("another request has begun since: a backend serves one request at a time")
            started = time.perf_counter()
            decided = self._step(state, tree.pruned(remaining - 1), sequences, stats)
            steps = _emit(sequences, decided, eos)
            stats.num_steps += len(steps)
            stats.num_decoded_tokens += (given := sum(len(step.token_ids) for step in steps))
            stats.num_generated_tokens += given
            stats.num_accepted_tokens += sum(step.num_accepted for step in steps)
            stats.decode_seconds += time.perf_counter() - started
            yield steps

    def _prefill(self, sequences: list[_Sequence], tree: CandidateTree, stats: DecodingStats) -> _State:
        """Cache the prompts, chunk by chunk and all sequences side by side, and decide their first tokens.

        A shorter prompt is padded: what padding writes lies beyond the sequence's length and is overwritten later.
        """
        prompt_lengths = np.array([len(s.prompt_ids) for s in sequences], np.int64)  # [B]
        batch, longest = len(sequences), int(prompt_lengths.max())
        chunk = self.backend.manifest.limits.max_prefill_tokens or PREFILL_CHUNK
        padded = np.zeros((batch, longest), np.int64)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence.prompt_ids)] = sequence.prompt_ids
        self.backend.reset(batch, self._capacity_for(longest))
        state = _State(lengths=np.zeros(batch, np.int64), root_ids=np.zeros(batch, np.int64))
        for start in range(0, longest, chunk):
            tokens = padded[:, start : start + chunk]
            width = tokens.shape[1]
            valid = np.clip(prompt_lengths - start, 0, width)  # [B] how many of the chunk's tokens are the prompt's
            rows = np.maximum(valid - 1, 0)
            self._reserve(state.lengths, width)
            output = self.backend.step(
                np.ascontiguousarray(tokens),
                self._positions(state.lengths, np.arange(width)),
                np.repeat(np.tri(width, dtype=np.bool_)[None], batch, axis=0),
                state.lengths,
                rows[:, None],
            )
            ends = (valid > 0) & (start + width >= prompt_lengths)  # [B] the prompt ends in this chunk
            state.root_ids = np.where(ends, output.greedy_ids[:, 0], state.root_ids)
            if tree.depth and ends.any():
                proposed = self.backend.propose(np.zeros(batch, np.int64)).token_ids
                kept = proposed if state.head_ids is None else state.head_ids
                state.head_ids = np.where(ends[:, None, None], proposed, kept)
            state.lengths = state.lengths + valid
        stats.num_prompt_tokens += int(prompt_lengths.sum())
        return state

    def _step(self, state: _State, tree: CandidateTree, sequences: list[_Sequence], stats: DecodingStats) -> list[list[int]]:
        """Propose, verify, accept, commit. Returns the tokens decided for each sequence."""
        batch, nodes = len(sequences), tree.num_nodes
        self._reserve(state.lengths, nodes)
        tokens = draft_tokens(tree, state.root_ids, state.head_ids if tree.depth else None)  # [B, N]

        started = time.perf_counter()
        output = self.backend.step(
            tokens,
            self._positions(state.lengths, tree.depths),
            np.repeat(tree.mask[None], batch, axis=0),
            state.lengths,
            np.repeat(np.arange(nodes)[None], batch, axis=0),
        )
        stats.engine_seconds += time.perf_counter() - started

        paths = accept_greedy(tree, tokens, output.greedy_ids)
        last = np.array([path[-1] for path in paths], np.int64)  # [B]
        decided: list[list[int]] = []
        for index, path in enumerate(paths):
            bonus = int(output.greedy_ids[index, path[-1]])
            decided.append([*tokens[index, path[1:]].tolist(), bonus])
            if sequences[index].finish_reason is None:
                self.backend.commit(index, int(state.lengths[index]), path)
                state.lengths[index] += len(path)
                state.root_ids[index] = bonus
                stats.num_draft_tokens += nodes - 1
        if tree.depth:
            started = time.perf_counter()
            state.head_ids = self.backend.propose(last).token_ids
            stats.engine_seconds += time.perf_counter() - started
        return decided

    def _positions(self, lengths: IntArray, depths: IntArray) -> IntArray:  # [B, T]
        """Cache length plus depth; what lies beyond the limit is never given out, and must not pass a position table."""
        positions: IntArray = np.minimum(lengths[:, None] + depths, self.backend.manifest.limits.max_seq_len - 1)
        return positions

    def _reserve(self, lengths: IntArray, new_tokens: int) -> None:
        self.backend.reserve(len(lengths), self._capacity_for(int(lengths.max()) + new_tokens))

    def _capacity_for(self, slots: int) -> int:
        return self.backend.manifest.limits.capacity or slots


def _emit(sequences: list[_Sequence], decided: list[list[int]], eos: frozenset[int]) -> list[SequenceStep]:
    """Cut what was decided at the end of the answer, and tell it for the sequences that were unfinished."""
    steps = []
    for index, (sequence, tokens) in enumerate(zip(sequences, decided, strict=True)):
        if sequence.finish_reason is not None:
            continue
        kept = tokens[: sequence.remaining]
        end = next((place for place, token in enumerate(kept) if token in eos), None)
        if end is not None:
            kept, sequence.finish_reason = kept[: end + 1], "stop"
        elif len(kept) == sequence.remaining:
            sequence.finish_reason = "length"
        sequence.remaining -= len(kept)
        steps.append(SequenceStep(index, kept, min(len(kept), len(tokens) - 1), sequence.finish_reason))
    return steps
