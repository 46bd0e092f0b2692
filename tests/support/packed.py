"""Packs the weights of a tiny model in each published layout, element by element, and says what they stand for.

The arithmetic is written from the layouts' descriptions, in NumPy, and shares nothing with the exporter's readers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, np.ndarray]  # the tensors by the end of their name, and the weight that they stand for [N, K]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BNB_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / 12


def rounded(weight: np.ndarray, bits: int, group: int, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], and scales and zeros [N, G], of a weight [N, K]; scales are halves, as in the files."""
    outputs, inputs = weight.shape
    blocks, top = weight.reshape(outputs, inputs // group, group), 2**bits - 1
    if symmetric:
        scale = np.abs(blocks).max(2) / (2 ** (bits - 1) - 1)
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        scale = (blocks.max(2) - blocks.min(2)) / top
        zero = np.clip(np.rint(-blocks.min(2) / scale), 1, top)
    scale = scale.astype(np.float16)
    codes = np.clip(np.rint(blocks / scale[..., None].astype(np.float32)) + zero[..., None], 0, top)
    return codes.reshape(outputs, inputs).astype(np.int64), scale, zero.astype(np.int64)


def meant(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    return np.asarray((codes - zero[:, group_of]) * scale.astype(np.float32)[:, group_of], np.float32)


def words(values: np.ndarray, bits: int) -> torch.Tensor:
    """Integers [R, C], packed along the first axis into words of 32 bits, as one stream of bits."""
    rows, columns = values.shape
    packed = np.zeros((-(-rows * bits // 32), columns), np.uint64)
    for row in range(rows):
        for bit in range(bits):
            place = row * bits + bit
            packed[place // 32] |= ((values[row].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)) << np.uint64(place % 32)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def gptq(
    weight: np.ndarray, bits: int = 4, group: int = 32, *, v2: bool = False, reorder: bool = False, symmetric: bool = False
) -> Packed:
    codes, scale, zero = rounded(weight, bits, group, symmetric=symmetric)
    group_of = np.arange(weight.shape[1]) // group
    if reorder:
        group_of = np.random.default_rng(0).permutation(group_of)
    stored = zero if v2 else zero - 1
    return {
        "qweight": words(codes.T, bits),
        "qzeros": words(stored, bits).T.contiguous(),  # along the outputs
        "scales": torch.from_numpy(scale.T.copy()),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }, meant(codes, scale, zero, group_of)


def awq(weight: np.ndarray, group: int = 32) -> Packed:
    codes, scale, zero = rounded(weight, 4, group, symmetric=False)

    def interleaved(values: np.ndarray) -> torch.Tensor:
        packed = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for column in range(packed.shape[1]):
            for place, source in enumerate(AWQ_ORDER):
                packed[:, column] |= values[:, 8 * column + source].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(packed.view(np.int32).copy())

    group_of = np.arange(weight.shape[1]) // group
    tensors = {"qweight": interleaved(codes.T), "qzeros": interleaved(zero.T), "scales": torch.from_numpy(scale.T.copy())}
    return tensors, meant(codes, scale, zero, group_of)


def pack_quantized(weight: np.ndarray, group: int = 32, bits: int = 4, *, symmetric: bool = True) -> Packed:
    codes, scale, zero = rounded(weight, bits, group, symmetric=symmetric)
    tensors = {
        "weight_packed": words(codes.T, bits).T.contiguous(),
        "weight_scale": torch.from_numpy(scale),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zero, bits)
    return tensors, meant(codes, scale, zero, np.arange(weight.shape[1]) // group)


def int_quantized(weight: np.ndarray) -> Packed:
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(weight / scale)
    tensors = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "weight_scale": torch.from_numpy(scale),
        "input_scale": torch.ones(1),
    }
    return tensors, (codes * scale).astype(np.float32)


def fp8_blocks(weight: np.ndarray, block: int = 48) -> Packed:
    """DeepSeek's form. The last block of a row or column may be smaller."""
    tensor = torch.from_numpy(weight)
    rows, columns = -(-weight.shape[0] // block), -(-weight.shape[1] // block)
    scales, values, whole = torch.ones(rows, columns), torch.empty(tensor.shape).to(torch.float8_e4m3fn), np.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            place = (slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
            scales[row, column] = tensor[place].abs().max() / 448
            values[place] = (tensor[place] / scales[row, column]).to(torch.float8_e4m3fn)
            whole[place] = values[place].float().numpy() * scales[row, column].numpy()
    return {"weight": values, "weight_scale_inv": scales}, whole


def fp8(weight: np.ndarray, *, per_output: bool = False) -> Packed:
    tensor = torch.from_numpy(weight)
    scale = (tensor.abs().amax(1, keepdim=True) if per_output else tensor.abs().max().reshape(1)) / 448
    values = (tensor / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale, "input_scale": torch.ones(1)}, (values.float() * scale).numpy()


def nearest_fp4(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(values[..., None] - FP4).argmin(-1), np.uint8)


def pairs(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes[..., 0::2] | codes[..., 1::2] << 4)


def nvfp4(weight: np.ndarray, *, compressed: bool) -> Packed:
    """4-bit floats in blocks of 16, with a scale in 8 bits for each and one for the tensor."""
    blocks = weight.reshape(weight.shape[0], -1, 16)
    largest = np.abs(blocks).max(2) / 6
    outer = np.float32(largest.max() / 448)
    scale = torch.from_numpy(largest / outer).to(torch.float8_e4m3fn)
    factor = scale.float().numpy() * outer
    codes = nearest_fp4(blocks / factor[..., None])
    packed, whole = pairs(codes.reshape(weight.shape)), (FP4[codes] * factor[..., None]).reshape(weight.shape)
    if compressed:
        return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": torch.tensor([1 / outer])}, whole
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(outer)}, whole


def mxfp4(weight: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Blocks [.., K / 32, 16], exponents [.., K / 32], and what they stand for [.., K]."""
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    exponent = np.ceil(np.log2(np.abs(blocks).max(-1) / 6)).astype(np.int64)
    codes = nearest_fp4(blocks / 2.0 ** exponent[..., None])
    whole = (FP4[codes] * 2.0 ** exponent[..., None]).reshape(weight.shape).astype(np.float32)
    return pairs(codes), torch.from_numpy((exponent + 127).astype(np.uint8)), whole


def compressed_mxfp4(weight: np.ndarray) -> Packed:
    packed, exponents, whole = mxfp4(weight)
    return {"weight_packed": packed.flatten(-2), "weight_scale": exponents}, whole


def bnb_4_bits(weight: np.ndarray, kind: str = "nf4", *, nested: bool) -> Packed:
    """fp4's table is that of bitsandbytes; that of nf4 is another one, as a reader must take it from the file."""
    table = np.linspace(-1, 1, 16, dtype=np.float32) ** 3 if kind == "nf4" else BNB_FP4
    flat = weight.reshape(-1, 64)
    largest = np.abs(flat).max(1)
    tensors, settings = {}, {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
    if nested:
        outer_table, offset = np.linspace(-1, 1, 256, dtype=np.float32), np.float32(largest.mean())
        padded = np.pad(largest - offset, (0, -len(largest) % 256)).reshape(-1, 256)
        outer = np.abs(padded).max(1) + np.float32(1e-6)
        inner = np.abs((padded / outer[:, None])[..., None] - outer_table).argmin(-1).astype(np.uint8)
        stored = inner.reshape(-1)[: len(largest)]
        largest = outer_table[stored] * np.repeat(outer, 256)[: len(largest)] + offset
        tensors = {
            "weight.absmax": torch.from_numpy(stored),
            "weight.nested_absmax": torch.from_numpy(outer),
            "weight.nested_quant_map": torch.from_numpy(outer_table),
        }
        settings |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        tensors = {"weight.absmax": torch.from_numpy(largest)}
    codes = np.abs((flat / largest[:, None])[..., None] - table).argmin(-1).astype(np.uint8).reshape(-1)
    state = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    tensors |= {
        "weight": torch.from_numpy(codes[0::2] << 4 | codes[1::2]).reshape(-1, 1),
        "weight.quant_map": torch.from_numpy(table),
        f"weight.quant_state.bitsandbytes__{kind}": state,
    }
    return tensors, (table[codes].reshape(-1, 64) * largest[:, None]).reshape(weight.shape).astype(np.float32)


def bnb_int8(weight: np.ndarray) -> Packed:
    largest = np.abs(weight).max(1)
    codes = np.rint(weight / largest[:, None] * 127)
    tensors = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "SCB": torch.from_numpy(largest),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, (codes * (largest / np.float32(127))[:, None]).astype(np.float32)


def bitnet(weight: np.ndarray, *, divides: bool) -> Packed:
    scale = np.abs(weight).mean()
    signs = np.clip(np.rint(weight / scale), -1, 1)
    rows = weight.shape[0] // 4
    packed = np.zeros((rows, weight.shape[1]), np.uint8)
    for row in range(weight.shape[0]):
        packed[row % rows] |= (signs[row] + 1).astype(np.uint8) << 2 * (row // rows)
    stored = torch.tensor([1 / scale if divides else scale], dtype=torch.float32)
    whole = signs / stored.numpy() if divides else signs * stored.numpy()
    return {"weight": torch.from_numpy(packed), "weight_scale": stored}, whole.astype(np.float32)


def save_packed(source: Path, directory: Path, settings: dict[str, Any], pack: Callable[[np.ndarray], Packed]) -> Tensors:
    """Copy a tiny model with the weights of its layers' projections packed. Returns what all its weights stand for."""
    shutil.copytree(source, directory)
    whole: Tensors = load_file(directory / "model.safetensors")
    packed: Tensors = {}
    for name, tensor in list(whole.items()):
        if ".layers." in name and name.endswith("proj.weight"):
            tensors, meaning = pack(tensor.numpy())
            packed |= {f"{name.removesuffix('weight')}{end}": part.contiguous() for end, part in tensors.items()}
            whole[name] = torch.from_numpy(meaning)
        else:
            packed[name] = tensor
    save_file(packed, directory / "model.safetensors", {"format": "pt"})
    add_settings(directory, settings)
    return whole


def add_settings(directory: Path, settings: dict[str, Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"quantization_config": settings}), encoding="utf-8")
