"""GPTQ's layout: integers packed along the inputs, with groups that may be reordered (`desc_act`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from medusa_export.model.packed.bits import fields, stream
from medusa_export.model.packed.tensors import IntegerWeight, LazyIntegers, PackedWeights, Tensors
from medusa_heads.errors import CheckpointError

PLAIN_FORMATS = frozenset({"", "gptq", "gptq_v2"})
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def read_gptq(tensors: Tensors, settings: dict[str, Any]) -> PackedWeights:
    """The weights of a GPTQ checkpoint. Bits and group sizes are read off the tensors.

    Zeros are stored one lower than they are, except in the format ``gptq_v2``. A zero of 0 is stored as the largest integer.

    Raises:
        CheckpointError: the checkpoint is in a form for one kernel alone, such as Marlin's.
    """
    kind = str(settings.get("checkpoint_format") or "")
    if settings.get("is_marlin_format") or kind not in PLAIN_FORMATS:
        raise CheckpointError(
            f"{tensors.directory} is a GPTQ checkpoint in the format {kind or 'marlin'}, which is for one GPU kernel; "
            "give the same model in the format gptq or gptq_v2"
        )
    offset = 0 if kind == "gptq_v2" else 1
    names = tensors.ending(".qweight")
    weights = {f"{name}.weight": LazyIntegers(partial(_unpack, tensors, name, offset)) for name in names}
    return PackedWeights(weights, frozenset(name + part for name in names for part in PARTS))


def _unpack(tensors: Tensors, name: str, offset: int) -> IntegerWeight:
    words, zeros = tensors.read(f"{name}.qweight"), tensors.read(f"{name}.qzeros")  # [K bits / 32, N], [G, N bits / 32]
    scales = tensors.read(f"{name}.scales").to(torch.float32)  # [G, N]
    bits = 32 * zeros.shape[1] // scales.shape[1]
    codes = stream(words, bits)  # [K, N]
    stored = (fields(zeros, bits) if 32 % bits == 0 else stream(zeros.T.contiguous(), bits).T).to(torch.int32)  # [G, N]
    group_of = tensors.read(f"{name}.g_idx").to(torch.long) if f"{name}.g_idx" in tensors else None
    return IntegerWeight(
        codes.T.contiguous(),
        scales.T.contiguous(),
        ((stored + offset) & ((1 << bits) - 1)).T.contiguous(),
        bits,
        group_of,
    )
