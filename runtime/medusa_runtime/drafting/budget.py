"""How many drafts a step should verify: their expected gain against the step's cost on this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import FloatArray
from medusa_runtime.drafting.averages import moving_average
from medusa_runtime.drafting.costs import Costs

ACCEPTANCE_DECAY = 0.98  # the weight of the heads' earlier results after one more step
PRIOR_WORTH = 2.0  # what heads and lookups are thought to be worth before they were tried: one try says little
LOOKUP_SHARE = 0.005  # the part of the steps' time that lookups may take where they do not pay
WORTH_MOVE = 0.02  # the least weight of one step in what heads are worth: steps differ much, and only their mean counts
PRIOR_TRIES = 8  # steps that count as much as what heads are thought to be worth before they were tried
TRIES = 8  # steps in a row in which the heads are tried: one says little
PAUSE, LONGEST_PAUSE = 16, 128  # steps that they rest before they are tried again; twice as many each time that was in vain


@dataclass(frozen=True)
class StepPlan:
    """The width of one step, and its expected results. `DraftBudget.learn` compares them with the step's real results."""

    width: int  # nodes to verify for each sequence at most
    expected: float = 0.0  # accepted drafts that the heads' probabilities promise
    speedup: float | None = None  # expected tokens a second over those without drafts; None if no drafts were weighed
    situation: tuple[int, bool] = (0, False)  # doublings of the batch size, and whether lookups find much
    heads_worth: float | None = None  # gain of asking the heads, in units of the time that it takes; None if they rested
    lookup_worth: float | None = None  # the same of looking up; None if lookups rested, or if their time is not known
    lookup_share: float = 0.0  # the time of looking up as a part of a step without drafts; 0 if it is not known


@dataclass
class _Situation:
    """What the steps of one situation have shown."""

    speedup: float = 1.0  # tokens a second over those without drafts, averaged
    worth: float = PRIOR_WORTH  # of asking the heads, averaged
    num_worths: int = 0  # steps that this average is of
    num_tries: int = 0  # steps in a row with heads that seem not to pay
    pause: int = 0  # how long the heads rest before the next tries; 0 if they do not rest

    def learn_worth(self, worth: float) -> None:
        """Learn from a step what the heads are worth, and decide whether they rest."""
        self.num_worths += 1
        self.worth += max(1 / (PRIOR_TRIES + self.num_worths), WORTH_MOVE) * (worth - self.worth)
        if self.worth >= 1.0:
            self.num_tries = self.pause = 0
            return
        self.num_tries += 1
        if self.num_tries == TRIES:
            self.num_tries, self.pause = 0, min(2 * self.pause, LONGEST_PAUSE) or PAUSE


@dataclass
class _Lookups:
    """What the steps of batch sizes of the same magnitude have shown of prompt lookup."""

    worth: float = PRIOR_WORTH  # averaged
    pause: int = 1  # how long lookups rest before the next try, if they do not pay


