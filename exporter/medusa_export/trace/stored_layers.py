"""Keeps the weights of a decoder's layers as they are stored, and casts a layer only while it is needed.

A model of which every weight is cast to float32 takes twice the memory of its checkpoint in fp16, in addition to it. Stored
weights are mapped from the files, and take none that the system cannot have back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa_export.trace.layers import decoder_layers


def cast_all_but_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's floating-point weights in place, except those of its decoder's layers."""
    _, layers = decoder_layers(model)
    kept = {id(tensor) for tensor in (*layers.parameters(), *layers.buffers())}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in kept and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def cast_layers_while_running(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let each of the decoder's layers compute in another precision: it is cast before it runs, and put back after it."""
    _, layers = decoder_layers(model)
    for layer in layers:
        stored: dict[torch.Tensor, torch.Tensor] = {}
        layer.register_forward_pre_hook(partial(_cast, stored, dtype))
        layer.register_forward_hook(partial(_put_back, stored), always_call=True)


def _cast(stored: dict[torch.Tensor, torch.Tensor], dtype: torch.dtype, layer: torch.nn.Module, _: Any) -> None:
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point() and tensor.dtype != dtype:
            stored[tensor] = tensor.data
            tensor.data = tensor.data.to(dtype)


def _put_back(stored: dict[torch.Tensor, torch.Tensor], *_: Any) -> None:
    for tensor, data in stored.items():
        tensor.data = data
    stored.clear()
