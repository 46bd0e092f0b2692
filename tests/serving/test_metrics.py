"""Metrics: what Prometheus reads is what the engine and the requests did."""

from __future__ import annotations

import dataclasses
import itertools
import time
from unittest.mock import patch

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from medusa_runtime import DecodingStats, QueueFullError, QueueTimeoutError
from medusa_serve.telemetry import Metrics
from medusa_serve.telemetry.families import HighWater
from medusa_serve.telemetry.request_metrics import one_two_five
from tests.support import fake_backend
from tests.support.fake_backend import FakeBackend, fake_manifest, repeating_token
from tests.support.telemetry import PATHS, key, metrics_of, record_of, samples_of
from tests.unit.test_service import gated, service


def decoded(num_requests: int = 3) -> tuple[Metrics, dict, list[DecodingStats]]:
    """The metrics after some requests whose answers repeat themselves, all samples, and the requests' own counts."""
    repeats = patch.object(fake_backend, "next_token", repeating_token)
    with repeats, service(backend=FakeBackend("sometimes", fake_manifest(max_seq_len=300)), prompt_lookup=True) as lm:
        metrics = metrics_of(lm)
        stats = [lm.generate("abcabcabc", max_new_tokens=120).stats for _ in range(num_requests)]
        for one in stats:
            metrics.observe(record_of(one))
        return metrics, samples_of(metrics), stats


def summed(samples: dict, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (found, has), value in samples.items() if found == name and wanted <= has)


def test_the_engines_counts_are_the_requests_sums() -> None:
    _, samples, stats = decoded()
    total = DecodingStats()
    for one in stats:
        total.add(one)
    assert samples[key("vllm:prompt_tokens_total")] == 3 * 9
    assert samples[key("vllm:generation_tokens_total")] == 3 * 120
    assert samples[key("vllm:prefix_cache_hits_total")] == total.num_cached_tokens > 0
    by_source = [
        samples[key("vllm:prompt_tokens_by_source_total", source=f"local_{name}")] for name in ("compute", "cache_hit")
    ]
    assert by_source == [27 - total.num_cached_tokens, total.num_cached_tokens]
    assert samples[key("medusa_steps_total")] == total.num_steps
    assert samples[key("medusa_passes_total")] == total.num_steps  # one request at a time
    assert samples[key("medusa_answers_total", outcome="completed")] == 3


def test_vllms_counters_of_drafts_agree_with_each_other_and_with_ours() -> None:
    _, samples, stats = decoded()
    accepted = sum(one.num_accepted_tokens for one in stats)
    assert samples[key("vllm:spec_decode_num_accepted_tokens_total")] == accepted > 0
    assert summed(samples, "vllm:spec_decode_num_accepted_tokens_per_pos_total") == accepted
    assert summed(samples, "medusa_accepted_tokens_total") == accepted
    drafted = samples[key("vllm:spec_decode_num_draft_tokens_total")]
    assert summed(samples, "medusa_draft_tokens_total") == drafted == samples[key("medusa_tree_drafts_sum")]
    assert summed(samples, "medusa_draft_tokens_total", source="lookup") > 0
    assert summed(samples, "medusa_draft_tokens_total", source="head") > 0
    sources = [dict(labels) for name, labels in samples if name == "medusa_draft_tokens_total"]
    assert sorted(labels["depth"] for labels in sources if labels["source"] == "head") == ["1", "2", "3"]
    assert max(int(labels["depth"]) for labels in sources if labels["source"] == "lookup") > 3  # deeper than the heads guess
    without = sum(one.steps_by_drafted[0] for one in stats)
    assert samples[key("vllm:spec_decode_num_drafts_total")] == samples[key("medusa_steps_total")] - without
    firsts = sum(one.accepted_by_depth[0] for one in stats)
    assert samples[key("vllm:spec_decode_num_accepted_tokens_per_pos_total", position="0")] == firsts
    assert summed(samples, "medusa_accepted_tokens_total", depth="1") == firsts


