"""What engines are asked for, checked against the bundle that they are built from and the flavour that builds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medusa_export.trt.flavor import TensorRT
from medusa_runtime.bundle.manifest import HEADS, STEP, EngineWeights, HardwareCompatibility, Limits, Manifest, Precision
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.errors import BundleError, OptionError

DEFAULT_MAX_SEQ_LEN = 2048  # attention reads every slot of the cache, used or not, so a long one costs at every step
MAX_TREE_NODES = 1024  # a step of more tokens costs more than its drafts can win
CAPACITY_MULTIPLE = 64  # slots that attention kernels read at a time
MAX_OPT_LEVEL = 5
_NEEDS: dict[str, tuple[int, int]] = {"bf16": (8, 0), "int4": (8, 0), "fp8": (8, 9)}  # the least compute capability


@dataclass(frozen=True)
class EngineOptions:
    """What `medusa-export trt` is asked for; the command's help tells what each means."""

    bundle: Path
    output: Path
    flavor: str = "rtx"
    compute_capabilities: tuple[str, ...] = ()  # none: the flavour's default
    max_seq_len: int | None = None  # none: the bundle's own, at most DEFAULT_MAX_SEQ_LEN
    max_batch_size: int = 1
    max_tree_nodes: int = 64
    max_prefill_tokens: int = 512  # cut to max_seq_len
    weights: EngineWeights = "as-is"
    strip_weights: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    timing_cache: Path | None = None
    workspace: int | None = None  # MB; none: what TensorRT takes
    opt_level: int | None = None  # none: TensorRT's default
    verbose: bool = False
    force: bool = False


def load_source(bundle: Path) -> Manifest:
    """The manifest of a bundle that engines can be built from.

    Raises:
        BundleError: it is no bundle, holds engines already, is quantised, lacks a portable graph, or failed its validation.
    """
    source = Manifest.load(bundle)
    if source.kind != "onnx":
        raise BundleError(f"{bundle} holds engines already; build from the ONNX bundle they were made from")
    if source.quantization is not None:  # its graphs gather rows of integers and have zero points: TensorRT takes neither
        raise BundleError(
            f"{bundle} is quantised ({source.quantization.scheme}); build from the float bundle it was made from, "
            "with --weights int8, int4 or fp8"
        )
    for name in (STEP, HEADS):
        if source.graphs[name].target != "portable":
            raise BundleError(f"{bundle} has no portable {name} graph; make one with: medusa-export onnx")
    if source.validation.status == "failed":
        raise BundleError(f"{bundle} failed its validation ({source.validation.report}); export it again")
    return source


def engine_limits(options: EngineOptions, source: Manifest) -> Limits:
    """What the engines will take, from the options and the bundle's own limits.

    A step writes the keys of its T tokens from a sequence's length on, those of rejected drafts too: besides
    `max_seq_len` slots the cache needs `max_tree_nodes` more. A prompt's chunk ends within `max_seq_len`.

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
    _require_range("--max-tree-nodes", options.max_tree_nodes, smallest_tree, largest_tree, "the bundle's own tree")
    needed = max_seq_len + options.max_tree_nodes
    return Limits(
        max_seq_len=max_seq_len,
        max_batch_size=options.max_batch_size,
        max_tree_nodes=options.max_tree_nodes,
        max_prefill_tokens=min(options.max_prefill_tokens, max_seq_len),
        capacity=-(-needed // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE,
    )


def require_flavor_takes(options: EngineOptions, tensorrt: TensorRT) -> None:
    """Raise an `OptionError` for an option out of its range, without its companion, or that the flavour does not know."""
    if options.workspace is not None:
        _require_range("--workspace", options.workspace, 1, None)
    if options.opt_level is not None:
        _require_range("--opt-level", options.opt_level, 0, MAX_OPT_LEVEL)
    if options.timing_cache is not None and not options.timing_cache.absolute().parent.is_dir():
        raise OptionError(f"--timing-cache is {options.timing_cache}, whose directory does not exist; make it first")
    if options.strip_weights and options.weights != "as-is":
        raise OptionError(f"--strip-weights leaves out what the bundle holds, which are no {options.weights} weights")
    if tensorrt.flavor == "rtx":
        _require_not_full_only(options, tensorrt)


def _require_not_full_only(options: EngineOptions, tensorrt: TensorRT) -> None:
    for option, given, instead in (
        ("--hardware-compatibility", options.hardware_compatibility != "none", "name every GPU with --compute-capability"),
        ("--version-compatible", options.version_compatible, "build the engines again for each version of it"),
        ("--timing-cache", options.timing_cache is not None, "leave it out: nothing is timed when it builds"),
    ):
        if given:
            raise OptionError(f"{option} is for --flavor tensorrt; with {tensorrt.name}, {instead}")


def require_gpus_take(weights: EngineWeights, precision: Precision, capabilities: list[str]) -> None:
    """Raise an `OptionError` where a GPU that is built for lacks a type of the engines."""
    for kind, name, instead in (
        (precision, f"the bundle's {precision}", "export it with --dtype fp16"),
        (weights, f"--weights {weights}", "use --weights int8"),
    ):
        major, minor = _NEEDS.get(kind, (0, 0))
        if lacking := [found for found in capabilities if tuple(map(int, found.split("."))) < (major, minor)]:
            raise OptionError(f"{name} needs compute capability {major}.{minor}, one to build for has {lacking[0]}; {instead}")


def default_tree_nodes(source: Manifest) -> int:
    """Nodes of the tree that the bundle uses by default, root included."""
    return CandidateTree.from_json(source.tree).num_nodes


def _require_range(option: str, value: int, low: int, high: int | None, why_low: str = "") -> None:
    if value < low or (high is not None and value > high):
        reason = f" ({why_low})" if why_low else ""
        raise OptionError(f"{option} is {value}; it must be {low}{reason} " + ("or more" if high is None else f"to {high}"))
