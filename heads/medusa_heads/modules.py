"""The modules of the heads.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", section 2.1.1.
Reading decided tokens comes from Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding". Heads that
`medusa-export train` makes read only one token, the root, and so stay independent of each other. Hydra's own heads, which also
read the guesses of the heads before them, can be loaded and exported.
"""

from __future__ import annotations

import hashlib
import json
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
        bias: whether there is a b.
    """

    def __init__(self, width: int, width_beside: int = 0, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width + width_beside, width, bias=bias)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:  # [..., C] -> [..., C]
        read = x if beside is None else torch.cat((x, beside), -1)
        return x + nn.functional.silu(self.linear(read))


class ConditionedBlock(nn.Module):
    """Hydra's first block: ``R x + r + SiLU(W x + b)``, where x is the hidden state with the embeddings of tokens after it.

    It is initialised so that it returns the hidden state.

    Args:
        width: C, the width of the hidden state and of an embedding.
        num_tokens: tokens after the hidden state.
    """

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width * (num_tokens + 1), width)
        self.residual = nn.Linear(width * (num_tokens + 1), width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.residual.weight[:, :width].fill_diagonal_(1)

    def forward(self, hidden: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:  # [..., C], [..., T*C] -> [..., C]
        read = torch.cat((hidden, beside), -1)
        result: torch.Tensor = self.residual(read) + nn.functional.silu(self.linear(read))
        return result


class MedusaHead(nn.Module):
    """Residual blocks, then an LM head: the head's own, or another one if `lm_head` is None.

    Args:
        config: the heads' configuration.
        index: k, from 0. A Hydra head reads k + 1 tokens.
    """

    def __init__(self, config: HeadsConfig, index: int = 0) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.block_bias
        is_hydra = config.kind == "hydra"
        count = min(config.num_layers, 2 if is_hydra else 1) if config.one_block else config.num_layers
        self.repeats = config.num_layers - count  # of the last block
        # a comprehension, not [block] * n: the blocks must not share weights
        blocks: list[nn.Module] = [ConditionedBlock(width, index + 1)] if is_hydra else []
        blocks += (
            ResidualBlock(width, width * config.reads_root * (not place), bias=bias) for place in range(len(blocks), count)
        )
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = None if config.shared_lm_head or config.one_lm_head else own_lm_head(config)

    def forward(self, hidden: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        """The input of the LM head. [..., C] -> [..., C]

        beside: for heads that read the root, see `root_states` [..., C]; for Hydra, k + 1 tokens' embeddings [..., (k+1)*C].
        """
        features = hidden
        for place, block in enumerate(self.blocks):
            features = block(features, beside) if place == 0 else block(features)
        for _ in range(self.repeats):
            features = self.blocks[-1](features)
        return features


def own_lm_head(config: HeadsConfig) -> nn.Linear:
    """An LM head of the heads' own; with `draft_rows`, it is resized once the draft vocabulary is known."""
    assert config.vocab_size is not None  # whoever makes own LM heads knows their rows
    return nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)


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
    guess. The paper's heads must infer it from the state (docs/decisions/0025-reading-the-root.md). Hydra's head k reads the
    root and the k best guesses before its own.

    `draft_ids` are the tokens that the heads choose from, or None for all. Most heads' logits still cover all tokens; it is
    cheaper to compute only those of `draft_ids`. With `config.draft_rows`, the LM heads have no rows for other tokens.

    Args:
        config: the heads' configuration.
        draft_ids: the draft vocabulary.
    """

    def __init__(self, config: HeadsConfig, draft_ids: list[int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.draft_ids = draft_ids
        shaped = config
        if config.draft_rows:
            if draft_ids is None:
                raise ValueError("draft_rows needs a draft vocabulary")
            shaped = config.model_copy(update={"vocab_size": len(draft_ids)})
        self.heads: Any = nn.ModuleList(MedusaHead(shaped, index) for index in range(config.num_heads))
        self.lm_head = own_lm_head(shaped) if config.one_lm_head else None

    @property
    def reads_tokens(self) -> bool:
        """Whether the heads read the root, and so need it as an input."""
        return self.config.reads_root or self.config.kind == "hydra"

    @property
    def vocab_size(self) -> int:
        """V. Heads whose files do not tell have it once they were matched with a backbone."""
        if self.config.vocab_size is None:
            raise ValueError("these heads do not tell the size of the vocabulary; it is their backbone's")
        return self.config.vocab_size

    def forward(
        self,
        hidden: torch.Tensor,
        lm_head: Any,
        root_ids: torch.Tensor | None = None,
        embedding: Any = None,
        guesses: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of every head. Tokens that the LM heads have no row for have the logit -inf.

        Args:
            hidden: the backbone's last hidden states. [N, C]
            lm_head: the backbone's LM head, for heads that share it and for embeddings of the root.
            root_ids: the tokens decided from these states, for heads that read them. [N]
            embedding: the backbone's input embedding, for Hydra heads.
            guesses: the tokens that Hydra heads read after the root; by default the likeliest of the heads before. [N, K - 1]

        Returns:
            [N, K, V]
        """
        if self.config.kind == "hydra" and (embedding is None or root_ids is None):
            raise ValueError("Hydra heads read tokens; give root_ids and the backbone's input embedding")
        roots = embedding(root_ids) if self.config.kind == "hydra" else self.roots(root_ids, lm_head)
        logits = self.logits(hidden, lm_head, roots, embedding, guesses)
        if not self.config.draft_rows:
            return logits
        spread = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return spread.index_copy(-1, torch.tensor(self.draft_ids, device=logits.device), logits)

    def logits(
        self,
        hidden: torch.Tensor,
        lm_head: nn.Module,
        roots: torch.Tensor | None,
        embedding: Any = None,
        guesses: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Like `forward`, for the rows that the LM heads have. [N, C], [N, C] -> [N, K, V]

        roots: the embeddings of the roots; the result of `roots`, or for Hydra heads the backbone's.
        """
        if self.config.kind == "hydra":
            assert roots is not None
            return self._chain(hidden, lm_head, roots, embedding, guesses)
        features = torch.stack([head(hidden, roots) for head in self.heads], dim=1)  # [N, K, C]
        if self.config.shared_lm_head or self.lm_head is not None:
            logits: torch.Tensor = (self.lm_head or lm_head)(features)
            return self._scaled(logits)
        return self._scaled(torch.stack([head.lm_head(features[:, k]) for k, head in enumerate(self.heads)], dim=1))

    def _chain(
        self, hidden: torch.Tensor, lm_head: nn.Module, roots: torch.Tensor, embedding: Any, guesses: torch.Tensor | None
    ) -> torch.Tensor:
        """Hydra along one path: head k reads the root and a token of each head before it."""
        read, found = roots, []
        for k, head in enumerate(self.heads):
            found.append(self._scaled((head.lm_head or self.lm_head or lm_head)(head(hidden, read))))  # [N, V]
            if k < len(self.heads) - 1:
                token_ids = found[-1].argmax(-1) if guesses is None else guesses[:, k]
                read = torch.cat((read, embedding(token_ids)), -1)
        return torch.stack(found, dim=1)

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.config.logit_scale == 1 else logits * self.config.logit_scale

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
        """SHA-256 over names and values of all weights, independent of their file.

        For heads of other projects, also over what else decides their guesses.
        """
        whole = hashlib.sha256()
        if foreign := self.config.foreign():
            whole.update(json.dumps([foreign, self.config.num_layers, self.draft_ids], sort_keys=True).encode())
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
