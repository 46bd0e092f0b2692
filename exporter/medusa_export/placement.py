"""The backend and device that a command runs a bundle on."""

from __future__ import annotations

from medusa_export.progress import note
from medusa_runtime.backends.choosing import Placement, choose_backend
from medusa_runtime.backends.gpu.devices import find_gpus, parse_device
from medusa_runtime.backends.names import AUTO
from medusa_runtime.backends.webgpu.adapters import choose_adapter
from medusa_runtime.bundle.cpu import Spin
from medusa_runtime.bundle.manifest import ORT_CPU, ORT_WEBGPU, Manifest
from medusa_runtime.errors import BackendError, OptionError


def place(
    manifest: Manifest,
    backend: str = AUTO,
    device: str = AUTO,
    *,
    threads: int = 0,
    spin: Spin = "auto",
    cuda_graphs: bool | None = None,
    tell: bool = True,
) -> Placement:
    """Choose backend and device for a bundle, and print the choice if it was automatic.

    Args:
        manifest: the bundle's manifest.
        backend: one of `medusa_runtime.BACKENDS`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``gpu`` or ``gpu:N``.
        threads: CPU threads; 0 if the user gave none.
        spin: how they wait; auto if the user did not say.
        cuda_graphs: whether to use CUDA graphs; None if the user did not say.
        tell: whether to print an automatic choice.

    Raises:
        OptionError: a name is unknown, options contradict each other, or an option has no meaning on that device.
        BackendError: the backend does not run this kind of bundle, or it needs a GPU and there is none.
        MissingExtraError: the package of the backend is not installed.
    """
    placement = choose_backend(manifest, backend, device)
    require_usable(placement, threads=threads, spin=spin, cuda_graphs=cuda_graphs)
    if tell and backend == AUTO:
        note(f"runs with {placement}")
    return placement


def require_usable(placement: Placement, *, threads: int, spin: Spin, cuda_graphs: bool | None) -> None:
    """Check that there is a GPU if one is needed, and that the options have a meaning on the device.

    Raises:
        OptionError: an option has no meaning on the device.
        BackendError: there is no GPU.
    """
    if placement.backend in (ORT_CPU, ORT_WEBGPU) and cuda_graphs is not None:
        flag = "--cuda-graphs" if cuda_graphs else "--no-cuda-graphs"
        raise OptionError(f"{flag} is only for CUDA and TensorRT, but the bundle runs with {placement}; leave it out")
    if placement.backend == ORT_CPU:
        return
    if placement.backend == ORT_WEBGPU:
        choose_adapter(parse_device(placement.device)[1])
    elif (why := find_gpus().why_none) is not None:
        raise BackendError(f"{placement.backend} needs an NVIDIA GPU: {why}")
    for flag, is_given in (("--threads", threads != 0), ("--spin", spin != "auto")):
        if is_given:
            raise OptionError(
                f"{flag} is only for the CPU, but the bundle runs on {placement.device}; leave it out or use --device cpu"
            )
