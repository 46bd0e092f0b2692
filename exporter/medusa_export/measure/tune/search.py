"""Finds the trees with the most tokens per second, from measured step times and recorded acceptance of drafts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from medusa_export.bundle.tree_shapes import most_likely_tree
from medusa_export.measure.tune.record import Record
from medusa_heads.replay import Evaluation, accuracies, best_tree, expected_tokens, replay
from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.drafting.budget import DraftBudget
from medusa_runtime.drafting.costs import StepCosts
from medusa_runtime.drafting.draft import likeliest_chances
from medusa_runtime.drafting.proposals import CandidateSet, HeadGuesses, candidates_for
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.drafting.tuning import Kind, TunedTree

SLACK = 0.005  # a smaller dynamic tree is preferred if it loses at most this part of the speed
WORTH = 1.03  # a static tree must be this many times faster than a dynamic one, which adapts to each step
Accuracy = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """The setting in which trees are compared: batch size, cache entries per slot, and the costs of steps."""

    costs: StepCosts
    batch_size: int
    capacity: int

    def seconds(self, nodes: int) -> float:
        """Time of a step with this many nodes per sequence, including the heads unless there is only the root."""
        step = float(self.costs.steps(self.batch_size, self.capacity, nodes)[-1])
        return step if nodes == 1 else step + self.costs.heads(self.batch_size)

    def whole(self, nodes: int, tokens_per_step: float) -> TunedTree:
        """The rating of a tree whose steps always verify all nodes."""
        return self.rated(nodes, tokens_per_step, nodes, self.seconds(nodes))

    def rated(self, nodes: int, tokens_per_step: float, nodes_per_step: float, seconds: float) -> TunedTree:
        """The rating of a tree whose steps take `seconds` on average."""
        return TunedTree(
            nodes=nodes,
            tokens_per_step=tokens_per_step,
            nodes_per_step=nodes_per_step,
            step_seconds=seconds,
            tokens_per_second=self.batch_size * tokens_per_step / seconds,
        )


class Acceptance(Protocol):
    """How often drafts are accepted, from any source."""

    accuracy: Accuracy  # [K, M]

    def static(self, place: Place) -> TunedTree:
        """The static tree with the most tokens per second."""
        ...

    def dynamic(self, place: Place) -> TunedTree:
        """The dynamic tree (rebuilt at each step) with the most tokens per second."""
        ...


class RecordedAcceptance:
    """Acceptance by replaying recorded answers.

    Static trees are rated by cross-validation: found on one half of the answers and rated on the other, and vice versa. The
    returned tree is found on all answers. A dynamic tree is replayed step by step as the engine builds it, with the width that
    pays most.

    Args:
        record: the recorded answers.
        top_k: candidates that each head returns.
        max_nodes: nodes of the largest tree.
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
        """See `Acceptance.dynamic`. It is the smallest tree within half a percent of the best."""
        found = [self.replayed(place, nodes) for nodes in sizes(self.max_nodes)]
        most = max(tree.tokens_per_second for tree in found)
        return next(tree for tree in found if tree.tokens_per_second >= (1 - SLACK) * most)

    def replayed(self, place: Place, tree: int | CandidateTree, answers: Sequence[int] | None = None) -> TunedTree:
        """The rating of a static tree, or of a dynamic one given by its size, on some of the answers (default: all)."""
        chosen = range(self.record.num_answers) if answers is None else answers
        if isinstance(tree, CandidateTree):
            part = self.record.part(chosen)
            return place.whole(tree.num_nodes, replay(part.ranks, part.starts, tree))
        return replay_dynamic(self.record, self._drafts, place, tree, chosen)


