"""Measures long prompts in parallel: requests per second with many callers, against other servers, in one sitting.

    python bench/long_prompts.py BUNDLE --genai MODEL --genai-python .venv-genai/bin/python [-o bench/results/long_prompts.json]
    python bench/long_prompts.py BUNDLE --llama-server bin/llama-server --llama-cpp-model model-q8_0.gguf

8 and 16 callers, each with a prompt of its own of some 500 tokens, greedy. No prompt is asked twice, so that no cache of
earlier prompts helps; the texts are pieces of this project's documentation. `medusa` and `plain` are `medusa-export serve` with
heads and without. `genai` is ONNX Runtime GenAI's engine, in a process of its own, without HTTP. `llama.cpp` is its own server,
`llama-server`, with a slot for each caller. They take turns round by round, and are paused while it is not their turn. Numbers
are medians of rounds; times are of all answers.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish
from http_servers import llama_server, medusa_server
from over_http import Ask, measure, through, told, watched

from medusa_export.measure.bench.process import WORKERS, WorkerProcess
from medusa_runtime.text.codec import TextCodec

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "What is this text about? Answer in a few sentences.\n\n"
REQUESTS_PER_CALLER = 2


def pieces(codec: TextCodec, num_tokens: int) -> Iterator[str]:
    """Prompts of about that many tokens with the template, all different.

    Raises:
        ClickException: the texts are used up.
    """
    room = num_tokens - len(codec.encode(QUESTION))
    files = sorted(ROOT.joinpath("docs").rglob("*.md"))
    ids = [token for file in files for token in codec.encode(file.read_text(encoding="utf-8"), raw=True)]
    for start in range(0, len(ids) - room, room):
        yield QUESTION + codec.decode(ids[start : start + room])
    raise click.ClickException(f"the texts have {len(ids)} tokens: too few for so many prompts; ask for fewer rounds")


def per_second(run: dict[str, Any]) -> float:
    """Requests per second of a round."""
    return len(run["answers"]) / float(run["seconds"])


def summary(outcomes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of one number of callers: the numbers of all, and the ratios of `medusa` to the others round by round."""
    entry: dict[str, Any] = {}
    for name, runs in outcomes.items():
        entry[name] = {"requests_per_second": round(float(np.median([per_second(run) for run in runs])), 3)} | told(runs)
    for other in sorted(set(outcomes) - {"medusa"}):
        pairs = zip(outcomes["medusa"], outcomes[other], strict=True)
        ratios = [per_second(ours) / per_second(theirs) for ours, theirs in pairs]
        entry[f"medusa_over_{other}"] = round(float(np.median(ratios)), 3)
        entry[f"medusa_over_{other}_by_round"] = [round(ratio, 3) for ratio in ratios]
    return entry


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--callers", default=(8, 16), multiple=True, show_default=True, type=click.IntRange(1))
@click.option("--prompt-tokens", default=500, show_default=True, type=click.IntRange(64))
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(2))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--genai", type=click.Path(exists=True, path_type=Path), help="The same model, made by GenAI's builder.")
@click.option("--genai-python", type=click.Path(exists=True, path_type=Path), help="Python that has onnxruntime-genai.")
@click.option("--llama-server", "llama", type=click.Path(exists=True, path_type=Path), help="llama.cpp's program of that name.")
@click.option("--llama-cpp-model", type=click.Path(exists=True, path_type=Path), help="The same model as a GGUF file in q8_0.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    bundle: Path,
    callers: tuple[int, ...],
    prompt_tokens: int,
    max_tokens: int,
    rounds: int,
    genai: Path | None,
    genai_python: Path | None,
    llama: Path | None,
    llama_cpp_model: Path | None,
    output: Path | None,
) -> None:
    """Measure BUNDLE on this machine."""
    if (genai is None) != (genai_python is None) or (llama is None) != (llama_cpp_model is None):
        raise click.UsageError("--genai and --genai-python belong together, and --llama-server and --llama-cpp-model")
    codec = TextCodec(bundle)
    prompts = list(itertools.islice(pieces(codec, prompt_tokens), REQUESTS_PER_CALLER * sum(callers) * (rounds + 1)))
    path = {"PYTHONPATH": ":".join([str(WORKERS), *filter(None, sys.path)]), "OMP_WAIT_POLICY": "PASSIVE"}
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    ours, versions = fields | {"stream_options": {"include_usage": True}}, {}
    with ExitStack() as stack:
        here = Path(__file__)
        load = stack.enter_context(WorkerProcess("load", [sys.executable, str(here.with_name("http_load.py"))], path))
        asks: dict[str, Ask] = {}
        for name in ("medusa", "plain"):  # two servers: one would remember the other's prompts
            server = stack.enter_context(medusa_server(bundle, max(callers)))
            own = ours | {"medusa": {"enabled": name == "medusa"}}
            asks[name] = watched(through(load, server, own, keeps=False), {"engine": server.process.pid})
        if llama is not None and llama_cpp_model is not None:
            other = stack.enter_context(llama_server(llama, llama_cpp_model, max(callers), prompt_tokens + max_tokens + 64))
            asks["llama.cpp"] = watched(through(load, other, ours, keeps=False), {"engine": other.process.pid})
        if genai is not None:
            command = [str(genai_python), str(here.with_name("genai_direct.py")), str(genai)]
            worker = stack.enter_context(WorkerProcess("genai", command, path | {"PYTHONPATH": str(WORKERS)}))
            asks["genai"] = watched(in_process(worker, codec, max_tokens), {"engine": worker.pid})
            versions["onnxruntime-genai"] = worker.ask("version")
        waiting = iter(prompts)
        found = measure(asks, rounds, callers, lambda streams: [next(waiting) for _ in range(REQUESTS_PER_CALLER * streams)])
    result = environment()
    result["versions"] |= versions
    result |= {"prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "rounds": rounds}
    publish(result | {"by_callers": {number: summary(runs) for number, runs in found.items()}}, output)


def in_process(worker: WorkerProcess, codec: TextCodec, max_tokens: int) -> Ask:
    """Asks an engine without a server, which gets token ids."""

    def ask(prompts: list[str], streams: int) -> dict[str, Any]:
        asked = [codec.encode(prompt) for prompt in prompts]
        outcome: dict[str, Any] = worker.ask("load", prompts=asked, streams=streams, max_tokens=max_tokens)
        return outcome

    return ask


if __name__ == "__main__":
    main()
