"""Keeps the weights of a decoder's layers as they are stored, and casts a layer only while it is needed.

A model of which every weight is cast to float32 takes twice the memory of its checkpoint in fp16, in addition to it. Stored
weights are mapped from the files, and take none that the system cannot have back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa_export.trace.layers import NoLayersError, decoder_layers

HALVES = frozenset({torch.float16, torch.bfloat16})


def is_stored(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight is in a half precision other than the model's. What a model keeps in float32 is not, and stays so."""
    return tensor.dtype in HALVES and tensor.dtype != dtype


def cast_all_but_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's stored weights in place, except those of its decoder's layers."""
    try:
        _, layers = decoder_layers(model)
        kept = {id(tensor) for tensor in (*layers.parameters(), *layers.buffers())}
    except NoLayersError:  # it is traced as a whole
        kept = set()
    model.config.dtype = dtype
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in kept and is_stored(tensor, dtype):
                tensor.data = tensor.data.to(dtype)


def cast_whole(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast all of a module's stored weights in place."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if is_stored(tensor, dtype):
                tensor.data = tensor.data.to(dtype)


def cast_layers_while_running(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let each of the decoder's layers compute in another precision: it is cast before it runs, and put back after it."""
    try:
        _, layers = decoder_layers(model)
    except NoLayersError:  # they do not run one by one
        cast_whole(model, dtype)
        return
    for layer in layers:
        stored: dict[torch.Tensor, torch.Tensor] = {}
        layer.register_forward_pre_hook(partial(_cast, stored, dtype))
        layer.register_forward_hook(partial(_put_back, stored), always_call=True)


@contextmanager
def as_if_cast(layers: Iterable[torch.nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """While open, the weights of layers have a precision, but neither values nor memory: for passes that only see shapes."""
    tensors = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    stored = {tensor: tensor.data for tensor in tensors if is_stored(tensor, dtype)}
    for tensor in stored:
        tensor.data = torch.zeros((), dtype=dtype).expand(tensor.shape)
    try:
        yield
    finally:
        for tensor, data in stored.items():
            tensor.data = data


def _cast(stored: dict[torch.Tensor, torch.Tensor], dtype: torch.dtype, layer: torch.nn.Module, _: Any) -> None:
    for tensor in (*layer.parameters(), *layer.buffers()):
        if is_stored(tensor, dtype):
            stored[tensor] = tensor.data
            tensor.data = tensor.data.to(dtype)


def _put_back(stored: dict[torch.Tensor, torch.Tensor], *_: Any) -> None:
    for tensor, data in stored.items():
        tensor.data = data
    stored.clear()
