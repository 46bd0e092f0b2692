"""Proposals: the tokens that may follow a sequence's root, by its heads, prompt lookup and guide."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from medusa_runtime.arrays import BoolArray, FloatArray, IntArray, TokenBuffer
from medusa_runtime.drafting.draft import Draft, depth_ends
from medusa_runtime.drafting.guide import Guide
from medusa_runtime.drafting.lookup import Continuation, PromptLookup
from medusa_runtime.drafting.ngrams import Guesses, NGrams, Root
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree

NO_CHANCES: FloatArray = np.empty(0, np.float32)


class HeadGuesses(NamedTuple):
    """The heads' candidates for what follows one sequence's root."""

    token_ids: IntArray  # [K, M] best first
    log_probs: FloatArray  # [K, M]


@dataclass(frozen=True)
class Proposals:
    """All tokens that one sequence's next draft may hold."""

    root_id: int
    num_nodes: int  # the largest draft that the sequence may have
    tree: Callable[[], Draft]  # makes the draft of all tokens
    chances: FloatArray  # of the drafts that the step budget weighs, likeliest first; none if the draft is forced
    is_forced: bool = False  # the sequence's guide alone says what the draft holds
    lets_pass: Callable[[list[int]], bool] | None = None  # the guide's check of a path; None if there is no guide

    @classmethod
    def root_only(cls, root_id: int) -> Proposals:
        """No drafts."""
        return cls(root_id, 1, lambda: Draft.chain([root_id]), NO_CHANCES)

    @classmethod
    def forced(cls, token_ids: Sequence[int]) -> Proposals:
        """The only tokens that may follow. token_ids: the root's, then these."""
        return cls(token_ids[0], len(token_ids), lambda: Draft.chain(token_ids), NO_CHANCES, is_forced=True)

    def draft(self, num_nodes: int) -> Draft:
        """The draft that the next step verifies, of at most `num_nodes` nodes."""
        if num_nodes == 1:
            return Draft.chain([self.root_id])
        return self.tree().likeliest(num_nodes, self.lets_pass)


class Drafter:
    """Makes the drafts of one sequence.

    Args:
        tokens: the sequence's tokens.
        candidates: the nodes that a tree of the heads' candidates may have.
        num_nodes: the most nodes of a draft.
        looks_up: also draft what followed the same tokens before.
        guide: restricts the sequence's tokens.
    """

    def __init__(
        self,
        tokens: TokenBuffer,
        candidates: CandidateSet,
        *,
        num_nodes: int,
        looks_up: bool = False,
        guide: Guide | None = None,
    ) -> None:
        self.candidates, self.num_nodes, self.guide = candidates, num_nodes, guide
        self._tokens = tokens
        self._lookup = PromptLookup(tokens) if looks_up else None
        self._continuations: list[Continuation] = []  # of the tokens decided so far
        self._lookup_chances: FloatArray | None = NO_CHANCES  # None: not computed yet

    @property
    def uses_heads(self) -> bool:
        """Whether the heads' candidates can become drafts."""
        return self.candidates.num_nodes > 1

    @property
    def looks_up(self) -> bool:
        """Whether what followed the same tokens before can become drafts."""
        return self._lookup is not None

    @property
    def lookup_chances(self) -> FloatArray:
        """Probabilities of the drafts that prompt lookup alone would give, likeliest first."""
        if self._lookup_chances is None:
            chances = [chance for one in self._continuations for chance in itertools.accumulate(one.chances, operator.mul)]
            self._lookup_chances = np.array(sorted(chances, reverse=True)[: self.num_nodes - 1], np.float32)
        return self._lookup_chances

    def follow(self, decided: Sequence[int]) -> None:
        """Compare what was looked up with the tokens that were just decided, and forget it."""
        if self._lookup is not None:
            self._lookup.learn(decided)
            self._continuations, self._lookup_chances = [], NO_CHANCES

    def look_up(self, remaining: int) -> None:
        """Look up what may follow the tokens decided so far, if this sequence does. remaining: tokens still to come."""
        if self._lookup is not None:
            self._continuations = self._lookup.continuations(min(remaining, self.num_nodes) - 1)
            self._lookup_chances = None if self._continuations else NO_CHANCES

    def root(self, guesses: HeadGuesses | None, remaining: int) -> Root | None:
        """What n-grams grow a tree from, with those of other sequences; None if there is none, or a guide may force the draft.

        Args:
            guesses: as for `propose`.
            remaining: as for `propose`.
        """
        ids = self._tokens.ids
        return None if self.guide is not None else self.candidates.root(int(ids[-1]), int(ids[-2:][0]), guesses, remaining - 1)

    def propose(self, guesses: HeadGuesses | None, remaining: int, grown: Guesses | None = None) -> Proposals:
        """The tokens that may follow the last token, which is the root.

        Args:
            guesses: the heads' guesses; None if they were not asked.
            remaining: tokens that the answer may still have.
            grown: the tree of `root`, if it has grown already.
        """
        ids = self._tokens.ids
        if self.guide is not None and self.num_nodes > 1:
            forced = self.guide.forced()[: min(remaining, self.num_nodes) - 1]
            if forced:
                return Proposals.forced([int(ids[-1]), *forced])
        last, previous = int(ids[-1]), int(ids[-2:][0])
        make = partial(self.candidates.proposals, last, guesses, remaining - 1, self._continuations, previous, grown)
        lets_pass = self.guide.lets_pass if self.guide else None
        if guesses is None:  # the tree is only made if a draft of it is verified
            num_nodes = min(self.num_nodes, 1 + sum(len(one.token_ids) for one in self._continuations))
            return Proposals(last, num_nodes, make, self.lookup_chances, lets_pass=lets_pass)
        tree = make()
        num_nodes = min(self.num_nodes, tree.num_nodes)
        return Proposals(last, num_nodes, lambda: tree, tree.chances(num_nodes), lets_pass=lets_pass)


