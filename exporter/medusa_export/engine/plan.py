"""Compiles a parsed network into a serialised TensorRT engine (a *plan*)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.engine.complaints import first_complaint
from medusa_export.engine.flavor import TensorRT
from medusa_export.engine.monitor import interruptible, progress_monitor
from medusa_export.engine.network import Network
from medusa_export.engine.profiles import Profile
from medusa_export.errors import ExportError
from medusa_runtime.bundle.files import replacing
from medusa_runtime.bundle.manifest import FileFacts
from medusa_runtime.errors import OptionError


def write_plan(
    network: Network,
    path: Path,
    profiles: dict[str, Profile],
    capabilities: Sequence[str],
    options: EngineOptions,
    tell: Callable[[str], None] = lambda _: None,
) -> FileFacts:
    """Compile a network and write the plan to a file.

    Args:
        network: the network.
        path: the plan's file.
        profiles: optimisation profiles by name, in the order in which they are added.
        capabilities: compute capabilities to build for.
        options: the builder's options.
        tell: called with the current phase of the build.

    Raises:
        ExportError: TensorRT cannot compile the network, or the file cannot be written.
        OptionError: another version or GPU has written the timing cache.
        KeyboardInterrupt: after Ctrl-C, once TensorRT has finished its current step.
    """
    tensorrt, builder = network.tensorrt, network.builder
    config = _config(tensorrt, builder, capabilities, options)
    for shapes in profiles.values():
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, bounds["min"], bounds["opt"], bounds["max"])
        config.add_optimization_profile(profile)
    try:
        with path.open("wb") as file, interruptible() as asked, network.weights.released():
            config.progress_monitor = progress_monitor(tensorrt.api, tell, asked)
            writer = _plan_writer(tensorrt.api, file)
            built = builder.build_serialized_network_to_stream(network.network, config, writer)
        if writer.error is not None:
            raise writer.error
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    if not built or not writer.size:
        raise ExportError(f"{tensorrt.name} cannot build the {network.name} engine: {first_complaint(network.log.errors)}")
    if options.timing_cache is not None:
        with replacing(options.timing_cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    return FileFacts(size=writer.size, sha256=writer.digest.hexdigest())


def _config(tensorrt: TensorRT, builder: Any, capabilities: Sequence[str], options: EngineOptions) -> Any:
    trt, config = tensorrt.api, builder.create_builder_config()
    tensorrt.set_compute_capabilities(config, capabilities)
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 must be float32, not TF32
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace * 1_000_000)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper().replace("-", "_")
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.timing_cache is not None:
        _load_timing_cache(config, options.timing_cache)
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    known = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise OptionError(f"--timing-cache is {path}, but another TensorRT version or GPU wrote it; choose another file")


def _plan_writer(trt: Any, file: Any) -> Any:
    class PlanWriter(trt.IStreamWriter):  # type: ignore[misc]  # the module is chosen at run time
        """Writes and hashes the plan in pieces, so that it is never completely in memory."""

        def __init__(self) -> None:
            super().__init__()
            self.size = 0
            self.digest = hashlib.sha256()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:  # must not unwind through C++: raised once the build returns
                self.error = error
                return 0
            self.size += len(data)
            self.digest.update(data)
            return len(data)

    return PlanWriter()
