"""Measures the forms that experts (mixture of experts) can take in a step graph, on the CPU.

    python bench/experts.py [-o bench/results/experts.json]

A random Qwen3-MoE of about 320 MB is exported once for each form, and all take steps in turn. Ids are random and new in each
step, so that the router chooses other experts each time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import onnx_ir as ir
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.integrations.moe import batched_mm_experts_forward

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from environment import environment, publish
from tests.support.models import save_random_heads, tokenizer

from medusa_export.bundle.export import export_bundle
from medusa_export.bundle.write_graphs import write_graphs
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.passes.quantize.expert_weights import QuantizeExperts
from medusa_export.passes.quantize.integer_weights import QuantizeWeights, tables
from medusa_runtime import Backend, Manifest
from medusa_runtime.backends.choosing import open_backend
from medusa_runtime.bundle.manifest import HEADS, STEP

SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "intermediate_size": 512,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "norm_topk_prob": True,
}  # fmt: skip
COUNTS = (8, 32)  # experts to choose from
CACHED = 128
STEPS = {1: 60, 16: 20, 512: 5}  # repetitions, by tokens of a step
GATHERED_TOO_MUCH = {"a gathered expert for each token and choice": (512,)}  # 6.4 GB of weights a layer


def dense(self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every expert for every token, and a weight of 0 for those that were not chosen."""
    routing = torch.zeros(hidden.shape[0], self.num_experts).scatter(1, ids, weights)  # [N, E]
    inner = torch.matmul(hidden.unsqueeze(0), self.gate_up_proj.transpose(1, 2))  # [E, N, 2·I]
    outer = torch.matmul(self._apply_gate(inner), self.down_proj.transpose(1, 2))  # [E, N, C]
    return (outer * routing.T.unsqueeze(2)).sum(0)


@contextmanager
def traced_as(function: Callable[..., torch.Tensor] | None, *, fused: bool) -> Iterator[None]:
    """While open, experts are traced by a function, ours by default, and not fused for the CPU unless asked for."""
    with ExitStack() as patches:
        if function is not None:
            patches.enter_context(mock.patch("medusa_export.trace.experts_node.onnx_experts", function))
        if not fused:
            patches.enter_context(mock.patch("medusa_export.passes.ort_cpu.variants.FuseExperts"))
        yield


FLOAT_FORMS: dict[str, tuple[Callable[..., torch.Tensor] | None, bool]] = {
    "MoE": (None, True),
    "blocks (the portable form)": (None, False),
    "a gathered expert for each token and choice": (batched_mm_experts_forward, False),
    "all experts for all tokens": (dense, False),
}
INTEGER_FORMS = {
    "int8, QMoE": ("int8", True),
    "int8, blocks (the portable form)": ("int8", False),
    "int4, QMoE": ("int4", True),
}


def save_model(directory: Path, **sizes: int) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**(SIZES | sizes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:  # the usual initialisation is so narrow that experts hardly matter
                parameter.normal_(0, 0.05)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def quantized(bundle: Path, output: Path, scheme: Any, *, fused: bool) -> Backend:
    """A bundle with all weights rounded, without the measurement of its quality."""
    output.mkdir()
    manifest = Manifest.load(bundle)
    graphs = {name: ir.load(bundle / manifest.graphs[name].file) for name in (STEP, HEADS)}
    gathered = tables(graphs.values())
    for model in graphs.values():
        QuantizeWeights(lambda _: "int8", gathered)(model)
        QuantizeExperts(lambda _: scheme)(model)
    with traced_as(None, fused=fused):
        files, facts = write_graphs(graphs, output, "fp32", activation_bits=16)
    return open_backend(output, manifest.model_copy(update={"graphs": facts, "files": files}), "ort-cpu")


def step(backend: Backend, tokens: int, rng: np.random.Generator) -> float:
    ids = rng.integers(0, SIZES["vocab_size"], (1, tokens))
    started = time.perf_counter()
    positions = np.arange(CACHED, CACHED + tokens)[None]
    backend.step(ids, positions, np.tri(tokens, dtype=np.bool_)[None], np.array([CACHED]), np.array([[tokens - 1]]))
    return 1e3 * (time.perf_counter() - started)


def in_turn(backends: dict[str, Backend]) -> dict[int, dict[str, dict[str, float]]]:
    """The median time of a step in ms and its ratio to the first form's, by tokens and form."""
    first, found = next(iter(backends)), {}
    for tokens, repeats in STEPS.items():
        forms = [name for name in backends if tokens not in GATHERED_TOO_MUCH.get(name, ())]
        rng = np.random.default_rng(tokens)
        times = [[step(backends[name], tokens, rng) for name in forms] for _ in range(repeats + 2)]
        medians = dict(zip(forms, np.median(times[2:], axis=0).tolist(), strict=True))
        found[tokens] = {
            name: {"ms": round(value, 2), "ratio": round(value / medians[first], 2)} for name, value in medians.items()
        }
    return found


def ready(backend: Backend) -> Backend:
    backend.resize(1, CACHED + max(STEPS))
    return backend


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(output: Path | None) -> None:
    """Export a random model with each form of its experts, and time steps of 1, 16 and 512 tokens."""
    result = environment() | {"unit": "ms, median", "model": SIZES}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = save_model(root / "model")
        heads = save_random_heads(model, root / "heads", num_heads=1, num_layers=1, reads_root=False)
        backends: dict[str, Backend] = {}
        for number, (name, (function, fused)) in enumerate(FLOAT_FORMS.items()):
            bundle = root / f"float{number}"
            with traced_as(function, fused=fused):
                export_bundle(ExportOptions(str(model), heads, bundle, max_seq_len=1024))
            backends[name] = ready(open_backend(bundle, Manifest.load(bundle), "ort-cpu"))
        for number, (name, (scheme, fused)) in enumerate(INTEGER_FORMS.items()):
            backends[name] = ready(quantized(root / "float0", root / f"int{number}", scheme, fused=fused))
        result["step_by_tokens"] = in_turn(backends)
        result["one_token_by_number_of_experts"] = by_number_of_experts(root, heads)
    publish(result, output)


def by_number_of_experts(root: Path, heads: Path) -> dict[str, dict[int, float]]:
    """A step of one token with as many chosen experts, but fewer to choose from: the weights of others are not read."""
    backends = {}
    for count in COUNTS:
        model = save_model(root / f"model{count}", num_experts=count)
        for name, fused in (("MoE", True), ("blocks (the portable form)", False)):
            bundle = root / f"of{count}-{fused}"
            with traced_as(None, fused=fused):
                export_bundle(ExportOptions(str(model), heads, bundle, max_seq_len=1024))
            backends[name, count] = ready(open_backend(bundle, Manifest.load(bundle), "ort-cpu"))
    rng = np.random.default_rng(0)
    times = [[step(backend, 1, rng) for backend in backends.values()] for _ in range(STEPS[1])]
    medians = dict(zip(backends, np.median(times[2:], axis=0).round(2).tolist(), strict=True))
    return {name: {count: medians[name, count] for count in COUNTS} for name, _ in backends}


if __name__ == "__main__":
    main()
