"""Metrics of requests. Each request that has ended is counted once, from its record."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from medusa_runtime import DecodingStats
from medusa_serve.record import RequestRecord

# Buckets as in vLLM, so that dashboards made for it show the same.
FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
                       640, 2560)  # fmt: skip
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
ANSWERS = (1, 2, 5, 10, 20)
FINISH_REASONS = ("stop", "length", "abort", "error")
VLLM_REASONS = {"tool_calls": "stop", "function_call": "stop", "cancelled": "abort", "deadline": "abort"}
METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
OTHER = "other"  # in the place of what clients may choose at will


class RequestMetrics:
    """Counters and histograms of requests.

    Args:
        registry: where they are registered.
        model_name: the name under which the model is served.
        max_model_len: the most tokens of prompt and answer together.
        paths: the server's own paths; requests for others are counted together.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str, max_model_len: int, paths: Collection[str]) -> None:
        self._registry, self._labels = registry, {"model_name": model_name, "engine": "0"}
        self._paths = frozenset(paths)
        self._http = Counter(
            "medusa_http_requests", "HTTP requests that have ended.", ["method", "path", "status"], registry=registry
        )
        self._success = Counter(
            "vllm:request_success", "Answers that have ended.", [*self._labels, "finished_reason"], registry=registry
        )
        for reason in FINISH_REASONS:
            self._success.labels(*self._labels.values(), reason)
        self._add_times()
        self._add_sizes(one_two_five(max_model_len))

    def _add_times(self) -> None:
        new = self._histogram
        self._first_token = new("time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN_SECONDS)
        self._gap = new("inter_token_latency_seconds", "Between two chunks of an answer.", TOKEN_SECONDS)
        self._per_token = new(
            "request_time_per_output_token_seconds", "Mean time of an answer's tokens after the first.", TOKEN_SECONDS
        )
        self._whole = new("e2e_request_latency_seconds", "From the request to the end of its answer.", REQUEST_SECONDS)
        self._queue = new("request_queue_time_seconds", "From the request to the start of its prefill.", REQUEST_SECONDS)
        self._inference = new("request_inference_time_seconds", "Prefill and decoding of an answer.", REQUEST_SECONDS)
        self._prefill = new("request_prefill_time_seconds", "Prefill of an answer.", REQUEST_SECONDS)
        self._decode = new("request_decode_time_seconds", "Decoding of an answer, after its first token.", REQUEST_SECONDS)

    def _add_sizes(self, buckets: Sequence[float]) -> None:
        new = self._histogram
        self._prompt = new("request_prompt_tokens", "Tokens of a prompt.", buckets)
        self._computed = new("request_prefill_kv_computed_tokens", "Tokens of a prompt that were not in the cache.", buckets)
        self._answer = new("request_generation_tokens", "Tokens of an answer.", buckets)
        self._longest = new("request_max_num_generation_tokens", "Tokens of a request's longest answer.", buckets)
        self._max_tokens = new("request_params_max_tokens", "The most tokens that a request asked for.", buckets)
        self._n = new("request_params_n", "Answers that a request asked for.", ANSWERS)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        method = record.method if record.method in METHODS else OTHER
        path = record.path if record.path in self._paths else OTHER
        self._http.labels(method, path, str(record.status)).inc()
        for reason in record.finish_reasons:
            self._success.labels(*self._labels.values(), VLLM_REASONS.get(reason, reason)).inc()
        if record.stats:
            self._observe_generation(record)

    def _observe_generation(self, record: RequestRecord) -> None:
        self._whole.observe(record.seconds)
        self._n.observe(record.n)
        self._longest.observe(max(stats.num_generated_tokens for stats in record.stats))
        if record.max_tokens is not None:
            self._max_tokens.observe(record.max_tokens)
        if record.first_token_seconds is not None:
            self._first_token.observe(record.first_token_seconds)
        for gap in record.gaps:
            self._gap.observe(gap)
        for stats in record.stats:
            self._observe_answer(stats)

    def _observe_answer(self, stats: DecodingStats) -> None:
        self._prompt.observe(stats.num_prompt_tokens)
        self._computed.observe(stats.num_prompt_tokens - stats.num_cached_tokens)
        self._answer.observe(stats.num_generated_tokens)
        self._queue.observe(stats.queue_seconds)
        self._prefill.observe(stats.prefill_seconds)
        self._decode.observe(stats.decode_seconds)
        self._inference.observe(stats.prefill_seconds + stats.decode_seconds)
        if stats.num_decoded_tokens:
            self._per_token.observe(stats.seconds_per_token)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(f"vllm:{name}", help_text, list(self._labels), buckets=buckets, registry=self._registry)
        return family.labels(*self._labels.values())


def one_two_five(most: int) -> list[float]:
    """The numbers 1, 2, 5, 10, 20, 50 … up to a largest one: vLLM's buckets for tokens."""
    numbers = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return list(itertools.takewhile(lambda number: number <= most, numbers)) or [1]
