"""What each layer caches of a token, seen in a forward pass: no configuration says it for all architectures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from medusa_export.model.checkpoint import Backbone, unsupported
from medusa_export.trace.ancestors import Ancestors
from medusa_export.trace.attention_node import counted
from medusa_export.trace.layers import NoLayersError
from medusa_export.trace.own_attention import has_own_attention
from medusa_export.trace.quiet import quiet_torch
from medusa_export.trace.scatter_cache import ScatterCache
from medusa_export.trace.step_module import StepModule
from medusa_runtime.bundle.cache_layout import CAPACITY_AXIS, CacheTensor
from medusa_runtime.errors import first_line

DTYPES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
TOKENS = 2
RECURRENT = frozenset({"linear_attention", "mamba"})  # kinds of layers that keep a state, wherever they keep it


class RecordingCache(ScatterCache):
    """A cache without memory, which notes what layers write to it. ``current`` is the layer that runs."""

    def __init__(self, num_layers: int, ancestors: Ancestors) -> None:
        super().__init__({}, ancestors)
        self.current: int | None = None
        self.mixer: torch.nn.Module | None = None  # the part of the layer that runs and knows its number
        self.recurrent: dict[int, str] = {}  # by layer: the class of what keeps a recurrent state
        self.num_runs: Counter[int] = Counter()
        self.tensors: list[list[CacheTensor]] = [[] for _ in range(num_layers)]

    @property
    def capacity(self) -> int:
        return TOKENS

    def begin(self, layer: int, *_: Any) -> None:
        """A layer's forward pass begins."""
        self.current = layer
        self.num_runs[layer] += 1

    def enter(self, mixer: torch.nn.Module, *_: Any) -> None:
        """A part of a layer that knows the layer's number begins."""
        self.mixer = mixer

    def update_recurrent_state(self, state: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Note which layer would keep a state, for a message that names them all."""
        if layer_idx not in self.scanned:
            self.recurrent[layer_idx] = type(self.mixer).__name__
        return state

    def write(self, name: str, new: torch.Tensor) -> torch.Tensor:
        if self.current is None:
            raise NoLayersError(f"{name} is cached outside of the decoder's layers")
        if new.dim() != 4 or new.shape[CAPACITY_AXIS] != TOKENS or new.dtype not in DTYPES:
            raise ValueError(f"{name} is cached as {new.dtype} {list(new.shape)}, which is not an entry a token")
        tensor = CacheTensor(name, new.shape[1], new.shape[3], DTYPES[new.dtype])
        if any(tensor.name == known.name for layer in self.tensors for known in layer):
            raise ValueError(f"{name} is cached twice in a step")
        self.tensors[self.current].append(tensor)
        return new


def cached_tensors(backbone: Backbone, module: StepModule, layers: Sequence[torch.nn.Module]) -> list[list[CacheTensor]]:
    """The tensors that each decoder layer writes to the cache, in the order of writing. A layer may have none.

    The pass runs on fake tensors: it knows shapes and dtypes alone, and takes no time and memory for a large model.

    Raises:
        NoLayersError: a layer does not run once in a step, or something is cached outside of the layers.
        ExportError: what a layer caches is not one entry a token, or it attends in code of its own.
    """
    what = type(backbone.model).__name__
    with unchanged(backbone.model), quiet_torch(), fake_tensors(), torch.no_grad(), counted() as attending:
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        mask = torch.ones(1, TOKENS, TOKENS, dtype=torch.bool)
        cache = RecordingCache(len(layers), Ancestors(ids, mask, torch.zeros(1, dtype=torch.long)))
        hooks = [layer.register_forward_pre_hook(partial(cache.begin, index)) for index, layer in enumerate(layers)]
        parts = [part for layer in layers for part in layer.modules() if hasattr(part, "layer_idx")]
        hooks += [part.register_forward_pre_hook(cache.enter) for part in parts]
        try:
            module.run(cache, ids, torch.zeros(1, 1, dtype=torch.long))
        except NoLayersError:
            raise
        except GuardOnDataDependentSymNode:
            raise unsupported(what, "what it computes next depends on values, as in a loop over experts") from None
        except Exception as error:  # a model's code can raise anything
            if kinds := sorted(RECURRENT & {*backbone.layer_types}):
                raise unsupported(what, f"it has layers of kind {', '.join(kinds)}, whose state a tree cannot branch") from None
            raise unsupported(what, first_line(error)) from error
        finally:
            for hook in hooks:
                hook.remove()
    _require_states_that_branch(backbone, cache)
    for index in range(len(layers)):
        if (runs := cache.num_runs[index]) != 1:
            raise NoLayersError(f"its layer {index} runs {runs} times in a step")
    few = len(attending) < sum(tensor.part == "key" for layer in cache.tensors for tensor in layer)
    if few and not has_own_attention(backbone.model):
        raise unsupported(what)
    return cache.tensors


def _require_states_that_branch(backbone: Backbone, cache: RecordingCache) -> None:
    what, depth = type(backbone.model).__name__, len(cache.tensors)
    if cache.recurrent:
        kept, classes = f"{len(cache.recurrent)} of its {depth} layers", ", ".join(sorted({*cache.recurrent.values()}))
        raise unsupported(what, f"{kept} keep a recurrent state ({classes}), which a tree of drafts cannot branch")
    kinds = dict(zip(range(depth), backbone.layer_types, strict=False))
    if hidden := [index for index, kind in kinds.items() if kind in RECURRENT and not cache.tensors[index]]:
        kept = f"{len(hidden)} of its {depth} layers ({kinds[hidden[0]]})"
        raise unsupported(what, f"{kept} keep a state outside of the cache, which a tree of drafts cannot branch")
    if not any(cache.tensors):
        raise unsupported(what, "it caches no keys and values")


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Undo what a forward pass changes in a model, such as the frequencies that LongRoPE stores: they would be fake tensors."""
    before = [(vars(module), dict(vars(module)), dict(vars(module)["_buffers"])) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, kept, buffers in before:
            for holder, values in ((attributes, kept), (kept["_buffers"], buffers)):
                holder.clear()
                holder.update(values)


def fake_tensors() -> FakeTensorMode:
    """Tensors without values. Sizes that depend on values, such as an expert's number of tokens, are symbols."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
