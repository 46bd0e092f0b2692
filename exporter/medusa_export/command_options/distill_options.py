"""The options of `medusa-export distill`."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from medusa_export.command_options.flag import OUTPUT, AllowEngineCode, CudaGraphs, Flag, Threads, TrustRemoteCode


@dataclass(frozen=True)
class DistillOptions:
    """What answers which prompts, and how."""

    model: str
    output: Annotated[Path, Field(description="directory for the data. An interrupted run continues there"), OUTPUT]
    prompts: Annotated[
        tuple[Path, ...],
        Field(description="a file of prompts: JSON lines (prompt, turns or messages), or text with one prompt per line"),
    ] = ()
    self_prompts: Annotated[int, Field(ge=0, description="number of prompts that the model writes itself")] = 0
    prompt_starts: Annotated[
        Path | None,
        Field(
            description="a text file of first words, one per line: each prompt that the model writes goes on with one of them"
        ),
    ] = None
    self_turns: Annotated[
        int, Field(ge=1, le=16, description="user's turns in each conversation whose prompts the model writes")
    ] = 1
    mix: Annotated[dict[str, int], Field(description="the most prompts of each source; sources not named are dropped")] = field(
        default_factory=dict
    )
    limit: Annotated[int | None, Field(ge=1, description="at most this many prompts, chosen at random")] = None
    max_tokens: Annotated[
        int | None,
        Field(ge=1, description="stop once the data holds this many tokens. A later run with a higher number continues"),
    ] = None
    max_new_tokens: Annotated[int, Field(ge=1, le=32768, description="longest answer")] = 256
    max_prompt_tokens: Annotated[int, Field(ge=1, description="longer prompts are skipped")] = 1024
    skip_refused: Annotated[
        bool, Field(description="skip and count prompts that the chat template or the endpoint refuses, instead of ending")
    ] = False
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False, description="temperature of answers; 0 is greedy")] = (
        0.0
    )
    prompt_temperature: Annotated[
        float,
        Field(gt=0, le=5, allow_inf_nan=False, description="temperature of the prompts that the model writes"),
    ] = 0.8
    seed: Annotated[int, Field(description="seed of the choices and of sampling")] = 0
    backend: Annotated[
        Literal["auto", "transformers", "bundle", "endpoint"],
        Field(description="what answers: PyTorch, a bundle with Medusa, or an OpenAI-compatible endpoint"),
    ] = "auto"
    base_url: Annotated[
        str | None,
        Field(description="endpoint's address, such as http://localhost:8000/v1. MODEL then gives the tokenizer"),
    ] = None
    served_model: Annotated[str | None, Field(description="the endpoint's name for the model"), Flag(default="MODEL")] = None
    batch_size: Annotated[
        int | None,
        Field(ge=1, le=4096, description="answers decoded at the same time"),
        Flag(default="64; bundle: 8"),
    ] = None
    dtype: Annotated[
        Literal["auto", "fp32", "fp16", "bf16"],
        Field(description="precision of the weights, with transformers. auto: bf16 if the hardware computes in it, else fp32"),
    ] = "auto"
    device: Annotated[
        str, Field(description="device for transformers or a bundle: auto, cpu, cuda, cuda:1 …; for a bundle also gpu (WebGPU)")
    ] = "auto"
    cuda_graphs: CudaGraphs = None
    allow_engine_code: AllowEngineCode = False
    threads: Threads = 0
    trust_remote_code: TrustRemoteCode = False
