"""The metrics of several replicas as one text: each sample gets the label `replica`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from medusa_serve.telemetry.metrics import exposition


class _Collected(CollectorRegistry):
    """Families that were collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__()
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        """See prometheus-client."""
        return self._families


def joined(by_replica: Mapping[str, Iterable[Metric]]) -> list[Metric]:
    """The families of all replicas. Families of the same name become one.

    Args:
        by_replica: the families of each replica, by its name.
    """
    found: dict[str, Metric] = {}
    for replica, families in by_replica.items():
        for family in families:
            samples = [sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples]
            if family.name not in found:
                found[family.name] = copy(family)
                found[family.name].samples = []
            found[family.name].samples += samples
    return list(found.values())


def exposition_of_all(by_replica: Mapping[str, Iterable[Metric]], accept: str = "") -> tuple[bytes, str]:
    """The metrics of all replicas as text, and its content type. Arguments as of `joined` and of `exposition`."""
    return exposition(_Collected(joined(by_replica)), accept)
