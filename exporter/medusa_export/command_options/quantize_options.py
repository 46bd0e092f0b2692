"""The options of `medusa-export quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from medusa_export.command_options.flag import OUTPUT, Flag, Force, MaxKl
from medusa_runtime.bundle.manifest import Scheme

ActivationBits = Annotated[
    Literal[8, 16] | None,
    Field(
        description="int8 only: bits of the activations on the CPU. 8 is faster; activations for which 8 are too few keep 16. "
        "With 16, more answers of Medusa decoding are those of plain decoding"
    ),
    Flag(default="16"),
]
Rotate = Annotated[
    bool | None,
    Field(
        description="rotate the activations, by changing weights alone, so that no channel holds outliers; int8-blocks then "
        "has one scale per 128 or 64 inputs, which is faster. If not, outliers of int8's 8-bit activations are moved into the "
        "weights"
    ),
    Flag(default="with --activation-bits 8, if it is exact for the model"),
]


@dataclass(frozen=True)
class QuantizeOptions:
    """Which bundle to quantise, and how."""

    bundle: Path
    output: Annotated[Path, Field(description="directory for the new bundle"), OUTPUT]
    scheme: Annotated[
        Scheme,
        Field(
            description="int8: one scale per output channel, best with AMX, for wide trees and batches. int8-blocks: one scale "
            "per 32 inputs, best for narrow trees, and for one caller without AMX. int4: the layers' weights in 4-bit blocks; "
            "weights that have 4 bits already, as from GGUF files, keep their values. "
            "int8-int4: only the MLPs' weights in 4-bit blocks"
        ),
    ] = "int8"
    activation_bits: ActivationBits = None
    rotate: Rotate = None
    calibration_prompts: Annotated[
        Path | None,
        Field(description="measure activations on answers to these prompts"),
        Flag(default="built-in prompts"),
    ] = None
    quality_prompts: Annotated[
        Path | None, Field(description="measure quality on answers to these prompts"), Flag(default="built-in prompts")
    ] = None
    quality_text: Annotated[Path | None, Field(description="measure quality on this plain-text file instead")] = None
    max_kl: MaxKl = None
    force: Force = False
