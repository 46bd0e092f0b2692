"""Times one layer's attention on the CPU with keys and values in float32 and in 8 bits.

    python bench/cache_types.py [--heads 9 --kv-heads 3 --head-size 64] [-o bench/results/cache_types.json]

The node is ONNX Runtime's GroupQueryAttention on a cache of which it writes the new entries where they lie, as the step graph
for one sequence has it. Steps of one token have no mask, steps of several have a tree's mask as `attention_bias`. All kinds run
in turn, round by round; the medians are told. The error is that of the attention's output against float32.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

ENTRIES = (128, 512, 1024, 2048, 4096)
TOKENS = (1, 16)
KINDS = {"float32": None, "8 bits": "PER_TENSOR", "8 bits, a scale a channel": "PER_CHANNEL"}  # name: what has a scale


def model(kind: str, heads: int, kv_heads: int, size: int, tokens: int) -> bytes:
    """A graph of one GroupQueryAttention node."""
    quant = KINDS[kind]
    cache = TensorProto.FLOAT if quant is None else TensorProto.INT8
    inputs = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total", "", ""]
    floats = {"query": [1, "T", heads * size], "key": [1, "T", kv_heads * size], "value": [1, "T", kv_heads * size]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in floats.items()]
    past = [1, kv_heads, "S", size]
    values += [helper.make_tensor_value_info(name, cache, past) for name in ("past_key", "past_value")]
    values += [helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1])]
    values += [helper.make_tensor_value_info("total", TensorProto.INT32, [])]
    more: dict[str, Any] = {}
    inputs.append("")  # position_ids
    if tokens > 1:
        inputs.append("attention_bias")
        values.append(helper.make_tensor_value_info("attention_bias", TensorProto.FLOAT, [1, 1, "T", "L"]))
    else:
        inputs.append("")
    if quant is not None:
        more = {"k_quant_type": quant, "v_quant_type": quant, "kv_cache_bit_width": 8}
        inputs += ["", "k_scale", "v_scale"]  # the first is head_sink
        shape = [1] if quant == "PER_TENSOR" else [1, kv_heads, 1, size]
        values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("k_scale", "v_scale")]
    while inputs[-1] == "":
        inputs.pop()
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", inputs, outputs, domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads, **more
    )
    told = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, "T", heads * size])]
    told += [helper.make_tensor_value_info(name, cache, past) for name in outputs[1:]]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph([node], "attention", values, told), opset_imports=opsets)
    made.ir_version = 10
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def prepared(kind: str, shape: tuple[int, int, int], entries: int, tokens: int, seed: int) -> tuple[Callable[[], None], Any]:
    """A call that runs the node, and its output."""
    heads, kv_heads, size = shape
    options = ort.SessionOptions()
    session = ort.InferenceSession(model(kind, heads, kv_heads, size, tokens), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(seed)
    draw = lambda *dims: random.standard_normal(dims).astype(np.float32)  # noqa: E731
    past = [draw(1, kv_heads, entries + tokens, size) for _ in range(2)]
    feeds: dict[str, Any] = {
        "query": draw(1, tokens, heads * size),
        "key": draw(1, tokens, kv_heads * size),
        "value": draw(1, tokens, kv_heads * size),
        "seqlens_k": np.array([entries + tokens - 1], np.int32),
        "total": np.array(entries + tokens, np.int32),
    }
    if tokens > 1:
        bias = np.zeros((1, 1, tokens, entries + tokens), np.float32)
        bias[..., entries:][..., np.triu(np.ones((tokens, tokens), bool), 1)] = np.finfo(np.float32).min
        feeds["attention_bias"] = bias
    quant = KINDS[kind]
    if quant is not None:
        axes = (0, 1, 2, 3) if quant == "PER_TENSOR" else (0, 2)
        scales = [(np.abs(array).max(axes, keepdims=True) / 127).astype(np.float32) for array in past]
        past = [np.clip(np.round(array / scale), -127, 127).astype(np.int8) for array, scale in zip(past, scales, strict=True)]
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            feeds[name] = scale.reshape(-1) if quant == "PER_TENSOR" else scale
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, array in zip(("key", "value"), past, strict=True):
        cache = ort.OrtValue.ortvalue_from_numpy(array)
        held[f"past_{name}"] = cache
        binding.bind_ortvalue_output(f"present_{name}", cache)
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    output = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, tokens, heads * size), np.float32))
    binding.bind_ortvalue_output("output", output)
    return lambda: session.run_with_iobinding(binding), (output, held)


@click.command()
@click.option("--heads", default=9, show_default=True)
@click.option("--kv-heads", default=3, show_default=True)
@click.option("--head-size", default=64, show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(heads: int, kv_heads: int, head_size: int, rounds: int, output: Path | None) -> None:
    """Compare the types of a KV cache on this CPU."""
    rows = []
    for tokens in TOKENS:
        for entries in ENTRIES:
            runs = {kind: prepared(kind, (heads, kv_heads, head_size), entries, tokens, seed=entries) for kind in KINDS}
            times: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for number in range(rounds + 3):
                for kind, (run, _) in runs.items():
                    started = time.perf_counter()
                    run()
                    if number >= 3:
                        times[kind].append(1000 * (time.perf_counter() - started))
            right = runs["float32"][1][0].numpy()
            for kind, (_, (found, _)) in runs.items():
                error = float(np.abs(found.numpy() - right).max() / np.abs(right).max())
                row = {"tokens": tokens, "entries": entries, "kind": kind, "ms": round(float(np.median(times[kind])), 4)}
                rows.append(row | {"relative_error": float(f"{error:.2g}")})
                click.echo(f"{rows[-1]}", err=True)
    publish(environment() | {"shape": {"heads": heads, "kv_heads": kv_heads, "head_size": head_size}, "rows": rows}, output)


if __name__ == "__main__":
    main()
