"""Where PyTorch runs, and in what precision it is fast there."""

from __future__ import annotations

from typing import cast

import torch

from medusa_export.checkpoint import Backbone, load_backbone
from medusa_export.progress import stage
from medusa_runtime.bundle.manifest import Precision
from medusa_runtime.errors import OptionError


def torch_device(name: str) -> torch.device:
    """The device of that name; `auto` takes a GPU where there is one.

    Raises:
        OptionError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name}: there is no such device here") from error
    return device


def fast_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it (GPUs since Ampere, CPUs with AMX or AVX-512 BF16), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"  # noqa: SLF001 - PyTorch's own question


def load_on_device(source: str, dtype: str, device: str, *, trust_remote_code: bool) -> Backbone:
    """A backbone to run as it is, where it runs.

    Args:
        source: a directory, a hub id or a GGUF file.
        dtype: a precision, or `auto` for the fast one there.
        device: see `torch_device`.
        trust_remote_code: run Python code that comes with it.

    Raises:
        OptionError: there is no such device here.
        CheckpointError: it cannot be loaded.
    """
    place = torch_device(device)
    precision = fast_precision(place) if dtype == "auto" else cast(Precision, dtype)
    with stage(f"load {source}"):
        backbone = load_backbone(source, precision, attention="sdpa", trust_remote_code=trust_remote_code)
    backbone.model.to(place)  # type: ignore[arg-type] # PreTrainedModel's own wrapper has lost torch's signature
    return backbone
