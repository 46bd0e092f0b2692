"""The decoding loop on token ids: propose, verify, accept, commit, for many sequences at once. It knows nothing of text."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from medusa_runtime.arrays import IntArray, TokenBuffer
from medusa_runtime.backends.base import Backend, StepOutput, not_finite
from medusa_runtime.decoding.checks import (
    DecodingRequest,
    check_costs,
    check_limits,
    check_request,
    check_tree,
    checked_batch_size,
)
from medusa_runtime.decoding.loop import generate
from medusa_runtime.decoding.prefill import CHUNK, FIRST_GAP_SECONDS, GAP_STEPS, Pass, PromptReader
from medusa_runtime.decoding.proposer import Proposer, StepDrafts
from medusa_runtime.decoding.sequence import DecodingSequence, FinishReason, Rows, SequenceStep
from medusa_runtime.decoding.slots import CacheUse, SlotPool
from medusa_runtime.decoding.stats import DecodingStats, StepCounts
from medusa_runtime.drafting.averages import moving_average
from medusa_runtime.drafting.costs import Costs
from medusa_runtime.drafting.draft import DraftBatch
from medusa_runtime.drafting.guide import Guide
from medusa_runtime.drafting.ngrams import NGrams
from medusa_runtime.drafting.proposals import Drafter, candidates_for
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import CapacityError, QueueTimeoutError, is_failure
from medusa_runtime.options import DecodingOptions
from medusa_runtime.sampling.acceptance import Accepted, accept_greedy

LOOKUP_NODES = 16  # of a draft by prompt lookup if the engine's tree has no room for one
log = logging.getLogger(__name__)


class DecodingEngine:
    """Decodes token ids on a backend, several tokens a step and several sequences at a time.

    Sequences join and leave between steps. A step verifies the drafts of all sequences that decode in one forward pass, then
    reads a chunk of the prompts. One thread at a time may use an engine.

    Args:
        backend: where the graphs run. Its cache is the engine's alone.
        tree: which continuations are verified; None for the tree that the bundle names.
        max_batch_size: sequences decoded at a time, each with a slot in the cache; more wait in the order they came. None
            for 8, or as many as the bundle takes.
        costs: what steps cost here. With it the engine's own trees shrink, and grow again, as the load and the heads' own
            probabilities make it pay. Without it, or if a request brings a tree, trees always have their full size.
        reuse_prefixes: start a prompt from what an earlier one that begins alike left in the cache.
        prompt_lookup: also draft what came after the same tokens before, in the prompt or in the answer, if a request does
            not say. Such drafts compete with the heads' for the nodes of the tree; without Medusa, they have all of them.
            A request that brings its own tree gets none unless it asks for them.
        ngrams: correct the heads' guesses in trees that are made anew at each step.
        max_gap_seconds: the longest time that reading prompts may take between two steps of sequences that decode. A small
            value keeps streams steady; a large one gives the first token of new prompts sooner. None for six times as long
            as a step of decoding takes.
        max_cache_bytes: the largest KV cache. If sequences need more, the youngest wait until others have ended.

    Raises:
        OptionError: max_batch_size is below 1, or another argument is out of range.
        TreeError: the tree is deeper or wider than the bundle's heads.
        CapacityError: the tree has more nodes, or the batch more sequences, than the bundle's engines take.
    """

    def __init__(
        self,
        backend: Backend,
        tree: CandidateTree | DynamicTree | None = None,
        *,
        max_batch_size: int | None = None,
        costs: Costs | None = None,
        reuse_prefixes: bool = True,
        prompt_lookup: bool = False,
        ngrams: NGrams | None = None,
        max_gap_seconds: float | None = None,
        max_cache_bytes: int | None = None,
    ) -> None:
        check_costs(costs)
        check_limits(max_gap_seconds, max_cache_bytes)
        self.backend = backend
        self.tree = tree or CandidateTree.from_json(backend.manifest.tree)
        check_tree(backend.manifest, self.tree)
        self.prompt_lookup, self.ngrams, self.costs = prompt_lookup, ngrams, costs
        self.stats = DecodingStats()  # of all sequences so far; its seconds are the engine's own, not the sequences' sum
        num_slots = checked_batch_size(backend.manifest, max_batch_size)
        self._slots = SlotPool(backend, num_slots, reuse_prefixes=reuse_prefixes, max_bytes=max_cache_bytes)
        self._proposer = Proposer(backend, costs, self._blaming)
        self._reader = PromptReader(backend, self._slots, self._proposer.asks_ahead, self._blame)
        self._max_gap_seconds = max_gap_seconds
        self._step_seconds: float | None = None  # of a step of decoding, on average
        self._numbers = itertools.count()
        self._news: dict[int, DecodingSequence] = {}  # sequences that the current step changed

    @property
    def max_batch_size(self) -> int:
        """Sequences decoded at a time."""
        return self._slots.num_slots

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self._reader.waiting)

    @property
    def num_active(self) -> int:
        """Sequences that have a slot."""
        return len(self._slots.active)

    @property
    def cache(self) -> CacheUse:
        """How much of the KV cache is used."""
        return self._slots.use

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._reader.waiting and not self._slots.active

    def check(self, prompt_ids: Sequence[int], options: DecodingOptions | None = None) -> DecodingRequest:
        """Refuse a request that cannot be decoded to its end, before any work; see `check_request` for the errors."""
        return check_request(self.backend.manifest, prompt_ids, options or DecodingOptions())

    def add(
        self, prompt_ids: Sequence[int], options: DecodingOptions | None = None, *, guide: Guide | None = None, stream: int = 0
    ) -> DecodingSequence:
        """Check a prompt and queue it. After each `step`, `DecodingSequence.take_steps` gives the tokens decided for it.

        Args:
            prompt_ids: token ids.
            options: how it is decoded.
            guide: restricts its tokens.
            stream: the number of the answer, if a request has several: each has random numbers of its own.

        Raises:
            OptionError, CapacityError, TreeError: at once; see `check_request`.
        """
        return self.begin(self.check(prompt_ids, options), guide=guide, stream=stream)

    def begin(
        self, request: DecodingRequest, *, guide: Guide | None = None, stream: int = 0, since: float | None = None
    ) -> DecodingSequence:
        """Queue a checked request. Arguments as for `add`; since: when it was made, by `time.perf_counter`."""
        options, model, heads = request.options, self.backend.manifest.model, self.backend.manifest.heads
        tree = (options.tree or self.tree) if options.medusa else CandidateTree.root_only()
        candidates = candidates_for(tree, heads.num_heads, heads.top_k)
        if isinstance(tree, DynamicTree):
            candidates = dataclasses.replace(candidates, ngrams=self.ngrams)
        looks_up = options.prompt_lookup
        if looks_up is None:
            looks_up = self.prompt_lookup and options.medusa and options.tree is None  # without Medusa is without drafts
        tokens = TokenBuffer(request.prompt_ids, request.max_new_tokens)
        sequence = DecodingSequence(
            next(self._numbers),
            request,
            tokens,
            end_ids=frozenset([*options.stop_token_ids, *([] if options.ignore_eos else model.eos_token_ids)]),
            drafter=Drafter(
                tokens,
                candidates,
                num_nodes=self._lookup_nodes(options) if looks_up else candidates.num_nodes,
                looks_up=looks_up,
                guide=guide,
            ),
            guide=guide,
            stream=stream,
            since=since,
        )
        self._reader.add(sequence)
        return sequence

    def end(self, sequence: DecodingSequence, reason: FinishReason = "cancelled", *, num_unused: int = 0) -> None:
        """End a sequence between two steps. If it has ended already, only its `num_unused` last tokens are taken back.

        Args:
            sequence: a sequence of this engine.
            reason: why it ends.
            num_unused: tokens after a stop text, at the end of its last step. They are not given out.
        """
        if num_unused:
            step = sequence.drop_last(num_unused)
            for stats in (sequence.stats, self.stats):
                stats.take_back(step, num_unused)
        if reason == "stop" or not sequence.is_finished:
            sequence.finish(reason)
            self._drop(sequence)

    def step(self) -> list[DecodingSequence]:
        """Verify a draft of every sequence that decodes, then read a chunk of the prompts. Returns the sequences that changed.

        A failure that concerns one sequence ends that sequence alone, with the finish reason "error".
        """
        self._end_overdue()
        self._decode()
        self._read_prompts()
        self._refuse_late()
        news, self._news = list(self._news.values()), {}
        for sequence in news:
            if sequence.is_finished:
                self._drop(sequence)
        return news

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        *,
        options: DecodingOptions | None = None,
        stats: DecodingStats | None = None,
        **fields: Any,
    ) -> Iterator[list[SequenceStep]]:
        """See `loop.generate`."""
        if max_new_tokens is not None:
            fields["max_new_tokens"] = max_new_tokens
        return generate(self, prompts, DecodingOptions.of(options, **fields), stats)

    def _decode(self) -> None:
        """One verification step of all sequences that decode."""
        started = time.perf_counter()
        sequences = [slot.sequence for slot in self._slots.decoding if slot.sequence is not None]
        if not sequences:
            return
        try:
            self._decode_once(sequences)
        except Exception as error:  # noqa: BLE001 - a step that fails ends the sequences on it, and the engine goes on
            for sequence in sequences:
                self._blame(sequence, error)
        self._news |= {sequence.id: sequence for sequence in sequences}
        self.stats.decode_seconds += time.perf_counter() - started

    def _decode_once(self, sequences: list[DecodingSequence]) -> None:
        """Propose, verify, accept, commit."""
        begun = time.perf_counter()
        lengths = np.array([slot.length for slot in self._slots.decoding])
        step = self._proposer.choose(sequences, int(lengths.max()))
        batch = DraftBatch.of(step.drafts)
        drafted = time.perf_counter()
        if not self._make_room(batch.width):
            return
        begun += time.perf_counter() - drafted  # a larger cache is no work of this step
        last_position = self.backend.manifest.limits.max_seq_len - 1  # deeper nodes belong to drafts that cannot be given out
        started = time.perf_counter()
        output = self.backend.step(
            batch.tokens,
            np.minimum(lengths[:, None] + batch.depths, last_position),
            batch.mask,
            lengths,
            _all_rows(len(sequences), batch.width),
            with_logits=any(sequence.needs_logits for sequence in sequences),
            propose_ahead=self._proposer.asks_ahead(sequences),
        )
        seconds = time.perf_counter() - started
        if self.costs is not None and output.is_warm:
            self.costs.observe(len(sequences), batch.width, int(lengths.max()), seconds)

        accepted = accept_greedy(batch, output.greedy_ids)
        for row, sequence in enumerate(sequences):
            with self._blaming(sequence):
                if not sequence.is_finished:
                    accepted[row] = self._accept(row, sequence, step, accepted[row], output)
        seconds += self._proposer.go_on(sequences, step, batch.width, accepted)
        _trust(sequences, output)
        for stats in (self.stats, *(sequence.stats for sequence in sequences)):
            stats.engine_seconds += seconds
            stats.num_passes += 1
        if self.costs is not None and output.is_warm:
            host = time.perf_counter() - begun - seconds
            if step.with_heads is not None:
                self.costs.observe_host(len(sequences), host, with_heads=step.with_heads)
        if output.is_warm:
            self._step_seconds = seconds if self._step_seconds is None else moving_average(self._step_seconds, seconds)

    def _make_room(self, width: int) -> bool:
        """Reserve the step's entries. If there is no memory for them, make one sequence wait. Returns whether there is room."""
        try:
            self._slots.reserve(0, self._slots.num_decoding, width)
        except CapacityError as error:
            active = self._slots.active
            youngest = max(active, key=lambda sequence: sequence.id)
            if len(active) == 1:
                self._blame(youngest, error)
            else:
                log.info("sequence %d waits for memory: %s", youngest.id, error)
                self._slots.release(youngest)
                self._reader.put_back(youngest)
                for stats in (youngest.stats, self.stats):
                    stats.num_preemptions += 1
            return False
        return True

    def _accept(
        self, row: int, sequence: DecodingSequence, chosen: StepDrafts, accepted: Accepted, output: StepOutput
    ) -> Accepted:
        """Give out what a sequence's options accept, and move the accepted entries to the front of its slot."""
        draft, is_forced = chosen.drafts[row], chosen.proposals[row].is_forced
        logits = None if output.logits is None else output.logits[row]
        if logits is not None and sequence.needs_logits:
            accepted = sequence.accept(draft, logits)
        if not output.is_row_finite(row, *accepted.nodes) or (sequence.is_suspect and not _are_finite(logits, accepted)):
            raise not_finite()
        sequence.is_suspect = False
        slot = self._slots[row]
        if accepted.nodes[-1] >= len(accepted.nodes):  # else they stand there already
            self.backend.commit(row, slot.length, np.array(accepted.nodes))
        has_ngrams = sequence.drafter.candidates.ngrams is not None
        step = sequence.take(draft, accepted, logits, is_forced=is_forced, has_ngrams=has_ngrams)
        slot.length = min(slot.length + len(accepted.nodes), len(sequence.tokens))  # entries after the answer's end are lost
        counts = StepCounts.of(draft, accepted.nodes[1 : 1 + step.num_accepted], len(step.token_ids), is_forced=is_forced)
        sequence.last_step = counts
        for stats in (sequence.stats, self.stats):
            stats.count_step(counts)
        sequence.stats.decode_seconds += sequence.lap()
        return accepted

    def _read_prompts(self) -> None:
        """Read prompts for as long as the sequences that decode may be held up."""
        started = time.perf_counter()
        room = self.backend.manifest.limits.max_prefill_tokens or CHUNK
        gap = self._gap_seconds if self._slots.num_decoding else None
        while room > 0:
            for sequence, num_cached in self._reader.admit():
                self._count_prompt(sequence, num_cached)
            elapsed = time.perf_counter() - started
            if gap is not None and elapsed > gap / 2:  # another pass would exceed the gap
                break
            if (done := self._reader.read(room, None if gap is None else gap - elapsed)) is None:
                break
            room -= done.num_tokens
            if done.complete:
                self._start_decoding(done)
                if gap is None:  # somebody decodes now
                    break
        self.stats.prefill_seconds += time.perf_counter() - started

    @property
    def _gap_seconds(self) -> float:
        """How long reading prompts may take between two steps of sequences that decode."""
        if self._max_gap_seconds is not None:
            return self._max_gap_seconds
        return FIRST_GAP_SECONDS if self._step_seconds is None else GAP_STEPS * self._step_seconds

    def _lookup_nodes(self, options: DecodingOptions) -> int:
        """The most nodes of a draft that prompt lookup may fill."""
        if options.tree is not None:
            return options.tree.num_nodes
        if self.tree.num_nodes > 1:
            return self.tree.num_nodes
        return min(LOOKUP_NODES, self.backend.manifest.limits.max_tree_nodes or LOOKUP_NODES)

    def _start_decoding(self, done: Pass) -> None:
        """Decide the first token of each sequence whose prompt a pass has read to its end."""
        root_ids = done.output.greedy_ids[np.arange(len(done.sequences)), done.last_rows].tolist()
        for row in done.complete:
            sequence = done.sequences[row]
            self._news[sequence.id] = sequence
            with self._blaming(sequence):
                if not sequence.num_tokens:  # it has tokens if it decoded before it had to wait for memory
                    self._take_first(sequence, row, done)
                root_ids[row] = int(sequence.tokens.ids[-1])
                if not sequence.is_finished:
                    self._slots.start_decoding(sequence)
        try:
            # incomplete ones do not use their guesses
            self._proposer.start(done.sequences, done.last_rows.tolist(), root_ids, self._slots.num_decoding)
            _trust(done.sequences, done.output)
        except Exception as error:  # noqa: BLE001 - as for a step that fails
            for row in done.complete:
                self._blame(done.sequences[row], error)

    def _take_first(self, sequence: DecodingSequence, row: int, done: Pass) -> None:
        """Give out the token that follows a prompt."""
        last_row = done.last_rows[row]
        logits = None if done.output.logits is None else done.output.logits[row, last_row]
        draft, accepted = sequence.accept_first(int(done.output.greedy_ids[row, last_row]), logits)
        step = sequence.take(draft, accepted, None if logits is None else logits[None])
        for stats in (sequence.stats, self.stats):
            stats.num_generated_tokens += len(step.token_ids)
        sequence.stats.prefill_seconds += sequence.lap()

    def _count_prompt(self, sequence: DecodingSequence, num_cached: int) -> None:
        """Count a prompt when its sequence gets a slot for the first time."""
        if sequence.stats.num_prompt_tokens:
            return
        waited = sequence.lap()
        for stats in (sequence.stats, self.stats):
            stats.num_prompt_tokens += len(sequence.tokens)
            stats.num_cached_tokens += num_cached
            stats.queue_seconds += waited

    def _end_overdue(self) -> None:
        """End the sequences that have passed their deadline."""
        now = time.perf_counter()
        for sequence in [*self._reader.waiting, *self._slots.active]:
            deadline = sequence.options.deadline_seconds
            if deadline is not None and now - sequence.since >= deadline:
                sequence.finish("deadline")
                self._news[sequence.id] = sequence
        for sequence in self._news.values():
            self._drop(sequence)

    def _refuse_late(self) -> None:
        """End the sequences that still wait for a slot, and have passed their longest wait. A free slot is never refused."""
        now = time.perf_counter()
        for sequence in self._reader.waiting:
            longest, had_slot = sequence.options.max_queue_seconds, sequence.stats.num_prompt_tokens > 0
            if longest is None or had_slot or now - sequence.since < longest or sequence in self._reader.held_back:
                continue
            self._blame(sequence, QueueTimeoutError(f"the request waited {longest:g} s for a slot (max_queue_seconds)"))

    def _blame(self, sequence: DecodingSequence, error: BaseException) -> None:
        """End one sequence with an error. Its slot is freed at the end of the step."""
        sequence.finish("error", error)
        self._reader.remove(sequence)
        self._news[sequence.id] = sequence

    @contextmanager
    def _blaming(self, sequence: DecodingSequence) -> Iterator[None]:
        """Any failure in here is reported to this sequence's caller, and ends no other sequence."""
        try:
            yield
        except BaseException as error:
            if not is_failure(error):
                raise
            self._blame(sequence, error)

    def _drop(self, sequence: DecodingSequence) -> None:
        """Take a finished sequence out of the engine."""
        self._reader.remove(sequence)
        self._slots.release(sequence, keep=sequence.error is None and not sequence.is_suspect)
        self._reader.has_memory = True


@lru_cache(maxsize=256)
def _all_rows(batch: int, width: int) -> IntArray:
    """The numbers of all rows, for each sequence. Nobody may change it. [batch, width]"""
    rows = np.tile(np.arange(width), (batch, 1))
    rows.flags.writeable = False
    return rows


def _are_finite(logits: Rows | None, accepted: Accepted) -> bool:
    """Whether the model's numbers are finite after the accepted nodes. logits: [N, V]"""
    assert logits is not None  # `needs_logits`
    return bool(np.isfinite(logits[accepted.nodes].max(axis=-1)).all())


def _trust(sequences: Sequence[DecodingSequence], output: StepOutput) -> None:
    """Suspect no sequence if the device itself tells whether the model's numbers are finite: the heads alone computed NaN."""
    if output.finite is not None:
        for sequence in sequences:
            sequence.is_suspect = False
