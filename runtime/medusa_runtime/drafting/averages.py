"""Seconds that are averaged by batch size, as they are seen."""

from __future__ import annotations

MOVE = 0.1  # how far a moving average goes to a new value


def moving_average(average: float, value: float) -> float:
    return average + MOVE * (value - average)


class AverageSeconds:
    """A moving average for each batch size."""

    def __init__(self) -> None:
        self._by_batch: dict[int, float] = {}

    def observe(self, batch: int, seconds: float) -> None:
        """Move the average of a batch size. A stall of the machine counts as twice the average."""
        before = self._by_batch.get(batch, seconds)
        self._by_batch[batch] = moving_average(before, min(seconds, 2 * before))

    def nearest(self, batch: int) -> int | None:
        """The nearest batch size that was seen; None if none was."""
        return min(self._by_batch, key=lambda seen: abs(seen - batch), default=None)

    def get(self, batch: int, otherwise: float) -> float:
        """The average of the nearest batch size that was seen, or `otherwise`."""
        nearest = self.nearest(batch)
        return otherwise if nearest is None else self._by_batch[nearest]


class HostWork:
    """The host's work in a step: without the heads' drafts, and what their tree, its mask and its acceptance add.

    It depends on what requests ask for: sampling reads the logits of every node, for example. So what was seen comes before
    what was measured in advance.
    """

    def __init__(self) -> None:
        self._without, self._with = AverageSeconds(), AverageSeconds()

    def observe(self, batch: int, seconds: float, *, with_heads: bool) -> None:
        """Learn from the seconds of one step, whose drafts were the heads' or not."""
        (self._with if with_heads else self._without).observe(batch, seconds)

    def without_drafts(self, batch: int, measured: float = 0.0) -> float:
        """Seconds in a step without drafts. Until one is seen, they are as measured, else a third of a step with drafts."""
        return self._without.get(batch, measured or self._with.get(batch, 0.0) / 3)

    def of_drafts(self, batch: int, measured: float = 0.0) -> float:
        """Seconds that the heads' drafts add; as measured until a step with drafts is seen."""
        seen = self._with.nearest(batch)
        if seen is None:
            return measured
        return max(self._with.get(seen, 0.0) - self.without_drafts(seen), 0.0)  # of one batch size: others have other work
