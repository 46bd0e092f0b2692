"""BitNet's layout: the weights -1, 0 and 1 in two bits each, with one scale for a tensor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from medusa_export.model.packed.tensors import LazyWeight, PackedWeights, Tensors
from medusa_heads.errors import CheckpointError

IN_A_BYTE = 4
NOTE = "BitNet's own kernels round activations to 8 bits; here they stay floats"


def read_bitnet(tensors: Tensors, settings: dict[str, Any]) -> PackedWeights:
    """The weights of a packed BitNet checkpoint.

    The class ``autobitlinear`` multiplies by the scale, the class ``bitlinear`` divides by it.

    Raises:
        CheckpointError: the weights are not packed yet, or layers have norms of their own.
    """
    names = tensors.ending(".weight_scale")
    if settings.get("use_rms_norm"):
        raise CheckpointError(f"{tensors.directory} has a norm before each packed layer (use_rms_norm); this is not supported")
    if not names:
        raise CheckpointError(
            f"{tensors.directory} is a BitNet checkpoint whose weights are rounded at each pass (quantization_mode online); "
            "give the packed one"
        )
    divides = str(settings.get("linear_class") or "bitlinear") == "bitlinear"
    weights = {f"{name}.weight": LazyWeight(partial(_unpack, tensors, name, divides=divides)) for name in names}
    consumed = frozenset(name + part for name in names for part in (".weight", ".weight_scale"))
    return PackedWeights(weights, consumed, NOTE)


def _unpack(tensors: Tensors, name: str, *, divides: bool) -> torch.Tensor:
    """Each byte holds one input's weights of four outputs that are N / 4 apart."""
    packed = tensors.read(f"{name}.weight")  # [N / 4, K]
    scale = tensors.read(f"{name}.weight_scale").to(torch.float32)
    if packed.dtype != torch.uint8:  # unpacked already
        signs = packed.to(torch.float32)
    else:
        signs = torch.cat([(packed >> 2 * place) & 3 for place in range(IN_A_BYTE)]).to(torch.float32) - 1
    return signs / scale if divides else signs * scale
