"""AWQ's layout for its GEMM kernel: 4-bit integers packed along the outputs, in the order that the kernel unpacks them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from medusa_export.model.packed.bits import fields
from medusa_export.model.packed.tensors import IntegerWeight, LazyIntegers, PackedWeights, Tensors
from medusa_heads.errors import CheckpointError

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the output 0, 1, 2 … lies
BITS = 4
PARTS = (".qweight", ".qzeros", ".scales")


def read_awq(tensors: Tensors, settings: dict[str, Any]) -> PackedWeights:
    """The weights of an AWQ checkpoint.

    Raises:
        CheckpointError: it is in another form than GEMM's.
    """
    version = str(settings.get("version") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if version != "gemm" or bits != BITS:
        raise CheckpointError(
            f"{tensors.directory} is an AWQ checkpoint of version {version} with {bits} bits; only gemm with 4 bits can be read"
        )
    names = tensors.ending(".qweight")
    weights = {f"{name}.weight": LazyIntegers(partial(_unpack, tensors, name)) for name in names}
    return PackedWeights(weights, frozenset(name + part for name in names for part in PARTS))


def _unpack(tensors: Tensors, name: str) -> IntegerWeight:
    codes = _in_order(tensors.read(f"{name}.qweight"))  # [K, N]
    zeros = _in_order(tensors.read(f"{name}.qzeros"))  # [G, N]
    scales = tensors.read(f"{name}.scales").to(torch.float32)  # [G, N]
    return IntegerWeight(codes.T.contiguous(), scales.T.contiguous(), zeros.to(torch.int32).T.contiguous(), BITS)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] -> uint8 [R, N]"""
    values = fields(words, BITS).reshape(*words.shape, len(PLACES))
    return values[..., PLACES].flatten(-2)
