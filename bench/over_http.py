r"""Measures the server through HTTP against the runtime itself, and against llama.cpp's server, in one sitting.

    python bench/over_http.py BUNDLE [-o bench/results/http.json]
    python bench/over_http.py BUNDLE --llama-cpp-python .venv-llama/bin/python --llama-cpp-model model-q8_0.gguf

1, 4 and 16 streams, greedy, 96 new tokens each. `direct` is `MedusaLM` in a process of its own, asked by as many threads as
there are streams. `http` is `medusa-export serve`. `llama.cpp` is llama-cpp-python's server. The load on both servers comes
from a process of its own. They take turns round by round, and are paused while it is not their turn; rounds change who
begins. Numbers are medians of rounds; times are of all answers. Gaps are between two chunks of an answer: a chunk has the
tokens of one step.

`processor_ms_per_token` is the time on processors of the process that decodes and of the one that makes the load: unlike
rates, it hardly depends on what else the machine does, which `cores_used_by_others` tells.

llama-cpp-python lives in an environment of its own. It is built for processors with AVX-512, not for this one alone, and
makes the file in 8 bits from that of the fetched model's package:

    python -m venv .venv-llama
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON" \
        .venv-llama/bin/pip install 'llama-cpp-python[server]'
    .venv-llama/bin/python exporter/medusa_export/measure/bench/workers/request_loop.py with_llama_cpp --build \
        '{"gguf": "SmolLM2-135M-Instruct.Q4_1.gguf", "precision": "q8_0", "output": "model-q8_0.gguf"}'
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish
from http_servers import Server, llama_cpp_server, medusa_server
from two_checkouts import processor_seconds

from medusa_export.measure.bench.process import WORKERS, WorkerProcess
from serving import PROMPTS

STREAMS = (1, 4, 16)
ANSWERS_PER_STREAM, LEAST_ANSWERS = 2, 6
CONTEXT = 512  # of llama.cpp: prompt and answer fit
Ask = Callable[[list[str], int], dict[str, Any]]


def prompts_for(streams: int) -> list[str]:
    """The prompts of a round: each stream has several, one after the other."""
    return [PROMPTS[number % len(PROMPTS)] for number in range(max(LEAST_ANSWERS, ANSWERS_PER_STREAM * streams))]


def through(load: WorkerProcess, server: Server, fields: dict[str, Any], *, keeps: bool = True) -> Ask:
    """Asks a server. keeps: use a connection for more than one request."""

    def ask(prompts: list[str], streams: int) -> dict[str, Any]:
        with server.in_turn():
            words = {"url": server.url, "prompts": prompts, "streams": streams, "fields": fields, "keeps": keeps}
            outcome: dict[str, Any] = load.ask("load", **words)
        return outcome

    return ask


def watched(ask: Ask, pids: dict[str, int]) -> Ask:
    """`ask`, and the processor time that processes took meanwhile, and that all others took."""

    def measured(prompts: list[str], streams: int) -> dict[str, Any]:
        before = {name: processor_seconds(pid) for name, pid in pids.items()}
        outcome = ask(prompts, streams)
        after = {name: processor_seconds(pid) for name, pid in pids.items()}
        used = {name: after[name][1] - before[name][1] for name in pids}
        every = max(after[name][0] - before[name][0] for name in pids)
        return outcome | {"used": used | {"others": every - sum(used.values())}}

    return measured


def measure(
    asks: dict[str, Ask], rounds: int, numbers: tuple[int, ...] = STREAMS, prompts: Callable[[int], list[str]] = prompts_for
) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Outcomes by number of streams and name. The first round of each is not kept: it warms up.

    Args:
        asks: the contestants.
        rounds: how many are kept.
        numbers: of streams.
        prompts: those of a round, by the number of streams. It is called once a round.
    """
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for streams in numbers:
        outcomes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for turn in range(rounds + 1):
            asked = prompts(streams)
            for name in sorted(asks, reverse=bool(turn % 2)):
                outcome = asks[name](asked, streams)
                if turn:
                    outcomes[name].append(outcome)
        found[streams] = dict(outcomes)
        click.echo(f"{streams}: { {name: [round(rate(one)) for one in runs] for name, runs in outcomes.items()} }", err=True)
    return found


def rate(outcome: dict[str, Any]) -> float:
    """Tokens per second of a round."""
    return sum(int(one["tokens"]) for one in outcome["answers"]) / float(outcome["seconds"])


