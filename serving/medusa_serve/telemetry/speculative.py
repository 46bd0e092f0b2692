"""The speculative decoding of one request, as vLLM tells it at the root of a response under `metrics`."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_runtime import DecodingStats


def speculative_metrics(stats: Sequence[DecodingStats], num_spec_tokens: int) -> dict[str, object]:
    """What `metrics.speculative_decoding` holds. AIPerf reads it, and refuses it if its counts contradict each other.

    Only steps that verified a draft count. Draft tokens are all nodes of the trees, of which one path can be accepted, so
    the acceptance rate is far below that of a chain of the same depth.

    Args:
        stats: of the request's answers, which are added up.
        num_spec_tokens: how deep drafts usually are: the number of heads. Prompt lookup and structures draft deeper; the
            result then has the greatest depth at which a draft was accepted.
    """
    total = DecodingStats()
    for answer in stats:
        total.add(answer)
    histogram = [*total.steps_by_accepted]
    if histogram:
        histogram[0] -= total.steps_by_drafted[0]  # steps without a draft, which cannot accept any
    while histogram and not histogram[-1]:  # tokens that were taken back
        histogram.pop()
    histogram += [0] * (num_spec_tokens + 1 - len(histogram))
    num_steps, num_accepted, num_drafts = sum(histogram), total.num_accepted_tokens, total.num_draft_tokens
    return {
        "mean_acceptance_length": 1 + num_accepted / num_steps if num_steps else 0.0,
        "draft_acceptance_rate": num_accepted / num_drafts if num_drafts else 0.0,
        "acceptance_histogram": histogram,
        "num_spec_steps": num_steps,
        "num_accepted_draft_tokens": num_accepted,
        "num_draft_tokens": num_drafts,
        "num_spec_tokens": len(histogram) - 1,
    }
