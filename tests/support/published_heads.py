"""Heads in the layouts in which other projects publish them, and their forward passes, both written from the description.

Nothing here uses `medusa_heads`: files are written tensor by tensor, and logits come from NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray[Any, np.dtype[np.float32]]
FLAVOURS = (
    "medusa-0.1", "medusa-0.1 of two layers", "medusa-0.1 of one block twice", "medusa-v2", "tgi", "mlc", "vllm",
    "vllm with biases", "vllm of a truncated vocabulary", "vllm with a map of tokens", "vllm of one lm head", "hydra",
    "hydra of two layers", "hydra that reads no tokens", "tensorrt-llm", "tensorrt-llm of two ranks",
)  # fmt: skip
MERGED = ("medusa-1.0", "medusa-1.0 of one block twice", "axolotl", "modelopt")


@dataclass
class Parts:
    """Random weights: for each head its blocks (W [C, C], b [C]) and its LM head (W [V, C], b [V])."""

    blocks: list[list[tuple[Array, Array]]]
    lm_heads: list[tuple[Array, Array]]
    residuals: list[tuple[Array, Array]] = field(default_factory=list)


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)), np.float32)


def random_parts(num_layers: int = 1, *, num_heads: int = 3, hidden: int = 64, vocab: int = 320, reads: bool = False) -> Parts:
    """Weights of heads. If they read tokens, the first block of head k has k + 2 inputs, and a residual path beside it."""
    random = np.random.default_rng(num_layers)

    def normal(*shape: int) -> Array:
        return random.normal(0, 0.2, shape).astype(np.float32)

    def width(head: int, layer: int) -> int:
        return (head + 2) * hidden if reads and layer == 0 else hidden

    return Parts(
        [[(normal(hidden, width(h, layer)), normal(hidden)) for layer in range(num_layers)] for h in range(num_heads)],
        [(normal(vocab, hidden), normal(vocab)) for _ in range(num_heads)],
        [(normal(hidden, width(h, 0)), normal(hidden)) for h in range(num_heads)] if reads else [],
    )


def medusa_logits(
    parts: Parts, hidden: Array, *, lm_head: Array | None = None, bias: bool = True, lm_bias: bool = False
) -> Array:
    """[N, C] -> [N, K, V]. lm_head: the backbone's, for heads that have none. bias: of the blocks."""
    logits = []
    for blocks, (own, own_bias) in zip(parts.blocks, parts.lm_heads, strict=True):
        x = hidden
        for weight, shift in blocks:
            x = x + silu(x @ weight.T + bias * shift)
        logits.append(x @ (own if lm_head is None else lm_head).T + lm_bias * own_bias)
    return np.stack(logits, 1)


def hydra_logits(parts: Parts, hidden: Array, embeddings: Array) -> Array:
    """[N, C] and the embeddings of the root and of K - 1 guesses [N, K, C] -> [N, K, V]"""
    logits = []
    for k, (blocks, (own, own_bias)) in enumerate(zip(parts.blocks, parts.lm_heads, strict=True)):
        read = np.concatenate([hidden, *(embeddings[:, place] for place in range(k + 1))], -1)
        (weight, shift), (residual, residual_shift) = blocks[0], parts.residuals[k]
        x = read @ residual.T + residual_shift + silu(read @ weight.T + shift)
        for weight, shift in blocks[1:]:
            x = x + silu(x @ weight.T + shift)
        logits.append(x @ own.T + own_bias)
    return np.stack(logits, 1)


def hydra_greedy_logits(parts: Parts, hidden: Array, root_ids: list[int], embedding: Array) -> Array:
    """As `hydra_logits`, where each head reads the likeliest tokens of the heads before it."""
    read = np.repeat(embedding[root_ids][:, None], len(parts.blocks), 1)  # [N, K, C]; those not yet known do not matter
    for k in range(len(parts.blocks) - 1):
        read[:, k + 1] = embedding[hydra_logits(parts, hidden, read)[:, k].argmax(-1)]
    return hydra_logits(parts, hidden, read)


@dataclass
class Published:
    """Published heads: their path, the flavour's name, and their logits [N, K, V], which are -inf for tokens never guessed."""

    path: Path
    flavour: str
    logits: Callable[[Array, list[int], Array, Array], Array]  # hidden [N, C], roots [N], LM head [V, C], embedding [V, C]


