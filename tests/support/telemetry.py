"""A server's metrics over a real service, and records of requests."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client.parser import text_string_to_metric_families

from medusa_runtime import DecodingStats, MedusaLM
from medusa_serve.record import RequestRecord
from medusa_serve.telemetry import BuildInfo, Metrics, ServerView

PATHS = ("/v1/chat/completions", "/v1/models")
BUILD = BuildInfo(version="1.2.3", backend="ort-cpu", device="cpu", bundle="sha256:abc")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def metrics_of(lm: MedusaLM | None, paths: Collection[str] = PATHS, view: ServerView | None = None) -> Metrics:
    view = view or ServerView(
        is_ready=lambda: lm is not None, num_streams=lambda: 2, build=lambda: BUILD if lm else None, num_lost_lines=lambda: 0
    )
    state_of = lm.stats if lm is not None else lambda: None
    return Metrics(state_of, "tiny", view, max_model_len=300, num_heads=3, paths=paths)


def samples_of(metrics: Metrics) -> Samples:
    """All samples by name and labels; the labels that most of vLLM's have are left out."""
    text = metrics.exposition()[0].decode()
    return {
        (
            sample.name,
            frozenset((name, value) for name, value in sample.labels.items() if name not in ("model_name", "engine")),
        ): (sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def record_of(*stats: DecodingStats, **changes: object) -> RequestRecord:
    record = RequestRecord(
        "req-1",
        "POST",
        "/v1/chat/completions",
        client="10.0.0.7",
        since=1_700_000_000.0,
        seconds=0.9,
        model="tiny",
        n=max(len(stats), 1),
        max_tokens=64,
        finish_reasons=["stop"] * len(stats),
        prompt_tokens=12,
        cached_tokens=4,
        first_token_seconds=0.2,
        gaps=[0.02, 0.03],
        stats=list(stats),
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record
