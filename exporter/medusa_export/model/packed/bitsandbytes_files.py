"""bitsandbytes' layouts: 4 bits with a table of 16 values (nf4, fp4), and 8 bits with a scale for each output."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from medusa_export.model.packed.signed_bytes import signed_bytes
from medusa_export.model.packed.tensors import IntegerWeight, LazyIntegers, LazyWeight, PackedWeights, Readable, Tensors
from medusa_heads.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__"  # followed by nf4 or fp4: the settings as JSON, in bytes
NESTED = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
INT8_RANGE = 127


def read_bitsandbytes(tensors: Tensors, _: dict[str, Any]) -> PackedWeights:
    """The weights of a checkpoint that was saved while loaded with bitsandbytes."""
    weights: dict[str, Readable] = {}
    consumed: set[str] = set()
    for state in [name for name in tensors if STATE in name]:
        name = state.split(STATE)[0]
        weights[name] = LazyWeight(partial(_four_bits, tensors, name, state))
        consumed |= {name, state, *(name + part for part in NESTED)}
    for prefix in tensors.ending(".SCB"):
        weights[f"{prefix}.weight"] = LazyIntegers(partial(_eight_bits, tensors, prefix))
        consumed |= {f"{prefix}.weight", f"{prefix}.SCB", f"{prefix}.weight_format"}
    return PackedWeights(weights, frozenset(consumed))


def _four_bits(tensors: Tensors, name: str, state: str) -> torch.Tensor:
    try:
        settings = json.loads(bytes(tensors.read(state).tolist()))
        shape, size = [int(length) for length in settings["shape"]], int(settings["blocksize"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{tensors.directory}: {state} is damaged; download it again") from error
    packed = tensors.read(name).flatten()
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()  # the first of two is the upper half
    values = tensors.read(f"{name}.quant_map").to(torch.float32)[codes.to(torch.int32)]
    largest = tensors.read(f"{name}.absmax")  # of each block
    if f"{name}.nested_absmax" in tensors:
        table, blocks = tensors.read(f"{name}.nested_quant_map"), tensors.read(f"{name}.nested_absmax")
        outer = blocks.to(torch.float32).repeat_interleave(int(settings["nested_blocksize"]))[: largest.numel()]
        largest = table.to(torch.float32)[largest.to(torch.int32)] * outer + float(settings["nested_offset"])
    count = torch.Size(shape).numel()
    scales = largest.to(torch.float32).repeat_interleave(size)[:count]
    return (values[:count] * scales).reshape(shape)


def _eight_bits(tensors: Tensors, prefix: str) -> IntegerWeight:
    weight_format = f"{prefix}.weight_format"
    if weight_format in tensors and int(tensors.read(weight_format)) != 0:
        raise CheckpointError(f"{tensors.directory}: {prefix}.weight is in the order of a GPU's tiles; save it by rows")
    largest = tensors.read(f"{prefix}.SCB").to(torch.float32)  # [N]
    return signed_bytes(tensors.read(f"{prefix}.weight"), (largest / INT8_RANGE).unsqueeze(1))
