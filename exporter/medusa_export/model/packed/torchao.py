"""torchao's layouts that are plain: 8-bit integers and floats with scales, in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from medusa_export.model.packed.scaled_floats import spread
from medusa_export.model.packed.signed_bytes import read_signed_bytes
from medusa_export.model.packed.tensors import LazyWeight, PackedWeights, Readable, Tensors
from medusa_heads.errors import CheckpointError

INTEGERS = "Int8Tensor"
PLAIN = (INTEGERS, "Float8Tensor")
PARTS = ("qdata", "scale", "zero_point")


def read_torchao(tensors: Tensors, _settings: dict[str, Any]) -> PackedWeights:
    """The weights of a torchao checkpoint. The files' metadata name the kind of each weight.

    Raises:
        CheckpointError: weights are packed for GPU kernels.
    """
    weights: dict[str, Readable] = {}
    consumed: set[str] = set()
    for name, kind in _kinds(tensors.metadata).items():
        if kind == "Tensor":
            continue
        if kind not in PLAIN:
            raise CheckpointError(
                f"{tensors.directory}: {name} is torchao's {kind}, which is packed for GPU kernels; only "
                f"{' and '.join(PLAIN)} can be read. Give the model before it was quantised"
            )
        module, _dot, parameter = name.rpartition(".")
        parts: dict[str, str] = {part: f"{module}._{parameter}_{part}" for part in PARTS}
        weights[name] = (
            read_signed_bytes(tensors, parts["qdata"], parts["scale"], parts["zero_point"])
            if kind == INTEGERS
            else LazyWeight(partial(_float8, tensors, parts["qdata"], parts["scale"]))
        )
        consumed |= set(parts.values())
    return PackedWeights(weights, frozenset(consumed))


def _kinds(metadata: Mapping[str, str]) -> dict[str, str]:
    """The tensor class of each weight."""
    kinds = {}
    for name, text in metadata.items():
        try:
            entry = json.loads(text)
        except ValueError:  # another entry, such as the format
            continue
        if isinstance(entry, dict) and "_type" in entry:
            kinds[name] = str(entry["_type"])
    return kinds


def _float8(tensors: Tensors, data: str, scale: str) -> torch.Tensor:
    weight = tensors.read(data).to(torch.float32)
    return weight.mul_(spread(tensors.read(scale).to(torch.float32), weight.shape, None))
