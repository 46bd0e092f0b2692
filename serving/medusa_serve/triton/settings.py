"""How Triton runs a bundle: what stands in the `parameters` of the model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medusa_runtime import BACKENDS, OptionError, Spin


class ModelSettings(BaseModel):
    """The parameters of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = Field("bundle", description="the bundle's directory; if relative, in the directory of model.py")
    backend: str = Field("auto", description=f"backend that runs the bundle: {', '.join(BACKENDS)}")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, gpu or gpu:N")
    allow_engine_code: bool = Field(False, description="run the code that version-compatible engines bring")
    threads: int = Field(0, ge=0, description="CPU threads; 0 for one per core")
    spin: Spin = Field("auto", description="how CPU threads wait for work within a step: auto, on or off")
    max_batch_size: int | None = Field(None, ge=1, description="answers decoded at a time; omit for the runtime's choice")
    max_queue: int = Field(128, ge=0, description="answers that may wait; further requests are refused")

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Self:
        """Read the parameters of a model's configuration, as Triton gives them.

        Names in capital letters are Triton's own, and are left out.

        Raises:
            OptionError: a parameter is unknown, or has a value that it cannot have.
        """
        given = {name: value["string_value"] for name, value in parameters.items() if not name.isupper()}
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = first["loc"][0]
            if first["type"] == "extra_forbidden":
                raise OptionError(f"config.pbtxt has the parameter {name}; there are: {', '.join(cls.model_fields)}") from error
            asked = first["msg"].removeprefix("Input should be ")
            raise OptionError(f"the parameter {name} in config.pbtxt is {first['input']!r}; it must be {asked}") from error

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters as text. Those that are None are left out."""
        return {name: str(value) for name, value in self.model_dump(exclude_none=True).items()}
