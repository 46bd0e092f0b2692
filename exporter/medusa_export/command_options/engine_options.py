"""The options of `medusa-export trt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from medusa_export.command_options.flag import OUTPUT, Flag, Force
from medusa_runtime.bundle.manifest import EngineWeights, HardwareCompatibility

DEFAULT_MAX_SEQ_LEN = 2048  # attention reads all of the cache, used or not, so a long one costs time at every step


@dataclass(frozen=True)
class EngineOptions:
    """What to build engines from, and how."""

    bundle: Path
    output: Annotated[Path, Field(description="directory for the engine bundle; it must not exist yet"), OUTPUT]
    flavor: Annotated[
        Literal["rtx", "tensorrt"], Field(description="rtx: TensorRT-RTX, which needs no GPU. tensorrt: full TensorRT")
    ] = "rtx"
    compute_capabilities: Annotated[
        tuple[str, ...],
        Field(description="compute capability to build for, such as 8.9"),
        Flag(("--compute-capability",), default="rtx: 8.9; tensorrt: this machine's GPU"),
    ] = ()
    max_seq_len: Annotated[
        int | None,
        Field(description="longest prompt plus answer, in tokens"),
        Flag(default=f"the bundle's own limit, at most {DEFAULT_MAX_SEQ_LEN}"),
    ] = None
    max_batch_size: Annotated[int, Field(description="most sequences in one step")] = 1
    max_tree_nodes: Annotated[int, Field(description="most tokens in one verification step")] = 64
    max_prefill_tokens: Annotated[int, Field(description="most prompt tokens in one step")] = 512  # at most max_seq_len is used
    weights: Annotated[
        EngineWeights, Field(description="precision of the weights of matrix products. as-is: the bundle's own")
    ] = "as-is"
    strip_weights: Annotated[
        bool, Field(description="do not store in the plans the weights that BUNDLE's weights.bin holds")
    ] = False
    hardware_compatibility: Annotated[
        HardwareCompatibility, Field(description="tensorrt only: other GPUs that can run the engines")
    ] = "none"
    version_compatible: Annotated[
        bool, Field(description="tensorrt only: newer runtimes of the same major version can run the engines")
    ] = False
    timing_cache: Annotated[
        Path | None,
        Field(description="tensorrt only: file of kernel timings. It is read if it exists, and written after the build"),
        Flag(is_file=True),
    ] = None
    workspace: Annotated[
        int | None, Field(description="scratch GPU memory that the kernel of a layer may use"), Flag(metavar="MB")
    ] = None
    opt_level: Annotated[
        int | None, Field(description="effort spent on finding fast kernels, 0 to 5"), Flag(default="TensorRT's own, 3")
    ] = None
    verbose: Annotated[bool, Field(description="print TensorRT's log to stderr"), Flag(("-v", "--verbose"))] = False
    force: Force = False
