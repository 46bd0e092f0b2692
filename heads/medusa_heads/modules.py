"""The heads themselves.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", section 2.1.1.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from medusa_heads.config import HeadsConfig


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``. It starts as the identity, so an untrained head guesses what the LM head would."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., C] -> [..., C]
        return x + nn.functional.silu(self.linear(x))


class MedusaHead(nn.Module):
    """Residual blocks of its own, then an LM head: its own, or the backbone's where `lm_head` is None."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        # a comprehension, not [block] * n: the blocks of a head do not share weights
        self.blocks = nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(config.num_layers)))
        self.lm_head = None if config.shared_lm_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., C] -> [..., C], before the LM head
        features: torch.Tensor = self.blocks(hidden)
        return features


class MedusaHeads(nn.Module):
    """K heads on the backbone's last hidden state (after its final norm).

    `draft_ids` are the tokens that the heads learned to tell apart, ascending; none where that is all of them. The heads'
    logits are of all tokens nevertheless; who proposes drafts may leave the others out, which is cheaper.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.draft_ids: list[int] | None = None
        self.heads: Any = nn.ModuleList(MedusaHead(config) for _ in range(config.num_heads))

    def forward(self, hidden: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
        """Logits of every head.

        Args:
            hidden: the backbone's last hidden states. [N, C]
            lm_head: the backbone's; used where the heads share it.

        Returns:
            [N, K, V]
        """
        features = torch.stack([head(hidden) for head in self.heads], dim=1)  # [N, K, C]
        if self.config.shared_lm_head:
            logits: torch.Tensor = lm_head(features)
            return logits
        return torch.stack([head.lm_head(features[:, k]) for k, head in enumerate(self.heads)], dim=1)

    def digest(self) -> str:
        """SHA-256 over names and values of all weights, whatever file they came from."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()

    @torch.no_grad()
    def start_from(self, lm_head: nn.Linear) -> None:
        """Start the heads' own LM heads from the backbone's."""
        for head in self.heads:
            if head.lm_head is not None:
                head.lm_head.weight.copy_(lm_head.weight)
