"""All metrics of a server, for Prometheus. docs/metrics.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from medusa_runtime import ServiceStats
from medusa_serve.record import RequestRecord
from medusa_serve.telemetry.engine_metrics import EngineCollector
from medusa_serve.telemetry.families import Registry
from medusa_serve.telemetry.request_metrics import RequestMetrics
from medusa_serve.telemetry.server_metrics import ServerCollector, ServerView


class Metrics:
    """The metrics of one server. Any thread may use it.

    Args:
        state_of: gives the state of the service; None while there is no model.
        model_name: the name under which the model is served.
        view: what the server says of itself.
        max_model_len: the most tokens of prompt and answer together.
        num_heads: the bundle's heads.
        paths: the server's own paths, as they are in `RequestRecord.path`; requests for others are counted together.
    """

    def __init__(
        self,
        state_of: Callable[[], ServiceStats | None],
        model_name: str,
        view: ServerView,
        *,
        max_model_len: int,
        num_heads: int,
        paths: Collection[str],
    ) -> None:
        self._registry = Registry()
        self._requests = RequestMetrics(self._registry, model_name, max_model_len, paths)
        self._registry.register(EngineCollector(state_of, model_name, num_heads))
        self._registry.register(ServerCollector(view))
        ProcessCollector(registry=self._registry)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._requests.observe(record)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics as text, and its content type.

        Args:
            accept: the request's Accept header: OpenMetrics if it asks for it, else Prometheus' own format.
        """
        return exposition(self._registry, accept)

    def families(self) -> list[Metric]:
        """The metrics as families, for those who join them with others."""
        return list(self._registry.collect())


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """The metrics of a registry as text, and its content type. accept: see `Metrics.exposition`."""
    if "application/openmetrics-text" in accept:
        # any other escaping makes prometheus-client write vllm_ for vllm:, though a colon needs no escape
        text = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
            registry, openmetrics.ALLOWUTF8, version="1.0.0"
        )
        return text, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
