"""Exports torch modules to simplified ONNX graphs: the step graph and the heads graph."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
from torch.export import Dim

from medusa_export.model.checkpoint import Backbone, unsupported
from medusa_export.passes.common.attention_math import is_attention
from medusa_export.passes.portable.constant_reshapes import ConstantReshapes
from medusa_export.passes.portable.expand_experts import ExpandExperts
from medusa_export.passes.portable.expand_sinks import ExpandSinks
from medusa_export.passes.portable.fuse_rotary import FuseRotary
from medusa_export.passes.portable.simplify import Simplify
from medusa_export.passes.portable.transpose_weights import TransposeWeights
from medusa_export.trace.experts_node import recognise_activations
from medusa_export.trace.layers import decoder_layers, layer_kinds, only_layers
from medusa_export.trace.stamp import StampLayers, UnlikeLayersError
from medusa_export.trace.step_module import StepModule
from medusa_heads.modules import MedusaHeads, root_states
from medusa_runtime.errors import first_line

STEP_INPUTS = ("input_ids", "position_ids", "tree_mask", "cache_lengths", "logit_rows")
STEP_OUTPUTS = ("greedy_ids", "hidden", "logits")
Report = Callable[[str], None]


def trace_step(backbone: Backbone, opset: int, report: Report = lambda _: None, *, lm_head_as_table: bool = False) -> ir.Model:
    """Trace a backbone into the step graph of docs/onnx-contract.md.

    Two layers of each kind are traced and compared, then copied to the model's full depth. If the two differ, all layers are
    traced, and `report` is called with a message.

    Args:
        backbone: the model.
        opset: the graph's ONNX operator set.
        report: takes a message for the user.
        lm_head_as_table: keep the LM head's layout [V, C], since heads gather rows from that weight (`reads_lm_head_rows`).

    Raises:
        ExportError: the model cannot be traced.
    """
    recognise_activations(backbone.model)
    list_name, layers = decoder_layers(backbone.model)
    kinds = layer_kinds(layers, backbone.layer_types)
    try:
        model = _trace_kinds(backbone, list_name, kinds, opset)
    except UnlikeLayersError as error:
        report(f"layers that look alike have different traces ({error}); tracing all {len(layers)} layers")
        model = _trace_kinds(backbone, list_name, [[layer] for layer in range(len(layers))], opset)
    ExpandExperts()(model)
    ExpandSinks()(model)
    lm_head: Any = backbone.model.get_output_embeddings()
    tables = {f"model.{name}" for name, value in backbone.model.named_parameters() if value is lm_head.weight}
    TransposeWeights(frozenset(tables) if lm_head_as_table else frozenset())(model)
    return model


def _trace_kinds(backbone: Backbone, list_name: str, kinds: list[list[int]], opset: int) -> ir.Model:
    traced = sorted({layer for kind in kinds for layer in (kind[0], kind[-1])})
    _, layers = decoder_layers(backbone.model)
    module = StepModule(backbone.model, backbone.layer_types, backbone.sliding_window).eval()
    batch, tokens, capacity, rows = 2, 8, 64, 3  # any sizes above 1, all different
    facts = backbone.facts
    shape = (batch, facts.num_kv_heads, capacity, facts.head_dim)
    past = {
        str(layer): (torch.zeros(shape, dtype=backbone.dtype), torch.zeros(shape, dtype=backbone.dtype)) for layer in traced
    }
    b, t = Dim("batch", min=1, max=1 << 16), Dim("num_tokens", min=2, max=1 << 20)
    s, r = Dim("capacity", min=2, max=1 << 24), Dim("num_rows", min=1, max=1 << 20)
    with only_layers(layers, traced):
        model = _export(
            facts.architecture,
            module,
            (
                torch.ones(batch, tokens, dtype=torch.long),
                torch.arange(tokens).repeat(batch, 1),
                torch.ones(batch, tokens, tokens, dtype=torch.bool),
                torch.zeros(batch, dtype=torch.long),
                torch.zeros(batch, rows, dtype=torch.long),
            ),
            {"past": past},
            {
                "input_ids": {0: b, 1: t},
                "position_ids": {0: b, 1: t},
                "tree_mask": {0: b, 1: t, 2: t},
                "cache_lengths": {0: b},
                "logit_rows": {0: b, 1: r},
                "past": {str(layer): ({0: b, 2: s}, {0: b, 2: s}) for layer in traced},
            },
            opset,
        )
    if sum(is_attention(node) for node in model.graph) != len(traced):
        raise unsupported(backbone.facts.architecture)
    pairs = [f"{layer}.{part}" for layer in traced for part in ("key", "value")]
    _name(model.graph.inputs, [*STEP_INPUTS, *(f"past.{pair}" for pair in pairs)])
    _name(model.graph.outputs, [*STEP_OUTPUTS, *(f"present.{pair}" for pair in pairs)])
    _simplify(model)
    state = backbone.model.state_dict()
    prefix = f"model.{list_name}.{{layer}}."
    StampLayers(kinds, prefix, lambda name: _torch_tensor(state[name.removeprefix("model.")], name))(model)
    return model


class HeadsModule(torch.nn.Module):
    """The computation of the heads graph: from hidden rows, and roots if the heads read them, to each head's candidates.

    Args:
        heads: the heads.
        lm_head: the backbone's LM head: heads can share it, and heads that read the root use its rows as embeddings.
        top_k: candidates of each head.
        draft_ids: the tokens that heads choose from, or None for all. Logits of other tokens are not computed.
    """

    def __init__(self, heads: MedusaHeads, lm_head: torch.nn.Module, top_k: int, draft_ids: list[int] | None) -> None:
        super().__init__()
        self.heads, self.lm_head, self.top_k = heads, lm_head, top_k
        if heads.config.reads_root and heads.draft_ids is not None:
            table = torch.full((heads.config.vocab_size,), -1)
            table[heads.draft_ids] = torch.tensor(heads.draft_ids) if draft_ids is None else torch.arange(len(draft_ids))
            self.root_places = torch.nn.Buffer(table, persistent=False)
        if draft_ids is not None:
            self.lm_head = _rows(lm_head, draft_ids)
            self.draft_ids = torch.nn.Buffer(torch.tensor(draft_ids), persistent=False)
            self.heads = copy.deepcopy(heads)
            for head in self.heads.heads:
                if head.lm_head is not None:
                    head.lm_head = _rows(head.lm_head, draft_ids)

    def forward(self, hidden: torch.Tensor, root_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates and their log-probabilities. [B, C], and [B] if heads read the root -> [B, K, M] and [B, K, M]"""
        roots = None
        if root_ids is not None:
            lm_head: Any = self.lm_head
            roots = root_states(lm_head.weight, self.root_places[root_ids] if hasattr(self, "root_places") else root_ids)
        logits = self.heads.logits(
            hidden, self.lm_head, roots
        ).float()  # [B, K, V], where V is the size of the draft vocabulary
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
    module = HeadsModule(heads.to(backbone.dtype), backbone.model.get_output_embeddings(), top_k, draft_ids).eval()
    inputs = {"hidden": torch.zeros(2, backbone.facts.hidden_size, dtype=backbone.dtype)}
    if heads.config.reads_root:
        inputs["root_ids"] = torch.zeros(2, dtype=torch.long)
    batch = Dim("batch", min=1, max=1 << 16)
    model = _export("heads", module, (), inputs, {name: {0: batch} for name in inputs}, opset)
    _name(model.graph.inputs, list(inputs))
    _name(model.graph.outputs, ["head_ids", "head_log_probs"])
    _simplify(model)
    shares = draft_ids is None and (backbone.has_tied_embeddings or heads.config.reads_root)
    TransposeWeights(frozenset({"lm_head.weight"}) if shares else frozenset())(model)
    return model


def _export(
    what: str,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: dict[str, Any],
    opset: int,
) -> ir.Model:
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                args,
                kwargs=kwargs,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                opset_version=opset,
                optimize=False,  # `Simplify` does the necessary part in a fraction of the time
                verbose=False,
            )
        except Exception as error:  # the exporter wraps any exception of a model's code
            raise unsupported(what, first_line(error.__cause__ or error)) from error
    assert program is not None
    return program.model


def _simplify(model: ir.Model) -> None:
    Simplify()(model)
    fuse_rms_normalization(model)
    FuseRotary()(model)
    ConstantReshapes()(model)
    ir.passes.Sequential(
        IdentityEliminationPass(), CommonSubexpressionEliminationPass(), TopologicalSortPass(), RemoveUnusedNodesPass()
    )(model)


def _name(values: Any, names: list[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def _torch_tensor(tensor: torch.Tensor, name: str) -> ir.TensorProtocol:
    return ir.tensor_adapters.TorchTensor(tensor.detach(), name=name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the torch exporter: its warnings are for its developers."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)