def sequential(parts: Parts, prefix: str = "", *, lm_heads: bool = True) -> dict[str, torch.Tensor]:
    """The names of Medusa's own code: `{h}.{l}.linear.*`, then `{h}.{L}.weight`."""
    named = {}
    for h, blocks in enumerate(parts.blocks):
        for layer, (weight, shift) in enumerate(blocks):
            named[f"{prefix}{h}.{layer}.linear.weight"] = torch.from_numpy(weight)
            named[f"{prefix}{h}.{layer}.linear.bias"] = torch.from_numpy(shift)
        if lm_heads:
            named[f"{prefix}{h}.{len(blocks)}.weight"] = torch.from_numpy(parts.lm_heads[h][0])
    return named


def write(directory: Path, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save = torch.save if name.endswith(".pt") else save_file
    save(tensors, directory / name)
    return directory


def medusa_config(layers: int = 1, heads: int = 3, **more: Any) -> dict[str, Any]:
    return {"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": "a/model", **more}


def one_block(parts: Parts) -> Parts:
    """As `[block] * 2` makes it: the second block is the first."""
    return Parts([[blocks[0], blocks[0]] for blocks in parts.blocks], parts.lm_heads)


def publish(what: str, directory: Path) -> Published:
    """Write heads of a kind of `FLAVOURS`."""
    flavour, _, detail = what.partition(" ")
    parts = random_parts(2 if "two layers" in what else 1, reads=flavour == "hydra" and "no tokens" not in what)
    made: dict[str, Callable[[], Published]] = {
        "medusa-0.1": lambda: _medusa_01(directory, parts, detail),
        "medusa-v2": lambda: Published(
            write(directory, "medusa_lm_head.safetensors", sequential(parts, lm_heads=False), medusa_config(version="2")),
            flavour,
            lambda hidden, _, lm_head, __: medusa_logits(parts, hidden, lm_head=lm_head),
        ),
        "tgi": lambda: _own(write(directory, "medusa_lm_head.safetensors", sequential(parts), medusa_config()), flavour, parts),
        "mlc": lambda: _own(
            write(
                directory, "model.safetensors", sequential(parts, "medusa_head."), medusa_config(hidden_size=64, vocab_size=320)
            ),
            flavour,
            parts,
        ),
        "vllm": lambda: _vllm(directory, parts, detail),
        "hydra": lambda: _hydra(directory, parts),
        "tensorrt-llm": lambda: _tensorrt_llm(directory, parts, 2 if detail else 1),
    }
    return made[flavour]()


def publish_merged(what: str, model: Path, directory: Path) -> Published:
    """Write heads of a kind of `MERGED` and the model into one directory, in two shards."""
    flavour, _, detail = what.partition(" ")
    parts = random_parts(0 if flavour == "axolotl" else 1)
    parts = one_block(parts) if detail else parts
    tensors = sequential(parts, "medusa_heads." if flavour == "modelopt" else "medusa_head.")
    if detail:  # Transformers writes a tensor with two names once
        tensors = {name: tensor for name, tensor in tensors.items() if ".1.linear" not in name}
    config = json.loads((model / "config.json").read_text())
    layers = len(parts.blocks[0])
    counts: dict[str, Any] = {"medusa_num_heads": 3, "medusa_num_layers": layers}
    if flavour == "modelopt":
        counts = {"medusa": {"num_medusa_heads": 3, "num_medusa_layers": layers}}
    directory.mkdir(parents=True)
    for file in model.iterdir():
        if file.name not in {"config.json", "model.safetensors"}:
            (directory / file.name).write_bytes(file.read_bytes())
    whole = {**load_file(model / "model.safetensors"), **tensors}
    shards = {"model-00001-of-00002.safetensors": sorted(whole)[::2], "model-00002-of-00002.safetensors": sorted(whole)[1::2]}
    for shard, names in shards.items():
        save_file({name: whole[name] for name in names}, directory / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config | counts))
    return _own(directory, flavour, parts)


def _own(path: Path, flavour: str, parts: Parts) -> Published:
    return Published(path, flavour, lambda hidden, *_: medusa_logits(parts, hidden))


def _medusa_01(directory: Path, parts: Parts, detail: str) -> Published:
    parts = one_block(parts) if "one block" in detail else parts
    tensors = sequential(parts)
    if "one block" in detail:  # torch.save keeps that they are one object
        for name in [name for name in tensors if ".1.linear" in name]:
            tensors[name] = tensors[name.replace(".1.linear", ".0.linear")]
    return _own(write(directory, "medusa_lm_head.pt", tensors, medusa_config(len(parts.blocks[0]))), "medusa-0.1", parts)


