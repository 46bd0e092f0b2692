"""The two flavours of TensorRT: one API, two packages, two ways to say which GPU an engine is for."""

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
NVIDIA_INDEX = "--extra-index-url https://pypi.nvidia.com"  # where full TensorRT's libraries are


@dataclass(frozen=True)
class TensorRT:
    """A flavour with its module loaded.

    TensorRT-RTX (extra ``rtx``, from PyPI) compiles for the GPUs it is told of and needs none itself. Full TensorRT
    (extra ``trt``; its libraries come from NVIDIA's own package index) compiles for the GPU it
    runs on.
    """

    flavor: Flavor
    api: Any  # the module `tensorrt_rtx` or `tensorrt`

    @classmethod
    def load(cls, flavor: str) -> TensorRT:
        """Import a flavour's package.

        Raises:
            OptionError: there is no such flavour.
            BackendError: its package, or a library that it loads, is not installed.
        """
        for known in FLAVORS:
            if known == flavor:
                try:
                    return cls(known, importlib.import_module(module_of(known)))
                except (ImportError, OSError) as error:
                    raise _missing(known, error) from error
        raise OptionError(f"--flavor is {flavor!r}; there are: {', '.join(FLAVORS)}")

    @property
    def name(self) -> str:
        """What the flavour is called in messages."""
        return FLAVOR_NAMES[self.flavor]

    @property
    def target(self) -> str:
        """What a graph made for this flavour says in its manifest."""
        return self.name.lower()

    @property
    def version(self) -> str:
        """The version an engine must be loaded with."""
        return str(self.api.__version__)

    def known_compute_capabilities(self) -> list[str]:
        """What engines can be built for here, such as ``["8.6", "8.9"]``.

        Raises:
            BackendError: full TensorRT, and this machine has no GPU.
        """
        if self.flavor == "rtx":
            return [_dotted(name) for name in self.api.ComputeCapability.__members__ if name.startswith("SM")]
        found = find_gpus()
        if not found.gpus:
            raise BackendError(
                f"TensorRT builds for the GPU it runs on, and finds none here ({found.why_none}); "
                "build on the target machine, or use --flavor rtx"
            )
        return [found.gpus[0].compute_capability]

    def choose_compute_capabilities(self, asked: Sequence[str]) -> list[str]:
        """What to build for: what was asked for, or, where nothing was, the flavour's default.

        Raises:
            OptionError: engines cannot be built here for one of them; it lists those that can be.
        """
        known = self.known_compute_capabilities()
        for capability in asked:
            if capability not in known:
                builder = f"{self.name} {self.version}"
                raise OptionError(f"--compute-capability is {capability!r}; {builder} builds here for {', '.join(known)}")
        default = [DEFAULT_RTX_CAPABILITY] if self.flavor == "rtx" else known
        return list(dict.fromkeys(asked)) or default

    def set_compute_capabilities(self, config: Any, capabilities: Sequence[str]) -> None:
        """Tell a builder configuration what to build for; full TensorRT needs no telling."""
        if self.flavor == "rtx":
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(self.api.ComputeCapability.__members__[_member(capability)], index)


def module_of(flavor: str) -> str:
    """The module that a flavour is imported as."""
    return PACKAGES[flavor][0]


def install_flavor(flavor: str, *more: str) -> str:
    """The command that installs a flavour, and further extras with it."""
    command = install_command(PACKAGES[flavor][1], *more)
    return f"{command} {NVIDIA_INDEX}" if flavor == "tensorrt" else command


def gpu_here() -> dict[str, str]:
    """The first GPU of this machine and the CUDA version that its driver knows; empty where there is none."""
    found = find_gpus()
    return {"gpu": found.gpus[0].name, "cuda": found.cuda_version or "unknown"} if found.gpus else {}


def _missing(flavor: Flavor, error: Exception) -> BackendError:
    module, command = module_of(flavor), install_flavor(flavor, "build")
    if is_absent(module, error):
        return BackendError(f"{module} is not installed; install it with: {command}")
    why = first_line(error)
    return BackendError(f"{module} is installed, but libraries that it needs are missing ({why}); install them with: {command}")


def _dotted(member: str) -> str:
    """``SM120`` is 12.0."""
    return f"{member[2:-1]}.{member[-1]}"


def _member(capability: str) -> str:
    return "SM" + capability.replace(".", "")
