"""Metrics of the engine. They are read from its own counts when somebody asks, and so cost nothing per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from medusa_runtime import DecodingStats, ServiceStats
from medusa_serve.telemetry.families import ByLabels, Families, HighWater, by_depth

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)  # tokens that a step gives
TREE_SIZES = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # drafts that a step verifies


class EngineCollector(Collector):
    """The engine's counts as metric families.

    Args:
        state_of: gives the state of the service; None while there is no model, and then there are no families.
        model_name: the name under which the model is served.
        num_heads: the bundle's heads; each has its series from the first scrape on.
    """

    def __init__(self, state_of: Callable[[], ServiceStats | None], model_name: str, num_heads: int) -> None:
        self._state_of, self._num_heads = state_of, num_heads
        high_water = HighWater()
        self._families = Families({"model_name": model_name, "engine": "0"}, high_water)
        self._plain = Families({"model_name": model_name}, high_water)  # vLLM's without the label `engine`

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape."""
        if (state := self._state_of()) is None:
            return
        yield from self._service(state)
        yield from self._tokens(state.decoding)
        yield from self._vllm_drafts(state.decoding)
        yield from self._drafts(state.decoding)
        yield from self._steps(state.decoding)

    def _service(self, state: ServiceStats) -> Iterator[Metric]:
        gauge, counter, cache = self._families.gauge, self._families.counter, state.cache
        usage, refused = cache.num_entries / cache.max_entries, {("max_num_queued_reqs",): state.num_refused}
        yield gauge("vllm:num_requests_running", "Answers that have a slot.", state.num_active)
        yield gauge("vllm:num_requests_waiting", "Answers that wait for a slot.", state.num_waiting)
        yield gauge("vllm:kv_cache_usage_perc", "Part of the KV cache that is in use; 1 is all of it.", usage)
        yield self._plain.counter(
            "vllm:admission_rejections",
            "Requests refused because the queue was full.",
            refused,
            ["reason"],
        )
        yield gauge("medusa_slots", "Slots: answers that can be decoded at a time.", state.max_batch_size)
        yield gauge("medusa_slots_in_use", "Slots that an answer has.", state.num_active)
        yield gauge("medusa_cache_entries", "Entries of the KV cache that answers use; one holds a token.", cache.num_entries)
        yield gauge("medusa_cache_max_entries", "Entries that the KV cache can have at most.", cache.max_entries)
        yield gauge("medusa_cache_bytes", "Memory that the KV cache has now.", cache.num_bytes)
        outcomes: ByLabels = {
            ("completed",): state.num_completed,
            ("cancelled",): state.num_cancelled,
            ("overdue",): state.num_overdue,
            ("failed",): state.num_failed,
        }
        yield counter("medusa_answers", "Answers that have ended, by how they ended.", outcomes, ["outcome"])
        refusals: ByLabels = {("full",): state.num_refused, ("timeout",): state.num_timed_out}
        yield counter("medusa_queue_refusals", "Requests that the queue refused or gave up.", refusals, ["reason"])

    def _tokens(self, stats: DecodingStats) -> Iterator[Metric]:
        counter, cached = self._families.counter, stats.num_cached_tokens
        sources: ByLabels = {("local_compute",): stats.num_prompt_tokens - cached, ("local_cache_hit",): cached}
        yield counter("vllm:prompt_tokens", "Tokens of prompts.", stats.num_prompt_tokens)
        yield counter("vllm:prompt_tokens_by_source", "Tokens of prompts, by where they came from.", sources, ["source"])
        yield counter("vllm:prompt_tokens_cached", "Tokens of prompts that were in the cache.", cached)
        yield counter("vllm:prefix_cache_queries", "Tokens that were looked for in the prefix cache.", stats.num_prompt_tokens)
        yield counter("vllm:prefix_cache_hits", "Tokens that were found in the prefix cache.", cached)
        yield counter("vllm:generation_tokens", "Tokens of answers.", stats.num_generated_tokens)
        yield counter("vllm:num_preemptions", "Answers that lost their slot for want of memory.", stats.num_preemptions)

    def _vllm_drafts(self, stats: DecodingStats) -> Iterator[Metric]:
        counter, without_draft = self._families.counter, sum(stats.steps_by_drafted[:1])
        positions: ByLabels = {
            (str(place),): count for place, count in enumerate(_at_least(self._num_heads, stats.accepted_by_depth))
        }
        prefix = "vllm:spec_decode_num_"
        yield counter(f"{prefix}drafts", "Steps that verified a draft.", sum(stats.steps_by_drafted) - without_draft)
        yield counter(f"{prefix}draft_tokens", "Drafts verified.", stats.num_draft_tokens)
        yield counter(f"{prefix}accepted_tokens", "Drafts accepted.", stats.num_accepted_tokens)
        yield counter(f"{prefix}accepted_tokens_per_pos", "Drafts accepted, by position from 0.", positions, ["position"])

    def _drafts(self, stats: DecodingStats) -> Iterator[Metric]:
        counter, labels = self._families.counter, ["depth", "source"]
        drafted = {
            "head": self._by_head(stats.drafted_by_head),
            "lookup": stats.drafted_by_lookup,
            "structure": stats.drafted_by_guide,
        }
        accepted = {
            "head": self._by_head(stats.accepted_by_head),
            "lookup": stats.accepted_by_lookup,
            "structure": stats.accepted_by_guide,
        }
        yield counter("medusa_draft_tokens", "Drafts verified, by depth and by who named them.", by_depth(drafted), labels)
        yield counter("medusa_accepted_tokens", "Drafts accepted, by depth and by who named them.", by_depth(accepted), labels)

    def _by_head(self, counts: Sequence[int]) -> list[int]:
        """Counts of the heads; deeper than they guess, there is nothing to count."""
        return _at_least(self._num_heads, counts)[: self._num_heads]

    def _steps(self, stats: DecodingStats) -> Iterator[Metric]:
        counter, histogram = self._families.counter, self._families.histogram
        seconds: ByLabels = {
            ("backend",): stats.engine_seconds,
            ("host",): max(stats.decode_seconds - stats.engine_seconds, 0.0),
            ("prefill",): stats.prefill_seconds,
        }
        yield counter("medusa_steps", "Verification steps, counted for each answer that took part.", stats.num_steps)
        yield counter("medusa_passes", "Forward passes that verified drafts; one may verify many steps.", stats.num_passes)
        yield counter("medusa_engine_seconds", "Seconds that the engine worked, by what it did.", seconds, ["part"])
        yield histogram(
            "medusa_acceptance_length",
            "Tokens that a step gives: accepted drafts and the bonus token.",
            stats.steps_by_accepted,
            LENGTHS,
            lambda num_accepted: num_accepted + 1,
        )
        yield histogram(
            "medusa_tree_drafts",
            "Drafts that a step verifies: the nodes of its tree without the root.",
            stats.steps_by_drafted,
            TREE_SIZES,
            lambda num_drafts: num_drafts,
        )


def _at_least(length: int, counts: Sequence[int]) -> list[int]:
    """Counts, filled up with zeros."""
    return [*counts, *[0] * (length - len(counts))]