def test_the_histograms_of_steps_hold_every_step() -> None:
    _, samples, stats = decoded()
    steps = samples[key("medusa_steps_total")]
    for name in ("medusa_acceptance_length", "medusa_tree_drafts"):
        assert samples[key(f"{name}_count")] == samples[key(f"{name}_bucket", le="+Inf")] == steps
    assert samples[key("medusa_acceptance_length_bucket", le="1.0")] == sum(one.steps_by_accepted[0] for one in stats)
    assert samples[key("medusa_acceptance_length_sum")] == steps + sum(one.num_accepted_tokens for one in stats)


def test_a_request_is_counted_once_and_an_answer_for_each_of_its_own() -> None:
    metrics = metrics_of(None)
    stats = [
        DecodingStats(
            num_prompt_tokens=12, num_cached_tokens=4, num_generated_tokens=size, num_decoded_tokens=size - 1,
            queue_seconds=0.1, prefill_seconds=0.3, decode_seconds=0.01 * (size - 1),
        )
        for size in (11, 21)
    ]  # fmt: skip
    metrics.observe(record_of(*stats, finish_reasons=["tool_calls", "length"], n=2))
    samples = samples_of(metrics)
    sums = {
        "e2e_request_latency_seconds": (1, 0.9),
        "time_to_first_token_seconds": (1, 0.2),
        "inter_token_latency_seconds": (2, 0.05),
        "request_params_n": (1, 2),
        "request_params_max_tokens": (1, 64),
        "request_max_num_generation_tokens": (1, 21),
        "request_generation_tokens": (2, 32),
        "request_prompt_tokens": (2, 24),
        "request_prefill_kv_computed_tokens": (2, 16),
        "request_queue_time_seconds": (2, 0.2),
        "request_prefill_time_seconds": (2, 0.6),
        "request_decode_time_seconds": (2, 0.3),
        "request_inference_time_seconds": (2, 0.9),
        "request_time_per_output_token_seconds": (2, 0.02),
    }
    for name, (count, total) in sums.items():
        assert samples[key(f"vllm:{name}_count")] == count, name
        assert samples[key(f"vllm:{name}_sum")] == pytest.approx(total), name
    success = {
        reason: samples[key("vllm:request_success_total", finished_reason=reason)] for reason in ("stop", "length", "abort")
    }
    assert success == {"stop": 1, "length": 1, "abort": 0}


def test_requests_that_decode_nothing_are_counted_as_http_alone() -> None:
    metrics = metrics_of(None)
    metrics.observe(record_of(method="GET", path="/v1/models", finish_reasons=[]))
    metrics.observe(record_of(status=429, finish_reasons=[]))
    samples = samples_of(metrics)
    assert samples[key("medusa_http_requests_total", method="GET", path="/v1/models", status="200")] == 1
    assert samples[key("medusa_http_requests_total", method="POST", path=PATHS[0], status="429")] == 1
    assert samples[key("vllm:e2e_request_latency_seconds_count")] == 0
    assert summed(samples, "vllm:request_success_total") == 0


def test_clients_cannot_make_series_at_will() -> None:
    metrics = metrics_of(None)
    for number in range(50):
        metrics.observe(record_of(method=f"METHOD{number}", path=f"/{number}", status=404, finish_reasons=[]))
    samples = samples_of(metrics)
    assert samples[key("medusa_http_requests_total", method="other", path="other", status="404")] == 50
    assert sum(name == "medusa_http_requests_total" for name, _ in samples) == 1


