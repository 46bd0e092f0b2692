"""Takes integers and small floats of fewer than 8 bits out of the words that they are packed in."""

from __future__ import annotations

import torch

# float4 e2m1 (OCP Microscaling Formats v1.0, section 5.3.3): a sign, two bits of exponent, one of mantissa
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers that lie one after the other along the first axis, without padding; the lowest bits come first.

    Args:
        words: int32 [W, N].
        bits: of an integer, at most 8.

    Returns:
        uint8 [W * 32 / bits, N].
    """
    if 32 % bits == 0:
        return fields(words.T, bits).T
    places = torch.arange(32).reshape(1, 32, 1)
    single = (words.unsqueeze(1) >> places) & 1  # [W, 32, N]
    single = single.reshape(-1, bits, words.shape[1])
    return (single << torch.arange(bits).reshape(1, bits, 1)).sum(1).to(torch.uint8)


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers packed along the last axis, as many whole ones as a word holds; the lowest bits come first.

    Args:
        words: int32 [.., W].
        bits: of an integer, at most 8.

    Returns:
        uint8 [.., W * (32 // bits)].
    """
    places = torch.arange(32 // bits, dtype=torch.int32) * bits
    return ((words.unsqueeze(-1) >> places) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Two 4-bit integers of each byte, the lower one first. uint8 [.., W] -> uint8 [.., 2 W]"""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def float4(packed: torch.Tensor) -> torch.Tensor:
    """Two e2m1 floats of each byte, the lower one first. uint8 [.., W] -> float32 [.., 2 W]"""
    return torch.tensor(E2M1)[nibbles(packed).to(torch.int32)]


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Scales stored as exponents alone (e8m0, biased by 127). uint8 -> float32"""
    return torch.ldexp(torch.ones(exponents.shape), exponents.to(torch.int32) - 127)


def as_scale(tensor: torch.Tensor) -> torch.Tensor:
    """A scale in float32; bytes are exponents."""
    return power_of_two(tensor) if tensor.dtype == torch.uint8 else tensor.to(torch.float32)
