"""Metrics of the server itself: whether it is ready, what it runs, and what it has open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from medusa_serve.telemetry.families import Families, HighWater


@dataclass(frozen=True)
class BuildInfo:
    """What a server runs."""

    version: str  # of this package
    backend: str  # such as ort-cpu
    device: str  # such as cpu, or a GPU's name
    bundle: str  # the digest of the bundle's manifest


@dataclass(frozen=True)
class ServerView:
    """What the metrics ask the server at each scrape. All of it must be quick, and may be called from any thread."""

    is_ready: Callable[[], bool]  # whether requests are taken: loaded, warm, not draining
    num_streams: Callable[[], int]  # streams that are open
    build: Callable[[], BuildInfo | None]  # None until the model is loaded
    num_lost_lines: Callable[[], int]  # lines of the access log that could not be written


class ServerCollector(Collector):
    """What the server says of itself, as metric families."""

    def __init__(self, view: ServerView) -> None:
        self._view, self._families = view, Families({}, HighWater())

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape."""
        view, gauge = self._view, self._families.gauge
        yield gauge("medusa_ready", "1 if the server takes requests, 0 while it loads or drains.", view.is_ready())
        yield gauge("medusa_open_streams", "Streams that are open.", view.num_streams())
        yield self._families.counter(
            "medusa_access_log_lost_lines", "Lines of the access log that could not be written.", view.num_lost_lines()
        )
        if (build := view.build()) is not None:
            yield InfoMetricFamily("medusa_build", "What this server runs.", asdict(build))
