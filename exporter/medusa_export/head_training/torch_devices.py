"""The device that PyTorch runs on, and the precision that is fast there."""

from __future__ import annotations

from typing import cast

import torch

from medusa_export.model.checkpoint import Backbone, load_backbone
from medusa_export.progress import stage
from medusa_runtime.bundle.manifest import Precision
from medusa_runtime.errors import OptionError


def torch_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one, else the CPU.

    Raises:
        OptionError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name}: this machine has no such device; use auto, cpu or cuda") from error
    return device


def fast_precision(device: torch.device) -> Precision:
    """The precision that is fast: bf16 if the hardware computes in it (GPUs since Ampere, CPUs with AMX or AVX-512 BF16).

    Otherwise fp16 on a GPU and fp32 on a CPU.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"  # noqa: SLF001 - PyTorch has no public way to ask


def load_on_device(source: str, dtype: str, device: str, *, trust_remote_code: bool) -> Backbone:
    """Load a backbone for inference onto a device.

    Args:
        source: a directory, a hub id or a GGUF file.
        dtype: a precision, or `auto` for the one that is fast on the device.
        device: see `torch_device`.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        OptionError: this machine has no such device.
        CheckpointError: the checkpoint cannot be loaded.
    """
    place = torch_device(device)
    precision = fast_precision(place) if dtype == "auto" else cast(Precision, dtype)
    with stage(f"load {source}"):
        backbone = load_backbone(source, precision, attention="sdpa", trust_remote_code=trust_remote_code)
    backbone.model.to(place)  # type: ignore[arg-type] # PreTrainedModel's wrapper hides torch's signature
    return backbone
