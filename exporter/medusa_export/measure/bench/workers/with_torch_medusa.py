"""Medusa decoding in PyTorch, short but not slow: Transformers' model and cache, and a fixed tree.

One forward pass verifies the tree under a 4-D mask. The heads run only at the last accepted node. Accepted entries move to the
front of the cache, and the rest is cut off. It decodes the same tokens as our runtime with the same tree.
Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, DynamicCache


class _Heads:
    """The heads in a directory with config.json, heads.safetensors and possibly draft_vocabulary.json."""

    def __init__(self, directory: Path, lm_head: torch.Tensor, dtype: torch.dtype) -> None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if foreign := config.keys() & {
            "kind",
            "block_bias",
            "one_block",
            "one_lm_head",
            "lm_head_bias",
            "draft_rows",
            "logit_scale",
        }:
            raise SystemExit(f"the heads in {directory} have the setting {min(foreign)}, which this worker does not compute")
        tensors = {
            name: tensor.to(lm_head.device, dtype) for name, tensor in load_file(directory / "heads.safetensors").items()
        }
        self._weights = [  # for each residual block, the weights of all heads: [K, C, C] and [K, 1, C]
            tuple(
                torch.stack([tensors[f"heads.{head}.blocks.{block}.linear.{part}"] for head in range(config["num_heads"])])
                for part in ("weight", "bias")
            )
            for block in range(config["num_layers"])
        ]
        vocabulary = directory / "draft_vocabulary.json"
        self._draft_ids = torch.tensor(json.loads(vocabulary.read_text(encoding="utf-8"))) if vocabulary.is_file() else None
        shared = [lm_head] * config["num_heads"]
        own = [tensors.get(f"heads.{head}.lm_head.weight", shared[head]) for head in range(config["num_heads"])]
        rows = own if self._draft_ids is None else [table[self._draft_ids] for table in own]
        self._lm_head, self._reads_root = lm_head, config.get("reads_root", False)
        self._tables = rows[:1] if all(table is lm_head for table in own) else rows  # keep a shared LM head only once

    def __call__(self, hidden: torch.Tensor, root: int, top_k: int) -> torch.Tensor:
        """The most likely tokens of each head after a row and the token decided there. hidden: [C], result: [K, M]."""
        features = hidden.expand(len(self._weights[0][0]), -1)[:, None]  # [K, 1, C]
        read = features
        if self._reads_root:
            read = torch.cat([features, self._root_state(root).expand_as(features)], dim=-1)  # [K, 1, 2C]
        for weight, bias in self._weights:
            features = features + silu(torch.baddbmm(bias[:, None], read, weight.transpose(1, 2)))
            read = features
        features = features[:, 0]
        if len(self._tables) == 1:
            logits = linear(features, self._tables[0])
        else:
            logits = torch.stack([linear(row, table) for row, table in zip(features, self._tables, strict=True)])
        best = logits.topk(top_k).indices
        return best if self._draft_ids is None else self._draft_ids[best]

    def _root_state(self, root: int) -> torch.Tensor:  # [C]
        if self._draft_ids is not None and root not in self._draft_ids:
            return torch.zeros_like(self._lm_head[root])
        row = self._lm_head[root].float()
        return (row * (row.square().mean() + 1e-6).rsqrt()).to(self._lm_head.dtype)


class _Tree:
    """A candidate tree, given by parents and ranks. Parents come before their children."""

    def __init__(self, parents: list[int], ranks: list[int], dtype: torch.dtype) -> None:
        self.parents, self.ranks, self.depths = parents, torch.tensor(ranks), [0] * len(parents)
        sees = torch.eye(len(parents), dtype=torch.bool)
        for node, parent in enumerate(parents[1:], start=1):
            self.depths[node] = self.depths[parent] + 1
            sees[node] |= sees[parent]
        self.mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)  # [N, N], additive
        self.places = torch.tensor(self.depths)

    def tokens(self, root: int, best: torch.Tensor) -> torch.Tensor:
        """The token ids of the nodes. best: the heads' candidates [K, M]."""
        drafts = best[self.places[1:] - 1, self.ranks[1:]]
        return torch.cat([torch.tensor([root]), drafts])  # [N]

    def accept(self, tokens: list[int], choices: list[int]) -> list[int]:
        """The longest path of drafts of which each is the model's choice after its parent."""
        path = [0]
        for node in range(1, len(tokens)):
            if self.parents[node] == path[-1] and tokens[node] == choices[path[-1]]:
                path.append(node)
        return path


def load(settings: dict[str, Any]) -> Callable[[list[int], int, Callable[[list[int]], None]], None]:
    """settings: checkpoint, heads, tree (parents and ranks), dtype, threads, and optionally device and compile."""
    torch.set_num_threads(settings["threads"])
    torch.set_default_device(settings.get("device", "cpu"))  # for everything created below
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["checkpoint"], dtype=dtype).eval().to(torch.get_default_device())
    if settings.get("compile"):
        model.base_model.compile(dynamic=True)
    lm_head = model.get_output_embeddings().weight
    heads = _Heads(Path(settings["heads"]), lm_head, dtype)
    tree = _Tree(**settings["tree"], dtype=dtype)
    top_k = int(tree.ranks.max()) + 1

    @torch.inference_mode()
    def decode(token_ids: list[int], max_new_tokens: int, emit: Callable[[list[int]], None]) -> None:
        cache = DynamicCache(config=model.config)
        hidden = model.base_model(torch.tensor([token_ids]), past_key_values=cache, use_cache=True)[0][0, -1]
        root, count = int(linear(hidden, lm_head).argmax()), 1
        emit([root])
        while count < max_new_tokens:
            cached = cache.get_seq_length()
            tokens = tree.tokens(root, heads(hidden, root, top_k))
            mask = torch.cat([tree.mask.new_zeros(len(tokens), cached), tree.mask], dim=1)[None, None]
            rows = model.base_model(
                tokens[None],
                attention_mask=mask,
                position_ids=(cached + tree.places)[None],
                past_key_values=cache,
                use_cache=True,
            )[0][0]
            choices = linear(rows, lm_head).argmax(-1).tolist()
            path = tree.accept(tokens.tolist(), choices)
            _keep(cache, cached, path)
            new_ids = [choices[node] for node in path]
            emit(new_ids)
            root, hidden, count = new_ids[-1], rows[path[-1]], count + len(new_ids)

    return decode


def _keep(cache: Any, cached: int, path: list[int]) -> None:
    """Move the entries of a path to the end of the cached ones, and cut the others off."""
    if path != list(range(len(path))):
        nodes = cached + torch.tensor(path)
        for layer in cache.layers:
            for entries in (layer.keys, layer.values):  # [1, Hkv, S, D]
                entries[:, :, cached : cached + len(path)] = entries[:, :, nodes]
    if (num_rejected := cache.get_seq_length() - cached - len(path)) > 0:
        cache.crop(-num_rejected)
