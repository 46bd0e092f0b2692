"""Which tree gives the most tokens a second: steps cost what was measured, drafts are accepted as they were before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from medusa_export.trees import most_likely_tree
from medusa_export.tune.record import Record
from medusa_heads.replay import Evaluation, accuracies, best_tree, expected_tokens, replay
from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.drafting.budget import DraftBudget
from medusa_runtime.drafting.costs import StepCosts
from medusa_runtime.drafting.draft import likeliest_chances
from medusa_runtime.drafting.proposals import CandidateSet, HeadGuesses, candidates_for
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.drafting.tuning import Kind, TunedTree

SLACK = 0.005  # for so little, a dynamic tree is rather smaller
WORTH = 1.03  # times better a static tree must be than a dynamic one, which fits itself to the moment
Accuracy = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """Where trees are compared: a batch of so many sequences, on a cache of so many entries, at what steps cost there."""

    costs: StepCosts
    batch_size: int
    capacity: int

    def seconds(self, nodes: int) -> float:
        """Of a step of so many nodes for each sequence, and of the heads, which a root alone does not need."""
        step = float(self.costs.steps(self.batch_size, self.capacity, nodes)[-1])
        return step if nodes == 1 else step + self.costs.heads(self.batch_size)

    def whole(self, nodes: int, tokens_per_step: float) -> TunedTree:
        """What steps give that always verify all nodes."""
        return self.rated(nodes, tokens_per_step, nodes, self.seconds(nodes))

    def rated(self, nodes: int, tokens_per_step: float, nodes_per_step: float, seconds: float) -> TunedTree:
        """What steps of so many seconds give."""
        return TunedTree(
            nodes=nodes,
            tokens_per_step=tokens_per_step,
            nodes_per_step=nodes_per_step,
            step_seconds=seconds,
            tokens_per_second=self.batch_size * tokens_per_step / seconds,
        )


class Acceptance(Protocol):
    """What is known of how often drafts are accepted."""

    accuracy: Accuracy  # [K, M]

    def static(self, place: Place) -> TunedTree:
        """The fixed tree that gives the most tokens a second."""
        ...

    def dynamic(self, place: Place) -> TunedTree:
        """The tree made anew at each step that gives the most."""
        ...


class RecordedAcceptance:
    """By replaying recorded answers.

    A fixed tree is searched on one half of the answers and judged on the other, and the other way round; the one that is
    given is searched on all. A dynamic tree is replayed as the engine makes it, step by step, no larger than pays.

    Args:
        record: the answers.
        top_k: candidates a head returns.
        max_nodes: the largest tree.
    """

    def __init__(self, record: Record, top_k: int, max_nodes: int) -> None:
        self.record, self.max_nodes = record, max_nodes
        self.accuracy: Accuracy = accuracies(record.ranks)
        self._trees = prefixes(best_tree(record.ranks, max_nodes))
        self._tokens = _judged_apart(record, len(self._trees))
        self._drafts = LikelyDrafts.of(record, candidates_for(DynamicTree(max_nodes), record.ranks.shape[1], top_k))

    def static(self, place: Place) -> TunedTree:
        """See `Acceptance.static`."""
        best = best_static(self._trees, self._tokens, place)
        return best.model_copy(update={"acceptance": node_acceptance(self.record.ranks, self._trees[best.nodes - 1])})

    def dynamic(self, place: Place) -> TunedTree:
        """See `Acceptance.dynamic`. The smallest tree within half a percent of the best."""
        found = [self.replayed(place, nodes) for nodes in sizes(self.max_nodes)]
        most = max(tree.tokens_per_second for tree in found)
        return next(tree for tree in found if tree.tokens_per_second >= (1 - SLACK) * most)

    def replayed(self, place: Place, tree: int | CandidateTree, answers: Sequence[int] | None = None) -> TunedTree:
        """What a tree gives, by its size where it is dynamic, on some of the answers, or on all."""
        chosen = range(self.record.num_answers) if answers is None else answers
        if isinstance(tree, CandidateTree):
            part = self.record.part(chosen)
            return place.whole(tree.num_nodes, replay(part.ranks, part.starts, tree))
        return replay_dynamic(self.record, self._drafts, place, tree, chosen)


class EvaluatedAcceptance:
    """By an evaluation of the heads: it tells how often each rank of each head is right, but not when.

    What heads that are right and wrong together lose is taken from the trees that the evaluation replayed. Of a dynamic tree it
    says nothing, so that is taken to give what the best fixed one of its size does; it gives a little more.

    Args:
        evaluation: of the bundle's heads.
        top_k: candidates a head returns.
        max_nodes: the largest tree.
    """

    def __init__(self, evaluation: Evaluation, top_k: int, max_nodes: int) -> None:
        self.accuracy: Accuracy = np.array(evaluation.accuracy, np.float64)[:, :top_k]
        self._trees = prefixes(most_likely_tree(self.accuracy.astype(np.float32), max_nodes))
        judged = sorted(evaluation.trees, key=lambda result: result.nodes)
        nodes = [1, *(result.nodes for result in judged)]
        share = [1.0, *((result.tokens_per_step - 1) / max(result.expected - 1, 1e-9) for result in judged)]
        if judged:
            share[0] = share[1]
        self._tokens = [
            1 + (expected_tokens(self.accuracy, tree) - 1) * float(np.interp(tree.num_nodes, nodes, share))
            for tree in self._trees
        ]

    def static(self, place: Place) -> TunedTree:
        """See `Acceptance.static`."""
        best = best_static(self._trees, self._tokens, place)
        return best.model_copy(update={"acceptance": path_products(self.accuracy, self._trees[best.nodes - 1])})

    def dynamic(self, place: Place) -> TunedTree:
        """See `Acceptance.dynamic`."""
        return self.static(place).model_copy(update={"tree": None, "acceptance": None})


def best_kind(plain: TunedTree, static: TunedTree, dynamic: TunedTree) -> Kind:
    """The way to decode that is best for a batch size of its own."""
    if max(static.tokens_per_second, dynamic.tokens_per_second) <= plain.tokens_per_second:
        return "plain"
    return "static" if static.tokens_per_second > WORTH * dynamic.tokens_per_second else "dynamic"


def best_static(trees: Sequence[CandidateTree], tokens: Sequence[float], place: Place) -> TunedTree:
    """The tree that gives the most tokens a second, of some that give so many a step."""
    rated = [place.whole(tree.num_nodes, given) for tree, given in zip(trees, tokens, strict=True)]
    best = max(range(len(rated)), key=lambda number: rated[number].tokens_per_second)
    return rated[best].model_copy(update={"tree": trees[best].to_json()})


def prefixes(tree: CandidateTree) -> list[CandidateTree]:
    """The tree's first node, its first two …: for a tree grown node by node, the best of each size."""
    return [CandidateTree(tree.parents[:nodes], tree.ranks[:nodes]) for nodes in range(1, tree.num_nodes + 1)]


