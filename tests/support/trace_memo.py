"""PyTorch's exporter, run once for each model: tests export the same few tiny models again and again."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator
from types import NoneType
from typing import Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig

from medusa_export.trace.torch_to_onnx import tensor_of, torch_tensor

PLAIN = (bool, int, float, str, list, tuple, dict, NoneType)


class TraceMemo:
    """Stands for `export_module`. The graph that it gives holds the weights of the module that it is asked for.

    Two modules are taken for the same if they have the same classes, configurations and plain attributes, tensors of the same
    names, shapes and types, and inputs of the same shapes. Errors are not kept.
    """

    def __init__(self, export: Callable[..., ir.Model]) -> None:
        self.export = export
        self.made: dict[Hashable, ir.Model] = {}

    def __call__(self, what: str, module: torch.nn.Module, args: Any, kwargs: Any, shapes: Any, opset: int) -> ir.Model:
        """As `export_module`."""
        key = (tuple(facts(module)), _shapes((args, kwargs)), repr(shapes), opset)
        if key not in self.made:
            made = self.export(what, module, args, kwargs, shapes, opset)
            for part in ir.traversal.RecursiveGraphIterator(made.graph):
                for noted in (part, *part.outputs):
                    noted.meta.clear()  # the exporter notes what it traced, which would stay in memory
            self.made[key] = made
        model = self.made[key].clone()
        names = {name for name, _ in _tensors(module)}
        for name, value in model.graph.initializers.items():
            if name in names:
                tensor = tensor_of(module, name)
                value.const_value = torch_tensor(tensor, name, tensor.dtype)
        return model


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by all of their names: tied ones have several."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def facts(module: torch.nn.Module) -> Iterator[Hashable]:
    """What a trace depends on, beside the inputs."""
    configs: dict[int, Hashable] = {}
    for name, part in module.named_modules():
        yield name, type(part)
        for attribute, value in vars(part).items():
            if isinstance(value, PreTrainedConfig):
                yield name, attribute, configs.setdefault(id(value), _config(value))
            elif not attribute.startswith("_") and (isinstance(value, PLAIN) or hasattr(value, "__dataclass_fields__")):
                yield name, attribute, repr(value)
    first: dict[int, str] = {}
    for name, tensor in _tensors(module):
        yield name, first.setdefault(id(tensor), name), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _config(config: PreTrainedConfig) -> Hashable:
    said = config.to_dict() | {"_name_or_path": None}
    return json.dumps(said, sort_keys=True, default=str), config._attn_implementation


def _shapes(inputs: Any) -> Hashable:
    leaves, spec = pytree.tree_flatten(inputs)
    return str(spec), tuple((leaf.dtype, tuple(leaf.shape)) for leaf in leaves)
