"""Checks of requests, trees and batch sizes against a bundle, once, before any work."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.drafting.costs import Costs
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import CapacityError, ContextLengthError, OptionError
from medusa_runtime.options import DecodingOptions

DEFAULT_NEW_TOKENS, DEFAULT_BATCH_SIZE = 256, 8
RANDOM_SEEDS = 1 << 53  # JSON readers with floating-point numbers keep all smaller integers exactly


@dataclass(frozen=True)
class DecodingRequest:
    """A request that can be decoded to its end. Make one with `check_request`."""

    prompt_ids: Sequence[int]
    options: DecodingOptions
    max_new_tokens: int
    seed: int


def check_request(manifest: Manifest, prompt_ids: Sequence[int], options: DecodingOptions) -> DecodingRequest:
    """Refuse a request that cannot be decoded to its end, and fill in its number of tokens and its seed.

    Raises:
        OptionError: the prompt is empty, or the prompt or an option names an id outside the vocabulary.
        ContextLengthError: the prompt with its answer is longer than the bundle allows.
        TreeError: the options' tree does not fit the heads.
    """
    longest, vocab_size = manifest.limits.max_seq_len, manifest.model.vocab_size
    if not prompt_ids:
        raise OptionError("the prompt is empty")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise OptionError(f"the prompt holds a token id outside the vocabulary of {vocab_size}")
    for name, token_ids in options.named_tokens.items():
        if outside := [token for token in token_ids if not 0 <= token < vocab_size]:
            raise OptionError(f"{name} names the token {outside[0]}; the vocabulary has {vocab_size}")
    if options.tree is not None:
        check_tree(manifest, options.tree)
    room = longest - len(prompt_ids)
    wanted = options.max_new_tokens
    if wanted is None:
        wanted = max(1, options.min_new_tokens, min(DEFAULT_NEW_TOKENS, room))
    if wanted > room:
        raise ContextLengthError(
            f"the prompt has {len(prompt_ids)} tokens and {wanted} new ones were asked for, together more "
            f"than the bundle's {longest}; shorten the prompt or lower max_new_tokens"
        )
    seed = options.seed if options.seed is not None else secrets.randbelow(RANDOM_SEEDS)
    return DecodingRequest(prompt_ids, options, wanted, seed)


def check_tree(manifest: Manifest, tree: CandidateTree | DynamicTree) -> None:
    """Refuse a tree that the bundle cannot verify.

    Raises:
        OptionError: it is no tree.
        TreeError: it is deeper or wider than the heads.
        CapacityError: it has more nodes than the bundle's engines take.
    """
    heads, limits = manifest.heads, manifest.limits
    if not isinstance(tree, CandidateTree | DynamicTree):
        raise OptionError(f"tree is {tree!r}; it must be a CandidateTree, a DynamicTree or none")
    if isinstance(tree, CandidateTree):
        tree.check_fits(heads.num_heads, heads.top_k)
    if limits.max_tree_nodes is not None and tree.num_nodes > limits.max_tree_nodes:
        raise CapacityError(
            f"the tree has {tree.num_nodes} nodes, the engine takes {limits.max_tree_nodes}; "
            f"rebuild it with --max-tree-nodes {tree.num_nodes}"
        )


def checked_batch_size(manifest: Manifest, max_batch_size: int | None) -> int:
    """The number of sequences to decode at a time: the one asked for, or else 8, or as many as the bundle takes.

    Raises:
        OptionError: it is below 1.
        CapacityError: it is more than the bundle's engines take.
    """
    largest = manifest.limits.max_batch_size
    if max_batch_size is None:
        return min(DEFAULT_BATCH_SIZE, largest or DEFAULT_BATCH_SIZE)
    if type(max_batch_size) is not int or max_batch_size < 1:
        raise OptionError(f"max_batch_size is {max_batch_size!r}; it must be a whole number of at least 1")
    if largest is not None and max_batch_size > largest:
        raise CapacityError(f"max_batch_size is {max_batch_size}, the bundle takes {largest}")
    return max_batch_size


def check_costs(costs: Costs | str | None, *names: str) -> None:
    """Refuse anything but a table of costs, costs that are learned, None, or one of some names.

    Raises:
        OptionError: it is something else.
    """
    if costs is not None and costs not in names and not hasattr(costs, "observe_heads"):
        raise OptionError(f"costs is {costs!r}; it must be {', '.join([*map(repr, names), 'StepCosts, LearnedCosts or None'])}")


def check_limits(max_gap_seconds: float | None, max_cache_bytes: int | None) -> None:
    """Refuse limits of an engine that are out of range.

    Raises:
        OptionError: one of them is.
    """
    if max_gap_seconds is not None and (not isinstance(max_gap_seconds, int | float) or not max_gap_seconds > 0):
        raise OptionError(f"max_gap_seconds is {max_gap_seconds!r}; it must be a number of seconds above 0, or none")
    if max_cache_bytes is not None and (type(max_cache_bytes) is not int or max_cache_bytes < 1):
        raise OptionError(f"max_cache_bytes is {max_cache_bytes!r}; it must be a whole number of bytes, or none for no limit")
