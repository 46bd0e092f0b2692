"""Measures exports of large models: seconds and peak memory, as a ratio to the weights, of a fresh process.

python bench/large.py [--size 1b|7b] [--kind fp16|int8] … [-o bench/results/large.json]

The checkpoints are of Llama's shapes, in sharded safetensors files of fp16, with random numbers of a small table: what they say
does not matter here. They are made in a temporary directory and deleted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

SIZES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
}
SHARD_BYTES = 2 << 30
TABLE = 1 << 22  # numbers that the weights are cut from
PROGRAM = """
import json, re, resource, sys, threading, time
from pathlib import Path
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.bundle.export import export_bundle
from medusa_export.quantize import export
model, heads, output, kind = sys.argv[1:]
anonymous, ended = [0], threading.Event()
def watch():
    while not ended.wait(0.05):
        status = Path("/proc/self/status").read_text()
        anonymous[0] = max(anonymous[0], int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024)
threading.Thread(target=watch, daemon=True).start()
started, cpu = time.perf_counter(), time.process_time()
if kind == "fp16":
    export_bundle(ExportOptions(model, Path(heads), Path(output), precision="fp16"))
else:
    export(ExportOptions(model, Path(heads), Path(output), quantize=kind))
ended.set()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu,
                  "peak_bytes": peak, "peak_bytes_without_mapped_files": anonymous[0]}))
"""


def make_checkpoint(directory: Path, size: dict[str, int]) -> int:
    """Write a checkpoint and untrained heads for it. Returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from medusa_heads.config import HeadsConfig
    from medusa_heads.formats import save_heads
    from medusa_heads.modules import MedusaHeads

    config = LlamaConfig(vocab_size=32000, num_attention_heads=32, max_position_embeddings=2048, dtype="float16", **size)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    table = torch.randn(TABLE, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    directory.mkdir()
    config.save_pretrained(directory)
    places, shard, total, shards = {}, {}, 0, []
    for number, (name, shape) in enumerate(shapes.items()):
        count = shape.numel()
        weight = torch.ones(shape, dtype=torch.float16)
        if len(shape) > 1:
            weight = table.roll(number * 1013).repeat(-(-count // TABLE))[:count].reshape(shape).clone()
        shard[name], total = weight, total + 2 * count
        if sum(2 * part.numel() for part in shard.values()) >= SHARD_BYTES or number == len(shapes) - 1:
            file = f"model-{len(shards) + 1:05}.safetensors"
            save_file(shard, directory / file, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shards.append(file)
            shard = {}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    heads = HeadsConfig(
        base_model=str(directory), num_heads=2, num_layers=1, hidden_size=config.hidden_size, vocab_size=config.vocab_size
    )
    save_heads(MedusaHeads(heads), directory.with_name("heads"))
    return total


def measure(size: str, kind: str, model: Path, weights: int) -> dict[str, Any]:
    """One export in a process of its own."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        words = [str(model), str(model.with_name("heads")), str(Path(scratch) / "bundle"), kind]
        done = subprocess.run([sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, encoding="utf-8", check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        written = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())
    return {
        "size": size,
        "kind": kind,
        "checkpoint_bytes": weights,
        "bundle_bytes": written,
        **found,
        "peak_over_checkpoint": found["peak_bytes"] / weights,
        "peak_without_mapped_files_over_checkpoint": found["peak_bytes_without_mapped_files"] / weights,
        "load_average": os.getloadavg()[0],
    }


@click.command()
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(SIZES)), default=["1b"], show_default=True)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(["fp16", "int8", "int4"]), default=["fp16", "int8"])
@click.option("--scratch", type=click.Path(path_type=Path), help="Where checkpoints and bundles are made.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(sizes: tuple[str, ...], kinds: tuple[str, ...], scratch: Path | None, output: Path | None) -> None:
    """Export random models of each size to a bundle of each kind."""
    runs = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            weights = make_checkpoint(Path(place) / "model", SIZES[size])
            runs += [measure(size, kind, Path(place) / "model", weights) for kind in kinds]
    publish(environment() | {"runs": runs}, output)


if __name__ == "__main__":
    main()
