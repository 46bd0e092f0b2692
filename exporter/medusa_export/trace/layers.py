"""Groups a decoder's layers by kind, so that only a few layers of each kind are traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa_runtime.bundle.cache_layout import CacheTensor

MARKER_DOMAIN = "medusa.trace"
PLAIN = (bool, int, float, str, tuple, list, dict, type(None))


class NoLayersError(Exception):
    """A decoder does not run one list of layers, each of them once."""


def text_decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a model that runs the layers: the model without its LM head, and without the parts that read images."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model  # some call their LM head "decoder"


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The text decoder's layers and their dotted name in the model.

    They are the decoder's largest ModuleList by parameters, of those as long as the configuration says if there are any.

    Raises:
        NoLayersError: the decoder has no ModuleList.
    """
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    inside = {id(module) for module in text_decoder(model).modules()}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and id(module) in inside
    ]
    if not lists:
        raise NoLayersError("its decoder has no list of layers")
    as_long = [(name, module) for name, module in lists if len(module) == depth]
    return max(as_long or lists, key=lambda named: sum(parameter.numel() for parameter in named[1].parameters()))


def layer_kinds(
    layers: torch.nn.ModuleList, layer_types: list[str], cached: Sequence[Sequence[CacheTensor]]
) -> list[list[int]]:
    """Group the indices of layers with the same modules, shapes, settings and cache, such as [[0, 2, 4], [1, 3, 5]].

    Args:
        layers: the decoder's.
        layer_types: the kind of attention of each layer.
        cached: the tensors that each layer caches.
    """
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        cache = tuple((tensor.part, tensor.kind) for tensor in cached[index])
        kinds.setdefault((layer_types[index], cache, _signature(layer)), []).append(index)
    return list(kinds.values())


def _signature(layer: torch.nn.Module) -> tuple[Any, ...]:
    def settings(module: torch.nn.Module) -> tuple[Any, ...]:
        named = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "layer_idx"}
        return tuple(sorted((name, repr(value)) for name, value in named.items() if isinstance(value, PLAIN)))

    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return (
        tuple((name, type(module).__name__, settings(module)) for name, module in layer.named_modules()),
        tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors),
    )


@contextmanager
def only_layers(layers: torch.nn.ModuleList, kept: list[int]) -> Iterator[None]:
    """While open, the decoder runs only the kept layers. In the trace, two marker nodes enclose each of them.

    Layer 0 must be kept: skipped layers copy its return type (tensor or tuple).
    """
    originals = list(layers)
    returns_tuple: list[bool] = []
    hooks = []
    for index, layer in enumerate(originals):
        if index in kept:
            hooks.append(layer.register_forward_pre_hook(partial(_mark_input, index), with_kwargs=True))
            hooks.append(layer.register_forward_hook(partial(_mark_output, index, returns_tuple)))
        else:
            layers[index] = _Skipped(layer, returns_tuple)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for index, layer in enumerate(originals):
            layers[index] = layer


class _Skipped(torch.nn.Module):
    """Identity stand-in for a layer. Attribute reads are forwarded to the real layer."""

    def __init__(self, layer: torch.nn.Module, returns_tuple: list[bool]) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is not registered as a submodule
        self._returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self._returns_tuple[0] else hidden_states


def _mark_input(layer: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if args:
        return (_mark("LayerInput", layer, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": _mark("LayerInput", layer, kwargs["hidden_states"])}


def _mark_output(layer: int, returns_tuple: list[bool], _: torch.nn.Module, __: Any, result: Any) -> Any:
    returns_tuple.append(isinstance(result, tuple))
    if isinstance(result, tuple):
        return (_mark("LayerOutput", layer, result[0]), *result[1:])
    return _mark("LayerOutput", layer, result)


def _mark(kind: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"{MARKER_DOMAIN}::{kind}",
        [hidden],
        attrs={"layer": layer},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )
