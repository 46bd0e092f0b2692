"""Acceptance policies: which of a step's drafts become part of the answer, and which token follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.drafting.draft import Draft, DraftBatch
from medusa_runtime.options import DecodingOptions
from medusa_runtime.sampling.distribution import Distribution, distribution


@dataclass(frozen=True)
class Accepted:
    """What a policy decided for one sequence."""

    nodes: list[int]  # the accepted path from the root on, which is always accepted
    bonus_id: int  # the token after it: verified by nobody, drawn from the model itself


class Target(Protocol):
    """What the model says after the nodes of a draft."""

    def logits(self, path: Sequence[int]) -> FloatArray:
        """The shaped logits of what follows a path of nodes from the root on. [V]"""
        ...

    def uniform(self, depth: int) -> float:
        """The random number of the token that follows a node of that depth."""
        ...

    def ends_at(self, token_id: int) -> bool:
        """Whether nothing may follow a token."""
        ...


class AcceptancePolicy(Protocol):
    """Decides from a verified draft what is given out."""

    def accept(self, draft: Draft, target: Target) -> Accepted:
        """The accepted path and the token after it."""
        ...


class GreedyAcceptance:
    """Every token is the model's most likely one: what greedy decoding gives, token by token.

    A draft is accepted when it equals the most likely token after its parent. So the path that is walked here is the one
    greedy decoding takes, as far as the tree reaches, and the bonus token is the one it takes next.
    """

    def accept(self, draft: Draft, target: Target) -> Accepted:
        """See `AcceptancePolicy.accept`."""
        return _walk(draft, target, self)

    def choose(self, target: Target, path: list[int]) -> int:
        """The most likely token after a path."""
        return int(target.logits(path).argmax())


class SamplingAcceptance:
    """Every token is a sample of exactly the model's distribution p at the request's options: lossless sampling.

    Speculative sampling over several candidates without replacement tries them in turn: accept x1 with probability p(x1);
    else take x1 out of p, normalise, accept x2 with its probability there, and so on; when all are rejected, draw from what
    is left (Miao et al., "SpecInfer", algorithm 2; Chen et al., "Sequoia", algorithm 2). Medusa's candidates are the heads'
    best tokens, not samples, so each one's draft distribution is a point. Then candidate x is accepted with probability
    p(x) exactly, and any other token is drawn with its own, which is what drawing one token from p and asking whether it is
    among the candidates does. No rule that keeps the distribution accepts more often: the token given out has to be a
    candidate, and its probability to be one is their sum.

    So this draws from p at each node, by inversion with the random number of the token's place in the answer, and follows the
    child that holds the token. The i-th token is one function of the seed and of the tokens before it, as it is without
    Medusa: tree, batch and load change nothing but speed.

    Args:
        options: with a temperature above 0.
    """

    def __init__(self, options: DecodingOptions) -> None:
        self._options = options

    def accept(self, draft: Draft, target: Target) -> Accepted:
        """See `AcceptancePolicy.accept`."""
        return _walk(draft, target, self)

    def choose(self, target: Target, path: list[int]) -> int:
        """A sample of what follows a path."""
        return distribution(target.logits(path), self._options).draw(target.uniform(len(path) - 1))


class TypicalAcceptance:
    """Every draft that is typical of the model is accepted, whether or not a sample would have been that token.

    A draft x is accepted when p(x) > min(epsilon, delta · exp(-H(p))), where p is the distribution at the request's
    temperature, top-k, top-p and min-p, and H its entropy: unlikely tokens pass where the model itself is undecided. The
    longest accepted path is given out; of several, the likeliest. The token after it is drawn from the tokens that pass
    there, or is the most likely one where none does. This accepts more than sampling does, and its output is not
    distributed as the model's.

    Source: Cai et al., "Medusa", section 2.3.1 (its delta is `posterior_alpha` here, as in the reference implementation).

    Args:
        options: with a temperature above 0.
    """

    def __init__(self, options: DecodingOptions) -> None:
        self._options = options

    def accept(self, draft: Draft, target: Target) -> Accepted:
        """See `AcceptancePolicy.accept`."""
        best: tuple[int, float, list[int], Distribution] | None = None
        open_paths: list[tuple[list[int], float]] = [([0], 0.0)]  # paths still to be looked beyond, and their log-probability
        while open_paths:
            path, likelihood = open_paths.pop()
            typical = self._typical(target.logits(path))
            if best is None or (len(path), likelihood) > best[:2]:
                best = (len(path), likelihood, path, typical)
            for child in draft.children(path[-1]):
                token_id = int(draft.tokens[child])
                if (probability := typical.weight(token_id)) > 0 and not target.ends_at(token_id):
                    open_paths.append(([*path, int(child)], likelihood + float(np.log(probability))))
        assert best is not None  # the root is always accepted
        _, _, path, typical = best
        return Accepted(path, typical.draw(target.uniform(len(path) - 1)))

    def _typical(self, logits: FloatArray) -> Distribution:
        """The tokens that pass, with their probabilities."""
        whole = distribution(logits, self._options)
        probabilities = whole.probabilities()
        entropy = -float(np.sum(probabilities * np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))))
        threshold = min(self._options.posterior_threshold, self._options.posterior_alpha * float(np.exp(-entropy)))
        passing = np.flatnonzero(probabilities > threshold)
        if not len(passing):
            passing = np.array([int(probabilities.argmax())])
        token_ids = passing if whole.token_ids is None else whole.token_ids[passing]
        return Distribution(probabilities[passing], token_ids)


class _Chooser(Protocol):
    def choose(self, target: Target, path: list[int]) -> int: ...


def _walk(draft: Draft, target: Target, chooser: _Chooser) -> Accepted:
    """Choose the token after each node, and go on as long as the tree holds it."""
    path = [0]
    while True:
        token_id = chooser.choose(target, path)
        child = None if target.ends_at(token_id) else draft.child(path[-1], token_id)
        if child is None:
            return Accepted(path, token_id)
        path.append(child)


def policy_for(options: DecodingOptions) -> AcceptancePolicy:
    """The policy that a request's options ask for."""
    if not options.is_sampled:
        return GreedyAcceptance()
    return TypicalAcceptance(options) if options.acceptance == "typical" else SamplingAcceptance(options)


def accept_greedy(drafts: DraftBatch, greedy_ids: IntArray) -> list[Accepted]:
    """`GreedyAcceptance` for a whole batch, from the model's most likely tokens alone.

    Parents come before their children, and siblings hold different tokens: one pass over a draft finds its path. For a step's
    few nodes that is faster than NumPy.

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
