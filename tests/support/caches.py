"""Layouts of caches whose tensors differ, as latent attention, shared keys and short convolutions make them."""

from __future__ import annotations

from collections.abc import Mapping

from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import GraphFacts, TensorFacts

# heads and width by name: values narrower than keys, a convolution's inputs, layers without a cache of their own
UNEQUAL = {"0.key": (2, 16), "0.value": (2, 8), "1.conv": (1, 24), "4.key": (2, 16), "4.value": (2, 8)}


def step_facts(tensors: Mapping[str, tuple[int, int]], dtypes: Mapping[str, str] | None = None) -> GraphFacts:
    """A step graph with these cache tensors alone."""
    past, present = (
        [
            TensorFacts(
                name=f"{when}.{name}", dtype=(dtypes or {}).get(name, "float"), shape=["batch", heads, "capacity", width]
            )
            for name, (heads, width) in tensors.items()
        ]
        for when in ("past", "present")
    )
    return GraphFacts(file="step.onnx", target="portable", inputs=past, outputs=present)


def layout_of(tensors: Mapping[str, tuple[int, int]], dtypes: Mapping[str, str] | None = None) -> CacheLayout:
    """The layout of these cache tensors."""
    return CacheLayout.of(step_facts(tensors, dtypes))