class DraftBudget:
    """Chooses the width of each step, and whether the heads are asked at all, for the most tokens a second.

    The heads' probabilities say how many of the N likeliest candidates will be accepted; the steps' results correct them. If
    decoding here runs at r tokens/s, a step that yields g tokens in s seconds gains g - r·s over average. An answer that
    copies is decoded faster than others, so r is averaged apart for steps in which lookups find much. The width is the one
    that gains most. Asking the heads gains the best width's gain less the best gain without them. If that is less than the
    heads' time is worth on average, they rest, and are tried again now and then for some steps, the more rarely the more often
    that was in vain. They gain less if prompt lookup finds something, and with more sequences. So that is learned apart for
    batches of 1, 2, 3 to 4, 5 to 8 … sequences: with many callers, the number changes from step to step, and little would be
    known of each.

    Lookups take time too, for each sequence. If drafts cost so much that lookups do not pay, as with many sequences, they rest.
    Any sequence may begin to copy, so they are tried again as often as takes a two-hundredth of the time of the steps.

    Args:
        costs: the costs of steps on this machine.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._expected = self._accepted = 8.0  # decaying sums: accepted drafts as the heads expected them, and in fact
        self._situations: defaultdict[tuple[int, bool], _Situation] = defaultdict(_Situation)
        self._num_rests = 0  # steps since the heads were asked
        self._lookups: defaultdict[int, _Lookups] = defaultdict(_Lookups)  # by doublings of the batch size
        self._lookup_seconds = 0.0  # of one sequence in one step, averaged; 0 before the first
        self._num_lookup_rests = 0  # steps since sequences were looked up

    def plan(
        self,
        probabilities: Sequence[FloatArray],
        least: int,
        capacity: int,
        looked_up: Sequence[FloatArray] = (),
        *,
        with_heads: bool = True,
        with_lookup: bool = False,
    ) -> StepPlan:
        """Choose the width of the next step. Nothing is learned here.

        Args:
            probabilities: those of each sequence's drafts, likeliest first; empty if its guide forces the draft.
            least: the smallest width allowed, because a sequence needs it.
            capacity: entries in use in the fullest slot.
            looked_up: as `probabilities`, of the drafts that each sequence would have without heads.
            with_heads: whether the heads were asked.
            with_lookup: whether the sequences were looked up.
        """
        batch, longest = len(probabilities), max(len(chances) for chances in probabilities)
        if longest == 0:  # there are no drafts to choose from
            return StepPlan(least, situation=(_doublings(batch), False), lookup_worth=0.0 if with_lookup else None)
        most = max(least, 1 + longest)
        expected = _expected(probabilities, most)
        seconds, head_seconds = self._costs.steps(batch, capacity, most), self._costs.heads(batch)
        trust, situation = self._accepted / self._expected, (_doublings(batch), _finds_much(looked_up))
        tokens = batch + trust * expected
        plain_rate = batch / float(seconds[0])
        rate = plain_rate * max(self._situations[situation].speedup, 1.0)
        costs = rate * seconds
        gain = tokens - costs
        width = least + int(gain[least - 1 :].argmax())
        gain_alone = batch + trust * _expected(looked_up, most) - costs if with_heads or with_lookup else costs
        worth, lookup_worth, lookup_share = None, None, 0.0
        if with_heads:
            worth = float(gain.max() - gain_alone.max()) / (rate * head_seconds)  # whatever width some sequence needs
        if with_lookup and self._lookup_seconds:
            lookup_seconds = self._lookup_seconds * batch
            lookup_worth = float(gain_alone.max() - gain_alone[0]) / (rate * lookup_seconds)
            lookup_share = lookup_seconds / float(seconds[0])
        now = float(tokens[width - 1]) / (float(seconds[width - 1]) + head_seconds * with_heads)
        return StepPlan(width, float(expected[width - 1]), now / plain_rate, situation, worth, lookup_worth, lookup_share)

    def learn(self, plan: StepPlan, width: int, num_accepted: int) -> None:
        """Learn from a step.

        Args:
            plan: the step's.
            width: nodes that it verified for each sequence at most.
            num_accepted: accepted drafts of all sequences, except drafts that guides forced.
        """
        situation, lookups = self._situations[plan.situation], self._lookups[plan.situation[0]]
        if plan.heads_worth is not None:
            situation.learn_worth(plan.heads_worth)
        if plan.lookup_worth is not None:
            lookups.worth = moving_average(lookups.worth, plan.lookup_worth)
            if plan.lookup_share:
                lookups.pause = min(round(plan.lookup_share / LOOKUP_SHARE), PAUSE)
        if plan.speedup is not None:
            situation.speedup = moving_average(situation.speedup, plan.speedup)
        if width > 1:
            self._expected = ACCEPTANCE_DECAY * self._expected + plan.expected
            self._accepted = ACCEPTANCE_DECAY * self._accepted + num_accepted

    def wants_heads(self, batch: int, looked_up: Sequence[FloatArray] = ()) -> bool:
        """Whether the heads should be asked before the next step. Tell `note_heads` whether they were.

        Args:
            batch: sequences.
            looked_up: as for `plan`, of the next step.
        """
        situation = self._situations[_doublings(batch), _finds_much(looked_up)]
        return situation.worth >= 1.0 or situation.num_tries > 0 or self._num_rests + 1 >= situation.pause

    def note_heads(self, *, asked: bool) -> None:
        """Count the steps since the heads were asked."""
        self._num_rests = 0 if asked else self._num_rests + 1

    def wants_lookup(self, batch: int) -> bool:
        """Whether sequences should be looked up before the next step. Tell `note_lookup` whether they were."""
        lookups = self._lookups[_doublings(batch)]
        return lookups.worth >= 1.0 or self._num_lookup_rests + 1 >= lookups.pause

    def note_lookup(self, seconds: float | None) -> None:
        """Count the steps since sequences were looked up. seconds: what that took for each of them; None if they were not."""
        self._num_lookup_rests = 0 if seconds is not None else self._num_lookup_rests + 1
        if seconds is not None:
            before = self._lookup_seconds or seconds
            self._lookup_seconds = moving_average(before, min(seconds, 2 * before))  # a stall counts as twice the average


def _expected(probabilities: Sequence[FloatArray], most: int) -> npt.NDArray[np.float64]:
    """Drafts expected to be accepted in a step of 1, 2 … `most` nodes for each sequence. [most]"""
    expected = np.zeros(most)
    for chances in probabilities:
        if len(chances) and most > 1:
            sums = chances[: most - 1].cumsum()
            expected[1 : len(sums) + 1] += sums
            expected[len(sums) + 1 :] += sums[-1]
    return expected


def _doublings(batch: int) -> int:
    """How often 1 is doubled until it is at least the batch size: 0 for 1, 1 for 2, 2 for 3 and 4, and so on."""
    return (batch - 1).bit_length()


def _finds_much(looked_up: Sequence[FloatArray]) -> bool:
    """Whether lookups alone are expected to give every sequence one more draft on average."""
    return sum(float(chances.sum()) for chances in looked_up if len(chances)) >= max(len(looked_up), 1)