@dataclass(frozen=True)
class CandidateSet:
    """The nodes that a tree of the heads' candidates may have, by depth. Make one with `candidates_for`."""

    num_nodes: int  # the tree's size
    parents: IntArray  # [A]
    ranks: IntArray  # [A]
    depths: IntArray  # [A], ascending
    ends: tuple[int, ...]  # ends[d]: how many candidates are at most d deep
    ngrams: NGrams | None = None  # if given, the tree has the nodes that they find likeliest, instead of these

    def proposals(
        self,
        root_id: int,
        guesses: HeadGuesses | None,
        max_depth: int,
        continuations: Sequence[Continuation] = (),
        previous_id: int | None = None,
        grown: Guesses | None = None,
    ) -> Draft:
        """The tokens that may follow a root by the heads and by prompt lookup.

        A node's probability is the product along its path, as if heads and continuations were independent of each other;
        n-grams correct the heads' candidates for the tokens before them. A token that both heads and lookup name has the
        larger of its two probabilities.

        Args:
            root_id: the last decided token.
            guesses: the heads' guesses; None if they were not asked.
            max_depth: the depth of the deepest token.
            continuations: from `PromptLookup.continuations`.
            previous_id: the decided token before the root, for the n-grams.
            grown: the tree that n-grams found, if they have been asked already; see `root`.
        """
        tokens, parents, depths, log_probs = grown or self._guessed(root_id, previous_id, guesses, max_depth)
        looked_up = np.zeros(len(tokens), np.bool_)
        added = _merge(continuations, tokens, parents, log_probs, looked_up)
        for start, end in itertools.pairwise(depth_ends(depths)):
            log_probs[start:end] += log_probs[parents[start:end]]
        if not added:
            return Draft(tokens, parents, depths, log_probs, looked_up)
        scores = log_probs.tolist()
        for node in added:
            scores.append(scores[node.parent] + node.log_prob)
        return Draft(
            np.append(tokens, [node.token_id for node in added]),
            np.append(parents, [node.parent for node in added]),
            np.append(depths, [node.depth for node in added]),
            np.array(scores, np.float32),
            np.append(looked_up, np.ones(len(added), np.bool_)),
        )

    def root(self, root_id: int, previous_id: int | None, guesses: HeadGuesses | None, max_depth: int) -> Root | None:
        """What n-grams grow the tree from; None without n-grams or guesses. Arguments as for `proposals`."""
        if self.ngrams is None or guesses is None:
            return None
        last_ids = (root_id if previous_id is None else previous_id, root_id)
        return Root(last_ids, *guesses, self.num_nodes, min(max_depth, len(self.ends) - 1))

    def _guessed(self, root_id: int, previous_id: int | None, guesses: HeadGuesses | None, max_depth: int) -> Guesses:
        """The heads' candidates as nodes, by depth."""
        root = self.root(root_id, previous_id, guesses, max_depth)
        if root is not None and self.ngrams is not None:
            return self.ngrams.grow([root])[0]
        count = self.ends[0 if guesses is None else min(max_depth, len(self.ends) - 1)]
        tokens, log_probs = np.full(count, root_id, np.int64), np.zeros(count, np.float32)
        if guesses is not None:
            places = self.depths[1:count] - 1, self.ranks[1:count]
            tokens[1:] = guesses.token_ids[places]
            # rounding may give a log-probability above 0, and then a child would be likelier than its parent
            log_probs[1:] = np.minimum(guesses.log_probs[places], 0)
        return Guesses(tokens, self.parents[:count], self.depths[:count], log_probs)