def sizes(max_nodes: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 … and the largest."""
    found = {1, max_nodes}
    for power in range(1, max_nodes.bit_length()):
        found |= {size for size in (1 << power, 3 << (power - 1)) if size < max_nodes}
    return sorted(found)


def node_acceptance(ranks: IntArray, tree: CandidateTree) -> list[float]:
    """For each node, how often all drafts down to it are right, over all rows whose answers go so far. [n, K] -> [N]"""
    reached = [np.ones(len(ranks), np.bool_)]
    shares = [1.0]
    for node in range(1, tree.num_nodes):
        column = ranks[:, tree.depths[node] - 1]
        reached.append(reached[tree.parents[node]] & (column == tree.ranks[node]))
        shares.append(float(reached[-1].sum() / max(1, (column >= 0).sum())))
    return shares


def path_products(accuracy: Accuracy, tree: CandidateTree) -> list[float]:
    """For each node the product of the heads' accuracies down to it, as if they were independent. [K, M] -> [N]"""
    found = [1.0]
    for node in range(1, tree.num_nodes):
        head, rank = tree.depths[node] - 1, tree.ranks[node]
        inside = head < accuracy.shape[0] and rank < accuracy.shape[1]
        found.append(found[tree.parents[node]] * (float(accuracy[head, rank]) if inside else 0.0))
    return found


@dataclass(frozen=True)
class LikelyDrafts:
    """For each row of a record, what a dynamic tree of any size up to A nodes would hold there.

    Args:
        places: of the right drafts of depth 1, 2 … among the row's candidates, likeliest first; A where it is none. [P, K]
        chances: the likeliest drafts' probabilities by the heads. [P, A - 1]
    """

    places: IntArray
    chances: FloatArray

    @classmethod
    def of(cls, record: Record, candidates: CandidateSet) -> LikelyDrafts:
        """Sort a set of candidates at each row."""
        rows, heads = record.ranks.shape
        nodes = {
            (int(parent), int(rank)): node
            for node, (parent, rank) in enumerate(zip(candidates.parents, candidates.ranks, strict=True))
        }
        none = candidates.num_nodes
        places = np.full((rows, heads), none)
        chances = np.zeros((rows, none - 1), np.float32)
        no_ids = np.zeros(record.log_probs.shape[1:], np.int64)  # which do not matter here
        for row, (ranks, log_probs) in enumerate(zip(record.ranks.tolist(), record.log_probs, strict=True)):
            scores = candidates.proposals(0, HeadGuesses(no_ids, log_probs), heads).scores
            place = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
            found = likeliest_chances(scores, none)
            chances[row, : len(found)] = found
            node: int | None = 0
            for depth, rank in enumerate(ranks):
                node = nodes.get((node, rank)) if node is not None else None
                if node is None:
                    break
                places[row, depth] = min(int(place[node]), none)
        return cls(places, chances)

    def accepted(self, row: int, nodes: int) -> int:
        """How many drafts a step has accepted that verifies the likeliest nodes."""
        return sum(1 for _ in itertools.takewhile(lambda place: place < nodes, self.places[row].tolist()))


def replay_dynamic(record: Record, drafts: LikelyDrafts, place: Place, nodes: int, answers: Sequence[int]) -> TunedTree:
    """What a dynamic tree gives under a `DraftBudget` with these costs, as the engine has it.

    Answers are decoded side by side, the next one beginning where one ends, from the first again after the last, until each
    was begun and so many tokens were given as they have together.
    """
    budget = DraftBudget(place.costs)
    ends = [*record.starts[1:].tolist(), len(record.ranks)]
    spans = itertools.cycle(
        [(int(record.starts[answer]), ends[answer] - 1) for answer in answers if ends[answer] - record.starts[answer] > 1]
    )
    wanted = sum(ends[answer] - int(record.starts[answer]) - 1 for answer in answers)
    if wanted == 0:
        return place.whole(1, 1.0)
    rows, asked = [next(spans) for _ in range(place.batch_size)], [nodes > 1] * place.batch_size
    tokens = steps = num_nodes = 0
    seconds = 0.0
    while tokens < max(wanted, 8 * place.batch_size):
        chances = [
            drafts.chances[row, : nodes - 1] if knows else drafts.chances[row, :0]
            for (row, _), knows in zip(rows, asked, strict=True)
        ]
        plan = budget.plan(chances, 1, place.capacity)
        width = plan.width
        seconds += float(place.costs.steps(place.batch_size, place.capacity, width)[-1])
        gained = [
            min(drafts.accepted(row, width), end - row - 1) if knows else 0
            for (row, end), knows in zip(rows, asked, strict=True)
        ]
        budget.learn(plan, width, sum(gained))
        asks = nodes > 1 and budget.wants_heads(place.batch_size)
        budget.note_heads(asked=asks)
        seconds += place.costs.heads(place.batch_size) if asks else 0.0
        for number, ((row, end), gain) in enumerate(zip(rows, gained, strict=True)):
            rest = (row + gain + 1, end)
            rows[number], asked[number] = (rest, asks) if rest[0] < end else (next(spans), nodes > 1)
        tokens, steps, num_nodes = tokens + sum(gained) + len(rows), steps + 1, num_nodes + width
    return place.rated(nodes, tokens / steps / place.batch_size, num_nodes / steps, seconds / steps)


def _judged_apart(record: Record, most: int) -> list[float]:
    """Tokens per step of the best trees of 1, 2 … nodes, searched on each half of the answers and judged on the other."""
    halves = [list(range(half, record.num_answers, 2)) for half in (0, 1)]
    if not halves[1]:
        halves[1] = halves[0]
    found = np.zeros((2, most))
    for number, (searched, judged) in enumerate((halves, halves[::-1])):
        trees = prefixes(best_tree(record.part(searched).ranks, most))
        part = record.part(judged)
        found[number] = [replay(part.ranks, part.starts, trees[min(nodes, len(trees)) - 1]) for nodes in range(1, most + 1)]
    return cast(list[float], np.maximum(found, 1.0).mean(axis=0).tolist())
