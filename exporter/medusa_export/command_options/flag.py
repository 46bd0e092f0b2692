"""How fields become flags, and the fields that several commands have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from pydantic.fields import FieldInfo

from medusa_runtime.bundle.cpu import max_threads


@dataclass(frozen=True)
class Flag:
    """What a field's name, type and description do not say about its flag. Put it in the field's `Annotated`.

    Args:
        names: in place of the field's name with dashes.
        default: what the default means, if its value does not say it.
        metavar: the value's name in the help, in place of its type.
        is_file: a directory is refused.
    """

    names: tuple[str, ...] = ()
    default: str = ""
    metavar: str | None = None
    is_file: bool = False


def fields_of(model: type[Any]) -> Mapping[str, FieldInfo]:
    """The fields of a pydantic model or dataclass."""
    fields: Mapping[str, FieldInfo] = model.__pydantic_fields__
    return fields


OUTPUT = Flag(("-o", "--output"))

Force = Annotated[bool, Field(description="replace the output if it exists")]
TrustRemoteCode = Annotated[bool, Field(description="run Python code that comes with the checkpoint")]
AllowEngineCode = Annotated[
    bool, Field(description="run the code that version-compatible engines bring. Do so if you trust them")
]
Threads = Annotated[int, Field(ge=0, le=max_threads(), description="CPU threads"), Flag(default="one per core")]
CudaGraphs = Annotated[
    bool | None,
    Field(description="on a GPU, capture each step as a CUDA graph and replay it"),
    Flag(default="yes with TensorRT, no with ONNX Runtime"),
]
MaxKl = Annotated[
    float | None,
    Field(ge=0, allow_inf_nan=False, description="fail if the mean KL divergence from the original exceeds this, in nats"),
]
