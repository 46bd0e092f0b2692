"""What is minimised. Each objective is a module whose forward pass gives the losses of one batch.

Source: Cai et al., "Medusa", section 2.2: Medusa-1 is the sum over heads k of decay^k · CE(head k, token t + k + 2); Medusa-2
adds the backbone's own loss, which for self-distilled data is the KL divergence from the original model (section 2.3.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody names it
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from medusa_heads.logits import shaped_logits
from medusa_heads.modules import MedusaHeads, root_states

IGNORED = -100  # what cross_entropy passes over
KL_ROWS = 256  # whose logits over the whole vocabulary, of both models, are held at once


class Losses(NamedTuple):  # and no dataclass: FSDP finds the tensors in a tuple alone
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

    weight: torch.Tensor
    bias: torch.Tensor | None
    token_ids: torch.Tensor | None
    index: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, token_ids: torch.Tensor | None = None) -> None:
        super().__init__()
        index = torch.arange(len(weight))
        if token_ids is not None:
            index = torch.full((len(weight),), IGNORED)
            index[token_ids] = torch.arange(len(token_ids))
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("weight", self.kept(weight.detach()).clone(), persistent=False)
        self.register_buffer("bias", None if bias is None else self.kept(bias.detach()).clone(), persistent=False)

    def kept(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens that count. [V, …] -> [V', …]"""
        return rows if self.token_ids is None else rows[self.token_ids]

    def of(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias that a head's logits come from: its own, or these."""
        own: Any = head.lm_head
        return (self.weight, self.bias) if own is None else (self.kept(own.weight), None)

    def places(self, targets: torch.Tensor) -> torch.Tensor:
        """Where among the tokens that count the targets are; IGNORED for others and for -1. Any shape."""
        found: torch.Tensor = self.index[targets.clamp(min=0)]
        return found.masked_fill(targets < 0, IGNORED)


def lm_head_of(model: PreTrainedModel, dtype: torch.dtype, token_ids: torch.Tensor | None = None) -> LmHead:
    """A copy of a model's LM head in some precision, for the tokens that count."""
    output: Any = model.get_output_embeddings()
    bias = getattr(output, "bias", None)
    return LmHead(output.weight.to(dtype), None if bias is None else bias.to(dtype), token_ids)


class HeadsObjective(nn.Module):
    """Medusa-1: the heads' loss on given hidden states."""

    def __init__(self, heads: MedusaHeads, lm_head: LmHead, decay: float, soft_targets: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.lm_head = lm_head
        self.decay = decay
        self.soft_targets = soft_targets

    def forward(
        self,
        hidden: torch.Tensor,  # [N, C]
        root_ids: torch.Tensor,  # [N] the backbone's next tokens there
        targets: torch.Tensor,  # [N, K] what the heads are to guess, -1 where there is nothing
        ahead: torch.Tensor | None = None,  # [U, C] the backbone's states that targets are read off, for soft targets
        places: torch.Tensor | None = None,  # [N, K] which of them each target is read off
    ) -> Losses:
        """Losses of a batch of rows."""
        if ahead is None or places is None:
            losses = heads_losses(self.heads, self.lm_head, hidden, root_ids, targets)
        else:
            losses = self._soft_losses(hidden, root_ids, targets, ahead, places)
        return Losses(weighted(losses, self.decay), losses.detach())

    def _soft_losses(
        self,
        hidden: torch.Tensor,
        root_ids: torch.Tensor,
        targets: torch.Tensor,
        ahead: torch.Tensor,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """As `heads_losses`, but part of each target is the distribution that the backbone has there. [K]"""
        with torch.no_grad():
            backbone = F.linear(ahead, self.lm_head.weight, self.lm_head.bias).softmax(-1)  # [U, V']
        roots = root_states(self.lm_head.weight, self.lm_head.places(root_ids)) if self.heads.config.reads_root else None
        tokens, losses = self.lm_head.places(targets), []  # [N, K]
        for k, head in enumerate(self.heads.heads):
            known = (tokens[:, k] != IGNORED).nonzero().flatten()  # [n]
            wanted = backbone[places[known, k]] * self.soft_targets  # [n, V']
            wanted[torch.arange(len(known)), tokens[known, k]] += 1 - self.soft_targets
            features = head(hidden[known], None if roots is None else roots[known])
            logits = F.linear(features, *self.lm_head.of(head))  # [n, V']
            losses.append(F.cross_entropy(logits, wanted, reduction="sum") / max(1, len(known)))
        return torch.stack(losses)


def heads_losses(
    heads: MedusaHeads,
    lm_head: LmHead,
    hidden: torch.Tensor,
    root_ids: torch.Tensor,
    targets: torch.Tensor,
    learning: Any = None,
) -> torch.Tensor:
    """Mean cross-entropy of each head over its valid targets. [N, C], [N], [N, K] -> [K]

    Args:
        heads: what learns.
        lm_head: the tokens that count, and the LM head of heads that have none.
        hidden: what the heads read.
        root_ids: the backbone's next tokens there, which they may read as well.
        targets: what they are to guess, -1 where there is nothing.
        learning: the backbone's LM head where it learns as well; it then takes the place of `lm_head`'s weights.
    """
    places = lm_head.places(targets)  # [N, K]
    shared = (lm_head.weight, lm_head.bias)
    if learning is not None:
        shared = (lm_head.kept(learning.weight), None if learning.bias is None else lm_head.kept(learning.bias))
    # looked up, not learned through
    roots = root_states(shared[0].detach(), lm_head.places(root_ids)) if heads.config.reads_root else None
    losses = []
    for k, head in enumerate(heads.heads):
        weight, bias = shared if head.lm_head is None else lm_head.of(head)
        logits = F.linear(head(hidden, roots), weight, bias)  # [N, V']
        total = F.cross_entropy(logits, places[:, k], ignore_index=IGNORED, reduction="sum")
        losses.append(total / (places[:, k] != IGNORED).sum().clamp(min=1))  # a batch may have no target for the last heads
    return torch.stack(losses)


def weighted(losses: torch.Tensor, decay: float) -> torch.Tensor:
    """The heads' losses as one number: the k-th head, from 1, counts decay^k. [K] -> []"""
    return (losses * decay ** torch.arange(1, len(losses) + 1, device=losses.device)).sum()


class JointObjective(nn.Module):
    """Medusa-2: the heads' loss beside the backbone's own, on token sequences.

    Args:
        backbone: what learns; an adapter's layers may be in it.
        heads: what learns with it.
        lm_head: the original's, for the tokens that count in the heads' loss.
        original: the original's LM head, all of it; the KL's reference is read off it.
        decay: head k counts decay^k.
        backbone_loss: ``kl`` or ``ce``.
    """

    def __init__(
        self, backbone: PreTrainedModel, heads: MedusaHeads, lm_head: LmHead, original: LmHead, decay: float, backbone_loss: str
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.heads = heads
        self.lm_head = lm_head
        self.original = original
        self.decay = decay
        self.backbone_loss = backbone_loss

    @property
    def layers(self) -> set[str]:
        """The classes of the backbone's layers, by which it is sharded."""
        names: Any = self.backbone._no_split_modules  # noqa: SLF001 - where Transformers says it
        return set(names or ()) & {type(module).__name__ for module in self.backbone.modules()}

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
        states = self.backbone.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # [B, T, C]
        hidden = states.flatten(0, 1)[rows]  # [N, C]
        output = self.backbone.get_output_embeddings()
        learning = output if output.weight.requires_grad else None
        losses = heads_losses(self.heads, self.lm_head, hidden, next_ids, targets, learning)
        backbone = self._backbone_loss(output, hidden, next_ids, reference)
        return Losses(backbone + heads_weight * weighted(losses, self.decay), losses.detach(), backbone.detach())

    def _backbone_loss(
        self, lm_head: nn.Module, hidden: torch.Tensor, next_ids: torch.Tensor, reference: torch.Tensor
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), KL_ROWS):
            part = slice(start, start + KL_ROWS)
            total = total + checkpoint(
                self._part_loss, lm_head, hidden[part], next_ids[part], reference[part], use_reentrant=False
            )
        return total / len(hidden)

    def _part_loss(
        self, lm_head: nn.Module, hidden: torch.Tensor, next_ids: torch.Tensor, reference: torch.Tensor
    ) -> torch.Tensor:
        config = self.backbone.config.get_text_config()
        logits = shaped_logits(lm_head(hidden).float(), config)  # [n, V]
        if self.backbone_loss == "ce":
            return F.cross_entropy(logits, next_ids, reduction="sum")
        with torch.no_grad():
            weight = self.original.weight
            wanted = shaped_logits(F.linear(reference.to(weight.dtype), weight, self.original.bias).float(), config)
        return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)
