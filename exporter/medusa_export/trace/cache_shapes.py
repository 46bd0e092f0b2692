"""What each layer caches of a token, seen in a forward pass: no configuration says it for all architectures."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from medusa_export.model.checkpoint import Backbone, unsupported
from medusa_export.trace.ancestors import Ancestors
from medusa_export.trace.quiet import quiet_torch
from medusa_export.trace.scatter_cache import ScatterCache
from medusa_export.trace.step_module import StepModule
from medusa_runtime.bundle.cache_layout import CAPACITY_AXIS, CacheTensor
from medusa_runtime.errors import first_line

DTYPES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
TOKENS = 2


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
            raise ValueError(f"{name} is cached outside of the decoder's layers")
        if new.dim() != 4 or new.shape[CAPACITY_AXIS] != TOKENS or new.dtype not in DTYPES:
            raise ValueError(f"{name} is cached as {new.dtype} {list(new.shape)}, which is not an entry a token")
        tensor = CacheTensor(name, new.shape[1], new.shape[3], DTYPES[new.dtype])
        if any(tensor.name == known.name for layer in self.tensors for known in layer):
            raise ValueError(f"{name} is cached twice in a step")
        self.tensors[self.current].append(tensor)
        return new


def cached_tensors(backbone: Backbone, module: StepModule, layers: torch.nn.ModuleList) -> list[list[CacheTensor]]:
    """The tensors that each decoder layer writes to the cache, in the order of writing. A layer may have none.

    The pass runs on fake tensors: it knows shapes and dtypes alone, and takes no time and memory for a large model.

    Raises:
        ExportError: a layer runs several times in a step, or what it caches is not one entry a token.
    """
    what = backbone.facts.architecture
    with quiet_torch(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        mask = torch.ones(1, TOKENS, TOKENS, dtype=torch.bool)
        cache = RecordingCache(len(layers), Ancestors(ids, mask, torch.zeros(1, dtype=torch.long)))
        hooks = [layer.register_forward_pre_hook(partial(cache.begin, index)) for index, layer in enumerate(layers)]
        hooks += [part.register_forward_pre_hook(cache.enter) for part in layers.modules() if hasattr(part, "layer_idx")]
        try:
            module.run(cache, ids, torch.zeros(1, 1, dtype=torch.long))
        except Exception as error:  # a model's code can raise anything
            raise unsupported(what, first_line(error)) from error
        finally:
            for hook in hooks:
                hook.remove()
    if cache.recurrent:
        kept = f"{len(cache.recurrent)} of its {len(layers)} layers keep a recurrent state"
        classes = ", ".join(sorted({*cache.recurrent.values()}))
        raise unsupported(what, f"{kept} ({classes}), which a tree of drafts cannot branch")
    for index in range(len(layers)):
        if (runs := cache.num_runs[index]) != 1:
            raise unsupported(what, f"its layer {index} runs {runs} times in a forward pass")
    return cache.tensors
