"""Opening a bundle: manifest → placement → tuning → tree and costs → engine. Arguments are checked first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from medusa_runtime.backends.choosing import Placement, choose_backend, open_placement
from medusa_runtime.backends.names import AUTO
from medusa_runtime.bundle.cpu import Spin, check_num_threads, check_spin, device_key, memory_limit
from medusa_runtime.bundle.manifest import ORT_CPU, Manifest
from medusa_runtime.decoding.checks import check_costs, check_limits, check_tree, checked_batch_size
from medusa_runtime.decoding.engine import LOOKUP_NODES, DecodingEngine
from medusa_runtime.drafting.corrected import CorrectedCosts
from medusa_runtime.drafting.costs import Costs, LearnedCosts, StepCosts, fitting_nodes
from medusa_runtime.drafting.ngrams import NGrams
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.drafting.tuning import DeviceTuning, tuned
from medusa_runtime.errors import BundleError, OptionError

Tree = CandidateTree | DynamicTree
CostsChoice = Costs | Literal["auto", "learn", "measure"] | None
log = logging.getLogger(__name__)


def open_engine(
    path: str | Path,
    backend: str = AUTO,
    *,
    tree: Tree | None = None,
    max_batch_size: int | None = None,
    costs: CostsChoice = "auto",
    reuse_prefixes: bool = True,
    prompt_lookup: bool | None = None,
    max_gap_seconds: float | None = None,
    max_cache_bytes: int | None = None,
    device: str = "auto",
    num_threads: int = 0,
    spin: Spin = "auto",
    cuda_graphs: bool | None = None,
    verify_files: bool = True,
    allow_failed: bool = False,
    allow_engine_code: bool = False,
) -> DecodingEngine:
    """Open a bundle, and an engine on it. Arguments and errors are those of `MedusaLM.from_bundle`."""
    _check_flags(
        reuse_prefixes=reuse_prefixes,
        prompt_lookup=prompt_lookup is not None and prompt_lookup,
        cuda_graphs=cuda_graphs is not None and cuda_graphs,
        verify_files=verify_files,
        allow_failed=allow_failed,
        allow_engine_code=allow_engine_code,
    )
    path = Path(path).resolve()  # a later change of the working directory does not matter
    manifest = Manifest.load(path)
    if manifest.validation.status == "failed" and not allow_failed:
        raise BundleError(
            f"{path} failed its validation ({manifest.validation.report}); export it again, "
            "or allow it on purpose (allow_failed=True, --allow-failed)"
        )
    max_batch_size, num_threads = checked_batch_size(manifest, max_batch_size), check_num_threads(num_threads)
    check_spin(spin)
    check_limits(max_gap_seconds, max_cache_bytes)
    check_costs(costs, "auto", "learn", "measure")
    if tree is not None:
        check_tree(manifest, tree)
    placement = choose_backend(manifest, backend, device)
    known: Costs | None = None
    if costs == "auto":
        key = device_key(placement.backend, num_threads=num_threads, spin=spin, processor=placement.processor)
        found = tuned(path, manifest, key)
        tree, known, prompt_lookup = _tuned_choice(found, manifest, max_batch_size, tree, prompt_lookup)
    elif costs == "learn":
        known = LearnedCosts()
    elif costs is not None and not isinstance(costs, str):
        known = _corrected(costs)
    tree = tree or DynamicTree(len(manifest.tree["parents"]))
    ngrams = NGrams.of_bundle(path, manifest)
    if verify_files:
        manifest.require_intact(path)
    _tell(placement, backend)
    if max_cache_bytes is None and placement.backend == ORT_CPU:
        max_cache_bytes = memory_limit()  # of the machine, or of its container
    runner = open_placement(
        path,
        manifest,
        placement,
        num_threads=num_threads,
        spin=spin,
        cuda_graphs=cuda_graphs,
        allow_engine_code=allow_engine_code,
    )
    if costs == "measure":
        known = _corrected(StepCosts.measure(runner, max_batch_size=max_batch_size, max_nodes=tree.num_nodes))
    return DecodingEngine(
        runner,
        tree,
        max_batch_size=max_batch_size,
        costs=known,
        reuse_prefixes=reuse_prefixes,
        prompt_lookup=bool(prompt_lookup),
        ngrams=ngrams,
        max_gap_seconds=max_gap_seconds,
        max_cache_bytes=max_cache_bytes,
    )


def _check_flags(**flags: bool) -> None:
    """Refuse values that are neither True nor False: any text, even "no", would count as yes."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name} is {value!r}; it must be True or False")


def _tell(placement: Placement, asked: str) -> None:
    """Log where a bundle runs; with a warning if that is not the best device of the machine."""
    level = logging.WARNING if asked == AUTO and placement.is_fallback else logging.INFO
    log.log(level, "the bundle runs with %s", placement)


def _tuned_choice(
    found: DeviceTuning | None,
    manifest: Manifest,
    max_batch_size: int,
    tree: Tree | None,
    prompt_lookup: bool | None,
) -> tuple[Tree | None, Costs | None, bool | None]:
    """Tree, costs and prompt lookup from a device's tuning, if there is one. Values that the caller gave come first.

    The costs are corrected while decoding: the machine may be busier than when it was tuned, or less busy.
    """
    if found is None:
        return tree, LearnedCosts(), prompt_lookup
    prompt_lookup = found.prompt_lookup if prompt_lookup is None else prompt_lookup
    if tree is not None:
        return tree, CorrectedCosts(found.costs), prompt_lookup
    lookup_nodes = fitting_nodes(manifest.limits, LOOKUP_NODES) if prompt_lookup else 0
    tree, table = found.choice(max_batch_size, lookup_nodes)
    return tree, None if table is None else CorrectedCosts(table), prompt_lookup


def _corrected(costs: Costs) -> Costs:
    """A table that is corrected while decoding, since it does not know the host's work, or who else uses the machine now."""
    return CorrectedCosts(costs) if isinstance(costs, StepCosts) else costs