def test_the_queues_refusals_are_told_by_reason() -> None:
    gate, backend = gated()
    with service(max_batch_size=1, max_queue=1, backend=backend) as lm:
        running = lm.submit("abc", max_new_tokens=3)
        assert gate.arrived.wait(30)
        waiting = lm.submit("abc", max_new_tokens=3, max_queue_seconds=0.01)
        with pytest.raises(QueueFullError):
            lm.submit("abc", max_new_tokens=3)
        busy = samples_of(metrics_of(lm))
        assert (busy[key("vllm:num_requests_running")], busy[key("vllm:num_requests_waiting")]) == (1, 1)
        assert (busy[key("medusa_slots_in_use")], busy[key("medusa_slots")]) == (1, 1)
        time.sleep(0.02)  # it has waited too long before it could be decoded
        gate.is_open.set()
        with pytest.raises(QueueTimeoutError):
            waiting.result(30)
        running.result(30)
        samples = samples_of(metrics_of(lm))
    assert samples[key("medusa_queue_refusals_total", reason="full")] == 1
    assert samples[key("medusa_queue_refusals_total", reason="timeout")] == 1
    assert samples[key("vllm:admission_rejections_total", reason="max_num_queued_reqs")] == 1
    assert samples[key("medusa_answers_total", outcome="failed")] == 0


def test_while_there_is_no_model_the_server_is_not_ready_and_tells_nothing_of_an_engine() -> None:
    samples = samples_of(metrics_of(None))
    assert samples[key("medusa_ready")] == 0
    assert not any(name.startswith(("vllm:num_requests", "medusa_steps", "medusa_build")) for name, _ in samples)


def test_what_runs_is_told() -> None:
    _, samples, _ = decoded(1)
    build = {"version": "1.2.3", "backend": "ort-cpu", "device": "cpu", "bundle": "sha256:abc"}
    assert samples[key("medusa_build_info", **build)] == samples[key("medusa_ready")] == 1
    assert samples[key("medusa_open_streams")] == 2
    assert samples[key("process_resident_memory_bytes")] > 1e6


def test_both_formats_say_the_same_and_have_no_created_series() -> None:
    metrics, _, _ = decoded()
    plain, plain_type = metrics.exposition("text/plain;version=0.0.4, */*;q=0.1")
    opened, open_type = metrics.exposition("application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5")
    assert plain_type.startswith("text/plain")
    assert open_type.startswith("application/openmetrics-text; version=1.0.0")
    assert opened.endswith(b"# EOF\n")
    found = [
        {(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples}
        for families in (text_string_to_metric_families(plain.decode()), open_metrics(opened.decode()))
    ]
    assert found[0] == found[1]
    assert not any(name.endswith("_created") for name, _ in found[0])


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=x", "text/plain;version=;;", "*/*", "\xff"])
def test_odd_accept_headers_do_no_harm(accept: str) -> None:
    assert b"medusa_ready 0.0" in metrics_of(None).exposition(accept)[0]


def test_counters_never_fall_though_tokens_are_taken_back() -> None:
    with service() as lm:
        lm.generate("abc", max_new_tokens=20)
        later = lm.stats()
        stats = later.decoding
        earlier = dataclasses.replace(
            later, decoding=dataclasses.replace(stats, num_generated_tokens=stats.num_generated_tokens - 2)
        )
        states = iter([later, earlier, later])
        metrics = metrics_of(lm)
        given = []
        lm.stats = lambda: next(states)  # type: ignore[method-assign]
        metrics = metrics_of(lm)
        given = [samples_of(metrics)[key("vllm:generation_tokens_total")] for _ in range(3)]
    assert given == [20, 20, 20]
    water = HighWater()
    assert [water.at_least(value, "a", "b") for value in (3, 1, 4, 4, 0)] == [3, 3, 4, 4, 4]
    assert water.at_least(0, "a", "c") == 0


def test_buckets_are_vllms() -> None:
    assert one_two_five(250) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert one_two_five(1) == [1]
    _, samples, _ = decoded(1)
    bounds = {float(dict(labels)["le"]) for name, labels in samples if name == "vllm:inter_token_latency_seconds_bucket"}
    assert sorted(bounds)[:3] == [0.01, 0.025, 0.05]
    assert all(a < b for a, b in itertools.pairwise(sorted(bounds)))
