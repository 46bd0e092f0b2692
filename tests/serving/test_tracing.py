"""Traces: a span for each request with its phases, named as OpenTelemetry's conventions say."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from medusa_runtime import DecodingStats, MissingExtraError, OptionError
from medusa_serve.telemetry import Tracing
from tests.support.telemetry import record_of

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

STATS = DecodingStats(
    num_prompt_tokens=12, num_generated_tokens=21, num_decoded_tokens=20, num_steps=8,
    queue_seconds=0.05, prefill_seconds=0.1, decode_seconds=0.6,
)  # fmt: skip
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def exported(*records) -> list[ReadableSpan]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    for record in records:
        tracing.export(record)
    tracing.close()
    return sorted(exporter.get_finished_spans(), key=lambda span: span.name != "POST /v1/chat/completions")


def test_a_request_is_a_span_and_its_phases_are_below_it() -> None:
    whole, *parts = exported(record_of(STATS, streamed=True))
    assert [part.name for part in parts] == ["queue", "prefill", "decode"]
    assert (whole.name, whole.kind, whole.parent) == ("POST /v1/chat/completions", SpanKind.SERVER, None)
    assert (whole.start_time, whole.end_time) == (1_700_000_000 * 10**9, 1_700_000_000 * 10**9 + 900_000_000)
    assert all(part.parent.span_id == whole.context.span_id for part in parts)
    starts = [(part.start_time - whole.start_time) / 1e9 for part in parts]
    assert starts == pytest.approx([0.05, 0.1, 0.2], abs=1e-6)  # the prompt was tokenised for 0.05 s before
    assert [(part.end_time - part.start_time) / 1e9 for part in parts] == pytest.approx([0.05, 0.1, 0.6], abs=1e-6)


def test_attributes_have_the_conventions_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module is marked as moved; the names are the same
        from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names
    whole = exported(record_of(STATS, STATS, streamed=True, finish_reasons=["stop", "length"]))[0]
    expected = {
        names.GEN_AI_OPERATION_NAME: "chat",
        names.GEN_AI_PROVIDER_NAME: "medusa",
        names.GEN_AI_REQUEST_MODEL: "tiny",
        names.GEN_AI_REQUEST_MAX_TOKENS: 64,
        names.GEN_AI_REQUEST_CHOICE_COUNT: 2,
        names.GEN_AI_REQUEST_STREAM: True,
        names.GEN_AI_RESPONSE_FINISH_REASONS: ("stop", "length"),
        names.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: 0.2,
        names.GEN_AI_USAGE_INPUT_TOKENS: 12,
        names.GEN_AI_USAGE_OUTPUT_TOKENS: 42,
        names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 4,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "client.address": "10.0.0.7",
        "medusa.request_id": "req-1",
        "medusa.steps": 16,
        "medusa.acceptance_length": 2.5,
    }
    assert dict(whole.attributes) == expected


def test_no_text_of_a_request_is_in_its_span() -> None:
    spans = exported(record_of(STATS, prompt="my secret", answer="your secret"))
    assert not any("secret" in span.to_json() for span in spans)


def test_a_callers_trace_is_continued_and_its_choice_not_to_sample_respected() -> None:
    whole, *_ = exported(record_of(STATS, traceparent=PARENT))
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert exported(record_of(STATS, traceparent=PARENT[:-1] + "0")) == []


@pytest.mark.parametrize(
    "header", ["", "nonsense", "00-0-0-01", PARENT[:-3], "ff-" + PARENT[3:], "00-" + "0" * 32 + PARENT[35:]]
)
def test_a_header_that_is_none_begins_a_new_trace(header: str) -> None:
    whole, *_ = exported(record_of(STATS, traceparent=header))
    assert whole.parent is None


def test_failures_of_the_server_are_errors_and_refusals_are_not() -> None:
    [failed] = exported(record_of(status=503, error="the queue is full"))
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "the queue is full")
    assert failed.attributes["error.type"] == "503"
    [refused] = exported(record_of(status=401, error="no such key"))
    assert refused.status.status_code == StatusCode.UNSET
    assert "gen_ai.operation.name" not in refused.attributes


def test_phases_that_an_answer_never_reached_have_no_span() -> None:
    waited = DecodingStats(queue_seconds=0.3)
    assert [span.name for span in exported(record_of(waited, first_token_seconds=None))[1:]] == ["queue"]
    assert len(exported(record_of(DecodingStats(), first_token_seconds=None))) == 1


def test_probes_have_no_span() -> None:
    assert exported(record_of(path="/health", method="GET"), record_of(path="/metrics", method="GET")) == []


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """A collector on this machine: its address, and what it got."""
    got: list[tuple[str, ExportTraceServiceRequest]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, request))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


def test_the_environment_says_where_spans_go(collector, monkeypatch) -> None:
    address, got = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    tracing = Tracing.from_environment()
    tracing.export(record_of(STATS))
    tracing.close()
    [(path, request)] = got
    [resource] = request.resource_spans
    attributes = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert path == "/v1/traces"
    assert (attributes["service.name"], attributes["deployment.environment.name"]) == ("medusa-serve", "test")
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/chat/completions", "decode", "prefill", "queue"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER is 'zipkin'; it must be otlp, console or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; only http/protobuf is supported"),
    ],
)
def test_a_way_of_export_that_there_is_not_is_refused(variable, value, message, monkeypatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(OptionError, match=message):
        Tracing.from_environment()


@pytest.mark.parametrize("value", ["none", "console"])
def test_spans_need_no_collector(value, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", value)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    tracing = Tracing.from_environment()
    tracing.export(record_of(STATS))
    tracing.close()
    assert ('"mine"' in capsys.readouterr().out) == (value == "console")


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("opentelemetry.sdk.trace", "opentelemetry-sdk"),
        ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry-exporter-otlp-proto-http"),
    ],
)
def test_a_missing_package_is_told_with_the_extra_that_has_it(module, package, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; .*medusa-export\[otel\]"):
        Tracing.from_environment()