class EvaluatedAcceptance:
    """Acceptance by an evaluation of the heads, which has the accuracy of each rank of each head but no single steps.

    Heads are not independent: they tend to be right or wrong together. The loss by that is taken from the trees that the
    evaluation replayed. Dynamic trees are rated like the best static tree of their size, which slightly underestimates them.

    Args:
        evaluation: the evaluation of the bundle's heads.
        top_k: candidates that each head returns.
        max_nodes: nodes of the largest tree.
        record: the recorded answers.
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
    """The fastest way to decode."""
    if max(static.tokens_per_second, dynamic.tokens_per_second) <= plain.tokens_per_second:
        return "plain"
    return "static" if static.tokens_per_second > WORTH * dynamic.tokens_per_second else "dynamic"


def best_static(trees: Sequence[CandidateTree], tokens: Sequence[float], place: Place) -> TunedTree:
    """The tree with the most tokens per second. `tokens` has the tokens per step of each tree."""
    rated = [place.whole(tree.num_nodes, given) for tree, given in zip(trees, tokens, strict=True)]
    best = max(range(len(rated)), key=lambda number: rated[number].tokens_per_second)
    return rated[best].model_copy(update={"tree": trees[best].to_json()})


def prefixes(tree: CandidateTree) -> list[CandidateTree]:
    """The trees of the first node, the first two nodes, and so on. If the tree grew greedily, each is the best of its size."""
    return [CandidateTree(tree.parents[:nodes], tree.ranks[:nodes]) for nodes in range(1, tree.num_nodes + 1)]


def sizes(max_nodes: int) -> list[int]:
    """The sizes 1, 2, 3, 4, 6, 8, 12, 16, … and the largest."""
    found = {1, max_nodes}
    for power in range(1, max_nodes.bit_length()):
        found |= {size for size in (1 << power, 3 << (power - 1)) if size < max_nodes}
    return sorted(found)


def node_acceptance(ranks: IntArray, tree: CandidateTree) -> list[float]:
    """For each node, how often all drafts on its path are right, over all rows with enough tokens left. [n, K] -> [N]"""
    reached = [np.ones(len(ranks), np.bool_)]
    shares = [1.0]
    for node in range(1, tree.num_nodes):
        column = ranks[:, tree.depths[node] - 1]
        reached.append(reached[tree.parents[node]] & (column == tree.ranks[node]))
        shares.append(float(reached[-1].sum() / max(1, (column >= 0).sum())))
    return shares


def path_products(accuracy: Accuracy, tree: CandidateTree) -> list[float]:
    """For each node, the product of the heads' accuracies along its path, as if they were independent. [K, M] -> [N]"""
    found = [1.0]
    for node in range(1, tree.num_nodes):
        head, rank = tree.depths[node] - 1, tree.ranks[node]
        inside = head < accuracy.shape[0] and rank < accuracy.shape[1]
        found.append(found[tree.parents[node]] * (float(accuracy[head, rank]) if inside else 0.0))
    return found


@dataclass(frozen=True)
class LikelyDrafts:
    """For each row of a record, the dynamic trees of all sizes up to A nodes.

    Args:
        places: index of the right draft of each depth among the row's candidates, most likely first; A if it is not one. [P, K]
        chances: the heads' probabilities of the most likely drafts. [P, A - 1]
    """

    places: IntArray
    chances: FloatArray

    @classmethod
    def of(cls, record: Record, candidates: CandidateSet) -> LikelyDrafts:
        """Sort a set of candidates by their probability in each row."""
        rows, heads = record.ranks.shape
        nodes = {
            (int(parent), int(rank)): node
            for node, (parent, rank) in enumerate(zip(candidates.parents, candidates.ranks, strict=True))
        }
        none = candidates.num_nodes
        places = np.full((rows, heads), none)
        chances = np.zeros((rows, none - 1), np.float32)
        no_ids = np.zeros(record.log_probs.shape[1:], np.int64)  # ids do not matter here
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
        """The number of drafts accepted in a row if a step verifies the `nodes` most likely ones."""
        return sum(1 for _ in itertools.takewhile(lambda place: place < nodes, self.places[row].tolist()))


def replay_dynamic(record: Record, drafts: LikelyDrafts, place: Place, nodes: int, answers: Sequence[int]) -> TunedTree:
    """The rating of a dynamic tree under a `DraftBudget` with these costs, as in the engine.

    Answers are replayed in a batch. When one ends, the next takes its place, starting over after the last. The replay stops
    after as many tokens as all answers have together.
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
        plan = budget.plan(chances, 1, place.capacity, with_heads=all(asked))
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
            rows[number], asked[number] = (
                (rest, asks) if rest[0] < end else (next(spans), nodes > 1 and budget.wants_heads(len(rows)))
            )
        tokens, steps, num_nodes = tokens + sum(gained) + len(rows), steps + 1, num_nodes + width
    return place.rated(nodes, tokens / steps / place.batch_size, num_nodes / steps, seconds / steps)


def _judged_apart(record: Record, most: int) -> list[float]:
    """Tokens per step of the best trees of 1, 2, … nodes, found on each half of the answers and rated on the other."""
    halves = [list(range(half, record.num_answers, 2)) for half in (0, 1)]
    if not halves[1]:
        halves[1] = halves[0]
    found = np.zeros((2, most))
    for number, (searched, judged) in enumerate((halves, halves[::-1])):
        trees = prefixes(best_tree(record.part(searched).ranks, most))
        part = record.part(judged)
        found[number] = [replay(part.ranks, part.starts, trees[min(nodes, len(trees)) - 1]) for nodes in range(1, most + 1)]
    return cast(list[float], np.maximum(found, 1.0).mean(axis=0).tolist())
