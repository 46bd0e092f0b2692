"""Which of a step's drafts become part of the answer, and which token follows them.

Every rule but typical acceptance is one walk: choose the token that follows a node, and go on if the tree holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.drafting.draft import Draft, DraftBatch
from medusa_runtime.options import DecodingOptions
from medusa_runtime.sampling.distribution import Distribution, distribution


@dataclass(frozen=True)
class Accepted:
    """What was decided for one sequence."""

    nodes: list[int]  # the accepted path: the root, which is always accepted, and drafts below it
    bonus_id: int  # the token after the path: the model's own choice, which no draft had to guess


class Target(Protocol):
    """What the model says after the nodes of one sequence's draft."""

    def logits(self, path: Sequence[int]) -> FloatArray:
        """The shaped logits of the token that follows a path of nodes from the root on. [V]"""
        ...

    def uniform(self, depth: int) -> float:
        """The random number of the token that follows a node of that depth, in [0, 1)."""
        ...

    def ends_at(self, token_id: int) -> bool:
        """Whether the answer ends at a token."""
        ...


def accept(draft: Draft, target: Target, options: DecodingOptions) -> Accepted:
    """Accept drafts by the rule that a request's options ask for."""
    if not options.is_sampled:
        return walk(draft, target, lambda logits, _: int(logits.argmax()))
    if options.acceptance == "typical":
        return accept_typical(draft, target, options)
    return accept_sampled(draft, target, options)


def walk(draft: Draft, target: Target, choose: Callable[[FloatArray, int], int]) -> Accepted:
    """Choose the token after each node, and go on as long as the draft holds it.

    With the most likely token as the choice, this is greedy decoding: the path walked here is the one that greedy decoding
    takes as far as the tree reaches, and the bonus token is the one it takes next.

    Args:
        draft: what was verified.
        target: what the model says.
        choose: from the logits [V] after a node and the node's depth, the token that follows.
    """
    path = [0]
    while True:
        token_id = choose(target.logits(path), len(path) - 1)
        child = None if target.ends_at(token_id) else draft.child(path[-1], token_id)
        if child is None:
            return Accepted(path, token_id)
        path.append(child)


def accept_sampled(draft: Draft, target: Target, options: DecodingOptions) -> Accepted:
    """Every token is a sample of exactly the model's distribution p at the request's options: lossless sampling.

    Speculative sampling over several candidates without replacement tries them in turn: accept x1 with probability p(x1);
    else take x1 out of p, normalise, accept x2 with its probability there, and so on; if all are rejected, draw from what
    is left (Miao et al., "SpecInfer", algorithm 2; Chen et al., "Sequoia", algorithm 2). Medusa's candidates are the heads'
    best tokens, not samples, so the draft distribution of each is a point. Then candidate x is accepted with probability
    p(x) exactly, and any other token is drawn with its own probability. Drawing one token from p and asking whether it is
    among the candidates does the same. No rule that keeps the distribution accepts more often: the token given out has to be
    a candidate, and the probability of that is the candidates' sum.

    So we draw from p at each node, by inversion with the random number of the token's place in the answer, and follow the
    child that holds the token. The i-th token is a function of the seed and of the tokens before it, as it is without
    Medusa: tree, batch and load change only the speed.

    Args:
        draft: what was verified.
        target: what the model says.
        options: with a temperature above 0.
    """
    return walk(draft, target, lambda logits, depth: distribution(logits, options).draw(target.uniform(depth)))


def accept_typical(draft: Draft, target: Target, options: DecodingOptions) -> Accepted:
    """Every draft that is typical of the model is accepted, whether or not a sample would have been that token.

    A draft x is accepted if p(x) > min(epsilon, delta · exp(-H(p))), where p is the distribution at the request's
    temperature, top-k, top-p and min-p, and H its entropy: unlikely tokens pass if the model itself is undecided. The
    longest accepted path is given out; of several, the likeliest. The token after it is drawn from the tokens that pass
    there; if none passes, it is the most likely one. This accepts more than sampling does, and its output is not
    distributed as the model's.

    Source: Cai et al., "Medusa", section 2.3.1 (its delta is `posterior_alpha` here, as in the reference implementation).

    Args:
        draft: what was verified.
        target: what the model says.
        options: with a temperature above 0.
    """
    best: tuple[int, float, list[int], Distribution] | None = None
    open_paths: list[tuple[list[int], float]] = [([0], 0.0)]  # paths to look beyond, and their log-probabilities
    while open_paths:
        path, likelihood = open_paths.pop()
        typical = _typical(target.logits(path), options)
        if best is None or (len(path), likelihood) > best[:2]:
            best = (len(path), likelihood, path, typical)
        for child in draft.children(path[-1]):
            token_id = int(draft.tokens[child])
            if (probability := typical.weight(token_id)) > 0 and not target.ends_at(token_id):
                open_paths.append(([*path, int(child)], likelihood + float(np.log(probability))))
    assert best is not None  # the root is always accepted
    _, _, path, typical = best
    return Accepted(path, typical.draw(target.uniform(len(path) - 1)))


def accept_greedy(drafts: DraftBatch, greedy_ids: IntArray) -> list[Accepted]:
    """Greedy acceptance for a whole batch, from the model's most likely tokens alone.

    Parents come before their children, and siblings hold different tokens: one pass over a draft finds its path. For the
    few nodes of a step that is faster than NumPy.

    Args:
        drafts: what was verified. B sequences, N nodes.
        greedy_ids: the most likely token after each node. [B, N]
    """
    found = []
    rows = (drafts.tokens.tolist(), drafts.parents.tolist(), drafts.num_nodes.tolist(), greedy_ids.tolist())
    for tokens, parents, num_nodes, greedy in zip(*rows, strict=True):
        path, wanted = [0], greedy[0]
        for node in range(1, num_nodes):
            if tokens[node] == wanted and parents[node] == path[-1]:
                path.append(node)
                wanted = greedy[node]
        found.append(Accepted(path, wanted))
    return found


def _typical(logits: FloatArray, options: DecodingOptions) -> Distribution:
    """The tokens that are typical, with their probabilities."""
    whole = distribution(logits, options)
    probabilities = whole.probabilities()
    entropy = -float(np.sum(probabilities * np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))))
    threshold = min(options.posterior_threshold, options.posterior_alpha * float(np.exp(-entropy)))
    passing = np.flatnonzero(probabilities > threshold)
    if not len(passing):
        passing = np.array([int(probabilities.argmax())])
    token_ids = passing if whole.token_ids is None else whole.token_ids[passing]
    return Distribution(probabilities[passing], token_ids)
