"""Where a command runs a bundle: asked for, or chosen and told."""

from __future__ import annotations

from medusa_export.progress import note
from medusa_runtime.backends.choosing import BACKENDS, Placement, choose_backend
from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.bundle.manifest import ORT_CPU, Manifest
from medusa_runtime.errors import BackendError, OptionError

AUTO = BACKENDS[0]


def place(
    manifest: Manifest,
    backend: str = AUTO,
    device: str = AUTO,
    *,
    threads: int = 0,
    cuda_graphs: bool | None = None,
    tell: bool = True,
) -> Placement:
    """Where a bundle runs. What was chosen and not asked for is told, in a line.

    Args:
        manifest: the bundle's.
        backend: one of `medusa_runtime.BACKENDS`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of the CPU; 0 where they were not asked for.
        cuda_graphs: as they were asked for; none where they were not.
        tell: whether to tell.

    Raises:
        OptionError: a name is unknown, they contradict each other, or what was asked for has no meaning there.
        BackendError: that backend does not run this kind of bundle, or it needs a GPU and there is none.
        MissingExtraError: what would run it is not installed.
    """
    placement = choose_backend(manifest, backend, device)
    require_usable(placement, threads=threads, cuda_graphs=cuda_graphs)
    if tell and backend == AUTO:
        note(f"runs with {placement}")
    return placement


def require_usable(placement: Placement, *, threads: int, cuda_graphs: bool | None) -> None:
    """Check that a GPU is there where one is needed, and that what was asked for has a meaning there.

    Raises:
        OptionError: it has none.
        BackendError: there is no GPU.
    """
    if placement.backend == ORT_CPU:
        if cuda_graphs is not None:
            flag = "--cuda-graphs" if cuda_graphs else "--no-cuda-graphs"
            raise OptionError(f"{flag} is for GPUs, the bundle runs with {placement}")
    elif (why := find_gpus().why_none) is not None:
        raise BackendError(f"{placement.backend} needs an NVIDIA GPU: {why}")
    elif threads:
        raise OptionError(f"--threads is for the CPU, the bundle runs on {placement.device}; leave it out or take --device cpu")
