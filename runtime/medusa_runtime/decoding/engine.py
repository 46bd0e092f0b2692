"""The decoding loop on token ids: propose, verify, accept, commit, for many sequences at once. It knows nothing of text."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from typing import Any

import numpy as np

from medusa_runtime.backends.base import Backend
from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.decoding.sequence import FinishReason, Rows, Sequence, SequenceStep
from medusa_runtime.decoding.slots import SlotPool
from medusa_runtime.decoding.stats import DecodingStats
from medusa_runtime.drafting.budget import DraftBudget, likeliest
from medusa_runtime.drafting.costs import LearnedCosts, StepCosts
from medusa_runtime.drafting.draft import Draft, DraftBatch
from medusa_runtime.drafting.ngrams import NGrams
from medusa_runtime.drafting.proposals import Candidates, candidates_for
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import CapacityError, OptionError
from medusa_runtime.options import DecodingOptions
from medusa_runtime.sampling.acceptance import Accepted, accept_greedy
from medusa_runtime.sampling.shaping import Guide

DEFAULT_NEW_TOKENS, DEFAULT_BATCH_SIZE = 256, 8
LOOKUP_NODES = 16  # of a draft by prompt lookup where the engine's tree has no room for one
PREFILL_CHUNK = 512  # prompt tokens a step takes where the bundle sets no limit and nobody waits
SHARED_PREFILL_CHUNK = 64  # and where other sequences wait for their next tokens


class DecodingEngine:
    """Decodes token ids on a backend, several tokens a step and several sequences at a time.

    Sequences join and leave between steps. A step reads a chunk of the oldest prompt, then verifies the drafts of all
    sequences that decode in one forward pass. One thread at a time may use an engine.

    Args:
        backend: where the graphs run. Its cache is the engine's alone.
        tree: which continuations are verified; none for the tree the bundle names.
        max_batch_size: sequences decoded at a time, each with a slot in the cache; more wait in the order they came. None
            for 8, or as many as the bundle takes.
        costs: what steps cost here. With it the engine's own trees shrink, and grow again, as the load and the heads' own
            probabilities make it pay; without it, and where a request brings a tree, they always have their full size.
        reuse_prefixes: start a prompt from what an earlier one that begins alike left in the cache.
        prompt_lookup: also draft what came after the same tokens before, in the prompt or in the answer, where a request does
            not say. Such drafts compete with the heads' for the nodes of the tree; without Medusa, they have it for themselves.
            A request that brings its own tree gets none unless it asks for them.
        ngrams: what corrects the heads' guesses in trees that are made anew at each step.

    Raises:
        OptionError: max_batch_size is below 1.
        TreeError: the tree is deeper or wider than the bundle's heads.
        CapacityError: the tree has more nodes, or the batch more sequences, than the bundle's engines take.
    """

    def __init__(
        self,
        backend: Backend,
        tree: CandidateTree | DynamicTree | None = None,
        *,
        max_batch_size: int | None = None,
        costs: StepCosts | LearnedCosts | None = None,
        reuse_prefixes: bool = True,
        prompt_lookup: bool = False,
        ngrams: NGrams | None = None,
    ) -> None:
        if not isinstance(costs, StepCosts | LearnedCosts | None):
            raise OptionError(f"costs is {costs!r}; it must be StepCosts, LearnedCosts or none")
        if max_batch_size is None:
            max_batch_size = min(DEFAULT_BATCH_SIZE, backend.manifest.limits.max_batch_size or DEFAULT_BATCH_SIZE)
        check_batch_size(backend.manifest, max_batch_size)
        self.backend = backend
        self.tree = tree or CandidateTree.from_json(backend.manifest.tree)
        self.check_tree(self.tree)
        self.prompt_lookup, self.ngrams = prompt_lookup, ngrams
        self.stats = DecodingStats()  # of all sequences there were; its seconds are the engine's own, not their sum
        self._slots = SlotPool(backend, max_batch_size, reuse_prefixes=reuse_prefixes)
        self._waiting: deque[Sequence] = deque()
        self._prefilling: Sequence | None = None
        self.costs = costs
        self._budget = DraftBudget(costs) if costs is not None else None
        self._numbers = itertools.count()

    @property
    def max_batch_size(self) -> int:
        """Sequences decoded at a time."""
        return self._slots.num_slots

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Sequences that have a slot."""
        return self._slots.num_active

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self.num_active

    def check_tree(self, tree: CandidateTree | DynamicTree) -> None:
        """Raise where the bundle cannot verify the tree."""
        heads, limits = self.backend.manifest.heads, self.backend.manifest.limits
        if isinstance(tree, CandidateTree):
            tree.check_fits(heads.num_heads, heads.top_k)
        if limits.max_tree_nodes is not None and tree.num_nodes > limits.max_tree_nodes:
            raise CapacityError(
                f"the tree has {tree.num_nodes} nodes, the engine takes {limits.max_tree_nodes}; "
                f"rebuild it with --max-tree-nodes {tree.num_nodes}"
            )

    def check_request(self, prompt_ids: Tokens[int], options: DecodingOptions) -> int:
        """Refuse what cannot be decoded to its end, before any work. Returns how many new tokens there may be.

        Raises:
            OptionError: the prompt is empty, or it or an option names an id outside the vocabulary.
            CapacityError: the prompt with its answer is longer than the bundle allows.
            TreeError: the options' tree does not fit the heads.
        """
        longest, vocab_size = self.backend.manifest.limits.max_seq_len, self.backend.manifest.model.vocab_size
        if not prompt_ids:
            raise OptionError("the prompt is empty")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
            raise OptionError(f"the prompt holds a token id outside the vocabulary of {vocab_size}")
        for name, token_ids in options.named_tokens.items():
            if outside := [token for token in token_ids if not 0 <= token < vocab_size]:
                raise OptionError(f"{name} names the token {outside[0]}; the vocabulary has {vocab_size}")
        if options.tree is not None:
            self.check_tree(options.tree)
        room = longest - len(prompt_ids)
        wanted = options.max_new_tokens
        if wanted is None:
            wanted = max(1, options.min_new_tokens, min(DEFAULT_NEW_TOKENS, room))
        if wanted > room:
            raise CapacityError(
                f"the prompt has {len(prompt_ids)} tokens and {wanted} new ones were asked for, together more "
                f"than the bundle's {longest}; shorten the prompt or lower max_new_tokens"
            )
        return wanted

    def add(
        self, prompt_ids: Tokens[int], options: DecodingOptions | None = None, *, guide: Guide | None = None, stream: int = 0
    ) -> Sequence:
        """Queue a prompt. What is decided for it comes from its `Sequence.take_steps`, after each `step`.

        Args:
            prompt_ids: token ids.
            options: how it is decoded.
            guide: what restricts its tokens.
            stream: which of several answers to one request: each has random numbers of its own.

        Raises:
            OptionError, CapacityError, TreeError: at once; see `check_request`.
        """
        options = options or DecodingOptions()
        max_new_tokens = self.check_request(prompt_ids, options)
        model, heads = self.backend.manifest.model, self.backend.manifest.heads
        tree = (options.tree or self.tree) if options.medusa else CandidateTree.root_only()
        candidates = candidates_for(tree, heads.num_heads, heads.top_k)
        if isinstance(tree, DynamicTree):
            candidates = dataclasses.replace(candidates, ngrams=self.ngrams)
        looks_up = options.prompt_lookup
        if looks_up is None:
            looks_up = self.prompt_lookup and options.medusa and options.tree is None  # without Medusa is without drafts
        sequence = Sequence(
            id=next(self._numbers),
            prompt_ids=list(prompt_ids),
            options=options,
            max_new_tokens=max_new_tokens,
            end_ids=frozenset([*options.stop_token_ids, *([] if options.ignore_eos else model.eos_token_ids)]),
            candidates=candidates,
            num_nodes=self._lookup_nodes(options) if looks_up else candidates.num_nodes,
            looks_up=looks_up,
            guide=guide,
            stream=stream,
            totals=self.stats,
        )
        self._waiting.append(sequence)
        return sequence

    def _lookup_nodes(self, options: DecodingOptions) -> int:
        """How many nodes a draft has at most where prompt lookup may fill it."""
        if options.tree is not None:
            return options.tree.num_nodes
        if self.tree.num_nodes > 1:
            return self.tree.num_nodes
        return min(LOOKUP_NODES, self.backend.manifest.limits.max_tree_nodes or LOOKUP_NODES)

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence between two steps. Nothing happens where it has ended already."""
        if not sequence.is_finished:
            sequence.finish(reason)
            self._drop(sequence)

    def step(self) -> list[Sequence]:
        """Verify a draft of every sequence that decodes, then read a chunk of the prompts. Returns the sequences with news.

        What fails for one sequence ends it with finish reason "error", and no other.
        """
        return self._decode() + self._read_prompts()

    def generate(
        self,
        prompts: Tokens[Tokens[int]],
        max_new_tokens: int | None = None,
        *,
        options: DecodingOptions | None = None,
        stats: DecodingStats | None = None,
        **fields: Any,
    ) -> Iterator[list[SequenceStep]]:
        """Decode prompts side by side and yield, after each step, what it decided for them. `sequence` counts the prompts.

        Args:
            prompts: lists of token ids.
            max_new_tokens: a limit for each of them, end-of-sequence token included.
            options: how they are decoded.
            stats: an object to count into.
            **fields: fields of `DecodingOptions`, instead of those in `options`.

        Raises:
            OptionError, CapacityError, TreeError: at the call, before any work; see `check_request`.
        """
        if max_new_tokens is not None:
            fields["max_new_tokens"] = max_new_tokens
        options = DecodingOptions.of(options, **fields)
        if not prompts:
            raise OptionError("there is no prompt")
        for prompt in prompts:
            self.check_request(prompt, options)
        return self._generate(prompts, options, stats if stats is not None else DecodingStats())

    def _generate(
        self, prompts: Tokens[Tokens[int]], options: DecodingOptions, stats: DecodingStats
    ) -> Iterator[list[SequenceStep]]:
        sequences = [self.add(prompt, options) for prompt in prompts]
        clock = _seconds(self.stats)
        try:
            while not all(sequence.is_finished for sequence in sequences):
                self.step()
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
                self.cancel(sequence)
                stats.add(_counts(sequence.stats))
            for name, seconds in _seconds(self.stats).items():  # of the batch, not the sum of what each sequence waited
                setattr(stats, name, getattr(stats, name) + seconds - clock[name])

    def _read_prompts(self) -> list[Sequence]:
        """Read as much of the waiting prompts as may delay those that decode, the oldest first.

        A chunk costs a pass over the weights however short it is, so it is not cut to fill what is left of the room.
        """
        started, news = time.perf_counter(), []
        most = self.backend.manifest.limits.max_prefill_tokens or PREFILL_CHUNK
        if self._slots.num_decoding:
            most = min(most, SHARED_PREFILL_CHUNK)
        room = most
        while room > 0 and (sequence := self._next_prompt()) is not None:
            with _blame(sequence):
                room -= self._read_chunk(sequence, most)
            if sequence.is_finished:
                self._drop(sequence)
            if sequence.is_finished or sequence.token_ids:
                news.append(sequence)
        self.stats.prefill_seconds += time.perf_counter() - started
        return news

    def _next_prompt(self) -> Sequence | None:
        """The sequence whose prompt is being read, or else the one that has waited longest, if there is a slot."""
        if self._prefilling is None and self._waiting and self.num_active < self.max_batch_size:
            self._prefilling = self._waiting.popleft()
        return self._prefilling

    def _read_chunk(self, sequence: Sequence, most: int) -> int:
        """Cache a chunk of a prompt, and decide the first token where it was the last. Returns the chunk's size."""
        if sequence.slot is None:
            sequence.begin(self._slots.admit(sequence))
        slot, start = sequence.slot, sequence.length
        assert slot is not None
        chunk = sequence.prompt_ids[start : start + most]
        width, is_last = len(chunk), start + len(chunk) == len(sequence.prompt_ids)
        self._slots.reserve(slot, [start], width)
        output = self.backend.step(
            np.array([chunk], np.int64),
            start + np.arange(width)[None],
            np.tri(width, dtype=np.bool_)[None],
            np.array([start]),
            np.array([[width - 1]]),
            first_slot=slot,
            with_logits=is_last and sequence.needs_logits,
            propose_ahead=is_last and self._asks_ahead([sequence]),
        )
        self._slots.extend(sequence, chunk)
        sequence.length += width
        if is_last:
            self._prefilling = None
            self._slots.start_decoding(sequence)
            sequence.decide_first(int(output.greedy_ids[0, 0]), None if output.logits is None else output.logits[0])
            self._propose([sequence], [Accepted([0], sequence.token_ids[-1])])
        return width

    def _decode(self) -> list[Sequence]:
        """One verification step of all sequences that decode."""
        started = time.perf_counter()
        decoding = self._slots.decoding
        if not decoding:
            return []
        try:
            self._verify(decoding)
        except Exception as error:  # noqa: BLE001 - a step that fails ends those that were on it, and the engine goes on
            for sequence in decoding:
                sequence.finish("error", error)
        for sequence in decoding:
            if sequence.is_finished:
                self._drop(sequence)
        self.stats.decode_seconds += time.perf_counter() - started
        return decoding

    def _verify(self, decoding: list[Sequence]) -> None:
        """Propose, verify, accept, commit."""
        drafts = self._drafts(decoding)
        batch = DraftBatch.of(drafts)
        lengths = np.array([sequence.length for sequence in decoding], np.int64)
        width = batch.tokens.shape[1]
        if not self._make_room(decoding, lengths.tolist(), width):
            return
        started = time.perf_counter()
        output = self.backend.step(
            batch.tokens,
            np.minimum(lengths[:, None] + batch.depths, self.backend.manifest.limits.max_seq_len - 1),  # what is beyond is cut
            batch.mask,
            lengths,
            np.tile(np.arange(width), (len(decoding), 1)),
            with_logits=any(sequence.needs_logits for sequence in decoding),
            propose_ahead=self._asks_ahead(decoding),
        )
        seconds = time.perf_counter() - started
        if self.costs is not None and output.is_warm:
            self.costs.observe(len(decoding), width, int(lengths.max()), seconds)

        greedy = accept_greedy(batch, output.greedy_ids)
        accepted = [Accepted([0], 0)] * len(decoding)
        for row, sequence in enumerate(decoding):
            if sequence.is_finished:
                continue
            with _blame(sequence):
                logits = None if output.logits is None else output.logits[row]
                accepted[row] = self._accept(sequence, drafts[row], greedy[row], logits)
        if self._wants_heads(decoding, width, accepted):
            seconds += self._propose(decoding, accepted)
        else:
            for sequence in decoding:
                sequence.forget_heads()
        for sequence in decoding:
            sequence.stats.engine_seconds += seconds
        self.stats.engine_seconds += seconds

    def _drafts(self, decoding: list[Sequence]) -> list[Draft]:
        """What is verified of each sequence: its whole tree, or as much of it as pays."""
        proposals = [_proposals(sequence) for sequence in decoding]
        sizes = [min(sequence.num_nodes, len(found.scores)) for sequence, found in zip(decoding, proposals, strict=True)]
        if self._budget is not None:
            fixed = [size for sequence, size in zip(decoding, sizes, strict=True) if sequence.has_fixed_tree]
            width = self._budget.width(
                [
                    likeliest(found.scores, 1 if sequence.is_forced else size)
                    for sequence, found, size in zip(decoding, proposals, sizes, strict=True)
                ],
                least=max(fixed, default=1),
                capacity=max(sequence.length for sequence in decoding),  # what is allocated is little more
                looked_up=[sequence.lookup_chances for sequence in decoding],
                with_heads=any(sequence.head_ids is not None for sequence in decoding),
            )
            sizes = [
                size if sequence.has_fixed_tree else min(size, width) for sequence, size in zip(decoding, sizes, strict=True)
            ]
        return [_draft(sequence, size, found) for sequence, size, found in zip(decoding, sizes, proposals, strict=True)]

    def _make_room(self, decoding: list[Sequence], lengths: list[int], width: int) -> bool:
        """Reserve the step's entries; where there is no memory for them, end the longest sequence instead of all."""
        try:
            self._slots.reserve(0, lengths, width)
        except CapacityError as error:
            max(decoding, key=lambda sequence: sequence.length).finish("error", error)
            return False
        return True

    def _accept(self, sequence: Sequence, draft: Draft, greedy: Accepted, logits: Rows | None) -> Accepted:
        """Give out what a sequence's policy accepts, and move its entries to the front."""
        assert sequence.slot is not None
        accepted = greedy if logits is None or not sequence.needs_logits else sequence.verdict(draft, logits)
        if accepted.nodes[-1] >= len(accepted.nodes):  # else they stand there already
            self.backend.commit(sequence.slot, sequence.length, np.array(accepted.nodes))
        self._slots.extend(sequence, draft.tokens[accepted.nodes].tolist())
        sequence.take(draft, accepted, logits)
        return accepted

    def _wants_heads(self, decoding: list[Sequence], width: int, accepted: list[Accepted]) -> bool:
        """Whether the heads' guesses are worth their time, or somebody's answer depends on them."""
        if self._budget is None:
            return True
        chosen = zip(decoding, accepted, strict=True)
        num_accepted = sum(len(one.nodes) - 1 for sequence, one in chosen if not sequence.is_forced)
        looked_up = [sequence.lookup_chances for sequence in decoding]
        pays = self._budget.asks_heads(len(decoding), width, num_accepted, looked_up)
        return pays or any(sequence.has_fixed_tree for sequence in decoding)

    def _asks_ahead(self, sequences: list[Sequence]) -> bool:
        """Whether the heads will be asked for what greedy decoding accepts, as far as can be told before it is verified."""
        if self.backend.manifest.heads.reads_root and any(sequence.options.is_sampled for sequence in sequences):
            return False  # most often another root is drawn for one of them
        return any(sequence.candidates.num_nodes > 1 for sequence in sequences)

    def _propose(self, sequences: list[Sequence], accepted: list[Accepted]) -> float:
        """Have the heads guess what follows each sequence's root, where somebody wants to know. Returns the seconds it took."""
        if all(sequence.is_finished or sequence.candidates.num_nodes == 1 for sequence in sequences):
            return 0.0
        started = time.perf_counter()
        rows, root_ids = [one.nodes[-1] for one in accepted], [one.bonus_id for one in accepted]
        output = self.backend.propose(np.array(rows), np.array(root_ids))
        for row, sequence in enumerate(sequences):
            sequence.head_ids, sequence.head_log_probs = output.token_ids[row], output.log_probs[row]
        seconds = time.perf_counter() - started
        if self.costs is not None:
            self.costs.observe_heads(len(sequences), seconds)
        return seconds

    def _drop(self, sequence: Sequence) -> None:
        """Take a finished sequence out of the engine."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if self._prefilling is sequence:
            self._prefilling = None
        if sequence.slot is not None:
            self._slots.release(sequence)


def check_batch_size(manifest: Manifest, max_batch_size: int) -> None:
    """Raise where a bundle cannot decode so many sequences at a time.

    Raises:
        OptionError: it is below 1.
        CapacityError: it is more than the bundle's engines take.
    """
    if max_batch_size < 1:
        raise OptionError(f"max_batch_size is {max_batch_size}; it must be at least 1")
    largest = manifest.limits.max_batch_size
    if largest is not None and max_batch_size > largest:
        raise CapacityError(f"max_batch_size is {max_batch_size}, the bundle takes {largest}")


@contextmanager
def _blame(sequence: Sequence) -> Iterator[None]:
    """What goes wrong here ends this sequence, and no other."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told to whom it concerns
        sequence.finish("error", error)


def _proposals(sequence: Sequence) -> Candidates:
    """What may follow a sequence's root; nothing where its guide fails."""
    with _blame(sequence):
        return sequence.proposals()
    return Candidates.chain(sequence.token_ids[-1:])


def _draft(sequence: Sequence, num_nodes: int, proposals: Candidates) -> Draft:
    """What a step verifies of a sequence; its root alone where its guide fails."""
    with _blame(sequence):
        return sequence.draft(num_nodes, proposals)
    return Draft.chain(sequence.token_ids[-1:])


def _counts(stats: DecodingStats) -> DecodingStats:
    """Statistics of a sequence without the seconds that it shared with others."""
    return dataclasses.replace(stats, prefill_seconds=0.0, decode_seconds=0.0, engine_seconds=0.0)


def _seconds(stats: DecodingStats) -> dict[str, float]:
    return {name: getattr(stats, name) for name in ("prefill_seconds", "decode_seconds", "engine_seconds")}
