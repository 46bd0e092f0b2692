"""Serialised TensorRT engines (*plans*) on disk: whether one can be loaded here, and its bytes."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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


def require_allowed(manifest: Manifest, bundle: str | Path, *, allow_engine_code: bool) -> None:
    """Refuse engines that bring code for this machine's processor, unless the caller allows it.

    A version-compatible plan holds a lean runtime, which TensorRT loads into this process. Whoever made the bundle decides
    what that code does.

    Raises:
        BundleError: they bring code, and it is not allowed.
    """
    if manifest.engine is not None and manifest.engine.lean_runtime and not allow_engine_code:
        raise BundleError(
            f"the engines of {bundle} bring code that would run in this process (they are version-compatible); if you trust "
            "whoever built them, allow it (allow_engine_code=True, --allow-engine-code)"
        )


def require_loadable(
    manifest: Manifest,
    directory: str | Path,
    *,
    flavor: str,
    tensorrt_version: str,
    compute_capability: str | None = None,
) -> None:
    """Check that engines can be loaded before TensorRT tries to: its own errors say less.

    Args:
        manifest: the engine bundle's.
        directory: the engine bundle.
        flavor: ``rtx`` or ``tensorrt``: the library that will load them.
        tensorrt_version: the library's version, such as ``1.7.1.116``.
        compute_capability: the GPU's, such as ``8.9``; omit it to leave it unchecked.

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
    """The file of weights that plans share: in the engine bundle itself, or else in the bundle that it was built from.

    Raises:
        BundleError: neither has a file of that size.
    """
    source = Path(directory) / shared.source
    with suppress(OSError, RuntimeError):  # links in a circle
        source = source.resolve()
    places = [Path(directory) / WEIGHTS_NAME, source / WEIGHTS_NAME]
    found = {path: size for path in places if (size := _file_size(path)) is not None}
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
    """Bytes of a plan with its weights. graph: ``step`` or ``heads``."""
    name = manifest.graphs[graph].file
    shared = manifest.engine.shared_weights if manifest.engine else None
    return (manifest.files[name] if shared is None else shared.plans[name]).size


@contextmanager
def open_plan(manifest: Manifest, directory: str | Path, graph: str) -> Iterator[mmap.mmap | Bytes]:
    """A plan's bytes, for `Runtime.deserialize_cuda_engine`: the file mapped, or put together with the weights it shares.

    Args:
        manifest: the engine bundle's.
        directory: the engine bundle.
        graph: ``step`` or ``heads``.

    Raises:
        BundleError: the plan is empty, or the weights it shares are missing or are not those it was built with.
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
            f"{whole.sha256[:12]}…: these are not the weights that it was built with; {_REBUILD}"
        )
    yield restored


def restore(own: bytes | mmap.mmap, whole: StrippedPlan, weights: bytes | mmap.mmap) -> Bytes:
    """Put the weights back into a stripped plan.

    Args:
        own: the stripped plan: the bytes between the regions of weights, one run after the other.
        whole: the size of the whole plan, and its regions of weights.
        weights: the weights file.

    Raises:
        BundleError: `own` or `weights` does not fit these regions, or the whole plan does not fit in memory.
    """
    rest, source = np.frombuffer(own, np.uint8), np.frombuffer(weights, np.uint8)
    gaps = plan_gaps(whole.size, whole.regions)
    parts = [(part.source, region.rows * part.row_bytes) for region in whole.regions for part in region.parts]
    if sum(stop - start for start, stop in gaps) != rest.size or any(start + size > source.size for start, size in parts):
        raise BundleError(f"a stripped plan and its weights do not fit together; {_REBUILD}")
    try:
        plan = np.empty(whole.size, np.uint8)
    except MemoryError as error:
        raise BundleError(f"there is no memory for a plan of {whole.size} bytes") from error
    taken = 0
    for start, stop in gaps:
        plan[start:stop] = rest[taken : taken + stop - start]
        taken += stop - start
    for region in whole.regions:
        for rows, part in zip(region_rows(plan, region), region.parts, strict=True):
            rows[...] = source[part.source :][: rows.size].reshape(rows.shape)
    return plan


def region_rows(plan: Bytes, region: RegionFacts) -> list[Bytes]:
    """The rows of each part of a region, as views into the plan. [rows, bytes of the part's row]"""
    rows = plan[region.offset : region.offset + region.num_bytes].reshape(region.rows, region.row_bytes)
    ends = np.cumsum([part.row_bytes for part in region.parts])
    return [rows[:, end - part.row_bytes : end] for end, part in zip(ends, region.parts, strict=True)]


def plan_gaps(size: int, regions: Sequence[RegionFacts]) -> list[tuple[int, int]]:
    """The runs of a plan of `size` bytes between its regions: start and stop of each, empty ones included.

    Raises:
        BundleError: regions overlap, are out of order, or end after the plan.
    """
    starts = [0, *(region.offset + region.num_bytes for region in regions)]
    gaps = list(zip(starts, [*(region.offset for region in regions), size], strict=True))
    if any(stop < start for start, stop in gaps):
        raise BundleError(f"the manifest names regions of a plan that overlap, or that end after the plan; {_REBUILD}")
    return gaps


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # mmap takes no empty file
        raise BundleError(f"{path} is empty; copy it again, or {_REBUILD}") from error


def _file_size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:  # a directory that may not be looked into, or a name that is too long
        return None


def _require_size(manifest: Manifest, path: Path) -> None:
    wanted = manifest.files[path.name].size
    if not path.is_file():
        raise BundleError(f"{path} is missing; copy it again, or {_REBUILD}")
    if (found := path.stat().st_size) != wanted:
        reason = "it is truncated" if found < wanted else "it is another file"
        raise BundleError(f"{path} has {found} bytes, the manifest says {wanted}: {reason}; copy it again, or {_REBUILD}")


def _version_fits(engine: EngineFacts, version: str) -> bool:
    """TensorRT-RTX loads engines of the same version; TensorRT also version-compatible engines of an earlier one."""
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
