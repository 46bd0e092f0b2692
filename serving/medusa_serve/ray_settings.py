"""What the operator of replicas on Ray Serve may choose.

Each field is an argument of `serve run`, a key of the YAML file, and a flag of `medusa-export ray`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from medusa_runtime import BACKENDS, Spin
from medusa_serve.settings import ServerSettings

PROXYS = ("host", "port", "uds", "root_path", "max_connections", "header_seconds")  # of the process that listens: Ray's proxy
# Ray reads these when it is imported: no report to its makers, and its own logs in files alone
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
DEFAULT_BATCH_SIZE = 8  # the most that a bundle gets if nothing else is said


class RaySettings(ServerSettings):
    """Which bundle replicas serve, how many there are, and what each of them may use."""

    bundle: Path = Field(description="the bundle; each machine has it under this absolute path")
    backend: str = Field("auto", description="backend that runs the bundle: " + ", ".join(BACKENDS))
    threads: int = Field(
        0, ge=0, description="CPU threads of a replica; omit for all cores, and then there is one replica on a machine"
    )
    spin: Spin = Field("auto", description="how CPU threads wait for work within a step; see `medusa-export serve --help`")
    gpus: int = Field(0, ge=0, le=1, description="GPUs of a replica: 0 to run on the CPU, or 1")
    max_batch_size: int | None = Field(
        None, ge=1, description=f"answers that a replica decodes at a time; omit for {DEFAULT_BATCH_SIZE}, or fewer"
    )
    max_queue: int = Field(128, ge=0, description="answers that may wait in a replica; more get status 429")
    allow_failed: bool = Field(False, description="serve a bundle even though its validation failed")
    allow_engine_code: bool = Field(False, description="run the code that version-compatible engines bring")
    num_replicas: int | None = Field(None, ge=1, description="number of replicas; omit for one, or if Ray chooses the number")
    min_replicas: int | None = Field(None, ge=0, description="the fewest replicas, if Ray chooses their number")
    max_replicas: int | None = Field(None, ge=1, description="the most replicas; with it, Ray chooses their number by the load")
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="requests a replica that Ray aims at; omit for the batch size"
    )

    @field_validator("served_model_name", "trusted_host", "cors_origin", mode="before")
    @classmethod
    def _one_of_several(cls, value: Any) -> Any:
        """`serve run` can give one value for a field that may have several."""
        return (value,) if isinstance(value, str) else value

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in BACKENDS:
            raise ValueError(f"backend is {value!r}, but it must be one of {', '.join(BACKENDS)}")
        return value

    @field_validator(*PROXYS)
    @classmethod
    def _not_ours(cls, _: Any, info: ValidationInfo) -> Any:
        """Runs only if the field is given."""
        raise ValueError(f"{info.field_name} is not for replicas, because Ray's proxy listens; set it in http_options")

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> Self:
        if self.max_replicas is None and (self.min_replicas is not None or self.target_ongoing_requests is not None):
            raise ValueError("min_replicas and target_ongoing_requests need max_replicas, too")
        if self.max_replicas is not None and self.num_replicas is not None:
            raise ValueError("give a number of replicas, or max_replicas if Ray is to choose it, but not both")
        if self.max_replicas is not None and (self.min_replicas or 0) > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, but max_replicas is {self.max_replicas}")
        if self.gpus and self.threads:
            raise ValueError("threads is only for the CPU; leave it out, or gpus")
        if self.gpus and self.spin != "auto":
            raise ValueError("spin is only for the CPU; leave it out, or gpus")
        return self

    @property
    def batch_size(self) -> int:
        """The most answers that a replica decodes at a time."""
        return self.max_batch_size or DEFAULT_BATCH_SIZE

    @property
    def least_replicas(self) -> int:
        """How many replicas there must be at the start."""
        if self.max_replicas is not None:
            return 1 if self.min_replicas is None else self.min_replicas
        return self.num_replicas or 1
