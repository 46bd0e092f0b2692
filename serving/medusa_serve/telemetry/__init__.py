"""What operators see of a server: metrics, the access log, traces."""

from medusa_serve.telemetry.access_log import AccessLog
from medusa_serve.telemetry.metrics import Metrics
from medusa_serve.telemetry.server_metrics import BuildInfo, ServerView
from medusa_serve.telemetry.speculative import speculative_metrics
from medusa_serve.telemetry.tracing import Tracing

__all__ = ["AccessLog", "BuildInfo", "Metrics", "ServerView", "Tracing", "speculative_metrics"]
