"""Checks of the options of `medusa-export trt` against the bundle and the flavour."""

from __future__ import annotations

from pathlib import Path

from medusa_export.command_options.engine_options import DEFAULT_MAX_SEQ_LEN, EngineOptions
from medusa_export.engine.flavor import TensorRT
from medusa_runtime.bundle.manifest import HEADS, STEP, EngineWeights, Limits, Manifest, Precision
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.errors import BundleError, OptionError

MAX_TREE_NODES = 1024  # a larger step costs more than its drafts can gain
CAPACITY_MULTIPLE = 64  # entries that attention kernels read at a time
MAX_OPT_LEVEL = 5
_NEEDS: dict[str, tuple[int, int]] = {"bf16": (8, 0), "int4": (8, 0), "fp8": (8, 9)}  # the lowest compute capability


def load_source(bundle: Path) -> Manifest:
    """The manifest of a bundle, if engines can be built from it.

    Raises:
        BundleError: the directory is not a bundle, or the bundle has engines already, is quantised, lacks a portable graph, or
        failed its validation.
    """
    source = Manifest.load(bundle)
    if source.kind != "onnx":
        raise BundleError(f"{bundle} is an engine bundle already; build from the ONNX bundle that it was made from")
    if source.quantization is not None:  # TensorRT supports neither zero points nor gathering rows of integers
        raise BundleError(
            f"{bundle} is quantised ({source.quantization.scheme}); build from the float bundle that it was made from, "
            "with --weights int8, int4 or fp8"
        )
    for name in (STEP, HEADS):
        if source.graphs[name].target != "portable":
            raise BundleError(f"{bundle} has no portable {name} graph; make one with: medusa-export onnx")
    if source.validation.status == "failed":
        raise BundleError(f"{bundle} failed its validation ({source.validation.report}); export it again")
    return source


def engine_limits(options: EngineOptions, source: Manifest) -> Limits:
    """The engines' limits, from the options and the bundle's own limits.

    A step writes cache entries for its T tokens after a sequence's end, including drafts that are rejected later. So the cache
    needs `max_tree_nodes` entries in addition to `max_seq_len`. Chunks of a prompt always end within `max_seq_len`.

    Raises:
        OptionError: an option is out of its range.
    """
    limits = source.limits
    max_seq_len = options.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(limits.max_seq_len, DEFAULT_MAX_SEQ_LEN)
    smallest_tree = default_tree_nodes(source)
    largest_tree = limits.max_tree_nodes or MAX_TREE_NODES
    _require_range("--max-seq-len", max_seq_len, 2, limits.max_seq_len)
    _require_range("--max-batch-size", options.max_batch_size, 1, limits.max_batch_size)
    _require_range("--max-prefill-tokens", options.max_prefill_tokens, 1, limits.max_prefill_tokens)
    _require_range("--max-tree-nodes", options.max_tree_nodes, smallest_tree, largest_tree, "the bundle's default tree")
    needed = max_seq_len + options.max_tree_nodes
    return Limits(
        max_seq_len=max_seq_len,
        max_batch_size=options.max_batch_size,
        max_tree_nodes=options.max_tree_nodes,
        max_prefill_tokens=min(options.max_prefill_tokens, max_seq_len),
        capacity=-(-needed // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE,
    )


def require_flavor_takes(options: EngineOptions, tensorrt: TensorRT) -> None:
    """Raise an `OptionError` for an option that is out of range, conflicts with another, or is unknown to the flavour."""
    if options.workspace is not None:
        _require_range("--workspace", options.workspace, 1, None)
    if options.opt_level is not None:
        _require_range("--opt-level", options.opt_level, 0, MAX_OPT_LEVEL)
    if options.timing_cache is not None and not options.timing_cache.absolute().parent.is_dir():
        raise OptionError(f"--timing-cache is {options.timing_cache}, but its directory does not exist; make it first")
    if options.strip_weights and options.weights != "as-is":
        raise OptionError(
            f"--strip-weights does not work with --weights {options.weights}: the bundle has no such weights to share"
        )
    if tensorrt.flavor == "rtx":
        _require_not_full_only(options, tensorrt)


def _require_not_full_only(options: EngineOptions, tensorrt: TensorRT) -> None:
    for option, given, instead in (
        ("--hardware-compatibility", options.hardware_compatibility != "none", "name every GPU with --compute-capability"),
        ("--version-compatible", options.version_compatible, "build engines for each version"),
        ("--timing-cache", options.timing_cache is not None, "leave it out, since its builds time no kernels"),
    ):
        if given:
            raise OptionError(f"{option} is only for --flavor tensorrt; with {tensorrt.name}, {instead}")


def require_gpus_take(weights: EngineWeights, precision: Precision, capabilities: list[str]) -> None:
    """Raise an `OptionError` if one of the GPUs to build for does not support the engines' types."""
    for kind, name, instead in (
        (precision, f"the bundle's {precision}", "export it with --dtype fp16"),
        (weights, f"--weights {weights}", "use --weights int8"),
    ):
        major, minor = _NEEDS.get(kind, (0, 0))
        if lacking := [found for found in capabilities if tuple(map(int, found.split("."))) < (major, minor)]:
            raise OptionError(f"{name} needs compute capability {major}.{minor}, but you build for {lacking[0]}; {instead}")


def default_tree_nodes(source: Manifest) -> int:
    """Nodes of the bundle's default tree, including the root."""
    return CandidateTree.from_json(source.tree).num_nodes


def _require_range(option: str, value: int, low: int, high: int | None, why_low: str = "") -> None:
    if value < low or (high is not None and value > high):
        reason = f" ({why_low})" if why_low else ""
        raise OptionError(f"{option} is {value}; it must be {low}{reason} " + ("or more" if high is None else f"to {high}"))
