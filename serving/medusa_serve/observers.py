"""Who is told of requests that have ended: metrics, the access log and traces, as the operator wants them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from medusa_serve.record import RequestRecord
from medusa_serve.state import ServerState
from medusa_serve.telemetry import AccessLog, Metrics, ServerView, Tracing

PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds; the access log leaves them out


@dataclass(frozen=True)
class Observers:
    """Make them with `open`, and close them at the end."""

    metrics: Metrics
    access_log: AccessLog
    tracing: Tracing | None

    @classmethod
    def open(cls, state: ServerState, paths: Collection[str]) -> Self:
        """Open what the settings ask for.

        Args:
            state: the server's.
            paths: the paths that metrics tell apart.

        Raises:
            OptionError: the file of the access log cannot be opened.
            MissingExtraError: traces are asked for, and OpenTelemetry is not installed.
        """
        settings, manifest = state.settings, state.manifest
        access_log = AccessLog.open(settings.access_log, with_texts=settings.log_texts)
        view = ServerView(
            is_ready=lambda: state.why_not_ready() is None,
            num_streams=lambda: state.num_under_way,
            build=state.build,
            num_lost_lines=lambda: access_log.num_lost,
        )
        metrics = Metrics(
            state.stats,
            state.name,
            view,
            max_model_len=manifest.limits.max_seq_len,
            num_heads=manifest.heads.num_heads,
            paths=paths,
        )
        return cls(metrics, access_log, Tracing.from_environment() if settings.otel else None)

    def report(self, record: RequestRecord) -> None:
        """A request has ended."""
        self.metrics.observe(record)
        if record.path not in PROBES:
            self.access_log.write(record)
        if self.tracing is not None:
            self.tracing.export(record)

    def close(self) -> None:
        """Write what is left."""
        self.access_log.close()
        if self.tracing is not None:
            self.tracing.close()
