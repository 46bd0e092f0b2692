"""How many drafts a step should verify: what they are expected to gain against what the step costs here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import FloatArray
from medusa_runtime.drafting.costs import LearnedCosts, StepCosts, moving_average

DECAY = 0.98  # how much of what was learnt of the heads from earlier steps remains after one more
PAUSE = 16  # steps without drafts until the heads are asked again


class DraftBudget:
    """Chooses the width of each step, and whether the heads are asked at all, so that the tokens a second are most.

    The heads' probabilities say how many of the N likeliest candidates will be accepted; what is accepted in fact corrects
    them. With r the tokens a second that can be had here, a step of N nodes that gives g tokens in s seconds is worth
    g - r·s: what it gives beyond what its time would give otherwise. The width is the one worth most. Asking the heads is
    worth what the best width has over the best without them; where that is less than their time, they rest, and are tried
    again now and then. Where prompt lookup finds something, they are worth less than where it does not.

    Args:
        costs: what steps cost here.
    """

    def __init__(self, costs: StepCosts | LearnedCosts) -> None:
        self._costs = costs
        self._expected = self._accepted = 8.0  # decaying sums: drafts that the heads expected to be accepted, and that were
        self._now_expected = 0.0
        self._speedup = 1.0  # of the tokens a second over those without drafts
        # by batch size and whether lookups find much: what asking the heads is worth, in the time that it takes
        self._worth: dict[tuple[int, bool], float] = {}
        self._resting = 0

    def width(
        self,
        probabilities: Sequence[FloatArray],
        least: int,
        capacity: int,
        looked_up: Sequence[FloatArray] = (),
        *,
        with_heads: bool = True,
    ) -> int:
        """Nodes that the next step should verify for each sequence at most.

        Args:
            probabilities: for each sequence those of its drafts, likeliest first; none where its guide forces them.
            least: nodes that some sequence has to have.
            capacity: entries in use in the fullest slot.
            looked_up: for each sequence those of the drafts that it would have without heads, likeliest first.
            with_heads: whether the heads were asked.
        """
        batch, longest = len(probabilities), max(len(chances) for chances in probabilities)
        if longest == 0:  # nobody was asked
            self._now_expected = 0.0
            return least
        most = max(least, 1 + longest)
        expected = _expected(probabilities, most)
        seconds, head_seconds = self._costs.steps(batch, capacity, most), self._costs.heads(batch)
        tokens = batch + self._accepted / self._expected * expected
        plain_rate = batch / float(seconds[0])
        rate = plain_rate * max(self._speedup, 1.0)
        worth = tokens - rate * seconds
        width = least + int(worth[least - 1 :].argmax())
        self._now_expected = float(expected[width - 1])
        if with_heads:
            alone = batch + self._accepted / self._expected * _expected(looked_up, most) - rate * seconds
            gained = float(worth[width - 1] - alone.max()) / (rate * head_seconds)
            place = batch, _finds_much(looked_up)
            self._worth[place] = moving_average(self._worth.get(place, gained), gained)
        now = float(tokens[width - 1]) / (float(seconds[width - 1]) + head_seconds * with_heads)
        self._speedup = moving_average(self._speedup, now / plain_rate)
        return width

    def asks_heads(self, batch: int, width: int, num_accepted: int, looked_up: Sequence[FloatArray] = ()) -> bool:
        """Learn from a step, and say whether the heads are asked after it.

        Args:
            batch: sequences.
            width: nodes it verified for each of them.
            num_accepted: drafts accepted, of those that no guide forced.
            looked_up: as for `width`, of the step to come.
        """
        if width > 1:
            self._expected = DECAY * self._expected + self._now_expected
            self._accepted = DECAY * self._accepted + num_accepted
        if self._worth.get((batch, _finds_much(looked_up)), 1.0) >= 1.0:
            return True
        self._resting = (self._resting + 1) % PAUSE
        return self._resting == 0


def _expected(probabilities: Sequence[FloatArray], most: int) -> npt.NDArray[np.float64]:
    """Drafts expected to be accepted in a step of 1, 2 … `most` nodes for each sequence. [most]"""
    expected = np.zeros(most)
    for chances in probabilities:
        sums = np.cumsum(chances)[: most - 1]
        expected[1 : len(sums) + 1] += sums
        expected[len(sums) + 1 :] += sums[-1] if len(sums) else 0.0
    return expected


def _finds_much(looked_up: Sequence[FloatArray]) -> bool:
    """Whether lookups alone are expected to give every sequence a draft more, on average."""
    return sum(float(chances.sum()) for chances in looked_up) >= max(len(looked_up), 1)


def likeliest(scores: FloatArray, num_nodes: int) -> FloatArray:
    """Probabilities of the drafts that a tree of so many nodes would hold, likeliest first. scores: `CandidateSet.scores`'."""
    chances: FloatArray = np.exp(np.sort(scores[1:])[::-1][: num_nodes - 1])
    return chances
