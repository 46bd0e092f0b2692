"""The metric families of one scrape, made from counts that somebody else keeps."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

ByLabels = (
    Mapping[tuple[str], float] | Mapping[tuple[str, str], float]
)  # values by the labels that a family has beside those that all have


class Registry(CollectorRegistry):
    """A registry without the `_created` series, which would add a third to the size of a scrape and are of no use here."""

    def collect(self) -> Iterable[Metric]:
        """The families of all collectors."""
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class HighWater:
    """The largest value that each counter has had.

    A stop text takes tokens of a step back, and a scrape may fall in between. Prometheus takes a counter that falls for one
    that began anew, and would count everything again. So a counter stays where it was until it is overtaken.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # scrapes may run at the same time
        self._highest: dict[tuple[str, ...], float] = {}

    def at_least(self, value: float, *key: str) -> float:
        """The value, or the largest one that was given for this key before."""
        with self._lock:
            highest = self._highest[key] = max(value, self._highest.get(key, value))
        return highest


class Families:
    """Makes families that have some labels in common.

    Args:
        labels: the common labels, by name.
        high_water: keeps counters from falling.
    """

    def __init__(self, labels: Mapping[str, str], high_water: HighWater) -> None:
        self._names, self._values = list(labels), tuple(labels.values())
        self._high_water = high_water

    def gauge(self, name: str, help_text: str, value: float) -> Metric:
        """A value that rises and falls."""
        family = GaugeMetricFamily(name, help_text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def counter(self, name: str, help_text: str, values: float | ByLabels, labels: Collection[str] = ()) -> Metric:
        """A count since the start; its samples' names end in `_total`.

        Args:
            name: without `_total`.
            help_text: what is counted.
            values: one count, or counts by the values of `labels`.
            labels: names of labels that this family has beside the common ones.
        """
        family = CounterMetricFamily(name, help_text, labels=[*self._names, *labels])
        for key, value in values.items() if isinstance(values, Mapping) else [((), values)]:
            family.add_metric((*self._values, *key), self._high_water.at_least(value, name, *key))
        return family

    def histogram(
        self, name: str, help_text: str, counts: Sequence[int], bounds: Sequence[int], value_of: Callable[[int], int]
    ) -> Metric:
        """How often each size occurred.

        Args:
            name: of the family.
            help_text: what is counted.
            counts: the n-th entry says how often n occurred.
            bounds: the buckets' upper bounds, ascending; one for all larger sizes is added.
            value_of: the size to report for n.
        """
        buckets, total = [0] * (len(bounds) + 1), 0
        for number, count in enumerate(counts):
            buckets[bisect_left(bounds, value_of(number))] += count
            total += count * value_of(number)
        upper = [*map(str, map(float, bounds)), "+Inf"]
        cumulative = [
            (bound, self._high_water.at_least(count, name, bound))
            for bound, count in zip(upper, itertools.accumulate(buckets), strict=True)
        ]
        family = HistogramMetricFamily(name, help_text, labels=self._names)
        family.add_metric(self._values, cumulative, self._high_water.at_least(total, name, "sum"))
        return family


def by_depth(by_source: Mapping[str, Sequence[int]]) -> ByLabels:
    """Counts by depth and source. by_source: for each source, its counts at depth 1, 2 …."""
    return {(str(depth), source): count for source, counts in by_source.items() for depth, count in enumerate(counts, start=1)}
