"""The options of `medusa-export onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from medusa_export.command_options.flag import OUTPUT, Flag, Force, MaxKl, TrustRemoteCode
from medusa_export.command_options.quantize_options import ActivationBits, Rotate
from medusa_export.opsets import MAX_OPSET, MIN_OPSET
from medusa_runtime.bundle.manifest import Precision, Scheme


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how."""

    model: str
    heads: Annotated[
        Path | None,
        Field(description="heads made for MODEL: directory, file or hub id, in any known format"),
        Flag(default="those in MODEL, if it has any"),
    ]
    output: Annotated[Path, Field(description="directory for the bundle; it must not exist yet"), OUTPUT]
    precision: Annotated[Precision, Field(description="precision of weights and computation"), Flag(("--dtype",))] = "fp32"
    opset: Annotated[int, Field(description=f"ONNX operator set, {MIN_OPSET} or {MAX_OPSET}")] = MIN_OPSET
    max_seq_len: Annotated[
        int | None,
        Field(ge=2, description="longest prompt plus answer, in tokens"),
        Flag(default="the model's own limit"),
    ] = None
    head_top_k: Annotated[int | None, Field(ge=1, description="candidates that each head returns"), Flag(default="32")] = None
    full_head_vocabulary: Annotated[bool, Field(description="let heads also guess tokens that they were not trained on")] = (
        False
    )
    tree: Annotated[
        Path | None,
        Field(description="the bundle's candidate tree, a JSON file"),
        Flag(default="the best one in the heads' evaluation"),
    ] = None
    tree_nodes: Annotated[int, Field(ge=2, le=1024, description="nodes of the default tree")] = 16
    quantize: Annotated[Scheme | None, Field(description="quantise the weights (see `quantize`)"), Flag(default="no")] = None
    activation_bits: ActivationBits = None
    rotate: Rotate = None
    max_kl: MaxKl = None
    force: Force = False
    trust_remote_code: TrustRemoteCode = False

    @property
    def inputs(self) -> list[str | Path]:
        """The paths that are read."""
        return [self.model] if self.heads is None else [self.model, self.heads]
