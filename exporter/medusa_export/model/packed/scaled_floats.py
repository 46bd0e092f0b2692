"""Weights in 8-bit floats with scales: a scale for a block (DeepSeek), an output (FBGEMM), or a whole tensor (ModelOpt)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from medusa_export.model.packed.bits import as_scale
from medusa_export.model.packed.tensors import LazyWeight, PackedWeights, Readable, Tensors
from medusa_heads.errors import CheckpointError

SCALES = ("_scale_inv", "_scale")  # both are factors of the weight, whatever the first is called
OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale")
NOTE = "its activations are computed in 8 bits by kernels of its kind; here they stay floats"


def read_scaled_floats(tensors: Tensors, settings: dict[str, Any]) -> PackedWeights:
    """The weights of a checkpoint whose tensors in 8-bit floats have scales beside them (`NAME_scale_inv`, `NAME_scale`).

    Raises:
        CheckpointError: a scale does not fit its weight.
    """
    block = block_of(settings)
    weights: dict[str, Readable] = {}
    consumed: set[str] = set(activation_scales(tensors))
    for name in tensors:
        if not tensors.dtype(name).startswith("F8_") or name.endswith(SCALES):
            continue
        scale = next((name + end for end in SCALES if name + end in tensors), None)
        weights[name] = LazyWeight(partial(_scaled, tensors, name, scale, block))
        consumed |= {name} | ({scale} if scale else set())
    return PackedWeights(weights, frozenset(consumed), NOTE if _rounds_activations(settings) else "")


def activation_scales(tensors: Tensors) -> list[str]:
    """The tensors that only say how activations are rounded."""
    return [name for name in tensors if name.endswith(OF_ACTIVATIONS)]


def block_of(settings: dict[str, Any]) -> tuple[int, int] | None:
    """Outputs and inputs of a block that shares a scale, if the settings name them."""
    found = settings.get("weight_block_size")
    for group in (settings.get("config_groups") or {}).values():
        found = found or ((group or {}).get("weights") or {}).get("block_structure")
    return (int(found[0]), int(found[1])) if isinstance(found, list | tuple) and len(found) == 2 else None


def spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None) -> torch.Tensor:
    """Scales for each element of a weight [.., N, K], from a scale for all, each output, each block or group.

    Raises:
        ValueError: the scales fit no way of dividing the weight.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1 and len(shape) == 2 and scale.shape[0] == shape[0]:
        scale = scale.unsqueeze(1)
    if scale.dim() != len(shape):
        raise ValueError(f"scales of shape {list(scale.shape)} for a weight of shape {list(shape)}")
    for axis in (-2, -1):
        length, count = shape[axis], scale.shape[axis]
        if count in (1, length):
            continue
        size = block[axis + 2] if block is not None and -(-length // block[axis + 2]) == count else length // count
        if -(-length // size) != count:
            raise ValueError(f"scales of shape {list(scale.shape)} for a weight of shape {list(shape)}")
        scale = scale.repeat_interleave(size, axis).narrow(axis, 0, length)
    return scale


def _scaled(tensors: Tensors, name: str, scale: str | None, block: tuple[int, int] | None) -> torch.Tensor:
    weight = tensors.read(name).to(torch.float32)
    if scale is None:
        return weight
    try:
        return weight.mul_(spread(as_scale(tensors.read(scale)), weight.shape, block))
    except ValueError as error:
        raise CheckpointError(f"{tensors.directory}: {scale} does not fit {name}: {error}") from error


def _rounds_activations(settings: dict[str, Any]) -> bool:
    groups = (settings.get("config_groups") or {}).values()
    return bool(settings.get("activation_scheme")) or any((group or {}).get("input_activations") for group in groups)
