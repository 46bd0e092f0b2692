"""What is minimised. Each objective is a module whose forward pass gives the losses of one batch.

Source: Cai et al., "Medusa", section 2.2: Medusa-1 is the sum over heads k of decay^k · CE(head k, token t + k + 2); Medusa-2 adds
the backbone's own loss, which for self-distilled data is the KL divergence from the original model (section 2.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody names it

from medusa_heads.modules import MedusaHeads

IGNORED = -100  # what cross_entropy passes over
KL_ROWS = 256  # whose logits over the whole vocabulary, of both models, are held at once


@dataclass
class Losses:
    """Of one batch."""

    total: torch.Tensor  # what is minimised
    heads: torch.Tensor  # cross-entropy of each head. [K]
    backbone: torch.Tensor | None = None  # medusa-2: the backbone's own


class LmHead(nn.Module):
    """The backbone's LM head, frozen, for the tokens that count in the loss alone.

    Args:
        weight: all rows. [V, C]
        bias: [V] or none.
        token_ids: the V' tokens that count, none for all. Other targets are left out.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, token_ids: torch.Tensor | None = None) -> None:
        super().__init__()
        kept = slice(None) if token_ids is None else token_ids
        self.register_buffer("weight", weight.detach()[kept].clone(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach()[kept].clone(), persistent=False)
        index = torch.arange(len(weight))
        if token_ids is not None:
            index = torch.full((len(weight),), IGNORED)
            index[token_ids] = torch.arange(len(token_ids))
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.register_buffer("index", index, persistent=False)

    def places(self, targets: torch.Tensor) -> torch.Tensor:
        """Where among the tokens that count the targets are; IGNORED for others and for -1. Any shape."""
        found: torch.Tensor = self.index[targets.clamp(min=0)]
        return found.masked_fill(targets < 0, IGNORED)


class HeadsObjective(nn.Module):
    """Medusa-1: the heads' loss on given hidden states."""

    def __init__(self, heads: MedusaHeads, lm_head: LmHead, decay: float) -> None:
        super().__init__()
        self.heads = heads
        self.lm_head = lm_head
        self.decay = decay

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> Losses:
        """Losses of rows [N, C] whose heads are to guess `targets` [N, K], -1 where nothing is to be guessed."""
        losses = heads_losses(self.heads, self.lm_head, hidden, targets)
        weights = self.decay ** torch.arange(len(losses), device=losses.device)
        return Losses((losses * weights).sum(), losses.detach())


def heads_losses(heads: MedusaHeads, lm_head: LmHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each head over its valid targets. [N, C], [N, K] -> [K]"""
    places = lm_head.places(targets)  # [N, K]
    losses = []
    for k, head in enumerate(heads.heads):
        weight, bias = lm_head.weight, lm_head.bias
        if head.lm_head is not None:
            weight, bias = head.lm_head.weight, None
            weight = weight if lm_head.token_ids is None else weight[lm_head.token_ids]
        logits = F.linear(head(hidden), weight.to(hidden.dtype), bias)  # [N, V']
        total = F.cross_entropy(logits, places[:, k], ignore_index=IGNORED, reduction="sum")
        losses.append(total / (places[:, k] != IGNORED).sum().clamp(min=1))  # a batch may have no target for the last heads
    return torch.stack(losses)


class JointObjective(nn.Module):
    """Medusa-2: the heads' loss beside the backbone's own, on token sequences.

    Args:
        backbone: what learns; a causal LM, maybe with an adapter.
        heads: what learns with it.
        lm_head: the original's, for the tokens that count in the heads' loss, where heads share it.
        original: the original's LM head, all of it; the KL's reference is read off it.
        decay: head k counts decay^k.
        backbone_loss: ``kl`` or ``ce``.
    """

    def __init__(
        self, backbone: nn.Module, heads: MedusaHeads, lm_head: LmHead, original: LmHead, decay: float, backbone_loss: str
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.lm_head = lm_head
        self.original = original
        self.decay = decay
        self.backbone_loss = backbone_loss

    def forward(
        self,
        tokens: torch.Tensor,  # [B, T]
        rows: torch.Tensor,  # [N] places in tokens, flattened, that answers are read off
        next_ids: torch.Tensor,  # [N] the answers' tokens there
        targets: torch.Tensor,  # [N, K]
        reference: torch.Tensor,  # [N, C] the original's hidden states there
        heads_weight: float,
    ) -> Losses:
        """Losses of a batch of sequences."""
        output = self.backbone(input_ids=tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        hidden = output.hidden_states[-1].flatten(0, 1)[rows]  # [N, C], after the final norm
        losses = heads_losses(self.heads, self.lm_head, hidden, targets)
        weights = self.decay ** torch.arange(len(losses), device=losses.device)
        backbone = self._backbone_loss(hidden, next_ids, reference)
        return Losses(backbone + heads_weight * (losses * weights).sum(), losses.detach(), backbone.detach())

    def _backbone_loss(self, hidden: torch.Tensor, next_ids: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        lm_head = self.backbone.get_output_embeddings()
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), KL_ROWS):
            part = slice(start, start + KL_ROWS)
            total = total + torch.utils.checkpoint.checkpoint(
                self._part_loss, hidden[part], lm_head, next_ids[part], reference[part], use_reentrant=False
            )
        return total / len(hidden)

    def _part_loss(
        self, hidden: torch.Tensor, lm_head: nn.Module, next_ids: torch.Tensor, reference: torch.Tensor
    ) -> torch.Tensor:
        logits = lm_head(hidden).float()  # [n, V]
        if self.backbone_loss == "ce":
            return F.cross_entropy(logits, next_ids, reduction="sum")
        with torch.no_grad():
            wanted = F.linear(reference.to(hidden.dtype), self.original.weight.to(hidden.dtype), self.original.bias).float()
        return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)