def _vllm(directory: Path, parts: Parts, detail: str) -> Published:
    has_bias, one = "biases" in detail, "one lm head" in detail
    token_ids = [*range(300, 20, -3)] if "truncated" in detail or "map" in detail else []  # not in order
    if one:
        parts = Parts(parts.blocks, parts.lm_heads[:1] * 3)
    config: dict[str, Any] = {
        "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": 64, "vocab_size": 320,
        "truncated_vocab_size": len(token_ids) or 320, "num_heads": 3, "num_hidden_layers": 1, "medusa_fc_bias": has_bias,
    }  # fmt: skip
    config |= {"original_lm_head": True} if one else {}
    scale = 0.5 if token_ids else 1.0
    config |= {"logit_scale": 0.5} if token_ids else {}
    tensors = {}
    for h, ((weight, shift),) in enumerate(parts.blocks):
        tensors[f"blocks.{h}.layers.0.weight"] = torch.from_numpy(weight)
        if has_bias:
            tensors[f"blocks.{h}.layers.0.bias"] = torch.from_numpy(shift)
    for h in range(1 if one else 3):
        rows = parts.lm_heads[h][0]
        tensors[f"lm_heads.{h}.weight"] = torch.from_numpy(rows[token_ids].copy() if "truncated" in detail else rows)
    if token_ids:
        tensors["token_map"] = torch.tensor(token_ids)

    def logits(hidden: Array, *_: Any) -> Array:
        found = medusa_logits(parts, hidden, bias=has_bias) * scale
        if token_ids:
            kept = np.isin(np.arange(found.shape[-1]), token_ids)
            found = np.where(kept, found, -np.inf).astype(np.float32)
        return found

    prefix = "medusa_heads." if "map" in detail else ""
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    return Published(write(directory, "model.safetensors", named, config), "vllm", logits)


def _hydra(directory: Path, parts: Parts) -> Published:
    tensors = {}
    for h, blocks in enumerate(parts.blocks):
        for layer, (weight, shift) in enumerate(blocks):
            tensors[f"hydra_mlp.{h}.{layer}.linear.weight"] = torch.from_numpy(weight)
            tensors[f"hydra_mlp.{h}.{layer}.linear.bias"] = torch.from_numpy(shift)
        if parts.residuals:
            tensors[f"hydra_mlp.{h}.0.res_connection.weight"] = torch.from_numpy(parts.residuals[h][0])
            tensors[f"hydra_mlp.{h}.0.res_connection.bias"] = torch.from_numpy(parts.residuals[h][1])
        tensors[f"hydra_lm_head.{h}.weight"] = torch.from_numpy(parts.lm_heads[h][0])
        tensors[f"hydra_lm_head.{h}.bias"] = torch.from_numpy(parts.lm_heads[h][1])
    config = {
        "hydra_num_heads": 3, "hydra_num_layers": len(parts.blocks[0]), "hydra_head_arch": "mlp",
        "grounded_heads": bool(parts.residuals), "hidden_state_offset": 0, "base_model_name_or_path": "a/model",
    }  # fmt: skip

    def logits(hidden: Array, root_ids: list[int], _: Array, embedding: Array) -> Array:
        if not parts.residuals:
            return medusa_logits(parts, hidden, lm_bias=True)
        return hydra_greedy_logits(parts, hidden, root_ids, embedding)

    return Published(write(directory, "hydra_lm_head.pt", tensors, config), "hydra", logits)


def _tensorrt_llm(directory: Path, parts: Parts, ranks: int) -> Published:
    whole = {}
    for h, ((weight, shift),) in enumerate(parts.blocks):
        whole[f"medusa_heads.{h}.medusa_layers.0.linear.weight"] = torch.from_numpy(weight)
        whole[f"medusa_heads.{h}.medusa_layers.0.linear.bias"] = torch.from_numpy(shift)
        whole[f"medusa_heads.{h}.lm_head.weight"] = torch.from_numpy(parts.lm_heads[h][0])
    config = {
        "architecture": "MedusaForCausalLM", "base_architecture": "LlamaForCausalLM", "num_medusa_heads": 3,
        "num_medusa_layers": 1, "max_draft_len": 63, "vocab_size": 320, "mapping": {"world_size": ranks, "tp_size": ranks},
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        pieces = {name: tensor.chunk(ranks)[rank].contiguous() for name, tensor in whole.items()}
        pieces["transformer.layers.0.attention.dense.weight"] = torch.zeros(4, 4)  # the backbone is in the same file
        save_file(pieces, directory / f"rank{rank}.safetensors")
    return _own(directory, "tensorrt-llm", parts)
