"""What operators see of a server: metrics, the access log, traces."""

from medusa_serve.telemetry.metrics import Metrics
from medusa_serve.telemetry.server_metrics import BuildInfo, ServerView
from medusa_serve.telemetry.speculative import speculative_metrics

__all__ = ["BuildInfo", "Metrics", "ServerView", "speculative_metrics"]