def told(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one contestant at one number of streams."""
    answers = [one for run in runs for one in run["answers"]]
    times = {
        "first_token_ms": [one["first_ms"] for one in answers],
        "gap_ms": [gap for one in answers for gap in one["gaps_ms"]],
        "ms_per_token": [one["token_ms"] for one in answers],
    }
    tokens = sum(one["tokens"] for one in answers)
    used = {name: sum(run["used"][name] for run in runs) for name in runs[0]["used"]}
    return {
        "tokens_per_second": round(float(np.median([rate(run) for run in runs])), 2),
        "processor_ms_per_token": {
            name: round(1e3 * seconds / tokens, 2) for name, seconds in used.items() if name != "others"
        },
        "cores_used_by_others": round(used["others"] / sum(run["seconds"] for run in runs), 2),
    } | {
        f"{name}_p{percent}": round(float(np.percentile(values, percent)), 2)
        for name, values in times.items()
        for percent in (50, 95)
    }


def compared(outcomes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of one number of streams: numbers of all, and the ratios of `http` to the others round by round."""
    entry: dict[str, Any] = {name: told(runs) for name, runs in outcomes.items()}
    for other in sorted(set(outcomes) - {"http"}):
        ratios = [rate(ours) / rate(theirs) for ours, theirs in zip(outcomes["http"], outcomes[other], strict=True)]
        entry[f"http_over_{other}"] = round(float(np.median(ratios)), 3)
        entry[f"http_over_{other}_by_round"] = [round(ratio, 3) for ratio in ratios]
    pairs = [
        (mine["text"], direct["text"])
        for ours, theirs in zip(outcomes["http"], outcomes["direct"], strict=True)
        for mine, direct in zip(ours["answers"], theirs["answers"], strict=True)
    ]
    entry["answers_equal_to_direct"] = f"{sum(mine == direct for mine, direct in pairs)} of {len(pairs)}"
    return entry


def version_of(python: Path) -> str:
    """The version of llama-cpp-python in an environment."""
    command = [str(python), "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--max-tokens", default=96, show_default=True, type=click.IntRange(2))
@click.option(
    "--llama-cpp-python", type=click.Path(exists=True, path_type=Path), help="Python that has llama-cpp-python[server]."
)
@click.option("--llama-cpp-model", type=click.Path(exists=True, path_type=Path), help="The same model as a GGUF file in q8_0.")
@click.option(
    "--eos", default=(0, 2), multiple=True, show_default=True, help="Tokens that end an answer; llama.cpp is kept from them."
)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    bundle: Path,
    rounds: int,
    max_tokens: int,
    llama_cpp_python: Path | None,
    llama_cpp_model: Path | None,
    eos: tuple[int, ...],
    output: Path | None,
) -> None:
    """Measure BUNDLE on this machine."""
    if (llama_cpp_python is None) != (llama_cpp_model is None):
        raise click.UsageError("--llama-cpp-python and --llama-cpp-model belong together")
    here, versions = Path(__file__), {}
    path = {"PYTHONPATH": ":".join([str(WORKERS), *filter(None, sys.path)]), "OMP_WAIT_POLICY": "PASSIVE"}
    with ExitStack() as stack:
        worker = WorkerProcess("load", [sys.executable, str(here.with_name("http_load.py"))], path)
        load = stack.enter_context(worker)
        command = [sys.executable, str(here.with_name("http_direct.py")), str(bundle), str(max(STREAMS))]
        direct = stack.enter_context(WorkerProcess("direct", command, path))
        server = stack.enter_context(medusa_server(bundle, max(STREAMS)))
        fields: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        ours = {"ignore_eos": True, "stream_options": {"include_usage": True}}

        def ask_directly(prompts: list[str], streams: int) -> dict[str, Any]:
            outcome: dict[str, Any] = direct.ask("load", prompts=prompts, streams=streams, max_tokens=max_tokens)
            return outcome

        asks = {
            "direct": watched(ask_directly, {"engine": direct.pid}),
            "http": watched(through(load, server, fields | ours), {"engine": server.process.pid, "load": load.pid}),
        }
        if llama_cpp_python is not None and llama_cpp_model is not None:
            versions["llama-cpp-python"] = version_of(llama_cpp_python)
            other = stack.enter_context(llama_cpp_server(llama_cpp_python, llama_cpp_model, CONTEXT))
            theirs = fields | {"logit_bias": {str(token): -100 for token in eos}}
            asks["llama.cpp"] = watched(through(load, other, theirs), {"engine": other.process.pid, "load": load.pid})
        found = measure(asks, rounds)
    result = environment()
    result["versions"] |= versions
    result |= {"max_tokens": max_tokens, "rounds": rounds, "by_streams": {n: compared(runs) for n, runs in found.items()}}
    publish(result, output)


if __name__ == "__main__":
    main()
