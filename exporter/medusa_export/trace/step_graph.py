"""Traces a backbone into the step graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from medusa_export.model.checkpoint import Backbone, unsupported
from medusa_export.passes.common.attention_math import is_attention
from medusa_export.passes.portable.expand_experts import ExpandExperts
from medusa_export.passes.portable.expand_sinks import ExpandSinks
from medusa_export.passes.portable.transpose_weights import TransposeWeights
from medusa_export.trace.cache_shapes import TORCH_DTYPES, cached_tensors
from medusa_export.trace.layers import NoLayersError, decoder_layers, layer_kinds, only_layers, text_decoder
from medusa_export.trace.ordered_sets import ordered_sets
from medusa_export.trace.own_attention import has_own_attention, require_known
from medusa_export.trace.selection import selecting_all
from medusa_export.trace.stamp import StampLayers, UnlikeLayersError
from medusa_export.trace.step_masks import StepMasks
from medusa_export.trace.step_module import StepModule
from medusa_export.trace.stored_layers import as_if_cast, cast_whole
from medusa_export.trace.torch_to_onnx import export_module, name_values, simplify, tensor_of, torch_tensor
from medusa_runtime.bundle.cache_layout import BATCH_AXIS, CAPACITY_AXIS, CacheTensor

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
    require_known(backbone.model)
    module = step_module(backbone)
    try:
        list_name, layers = decoder_layers(backbone.model)
        with as_if_cast(layers, backbone.dtype):
            cached = cached_tensors(backbone, module, list(layers))
    except NoLayersError as error:
        report(f"{error}, so the model is traced as a whole, which takes longer")
        model = _trace_whole(backbone, module, opset)
    else:
        kinds = layer_kinds(layers, backbone.layer_types, cached)
        try:
            model = _trace_kinds(backbone, module, list_name, kinds, cached, opset)
        except UnlikeLayersError as error:
            report(f"layers that look alike have different traces ({error}); tracing all {len(layers)} layers")
            model = _trace_kinds(backbone, module, list_name, [[layer] for layer in range(len(layers))], cached, opset)
    ExpandExperts()(model)
    ExpandSinks()(model)
    lm_head: Any = backbone.model.get_output_embeddings()
    tables = {f"model.{name}" for name, value in backbone.model.named_parameters() if value is lm_head.weight}
    TransposeWeights(frozenset(tables) if lm_head_as_table else frozenset())(model)
    return model


def step_module(backbone: Backbone) -> StepModule:
    """The module that is traced."""
    return StepModule(backbone.model, StepMasks(backbone.layer_types, backbone.sliding_window, backbone.chunk_size)).eval()


def _trace_whole(backbone: Backbone, module: StepModule, opset: int) -> ir.Model:
    """Trace a decoder that does not run a list of layers once each, such as one that runs its layers several times."""
    cast_whole(backbone.model, backbone.dtype)  # its layers' weights may be in the precision that they are stored in
    try:
        [tensors] = cached_tensors(backbone, module, [text_decoder(backbone.model)])
    except NoLayersError as error:
        raise unsupported(backbone.facts.architecture, str(error)) from error
    return _trace(backbone, module, tensors, opset)


def _trace_kinds(
    backbone: Backbone, module: StepModule, list_name: str, kinds: list[list[int]], cached: list[list[CacheTensor]], opset: int
) -> ir.Model:
    traced = sorted({layer for kind in kinds for layer in (kind[0], kind[-1])})
    _, layers = decoder_layers(backbone.model)
    for layer in traced:  # their weights may be in the precision that they are stored in
        cast_whole(layers[layer], backbone.dtype)
    with only_layers(layers, traced):
        model = _trace(backbone, module, [tensor for layer in traced for tensor in cached[layer]], opset)
    prefix = f"model.{list_name}.{{layer}}."
    StampLayers(kinds, cached, prefix, lambda name: torch_tensor(tensor_of(module, name), name, backbone.dtype))(model)
    return model


def _trace(backbone: Backbone, module: StepModule, tensors: list[CacheTensor], opset: int) -> ir.Model:
    """The graph of a step that caches the given tensors."""
    batch, tokens, capacity, rows = 2, 8, 64, 3  # any sizes above 1, all different
    past = {tensor.name: torch.zeros(tensor.shape(batch, capacity), dtype=TORCH_DTYPES[tensor.dtype]) for tensor in tensors}
    b, t = Dim("batch", min=1, max=1 << 16), Dim("num_tokens", min=2, max=max(backbone.max_seq_len, tokens))
    s, r = Dim("capacity", min=2, max=1 << 24), Dim("num_rows", min=1, max=1 << 20)
    with selecting_all(backbone.model), ordered_sets(backbone.model):
        model = export_module(
            backbone.facts.architecture,
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
                "past": {tensor.name: {BATCH_AXIS: b, CAPACITY_AXIS: s} for tensor in tensors},
            },
            opset,
        )
    found = sum(is_attention(node) for node in model.graph)
    # Layers that read another layer's keys attend too, so there may be more nodes than keys.
    few = found < sum(tensor.part == "key" for tensor in tensors)
    if few and not (found == 0 and has_own_attention(backbone.model)):
        raise unsupported(backbone.facts.architecture)
    name_values(model.graph.inputs, [*STEP_INPUTS, *(tensor.past for tensor in tensors)])
    name_values(model.graph.outputs, [*STEP_OUTPUTS, *(tensor.present for tensor in tensors)])
    simplify(model)
    return model