class _Added(NamedTuple):
    """A token that only a continuation names."""

    token_id: int
    parent: int
    depth: int
    log_prob: float


def _merge(
    continuations: Sequence[Continuation], tokens: IntArray, parents: IntArray, log_probs: FloatArray, looked_up: BoolArray
) -> list[_Added]:
    """Raise the candidates that continuations name as well. Returns the tokens that only continuations name, to be appended."""
    added: list[_Added] = []
    for continuation in continuations:
        node = 0
        for depth, (token_id, chance) in enumerate(zip(continuation.token_ids, continuation.chances, strict=True), start=1):
            log_prob = math.log(chance)
            if node < len(tokens) and len(same := np.flatnonzero((parents == node) & (tokens == token_id))):
                node = int(same[0])
                log_probs[node], looked_up[node] = max(log_probs[node], log_prob), True
            else:
                added.append(_Added(token_id, node, depth, log_prob))
                node = len(tokens) + len(added) - 1
    return added


@lru_cache(maxsize=256)
def candidates_for(tree: CandidateTree | DynamicTree, num_heads: int, top_k: int) -> CandidateSet:
    """The nodes that a tree may have: a static tree's own; for a dynamic tree, all that can be among the likeliest.

    A node is among the N likeliest only if every node that is certainly at least as likely also fits in N. For a node of
    ranks r1 … rd, counted from 1, these are its prefixes, each with any smaller ranks: r1 + r1·r2 + … + r1·…·rd nodes,
    and the root.
    """
    if isinstance(tree, DynamicTree):
        whole = CandidateTree.from_choices(_reachable(tree.num_nodes - 1, num_heads, top_k))
        num_nodes = min(tree.num_nodes, whole.num_nodes)
    else:
        whole, num_nodes = _by_depth(tree), tree.num_nodes
    ends = tuple(int((whole.depths <= depth).sum()) for depth in range(whole.depth + 1))
    return CandidateSet(num_nodes, np.array(whole.parents), np.array(whole.ranks), whole.depths, ends)


def _reachable(room: int, num_heads: int, top_k: int) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []

    def extend(path: tuple[int, ...], product: int, used: int) -> None:
        if len(path) == num_heads:
            return
        for rank in range(min(top_k, (room - used) // product)):
            longer = (*path, rank)
            paths.append(longer)
            extend(longer, product * (rank + 1), used + product * (rank + 1))

    extend((), 1, 0)
    return paths


def _by_depth(tree: CandidateTree) -> CandidateTree:
    """The same tree with its nodes ordered by depth."""
    order = np.argsort(tree.depths, kind="stable")
    place = {int(node): position for position, node in enumerate(order)} | {-1: -1}
    return CandidateTree(tuple(place[tree.parents[node]] for node in order), tuple(tree.ranks[node] for node in order))
