"""The heads themselves.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", section 2.1.1.
That heads read what is decided before what they guess: Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa
Decoding"; here they read one token, the root, and so stay independent of each other.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from medusa_heads.config import HeadsConfig

RMS_EPS = 1e-6  # beside the mean square of a row


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``. It starts as the identity, so an untrained head guesses what the LM head would.

    Args:
        width: of x, C.
        width_beside: of what is read beside x, without a residual path of its own; 0 for nothing.
    """

    def __init__(self, width: int, width_beside: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(width + width_beside, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:  # [..., C] -> [..., C]
        read = x if beside is None else torch.cat((x, beside), -1)
        return x + nn.functional.silu(self.linear(read))


class MedusaHead(nn.Module):
    """Residual blocks of its own, then an LM head: its own, or the backbone's where `lm_head` is None."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        width = config.hidden_size
        first = ResidualBlock(width, width if config.reads_root else 0)
        # a comprehension, not [block] * n: the blocks of a head do not share weights
        self.blocks = nn.ModuleList([first, *(ResidualBlock(width) for _ in range(config.num_layers - 1))])
        self.lm_head = None if config.shared_lm_head else nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, hidden: torch.Tensor, roots: torch.Tensor | None = None) -> torch.Tensor:
        """What the LM head reads. Both [..., C] -> [..., C]; roots: of heads that read the root, see `root_states`."""
        features: torch.Tensor = self.blocks[0](hidden, roots)
        for block in self.blocks[1:]:
            features = block(features)
        return features


def root_states(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What heads read of root tokens: the LM head's rows of them, scaled to a root mean square of 1.

    Args:
        weight: of an LM head. [V, C]
        places: its rows; below 0 for a token that the heads do not know, of which they read zeros. [N]

    Returns:
        [N, C]
    """
    known = (places >= 0).unsqueeze(-1).float()  # [N, 1]
    rows = nn.functional.embedding(places.clamp(min=0), weight).float() * known
    return (rows * (rows.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()).to(weight.dtype)


class MedusaHeads(nn.Module):
    """K heads on the backbone's last hidden state (after its final norm).

    Where the config says so, they also read the *root*: the token that was decided from that state, which all that they guess
    comes after. The paper's heads know it only as far as the state tells it (docs/decisions/0025-reading-the-root.md).

    `draft_ids` are the tokens that the heads learned to tell apart, ascending; none where that is all of them. The heads'
    logits are of all tokens nevertheless; who proposes drafts may leave the others out, which is cheaper.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.draft_ids: list[int] | None = None
        self.heads: Any = nn.ModuleList(MedusaHead(config) for _ in range(config.num_heads))

    def forward(self, hidden: torch.Tensor, lm_head: Any, root_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of every head.

        Args:
            hidden: the backbone's last hidden states. [N, C]
            lm_head: the backbone's; used where the heads share it, and for what they read of the root.
            root_ids: the tokens decided from these states, for heads that read them. [N]

        Returns:
            [N, K, V]
        """
        return self.logits(hidden, lm_head, self.roots(root_ids, lm_head))

    def logits(self, hidden: torch.Tensor, lm_head: nn.Module, roots: torch.Tensor | None) -> torch.Tensor:
        """As `forward`, of what `roots` gave. [N, C], [N, C] -> [N, K, V]"""
        features = torch.stack([head(hidden, roots) for head in self.heads], dim=1)  # [N, K, C]
        if self.config.shared_lm_head:
            logits: torch.Tensor = lm_head(features)
            return logits
        return torch.stack([head.lm_head(features[:, k]) for k, head in enumerate(self.heads)], dim=1)

    def roots(self, root_ids: torch.Tensor | None, lm_head: Any) -> torch.Tensor | None:
        """What the heads read of root tokens; None where they read nothing of them. [N] -> [N, C]"""
        if not self.config.reads_root:
            return None
        if root_ids is None:
            raise ValueError("these heads read the root; give its tokens")
        if self.draft_ids is not None:
            known = torch.isin(root_ids, torch.tensor(self.draft_ids, device=root_ids.device))
            root_ids = torch.where(known, root_ids, -1)
        return root_states(lm_head.weight, root_ids)

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
