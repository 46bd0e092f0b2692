"""The modules of the heads.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", section 2.1.1.
Reading decided tokens comes from Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding". Here heads
read only one token, the root, and so stay independent of each other.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from medusa_heads.config import HeadsConfig

RMS_EPS = 1e-6  # added to the mean square of a row


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``. It is initialised as the identity, so an untrained head guesses like the LM head.

    Args:
        width: C, the width of x.
        width_beside: width of a second input, which has no residual path; 0 for none.
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
    """Residual blocks, then an LM head: the head's own, or the backbone's if `lm_head` is None."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        width = config.hidden_size
        first = ResidualBlock(width, width if config.reads_root else 0)
        # a comprehension, not [block] * n: the blocks must not share weights
        self.blocks = nn.ModuleList([first, *(ResidualBlock(width) for _ in range(config.num_layers - 1))])
        self.lm_head = None if config.shared_lm_head else nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, hidden: torch.Tensor, roots: torch.Tensor | None = None) -> torch.Tensor:
        """The input of the LM head. [..., C] -> [..., C]. roots: see `root_states`, for heads that read them. [..., C]"""
        features: torch.Tensor = self.blocks[0](hidden, roots)
        for block in self.blocks[1:]:
            features = block(features)
        return features


def root_states(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The embeddings of root tokens that heads read: the tokens' rows of the LM head, scaled to a root mean square of 1.

    Args:
        weight: weight of an LM head. [V, C]
        places: row numbers. A negative number stands for a token that the heads do not know, and gives zeros. [N]

    Returns:
        [N, C]
    """
    known = (places >= 0).unsqueeze(-1).float()  # [N, 1]
    rows = nn.functional.embedding(places.clamp(min=0), weight).float() * known
    return (rows * (rows.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()).to(weight.dtype)


class MedusaHeads(nn.Module):
    """K heads on the backbone's last hidden state (after its final norm).

    If the config says so, they also read the *root*: the token decided from that state, which comes before all tokens that they
    guess. The paper's heads must infer it from the state (docs/decisions/0025-reading-the-root.md).

    `draft_ids` are the tokens that the heads were trained on, in ascending order, or None for all. The heads' logits still
    cover all tokens; it is cheaper to compute only those of `draft_ids`.
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
            lm_head: the backbone's LM head, for heads that share it and for embeddings of the root.
            root_ids: the tokens decided from these states, for heads that read the root. [N]

        Returns:
            [N, K, V]
        """
        return self.logits(hidden, lm_head, self.roots(root_ids, lm_head))

    def logits(self, hidden: torch.Tensor, lm_head: nn.Module, roots: torch.Tensor | None) -> torch.Tensor:
        """Like `forward`, with the result of `roots`. [N, C], [N, C] -> [N, K, V]"""
        features = torch.stack([head(hidden, roots) for head in self.heads], dim=1)  # [N, K, C]
        if self.config.shared_lm_head:
            logits: torch.Tensor = lm_head(features)
            return logits
        return torch.stack([head.lm_head(features[:, k]) for k, head in enumerate(self.heads)], dim=1)

    def roots(self, root_ids: torch.Tensor | None, lm_head: Any) -> torch.Tensor | None:
        """The embeddings of root tokens; None if the heads do not read the root. [N] -> [N, C]"""
        if not self.config.reads_root:
            return None
        if root_ids is None:
            raise ValueError("these heads read the root; give root_ids")
        if self.draft_ids is not None:
            known = torch.isin(root_ids, torch.tensor(self.draft_ids, device=root_ids.device))
            root_ids = torch.where(known, root_ids, -1)
        return root_states(lm_head.weight, root_ids)

    def digest(self) -> str:
        """SHA-256 over names and values of all weights, independent of their file."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()

    @torch.no_grad()
    def start_from(self, lm_head: nn.Linear) -> None:
        """Initialise the heads' own LM heads from the backbone's."""
        for head in self.heads:
            if head.lm_head is not None:
                head.lm_head.weight.copy_(lm_head.weight)
