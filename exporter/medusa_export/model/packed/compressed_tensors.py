"""The layouts of compressed-tensors (vLLM's LLM Compressor). Which one a weight has shows in its tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from medusa_export.model.packed.bits import as_scale, fields
from medusa_export.model.packed.microscaling import in_blocks
from medusa_export.model.packed.scaled_floats import activation_scales, block_of, read_scaled_floats
from medusa_export.model.packed.signed_bytes import read_signed_bytes
from medusa_export.model.packed.tensors import IntegerWeight, LazyIntegers, LazyWeight, PackedWeights, Readable, Tensors
from medusa_heads.errors import CheckpointError

PARTS = (
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale",
    ".input_global_scale", ".input_zero_point",
)  # fmt: skip
SPARSE = (".bitmask", ".compressed", ".meta", ".weight_meta", ".row_offsets")


def read_compressed_tensors(tensors: Tensors, settings: dict[str, Any]) -> PackedWeights:
    """The weights of a compressed-tensors checkpoint: packed integers, plain integers, 8-bit or 4-bit floats.

    Raises:
        CheckpointError: weights are stored sparsely.
    """
    if sparse := next((name for name in tensors if name.endswith(SPARSE)), None):
        raise CheckpointError(
            f"{tensors.directory} stores weights sparsely ({sparse}), which cannot be read; give the dense checkpoint"
        )
    floats = read_scaled_floats(tensors, settings)
    weights: dict[str, Readable] = dict(floats.weights)
    consumed = set(floats.consumed) | set(activation_scales(tensors))
    for name in tensors.ending(".weight_packed"):
        is_float = tensors.dtype(f"{name}.weight_packed") == "U8"
        weights[f"{name}.weight"] = (
            LazyWeight(partial(_float4, tensors, name)) if is_float else LazyIntegers(partial(_packed, tensors, name))
        )
        consumed |= {name + part for part in PARTS}
    for name in tensors.ending(".weight"):
        if tensors.dtype(f"{name}.weight") == "I8":
            parts = (f"{name}.weight", f"{name}.weight_scale", f"{name}.weight_zero_point")
            weights[f"{name}.weight"] = read_signed_bytes(tensors, *parts, block_of(settings))
            consumed |= {f"{name}.weight", *(name + part for part in PARTS)}
    return PackedWeights(weights, frozenset(consumed), floats.note)


def _packed(tensors: Tensors, name: str) -> IntegerWeight:
    """Signed integers, packed along the inputs after half of their range was added."""
    words = tensors.read(f"{name}.weight_packed")  # [N, W] int32
    outputs, inputs = (int(size) for size in tensors.read(f"{name}.weight_shape"))
    bits = _bits(words.shape[1], inputs, f"{tensors.directory}: {name}.weight_packed")
    scales = tensors.read(f"{name}.weight_scale").to(torch.float32).reshape(-1, tensors.shape(f"{name}.weight_scale")[-1])
    scales = scales.expand(outputs, -1).contiguous()  # [N, G]
    zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.int32)
    if f"{name}.weight_zero_point" in tensors:
        stored = tensors.read(f"{name}.weight_zero_point")  # packed along the outputs [N bits / 32, G], or int8 [N, G]
        if stored.dtype == torch.int32:
            zeros = fields(stored.T.contiguous(), bits)[:, :outputs].T.to(torch.int32).expand(outputs, -1).contiguous()
        else:
            zeros += stored.to(torch.int32)
    group_of = None
    if f"{name}.weight_g_idx" in tensors and bool((found := tensors.read(f"{name}.weight_g_idx").to(torch.long)).min() >= 0):
        group_of = found
    return IntegerWeight(fields(words, bits)[:, :inputs].contiguous(), scales, zeros, bits, group_of)


def _bits(num_words: int, inputs: int, what: str) -> int:
    """The width of integers of which `inputs` fit so many words."""
    for bits in (4, 8, 2, 3, 5, 6, 7, 1):
        if -(-inputs // (32 // bits)) == num_words:
            return bits
    raise CheckpointError(f"{what} has {num_words} words for {inputs} inputs, which fits no number of bits")


def _float4(tensors: Tensors, name: str) -> torch.Tensor:
    scales = as_scale(tensors.read(f"{name}.weight_scale"))
    if f"{name}.weight_global_scale" in tensors:  # the scales were multiplied by it before they were rounded to 8 bits
        scales = scales / tensors.read(f"{name}.weight_global_scale").to(torch.float32)
    return in_blocks(tensors.read(f"{name}.weight_packed"), scales)
