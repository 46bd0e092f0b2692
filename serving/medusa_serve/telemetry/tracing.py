"""OpenTelemetry traces: a span for each request of the API, with its phases below it.

The spans are made when a request has ended, from its record. Attributes have the names of OpenTelemetry's conventions for
HTTP and for generative AI. No text of a prompt or an answer is in them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from medusa_runtime import DecodingStats, MissingExtraError, OptionError
from medusa_serve.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

SERVICE_NAME = "medusa-serve"  # unless OTEL_SERVICE_NAME says another
PROVIDER_NAME = "medusa"
API = "/v1/"  # probes and scrapes have no spans
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion"}
Attributes = dict[str, str | int | float | bool | list[str]]


class Phase(NamedTuple):
    """A part of the time of one answer. Times are seconds since 1970."""

    name: str
    start: float
    end: float


class Tracing:
    """Makes the spans of requests. Any thread may use it.

    Args:
        provider: where spans go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415 - an extra

        self._provider, self._propagator = provider, TraceContextTextMapPropagator()
        self._tracer = provider.get_tracer("medusa_serve")

    @classmethod
    def from_environment(cls) -> Tracing:
        """Send spans in the background, as the environment's OTEL_* variables say; by default to a collector on this machine.

        Raises:
            MissingExtraError: OpenTelemetry is not installed.
            OptionError: a variable asks for a way of export that there is not.
        """
        try:
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError as error:
            raise MissingExtraError("opentelemetry-sdk", "otel") from error
        service_name = os.environ.get("OTEL_SERVICE_NAME") or SERVICE_NAME
        provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
        if (exporter := _exporter()) is not None:
            provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def export(self, record: RequestRecord) -> None:
        """Make the spans of a request that has ended."""
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415 - an extra

        if not record.path.startswith(API):
            return
        parent = self._propagator.extract({} if record.traceparent is None else {"traceparent": record.traceparent})
        span = self._tracer.start_span(
            f"{record.method} {record.path}",
            parent,
            SpanKind.SERVER,
            _attributes(record),
            start_time=_nanoseconds(record.since),
        )
        _tell_failure(span, record)
        below = set_span_in_context(span)
        for index, stats in enumerate(record.stats):
            for phase in phases(record, stats):
                child = self._tracer.start_span(
                    phase.name, below, attributes={"medusa.answer": index}, start_time=_nanoseconds(phase.start)
                )
                child.end(_nanoseconds(phase.end))
        span.end(_nanoseconds(record.since + record.seconds))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def phases(record: RequestRecord, stats: DecodingStats) -> Iterator[Phase]:
    """Queue, prefill and decode of one answer, one after the other; those that it never reached are left out.

    The engine's clock starts when a request is queued, after its prompt was tokenised. The time of the first token says
    when that was.
    """
    until_first = min((one.first_token_seconds for one in record.stats if one.num_generated_tokens), default=0.0)
    start = record.since + max((record.first_token_seconds or 0.0) - until_first, 0.0)
    seconds = {"queue": stats.queue_seconds, "prefill": stats.prefill_seconds, "decode": stats.decode_seconds}
    for name, duration in seconds.items():
        if duration > 0:
            yield Phase(name, start, start + duration)
        start += duration


def _attributes(record: RequestRecord) -> Attributes:
    attributes: Attributes = {
        "http.request.method": record.method,
        "http.route": record.path,
        "http.response.status_code": record.status,
        "medusa.request_id": record.request_id,
    }
    if record.client is not None:
        attributes["client.address"] = record.client
    if record.stats:
        attributes |= _generation(record)
    return attributes


def _generation(record: RequestRecord) -> Attributes:
    total = DecodingStats()
    for stats in record.stats:
        total.add(stats)
    optional: Mapping[str, str | int | float | None] = {
        "gen_ai.request.model": record.model,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.request.choice.count": record.n if record.n != 1 else None,
        "gen_ai.response.time_to_first_chunk": record.first_token_seconds if record.streamed else None,
    }
    return {
        "gen_ai.operation.name": OPERATIONS.get(record.path, "generate_content"),
        "gen_ai.provider.name": PROVIDER_NAME,
        "gen_ai.request.stream": record.streamed,
        "gen_ai.response.finish_reasons": list(record.finish_reasons),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": total.num_generated_tokens,
        "medusa.steps": total.num_steps,
        "medusa.acceptance_length": total.tokens_per_step,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _tell_failure(span: Span, record: RequestRecord) -> None:
    """By the conventions, only failures of the server are errors of its span; other refusals are seen by their status."""
    from opentelemetry.trace import StatusCode  # noqa: PLC0415 - an extra

    if record.status >= 500:
        span.set_attribute("error.type", str(record.status))
        span.set_status(StatusCode.ERROR, record.error)


def _exporter() -> SpanExporter | None:
    """What the environment asks for."""
    name = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if name == "none":
        return None
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # noqa: PLC0415 - an extra

        return ConsoleSpanExporter(out=sys.stdout)
    if name != "otlp":
        raise OptionError(f"OTEL_TRACES_EXPORTER is {name!r}; it must be otlp, console or none")
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    for variable in variables:
        if (protocol := os.environ.get(variable, "http/protobuf")) != "http/protobuf":
            raise OptionError(f"{variable} is {protocol!r}; only http/protobuf is supported")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("opentelemetry-exporter-otlp-proto-http", "otel") from error
    return OTLPSpanExporter()


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
