"""Checks a real bundle on WebGPU, also on a driver in software: greedy answers, token by token, beside those of the CPU.

    python bench/webgpu.py BUNDLE [--max-new-tokens 8] [-o bench/results/webgpu.json]

On Debian without a GPU: apt-get install chromium libvulkan1, and set VK_DRIVER_FILES, XDG_RUNTIME_DIR and
ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER as docs/gpu.md says. Times of a driver in software say nothing of a GPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.progress import note
from medusa_runtime import Manifest, MedusaLM
from medusa_runtime.backends.webgpu.adapters import choose_adapter

PROMPTS = ("What is the capital of France?", "Write a Python function that reverses a string.")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--max-new-tokens", type=click.IntRange(1), default=8, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, max_new_tokens: int, output: Path | None) -> None:
    """Decode prompts on the CPU and on WebGPU, with Medusa and without."""
    adapter = choose_adapter(0)
    runs: dict[str, list[dict[str, Any]]] = {}
    for device in ("cpu", "gpu"):
        with MedusaLM.from_bundle(bundle, device=device, max_batch_size=1) as lm:
            runs[device] = [
                _answer(lm, prompt, max_new_tokens, medusa=medusa) for prompt in PROMPTS for medusa in (True, False)
            ]
        note(f"{device}: {sum(run['seconds'] for run in runs[device]):.0f} s")
    equal = [one["token_ids"] == other["token_ids"] for one, other in zip(runs["cpu"], runs["gpu"], strict=True)]
    facts = {"model": Manifest.load(bundle).model.name, "adapter": adapter.name, "is_software": adapter.is_software}
    publish(environment() | facts | {"answers_equal": equal, "runs": runs}, output)
    if not all(equal):
        raise click.ClickException(f"{equal.count(False)} of {len(equal)} answers differ from the CPU's")


def _answer(lm: MedusaLM, prompt: str, max_new_tokens: int, *, medusa: bool) -> dict[str, Any]:
    started = time.perf_counter()
    result = lm.generate([{"role": "user", "content": prompt}], max_new_tokens=max_new_tokens, medusa=medusa)
    facts = {"prompt": prompt, "medusa": medusa, "token_ids": result.token_ids, "text": result.text}
    return facts | {"steps": result.stats.num_steps, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    main()
