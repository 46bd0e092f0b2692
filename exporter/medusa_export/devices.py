"""Where PyTorch runs, and in what precision it is fast there."""

from __future__ import annotations

import torch

from medusa_runtime.errors import OptionError
from medusa_runtime.manifest import Precision


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
