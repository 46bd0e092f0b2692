"""The two flavours of TensorRT: one API in two packages, with two ways to choose the GPU of an engine."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from medusa_export.packages import install_command, is_absent
from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.backends.gpu.trt import PACKAGES
from medusa_runtime.bundle.plans import FLAVOR_NAMES
from medusa_runtime.errors import BackendError, OptionError, first_line

Flavor = Literal["rtx", "tensorrt"]
FLAVORS: tuple[Flavor, ...] = get_args(Flavor)
DEFAULT_RTX_CAPABILITY = "8.9"
NVIDIA_INDEX = "--extra-index-url https://pypi.nvidia.com"  # the index of full TensorRT's libraries


@dataclass(frozen=True)
class TensorRT:
    """A flavour and its imported module.

    TensorRT-RTX (extra ``rtx``, from PyPI) compiles for the GPUs that it is given and needs no GPU to build. Full TensorRT
    (extra ``trt``; its libraries come from NVIDIA's package index) compiles for the GPU of the machine.
    """

    flavor: Flavor
    api: Any  # the module `tensorrt_rtx` or `tensorrt`

    @classmethod
    def load(cls, flavor: str) -> TensorRT:
        """Import a flavour's package.

        Raises:
            OptionError: there is no such flavour.
            BackendError: its package, or a library that the package loads, is not installed.
        """
        for known in FLAVORS:
            if known == flavor:
                try:
                    return cls(known, importlib.import_module(module_of(known)))
                except (ImportError, OSError) as error:
                    raise _missing(known, error) from error
        raise OptionError(f"--flavor is {flavor!r}; use one of: {', '.join(FLAVORS)}")

    @property
    def name(self) -> str:
        """The flavour's name in messages."""
        return FLAVOR_NAMES[self.flavor]

    @property
    def target(self) -> str:
        """The target of this flavour's graphs in a manifest."""
        return self.name.lower()

    @property
    def version(self) -> str:
        """The version of the installed package, with which its engines must be loaded."""
        return str(self.api.__version__)

    def known_compute_capabilities(self) -> list[str]:
        """The compute capabilities that engines can be built for on this machine, such as ``["8.6", "8.9"]``.

        Raises:
            BackendError: full TensorRT, and this machine has no GPU.
        """
        if self.flavor == "rtx":
            return [_dotted(name) for name in self.api.ComputeCapability.__members__ if name.startswith("SM")]
        found = find_gpus()
        if not found.gpus:
            raise BackendError(
                f"TensorRT builds for the GPU of this machine, but found none ({found.why_none}); "
                "build on the target machine, or use --flavor rtx"
            )
        return [found.gpus[0].compute_capability]

    def choose_compute_capabilities(self, asked: Sequence[str]) -> list[str]:
        """The compute capabilities to build for: the given ones, or else the flavour's default.

        Raises:
            OptionError: engines cannot be built for one of them; the message lists those that can.
        """
        known = self.known_compute_capabilities()
        for capability in asked:
            if capability not in known:
                builder = f"{self.name} {self.version}"
                raise OptionError(
                    f"--compute-capability is {capability!r}, but {builder} builds only for {', '.join(known)} on this machine"
                )
        default = [DEFAULT_RTX_CAPABILITY] if self.flavor == "rtx" else known
        return list(dict.fromkeys(asked)) or default

    def set_compute_capabilities(self, config: Any, capabilities: Sequence[str]) -> None:
        """Set the compute capabilities in a builder configuration. Full TensorRT knows its GPU already."""
        if self.flavor == "rtx":
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(self.api.ComputeCapability.__members__[_member(capability)], index)


def module_of(flavor: str) -> str:
    """The name of a flavour's Python module."""
    return PACKAGES[flavor][0]


def install_flavor(flavor: str, *more: str) -> str:
    """The command that installs a flavour, together with more extras."""
    command = install_command(PACKAGES[flavor][1], *more)
    return f"{command} {NVIDIA_INDEX}" if flavor == "tensorrt" else command


def gpu_here() -> dict[str, str]:
    """The first GPU of this machine and its driver's CUDA version; empty if there is no GPU."""
    found = find_gpus()
    return {"gpu": found.gpus[0].name, "cuda": found.cuda_version or "unknown"} if found.gpus else {}


def _missing(flavor: Flavor, error: Exception) -> BackendError:
    module, command = module_of(flavor), install_flavor(flavor, "build")
    if is_absent(module, error):
        return BackendError(f"{module} is not installed; install it with: {command}")
    why = first_line(error)
    return BackendError(f"{module} is installed, but libraries that it needs are missing ({why}); install them with: {command}")


def _dotted(member: str) -> str:
    """``SM120`` → ``12.0``."""
    return f"{member[2:-1]}.{member[-1]}"


def _member(capability: str) -> str:
    return "SM" + capability.replace(".", "")
