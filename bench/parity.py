"""Compares greedy decoding of a bundle with `generate` of Transformers, token by token.

    python bench/parity.py BUNDLE MODEL [--prompts FILE.jsonl] [--num-prompts 24] [-o bench/results/parity.json]

Each row of FILE.jsonl has a `prompt`, or the `turns` of MT-bench. Without a file, built-in prompts are used.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.check.compare import first_divergence
from medusa_export.model.checkpoint import load_backbone
from medusa_runtime import MedusaLM
from medusa_runtime.bundle.files import json_text

SUBJECTS = ("tides", "bread", "chess", "glass", "maps", "bees", "steam engines", "the moon")
FORMS = ("Explain {} to a child.", "Write a short poem about {}.", "List five facts about {}, numbered.")
TIE_MARGIN = 1e-3


def own_prompts() -> list[str]:
    return [form.format(subject) for subject in SUBJECTS for form in FORMS]


def read_prompts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    return [row["prompt"] if "prompt" in row else row["turns"][0] for row in rows]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--prompts", type=click.Path(path_type=Path))
@click.option("--num-prompts", default=24, show_default=True)
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, model: str, prompts: Path | None, num_prompts: int, max_new_tokens: int, output: Path | None) -> None:
    """Compare BUNDLE with MODEL. Exit code 3 if a token differs although its logits are not nearly equal."""
    lm = MedusaLM.from_bundle(bundle)
    reference = load_backbone(model, attention="sdpa").model
    reference.generation_config.eos_token_id = None  # both decode up to the limit, so that every prompt counts equally
    rows: list[dict[str, Any]] = []
    for prompt in (read_prompts(prompts) if prompts else own_prompts())[:num_prompts]:
        prompt_ids = lm.codec.encode(prompt)
        started = time.perf_counter()
        with torch.no_grad():
            tokens = torch.tensor([prompt_ids])
            # otherwise generate takes the prompt's end-of-turn tokens for padding and masks them
            mask = torch.ones_like(tokens)
            whole = reference.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)[0]
        theirs, seconds = whole[len(prompt_ids) :].tolist(), time.perf_counter() - started
        ours = lm.generate(prompt, max_new_tokens=max_new_tokens, ignore_eos=True)
        row: dict[str, Any] = {
            "prompt": prompt[:60],
            "num_tokens": len(theirs),
            "equal": ours.token_ids == theirs,
            "tokens_per_step": round(ours.stats.tokens_per_step, 3),
            "transformers_tokens_per_second": round(len(theirs) / seconds, 1),
            "medusa_tokens_per_second": round(ours.stats.tokens_per_second, 1),
        }
        if not row["equal"]:
            with torch.no_grad():
                logits = reference(whole[None]).logits[0, len(prompt_ids) - 1 : -1].numpy()
            divergence = first_divergence(ours.token_ids, theirs, logits)
            assert divergence is not None
            row["divergence"] = divergence.model_dump()
        rows.append(row)
        click.echo(json_text(row), err=True)
    bad = [row for row in rows if not row["equal"] and row["divergence"]["margin"] > TIE_MARGIN]
    result = environment() | {
        "max_new_tokens": max_new_tokens,
        "num_prompts": len(rows),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "num_equal": sum(row["equal"] for row in rows),
        "num_beyond_a_near_tie": len(bad),
        "rows": rows,
    }
    publish(result, output)
    sys.exit(3 if bad else 0)


if __name__ == "__main__":
    main()
