"""Finds the layout of a packed checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa_export.model.packed.awq import read_awq
from medusa_export.model.packed.bitnet import read_bitnet
from medusa_export.model.packed.bitsandbytes_files import read_bitsandbytes
from medusa_export.model.packed.compressed_tensors import read_compressed_tensors
from medusa_export.model.packed.gptq import read_gptq
from medusa_export.model.packed.microscaling import read_modelopt, read_mxfp4
from medusa_export.model.packed.scaled_floats import read_scaled_floats
from medusa_export.model.packed.tensors import PackedWeights, Tensors
from medusa_export.model.packed.torchao import read_torchao
from medusa_heads.errors import CheckpointError

Reader = Callable[[Tensors, dict[str, Any]], PackedWeights]
READERS: dict[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_scaled_floats,
    "mxfp8": read_scaled_floats,
    "fbgemm_fp8": read_scaled_floats,
    "mxfp4": read_mxfp4,
    "modelopt": read_modelopt,
    "bitsandbytes": read_bitsandbytes,
    "bitnet": read_bitnet,
    "torchao": read_torchao,
}


def method_of(settings: dict[str, Any]) -> str:
    """The name of a packed checkpoint's layout, from its `quantization_config`."""
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "")
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if method == "auto-round":  # it writes the layouts of others
        packing = str(settings.get("packing_format") or "")
        return "awq" if "awq" in packing else "gptq" if "gptq" in packing else f"auto-round ({packing})"
    if "producer" in settings and "modelopt" in str(settings["producer"]).lower():
        return "modelopt"
    return method


def read_packed(directory: Path, settings: dict[str, Any]) -> tuple[PackedWeights, Tensors]:
    """The weights of a packed checkpoint, and its files.

    Args:
        directory: the checkpoint.
        settings: its `quantization_config`.

    Raises:
        CheckpointError: the layout is not known, or the files do not hold it.
    """
    method = method_of(settings)
    if method not in READERS:
        raise CheckpointError(unreadable(str(directory), method))
    tensors = Tensors(directory)
    return READERS[method](tensors, settings), tensors


def unreadable(source: str, method: str) -> str:
    """The message for a layout that is not known."""
    return (
        f"{source} holds weights quantised with {method or 'an unnamed method'}, which cannot be read; those that can: "
        f"{', '.join(sorted(READERS))}. Give the model before it was quantised"
    )
