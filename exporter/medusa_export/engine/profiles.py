"""Optimisation profiles: the shapes that an engine accepts, and the shape that it is tuned for."""

from __future__ import annotations

from medusa_runtime.bundle.manifest import HEADS, PREFILL, VERIFY, GraphFacts, Limits, TensorFacts
from medusa_runtime.errors import BundleError

Sizes = dict[str, tuple[int, int, int]]  # dimension -> min, opt, max
Profile = dict[str, dict[str, list[int]]]  # input -> "min", "opt", "max" -> shape


def step_profiles(graph: GraphFacts, limits: Limits, tree_nodes: int) -> dict[str, Profile]:
    """The step engine's profiles, in the order in which they are added.

    ``prefill`` is for chunks of prompts, and tuned for a full chunk of which one row is evaluated. ``verify`` is for candidate
    trees and the single token of plain decoding, and tuned for a tree of `tree_nodes` with all rows evaluated.

    Raises:
        BundleError: the graph has a named dimension that is not in the contract.
    """
    assert limits.max_batch_size is not None
    assert limits.max_tree_nodes is not None
    assert limits.max_prefill_tokens is not None
    batch, nodes, chunk = limits.max_batch_size, limits.max_tree_nodes, limits.max_prefill_tokens
    sizes: dict[str, Sizes] = {
        PREFILL: {"batch": (1, batch, batch), "num_tokens": (1, chunk, chunk), "num_rows": (1, 1, nodes)},
        VERIFY: {"batch": (1, batch, batch), "num_tokens": (1, tree_nodes, nodes), "num_rows": (1, tree_nodes, nodes)},
    }
    return {name: _profile(graph, each) for name, each in sizes.items()}


def heads_profiles(graph: GraphFacts, limits: Limits) -> dict[str, Profile]:
    """The heads engine's only profile.

    Raises:
        BundleError: the graph has a named dimension that is not in the contract.
    """
    assert limits.max_batch_size is not None
    return {HEADS: _profile(graph, {"batch": (1, limits.max_batch_size, limits.max_batch_size)})}


def largest_sizes(graph: GraphFacts, profile: Profile) -> dict[str, int]:
    """The largest size of each named dimension in a profile."""
    return {
        name: size
        for tensor in graph.inputs
        if tensor.name in profile
        for name, size in zip(tensor.shape, profile[tensor.name]["max"], strict=True)
        if isinstance(name, str)
    }


def _profile(graph: GraphFacts, sizes: Sizes) -> Profile:
    return {
        tensor.name: {bound: _shape(tensor, sizes, index) for index, bound in enumerate(("min", "opt", "max"))}
        for tensor in graph.inputs
        if any(isinstance(size, str) for size in tensor.shape)
    }


def _shape(tensor: TensorFacts, sizes: Sizes, index: int) -> list[int]:
    shape = []
    for size in tensor.shape:
        if isinstance(size, str) and size not in sizes:
            raise BundleError(f"input {tensor.name} has a dimension {size!r} that is not in the contract; export it again")
        shape.append(sizes[size][index] if isinstance(size, str) else size)
    return shape
