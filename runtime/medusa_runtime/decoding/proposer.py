"""Chooses the draft of each sequence for the next step, and whether the heads are asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from medusa_runtime.arrays import BoolArray, FloatArray
from medusa_runtime.backends.base import Backend
from medusa_runtime.decoding.sequence import DecodingSequence
from medusa_runtime.drafting.budget import DraftBudget, StepPlan
from medusa_runtime.drafting.costs import Costs
from medusa_runtime.drafting.draft import Draft
from medusa_runtime.drafting.ngrams import Guesses
from medusa_runtime.drafting.proposals import NO_CHANCES, HeadGuesses, Proposals
from medusa_runtime.sampling.acceptance import Accepted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepDrafts:
    """The drafts of one step, and how they were chosen."""

    proposals: list[Proposals]  # [B]
    drafts: list[Draft]  # [B]
    plan: StepPlan | None  # None if all drafts have their full size
    with_heads: bool | None  # whether the heads were asked for them; None if only for some


class Proposer:
    """Chooses the drafts of each step, and asks the heads for the next one if that pays.

    Args:
        backend: runs the heads.
        costs: what steps cost here; None for drafts of full size at any load.
        blaming: a context in which a failure ends one sequence.
    """

    def __init__(
        self,
        backend: Backend,
        costs: Costs | None,
        blaming: Callable[[DecodingSequence], AbstractContextManager[None]],
    ) -> None:
        self._backend, self._costs, self._blaming = backend, costs, blaming
        self._budget = DraftBudget(costs) if costs is not None else None
        self._heads_are_sound = True
        self._looked_up = False  # whether sequences were looked up for the next step

    def choose(self, sequences: Sequence[DecodingSequence], capacity: int) -> StepDrafts:
        """The drafts of the next step.

        Args:
            sequences: those that decode.
            capacity: entries in use in the fullest slot.
        """
        proposals = [self._proposals(*pair) for pair in zip(sequences, _grown(sequences), strict=True)]
        asked = {sequence.guesses is not None for sequence in sequences if sequence.drafter.uses_heads} or {False}
        with_heads = asked.pop() if len(asked) == 1 else None  # those whose prompts were read just now may differ from others
        plan = self._plan(sequences, proposals, capacity, with_heads=with_heads is True)
        pairs = zip(sequences, proposals, strict=True)
        return StepDrafts(proposals, [self._draft(sequence, found, plan) for sequence, found in pairs], plan, with_heads)

    def start(self, sequences: Sequence[DecodingSequence], rows: list[int], root_ids: list[int], batch: int) -> None:
        """Look up, and ask the heads, for sequences whose prompts were read just now, if that pays for so many that decode.

        Args:
            sequences: as for `ask`.
            rows: as for `ask`.
            root_ids: as for `ask`.
            batch: sequences that decode now.
        """
        self._look_up([sequence for sequence in sequences if sequence.num_tokens], batch)
        if self._budget is None or self._budget.wants_heads(batch) or any(one.has_fixed_tree for one in sequences):
            self.ask(sequences, rows, root_ids)

    def go_on(self, sequences: Sequence[DecodingSequence], step: StepDrafts, width: int, accepted: list[Accepted]) -> float:
        """Learn from a step. If that pays, look up and ask the heads what may follow each root. Returns the heads' seconds."""
        if self._budget is not None and step.plan is not None:
            chosen = zip(step.proposals, accepted, strict=True)
            self._budget.learn(step.plan, width, sum(len(one.nodes) - 1 for found, one in chosen if not found.is_forced))
        self._look_up(sequences, len(sequences))
        if self._wants_heads(sequences, step):
            return self.ask(sequences, [one.nodes[-1] for one in accepted], [one.bonus_id for one in accepted])
        for sequence in sequences:
            sequence.guesses = None
        return 0.0

    def ask(self, sequences: Sequence[DecodingSequence], rows: list[int], root_ids: list[int]) -> float:
        """Have the heads guess the tokens after each sequence's root, if a sequence uses them. Returns the seconds it took.

        Args:
            sequences: those of the last step. [B]
            rows: which of its rows the heads read. [B]
            root_ids: the tokens decided after these rows. [B]
        """
        if all(sequence.is_finished or not sequence.drafter.uses_heads for sequence in sequences):
            return 0.0
        started = time.perf_counter()
        output = self._backend.propose(np.array(rows), np.array(root_ids))
        are_sound: BoolArray = ~np.isnan(output.log_probs.reshape(len(sequences), -1).sum(1))  # [B]
        for row, sequence in enumerate(sequences):
            guesses = HeadGuesses(output.token_ids[row], output.log_probs[row])
            sequence.guesses, sequence.is_suspect = (guesses, False) if are_sound[row] else (None, True)
        if self._heads_are_sound and any(sequence.is_suspect for sequence in sequences):
            self._heads_are_sound = False
            log.warning("the heads gave probabilities that are no numbers (NaN): such steps are decoded without their drafts")
        seconds = time.perf_counter() - started
        if self._costs is not None:
            self._costs.observe_heads(len(sequences), seconds)
        return seconds

    def asks_ahead(self, sequences: Sequence[DecodingSequence]) -> bool:
        """Whether the heads will probably be asked about the path that greedy decoding accepts. Known before verification."""
        if self._backend.manifest.heads.reads_root and any(sequence.options.is_sampled for sequence in sequences):
            return False  # a root that is drawn is most often not the greedy one
        return any(sequence.drafter.uses_heads for sequence in sequences)

    def _proposals(self, sequence: DecodingSequence, grown: Guesses | None) -> Proposals:
        """The tokens that may follow a sequence's root; none if its guide fails."""
        with self._blaming(sequence):
            return sequence.drafter.propose(sequence.guesses, sequence.remaining, grown)
        return Proposals.root_only(int(sequence.tokens.ids[-1]))

    def _plan(
        self, sequences: Sequence[DecodingSequence], proposals: list[Proposals], capacity: int, *, with_heads: bool
    ) -> StepPlan | None:
        """The width of the step; None if all drafts have their full size."""
        if self._budget is None:
            return None
        fixed = [found.num_nodes for one, found in zip(sequences, proposals, strict=True) if _is_fixed(one, found)]
        return self._budget.plan(
            [found.chances for found in proposals],
            least=max(fixed, default=1),
            capacity=capacity,  # little more is allocated
            looked_up=_lookup_chances(sequences, proposals),
            with_heads=with_heads,
            with_lookup=self._looked_up,
        )

    def _draft(self, sequence: DecodingSequence, proposals: Proposals, plan: StepPlan | None) -> Draft:
        """The draft of a sequence for this step; its root alone if its guide fails."""
        size = proposals.num_nodes
        if plan is not None and not _is_fixed(sequence, proposals):
            size = min(size, plan.width)
        with self._blaming(sequence):
            return proposals.draft(size)
        return Draft.chain([int(sequence.tokens.ids[-1])])

    def _look_up(self, sequences: Sequence[DecodingSequence], batch: int) -> None:
        """Look up what may follow each sequence's root, if that pays for so many sequences, or if the sequence needs it."""
        looking = [one for one in sequences if one.drafter.looks_up and not one.is_finished]
        if not looking:
            return
        pays = self._budget is None or self._budget.wants_lookup(batch)
        started = time.perf_counter()
        for sequence in looking:
            if pays or sequence.has_fixed_tree:
                sequence.drafter.look_up(sequence.remaining)
        self._looked_up = pays
        if self._budget is not None:
            self._budget.note_lookup((time.perf_counter() - started) / len(looking) if pays else None)

    def _wants_heads(self, sequences: Sequence[DecodingSequence], step: StepDrafts) -> bool:
        """Whether the heads' guesses are worth their time, or a sequence needs its whole tree."""
        if self._budget is None or step.plan is None:
            return True
        pays = self._budget.wants_heads(len(sequences), _lookup_chances(sequences, step.proposals))
        asked = pays or any(_is_fixed(one, found) for one, found in zip(sequences, step.proposals, strict=True))
        self._budget.note_heads(asked=asked)
        return asked


def _grown(sequences: Sequence[DecodingSequence]) -> list[Guesses | None]:
    """The trees that n-grams grow from the heads' guesses, all at once; None where a sequence has none."""
    roots = [one.drafter.root(one.guesses, one.remaining) for one in sequences]
    ngrams = next((one.drafter.candidates.ngrams for one in sequences if one.drafter.candidates.ngrams is not None), None)
    if ngrams is None:
        return [None] * len(sequences)
    trees = iter(ngrams.grow([root for root in roots if root is not None]))
    return [None if root is None else next(trees) for root in roots]


def _is_fixed(sequence: DecodingSequence, proposals: Proposals) -> bool:
    """Whether the load may not change the size of a sequence's draft."""
    return proposals.is_forced or sequence.has_fixed_tree


def _lookup_chances(sequences: Sequence[DecodingSequence], proposals: list[Proposals]) -> list[FloatArray]:
    """Probabilities of the drafts that each sequence would have without heads; none if its guide forces its draft."""
    pairs = zip(sequences, proposals, strict=True)
    return [NO_CHANCES if found.is_forced else one.drafter.lookup_chances for one, found in pairs]
