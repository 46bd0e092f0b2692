"""Serialised TensorRT engines (*plans*) on disk: whether one can be loaded here, and its bytes."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medusa_runtime.bundle.manifest import (
    HEADS,
    STEP,
    WEIGHTS_NAME,
    EngineFacts,
    Manifest,
    RegionFacts,
    SharedWeights,
    StrippedPlan,
)
from medusa_runtime.errors import BackendError, BundleError

Bytes = npt.NDArray[np.uint8]
FLAVOR_NAMES = {"rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
_REBUILD = "build them again with: medusa-export trt"


def require_loadable(
    manifest: Manifest,
    directory: str | Path,
    *,
    flavor: str,
    tensorrt_version: str,
    compute_capability: str | None = None,
) -> None:
    """Check that engines can be loaded, before TensorRT is asked to: it says less.

    Args:
        manifest: the engine bundle's.
        directory: where it is.
        flavor: ``rtx`` or ``tensorrt``: what is to load them.
        tensorrt_version: of that, such as ``1.7.1.116``.
        compute_capability: of the GPU, such as ``8.9``; none to leave it unchecked.

    Raises:
        BundleError: the bundle holds no engines, a plan is missing or has another size than the manifest says, or the
            weights that it shares are not there.
        BackendError: the engines are of another flavour or version, or were not built for this GPU.
    """
    engine = manifest.engine
    if engine is None:
        raise BundleError(f"{directory} holds no engines; build them from it with: medusa-export trt")
    found = f"{FLAVOR_NAMES[engine.flavor]} {engine.tensorrt_version}"
    if engine.flavor != flavor:
        raise BackendError(
            f"{directory} was built with {found} and cannot be loaded with {FLAVOR_NAMES.get(flavor, flavor)} "
            f"{tensorrt_version}; {_REBUILD} --flavor {flavor}"
        )
    if not _version_fits(engine, tensorrt_version):
        raise BackendError(
            f"{directory} was built with {found}, this machine has {tensorrt_version}; install the former, or {_REBUILD}"
        )
    if compute_capability is not None and not _gpu_fits(engine, compute_capability):
        raise BackendError(
            f"{directory} was built for GPUs of compute capability {_capabilities(engine)}, this one has {compute_capability}; "
            f"{_REBUILD} {_rebuild_option(engine, compute_capability)}"
        )
    for name in (STEP, HEADS):
        _require_size(manifest, Path(directory) / manifest.graphs[name].file)
    if engine.shared_weights is not None:
        shared_weights_file(engine.shared_weights, directory)


def shared_weights_file(shared: SharedWeights, directory: str | Path) -> Path:
    """Where the weights are that plans share: in the engine bundle itself, or else in the bundle it was built from.

    Raises:
        BundleError: in neither is a file of that size.
    """
    places = [Path(directory) / WEIGHTS_NAME, (Path(directory) / shared.source).resolve() / WEIGHTS_NAME]
    found = {path: path.stat().st_size for path in places if path.is_file()}
    for path, size in found.items():
        if size == shared.file.size:
            return path
    others = "".join(f"; {path} has {size} bytes" for path, size in found.items())
    raise BundleError(
        f"{directory} was built with --strip-weights and needs {WEIGHTS_NAME} ({shared.file.size} bytes, sha256 "
        f"{shared.file.sha256[:12]}…), which is neither in it nor in {places[1].parent}{others}; copy it into {directory}, or "
        "build the engines again without --strip-weights"
    )


def plan_size(manifest: Manifest, graph: str) -> int:
    """Bytes of a plan, its weights included. graph: ``step`` or ``heads``."""
    name = manifest.graphs[graph].file
    shared = manifest.engine.shared_weights if manifest.engine else None
    return (manifest.files[name] if shared is None else shared.plans[name]).size


@contextmanager
def open_plan(manifest: Manifest, directory: str | Path, graph: str) -> Iterator[mmap.mmap | Bytes]:
    """A plan's bytes, for `Runtime.deserialize_cuda_engine`: the file, mapped, or put together with the weights it shares.

    Args:
        manifest: the engine bundle's.
        directory: where it is.
        graph: ``step`` or ``heads``.

    Raises:
        BundleError: the weights it shares are not there, or are others.
    """
    name = manifest.graphs[graph].file
    shared = manifest.engine.shared_weights if manifest.engine else None
    plan = _map(Path(directory) / name)
    if shared is None:
        with plan:
            yield plan
        return
    path, whole = shared_weights_file(shared, directory), shared.plans[name]
    restored = restore(plan, whole, _map(path))
    if (digest := hashlib.sha256(restored.data).hexdigest()) != whole.sha256:
        raise BundleError(
            f"{Path(directory) / name} with the weights of {path} has sha256 {digest[:12]}…, the manifest says "
            f"{whole.sha256[:12]}…; the weights are others than it was built with: {_REBUILD}"
        )
    yield restored


def restore(own: bytes | mmap.mmap, whole: StrippedPlan, weights: bytes | mmap.mmap) -> Bytes:
    """A stripped plan with its weights.

    Args:
        own: what is left of the plan: what lies between its regions, one after the other.
        whole: what it was, and where the weights go.
        weights: the file that they are in.

    Raises:
        BundleError: `own` or `weights` is too short for these regions.
    """
    rest, source = np.frombuffer(own, np.uint8), np.frombuffer(weights, np.uint8)
    gaps = plan_gaps(whole.size, whole.regions)
    parts = [(part.source, region.rows * part.row_bytes) for region in whole.regions for part in region.parts]
    if sum(stop - start for start, stop in gaps) != rest.size or any(start + size > source.size for start, size in parts):
        raise BundleError(f"a stripped plan and its weights do not fit together; {_REBUILD}")
    plan = np.empty(whole.size, np.uint8)
    taken = 0
    for start, stop in gaps:
        plan[start:stop] = rest[taken : taken + stop - start]
        taken += stop - start
    for region in whole.regions:
        for rows, part in zip(region_rows(plan, region), region.parts, strict=True):
            rows[...] = source[part.source :][: rows.size].reshape(rows.shape)
    return plan


def region_rows(plan: Bytes, region: RegionFacts) -> list[Bytes]:
    """The rows of each part of a region within a plan: views [rows, bytes of its row]."""
    rows = plan[region.offset : region.offset + region.num_bytes].reshape(region.rows, region.row_bytes)
    ends = np.cumsum([part.row_bytes for part in region.parts])
    return [rows[:, end - part.row_bytes : end] for end, part in zip(ends, region.parts, strict=True)]


def plan_gaps(size: int, regions: Sequence[RegionFacts]) -> list[tuple[int, int]]:
    """What of a plan of `size` bytes lies between its regions: start and stop of each run, empty ones too.

    Raises:
        BundleError: regions overlap, are out of order, or end after the plan.
    """
    starts = [0, *(region.offset + region.num_bytes for region in regions)]
    gaps = list(zip(starts, [*(region.offset for region in regions), size], strict=True))
    if any(stop < start for start, stop in gaps):
        raise BundleError(f"the manifest names regions of a plan that overlap or end after it; {_REBUILD}")
    return gaps


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _require_size(manifest: Manifest, path: Path) -> None:
    wanted = manifest.files[path.name].size
    if not path.is_file():
        raise BundleError(f"{path} is missing; copy it again, or {_REBUILD}")
    if (found := path.stat().st_size) != wanted:
        reason = "it is truncated" if found < wanted else "it is another file"
        raise BundleError(f"{path} has {found} bytes, the manifest says {wanted}: {reason}; copy it again, or {_REBUILD}")


def _version_fits(engine: EngineFacts, version: str) -> bool:
    """TensorRT-RTX loads what the same version built; TensorRT also what was built to be compatible by an earlier one."""
    if engine.tensorrt_version == version:
        return True
    built, here = _numbers(engine.tensorrt_version), _numbers(version)
    return engine.flavor == "tensorrt" and engine.version_compatible and built[:1] == here[:1] and built <= here


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


def _gpu_fits(engine: EngineFacts, capability: str) -> bool:
    if engine.hardware_compatibility == "ampere-plus":
        return _numbers(capability) >= [8, 0]
    return capability in engine.compute_capabilities


def _capabilities(engine: EngineFacts) -> str:
    return "8.0 and later" if engine.hardware_compatibility == "ampere-plus" else ", ".join(engine.compute_capabilities)


def _rebuild_option(engine: EngineFacts, capability: str) -> str:
    return f"--compute-capability {capability}" if engine.flavor == "rtx" else "--flavor tensorrt, on this machine"
