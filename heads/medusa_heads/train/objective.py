"""The training objectives. Each is a module whose forward pass returns the losses of one batch.

Source: Cai et al., "Medusa", section 2.2: Medusa-1 is the sum over heads k of decay^k · CE(head k, token t + k + 2); Medusa-2
adds the backbone's own loss, which for self-distilled data is the KL divergence from the original model (section 2.3.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from medusa_heads.logits import shaped_logits
from medusa_heads.modules import MedusaHeads, root_states

IGNORED = -100  # the target that cross_entropy ignores
KL_ROWS = 256  # rows whose logits over the whole vocabulary, of both models, are in memory at a time


class Losses(NamedTuple):  # not a dataclass: FSDP only finds tensors in tuples
    """The losses of one batch."""

    total: torch.Tensor  # the loss to minimise
    heads: torch.Tensor  # cross-entropy of each head. [K]
    backbone: torch.Tensor | None = None  # medusa-2: the backbone's loss


class LmHead(nn.Module):
    """The backbone's LM head, frozen, reduced to the tokens that count in the loss.

    Args:
        weight: all rows of its weight. [V, C]
        bias: its bias, or None. [V]
        token_ids: the V' tokens that count, or None for all. Other targets are ignored.
        config: the text model's configuration, which says how the model scales and caps its logits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    token_ids: torch.Tensor | None
    index: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, token_ids: torch.Tensor | None = None, config: Any = None
    ) -> None:
        super().__init__()
        self._config = config
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

    def distribution(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own distribution over the tokens that count, from its last hidden states. [U, C] -> [U, V']"""
        return shaped_logits(F.linear(hidden, self.weight, self.bias), self._config).softmax(-1)

    def of(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias for a head's logits: the head's own, or these."""
        own: Any = head.lm_head
        return (self.weight, self.bias) if own is None else (self.kept(own.weight), None)

    def places(self, targets: torch.Tensor) -> torch.Tensor:
        """Indices of targets among the tokens that count; IGNORED for other tokens and for -1. Any shape."""
        found: torch.Tensor = self.index[targets.clamp(min=0)]
        return found.masked_fill(targets < 0, IGNORED)


def lm_head_of(model: PreTrainedModel, dtype: torch.dtype, token_ids: torch.Tensor | None = None) -> LmHead:
    """A copy of a model's LM head in the given precision, for the tokens that count."""
    output: Any = model.get_output_embeddings()
    bias = getattr(output, "bias", None)
    return LmHead(output.weight.to(dtype), None if bias is None else bias.to(dtype), token_ids, model.config.get_text_config())


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
        root_ids: torch.Tensor,  # [N] the next tokens at these states
        targets: torch.Tensor,  # [N, K] the heads' targets, -1 for none
        ahead: torch.Tensor | None = None,  # [U, C] for soft targets: the backbone's states that predict the targets
        places: torch.Tensor | None = None,  # [N, K] for each target, the index of its state in `ahead`
    ) -> Losses:
        """The losses of a batch of rows."""
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
        """Like `heads_losses`, but part of each target is the backbone's distribution at its position. [K]"""
        with torch.no_grad():
            backbone = self.lm_head.distribution(ahead)  # [U, V']
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
        heads: the heads to train.
        lm_head: the tokens that count, and the LM head for heads without their own.
        hidden: the hidden states that the heads read.
        root_ids: the next tokens at these states, for heads that read the root.
        targets: the heads' targets, -1 for none.
        learning: the backbone's LM head if it is trained as well; it then replaces the weights of `lm_head`.
    """
    places = lm_head.places(targets)  # [N, K]
    shared = (lm_head.weight, lm_head.bias)
    if learning is not None:
        shared = (lm_head.kept(learning.weight), None if learning.bias is None else lm_head.kept(learning.bias))
    # only looked up: no gradient flows into the LM head here
    roots = root_states(shared[0].detach(), lm_head.places(root_ids)) if heads.config.reads_root else None
    losses = []
    for k, head in enumerate(heads.heads):
        weight, bias = shared if head.lm_head is None else lm_head.of(head)
        logits = F.linear(head(hidden, roots), weight, bias)  # [N, V']
        total = F.cross_entropy(logits, places[:, k], ignore_index=IGNORED, reduction="sum")
        losses.append(total / (places[:, k] != IGNORED).sum().clamp(min=1))  # a batch can have no targets for the last heads
    return torch.stack(losses)


def weighted(losses: torch.Tensor, decay: float) -> torch.Tensor:
    """The weighted sum of the heads' losses: the k-th head (from 1) has the weight decay^k. [K] -> []"""
    return (losses * decay ** torch.arange(1, len(losses) + 1, device=losses.device)).sum()


class JointObjective(nn.Module):
    """Medusa-2: the heads' loss plus the backbone's loss, on token sequences.

    Args:
        backbone: the backbone to train, possibly with an adapter's layers.
        heads: the heads to train.
        lm_head: the original's LM head, for the tokens that count in the heads' loss.
        original: the original's complete LM head, for the reference of the KL divergence.
        decay: the k-th head has the weight decay^k.
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
        """The class names of the backbone's layers, by which it is sharded."""
        names: Any = self.backbone._no_split_modules  # noqa: SLF001 - Transformers has it only there
        return set(names or ()) & {type(module).__name__ for module in self.backbone.modules()}

    def forward(
        self,
        tokens: torch.Tensor,  # [B, T]
        rows: torch.Tensor,  # [N] indices into the flattened tokens, of the positions that predict answers
        next_ids: torch.Tensor,  # [N] the answers' tokens at these positions
        targets: torch.Tensor,  # [N, K]
        reference: torch.Tensor,  # [N, C] the original's hidden states at these positions
        heads_weight: float,
    ) -> Losses:
        """The losses of a batch of sequences."""
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
