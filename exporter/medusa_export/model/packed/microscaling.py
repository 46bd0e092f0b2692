"""4-bit floats with a scale for each block: MXFP4 as gpt-oss stores it, and ModelOpt's NVFP4."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from medusa_export.model.packed.bits import as_scale, float4
from medusa_export.model.packed.scaled_floats import activation_scales, read_scaled_floats
from medusa_export.model.packed.tensors import LazyWeight, PackedWeights, Tensors


def read_mxfp4(tensors: Tensors, _: dict[str, Any]) -> PackedWeights:
    """Weights of experts in blocks of 32 (`NAME_blocks`, `NAME_scales`), stored as [expert, out, in].

    The model keeps them as [expert, in, out].
    """
    names = tensors.ending("_blocks")
    weights = {name: LazyWeight(partial(_experts, tensors, name)) for name in names}
    return PackedWeights(weights, frozenset(f"{name}{part}" for name in names for part in ("_blocks", "_scales")))


def read_modelopt(tensors: Tensors, settings: dict[str, Any]) -> PackedWeights:
    """ModelOpt's weights: NVFP4 where there is a second scale (`weight_scale_2`), else 8-bit floats with one scale."""
    floats = read_scaled_floats(tensors, settings)
    names = tensors.ending(".weight_scale_2")
    weights = {f"{name}.weight": LazyWeight(partial(_nvfp4, tensors, name)) for name in names}
    parts = (".weight", ".weight_scale", ".weight_scale_2")
    consumed = {name + part for name in names for part in parts} | set(activation_scales(tensors))
    return PackedWeights({**floats.weights, **weights}, floats.consumed | consumed, floats.note)


def in_blocks(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """4-bit floats times a scale for each block. uint8 [N, K / 2], float32 [N, K / block] -> float32 [N, K]"""
    values = float4(packed)
    blocks = values.reshape(*scales.shape, -1)
    return (blocks * scales.unsqueeze(-1)).flatten(-2)


def _experts(tensors: Tensors, name: str) -> torch.Tensor:
    blocks, scales = tensors.read(f"{name}_blocks"), as_scale(tensors.read(f"{name}_scales"))  # [E, N, G, 16], [E, N, G]
    return in_blocks(blocks.flatten(-2), scales).transpose(1, 2).contiguous()  # [E, K, N]


def _nvfp4(tensors: Tensors, name: str) -> torch.Tensor:
    whole = tensors.read(f"{name}.weight_scale_2").to(torch.float32)  # of the tensor
    return in_blocks(tensors.read(f"{name}.weight"), as_scale(tensors.read(f"{name}.weight_scale")) * whole)
