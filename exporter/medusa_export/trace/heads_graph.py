"""Traces heads, with the LM head that they share, into the heads graph."""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from medusa_export.model.checkpoint import Backbone
from medusa_export.passes.portable.transpose_weights import TransposeWeights
from medusa_export.trace.torch_to_onnx import export_module, name_values, simplify
from medusa_heads.modules import MedusaHeads, root_states


class HeadsModule(torch.nn.Module):
    """The computation of the heads graph: from hidden rows, and roots if the heads read them, to each head's candidates.

    Args:
        heads: the heads.
        lm_head: the backbone's LM head: heads can share it, and heads that read the root use its rows as embeddings.
        top_k: candidates of each head.
        draft_ids: the tokens that heads choose from, or None for all. Logits of other tokens are not computed.
        embedding: the backbone's input embedding, for Hydra heads.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        lm_head: torch.nn.Module,
        top_k: int,
        draft_ids: list[int] | None,
        embedding: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.lm_head, self.top_k = heads, lm_head, top_k
        self.embedding = embedding if heads.config.kind == "hydra" else None
        if heads.config.reads_root and heads.draft_ids is not None:
            table = torch.full((heads.vocab_size,), -1)
            table[heads.draft_ids] = torch.tensor(heads.draft_ids) if draft_ids is None else torch.arange(len(draft_ids))
            self.root_places = torch.nn.Buffer(table, persistent=False)
        if draft_ids is not None:
            self.lm_head = _rows(lm_head, draft_ids)
            self.draft_ids = torch.nn.Buffer(torch.tensor(draft_ids), persistent=False)
        if draft_ids is not None and not heads.config.draft_rows:
            self.heads = copy.deepcopy(heads)
            for owner in (self.heads, *self.heads.heads):
                if owner.lm_head is not None:
                    owner.lm_head = _rows(owner.lm_head, draft_ids)

    def forward(self, hidden: torch.Tensor, root_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates and their log-probabilities. [B, C], and [B] if heads read the root -> [B, K, M] and [B, K, M]

        Each Hydra head reads the first candidates of the heads before it.
        """
        roots = None
        if self.embedding is not None:
            roots = self.embedding(root_ids)
        elif root_ids is not None:
            lm_head: Any = self.lm_head
            roots = root_states(lm_head.weight, self.root_places[root_ids] if hasattr(self, "root_places") else root_ids)
        logits = self.heads.logits(hidden, self.lm_head, roots, self.embedding).float()  # [B, K, V or the draft vocabulary]
        best, places = torch.topk(logits, self.top_k, dim=-1)
        head_ids = self.draft_ids[places] if hasattr(self, "draft_ids") else places
        return head_ids, best - torch.logsumexp(logits, -1, keepdim=True)


def _rows(lm_head: Any, token_ids: list[int]) -> torch.nn.Linear:
    """The rows of an LM head that belong to some tokens, as a linear layer."""
    bias = getattr(lm_head, "bias", None)
    part = torch.nn.Linear(lm_head.weight.shape[1], len(token_ids), bias=bias is not None, dtype=lm_head.weight.dtype)
    with torch.no_grad():
        part.weight.copy_(lm_head.weight[token_ids])
        if bias is not None:
            part.bias.copy_(bias[token_ids])
    return part


def reads_lm_head_rows(heads: MedusaHeads, draft_ids: list[int] | None) -> bool:
    """Whether the heads graph gathers rows from the backbone's full LM head."""
    return heads.config.reads_root and draft_ids is None


def trace_heads(backbone: Backbone, heads: MedusaHeads, top_k: int, opset: int, draft_ids: list[int] | None = None) -> ir.Model:
    """Trace heads into the heads graph, together with the backbone's LM head if they share it.

    Args:
        backbone: the model.
        heads: the model's heads.
        top_k: candidates of each head.
        opset: the graph's ONNX operator set.
        draft_ids: the tokens that heads choose from, or None for all.

    Raises:
        ExportError: the heads cannot be traced.
    """
    output, embedding = backbone.model.get_output_embeddings(), backbone.model.get_input_embeddings()
    module = HeadsModule(heads.to(backbone.dtype), output, top_k, draft_ids, embedding).eval()
    inputs = {"hidden": torch.zeros(2, backbone.facts.hidden_size, dtype=backbone.dtype)}
    if heads.reads_tokens:
        inputs["root_ids"] = torch.zeros(2, dtype=torch.long)
    batch = Dim("batch", min=1, max=1 << 16)
    model = export_module("heads", module, (), inputs, {name: {0: batch} for name in inputs}, opset)
    name_values(model.graph.inputs, list(inputs))
    name_values(model.graph.outputs, ["head_ids", "head_log_probs"])
    simplify(model)
    shares = draft_ids is None and (backbone.has_tied_embeddings or heads.config.reads_root)
    TransposeWeights(frozenset({"lm_head.weight"}) if shares else frozenset())(model)
    return model
