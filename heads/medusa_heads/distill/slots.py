"""Continuous batching for Transformers models: between steps, finished answers leave and new requests join.

Transformers' own batched `generate` decodes until the longest answer ends and copies its cache at every step; its continuous
batching is for GPUs. Measurements on a CPU are in docs/decisions/0009-distillation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from medusa_heads.distill.answerer import Answer, Made, Request
from medusa_heads.errors import CheckpointError
from medusa_runtime.errors import CapacityError

ATTENTION_NAME = "medusa_slots"
HARMLESS = frozenset({"position_ids", "cache_position"})  # arguments that do not change the result
GROWTH = 64  # entries per slot by which the cache grows at least
BLOCK = 128  # neighbouring tokens whose logits are compared together
PREFILL_TOKENS = 4096  # most prompt tokens in one forward pass, including padding


def slot_attention(
    _: torch.nn.Module,
    query: torch.Tensor,  # [B, Hq, T, D]
    key: torch.Tensor,  # [B, Hkv, S, D]
    value: torch.Tensor,  # [B, Hkv, S, D]
    attention_mask: torch.Tensor,  # [B, 1, T, S] bool
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention. The query heads that share a key head are rows of one matrix product, so no key is copied.

    Returns [B, T, Hq, D], as Transformers expects.
    """
    if unknown := [name for name, tensor in others.items() if isinstance(tensor, torch.Tensor) and name not in HARMLESS]:
        raise CheckpointError(f"this model cannot be decoded in slots: its attention has the extra inputs {', '.join(unknown)}")
    batch, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * tokens, width)
    mask = attention_mask if tokens == 1 else attention_mask.repeat(1, 1, groups, 1)
    if softcap:
        scores = rows @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, torch.finfo(scores.dtype).min)
        attended = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value
    else:
        attended = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


def register() -> None:
    """Register ``attn_implementation="medusa_slots"`` with Transformers. It may be called again."""
    AttentionInterface.register(ATTENTION_NAME, slot_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, attention_mask=None, **__: attention_mask)


class SlotCache:
    """Preallocated keys and values of B slots. Each slot has its own length.

    It has the methods of Transformers' ``Cache`` that decoders call. Set `rows` before each forward pass.
    """

    is_compileable = False

    def __init__(self, num_slots: int) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # key, value: [B, Hkv, S, D]
        self.lengths = torch.zeros(num_slots, dtype=torch.int64)  # [B] entries in use
        self.rows = torch.arange(num_slots)  # the slots of the next forward pass
        self.capacity = 0  # S

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoding: append [B, Hkv, 1, D] to the slots. Prefill of empty slots: store the entries, attend only to them."""
        keys, values = self._buffers(layer, key)
        rows, tokens = self.rows.to(key.device), key.shape[2]
        if tokens == 1:
            lengths = self.lengths.to(key.device)
            keys[rows, :, lengths], values[rows, :, lengths] = key[:, :, 0], value[:, :, 0]
            used = int(self.lengths.max()) + 1
            return keys[:, :, :used], values[:, :, :used]
        keys[rows, :, :tokens], values[rows, :, :tokens] = key, value
        return key, value

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` entries per slot."""
        if capacity > self.capacity:
            self.capacity = -(-capacity // GROWTH) * GROWTH

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def _buffers(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.layers.get(layer)
        if pair is None or pair[0].shape[2] < self.capacity:
            grown = []
            for old in pair or (None, None):
                buffer = like.new_zeros(len(self.lengths), like.shape[1], self.capacity, like.shape[3])
                if old is not None:
                    buffer[:, :, : old.shape[2]] = old
                grown.append(buffer)
            self.layers[layer] = pair = (grown[0], grown[1])
        return pair


@dataclass
class _Slot:
    request: Request
    token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uniform = np.random.default_rng(self.request.seed)


class SlotDecoder:
    """Answers requests in `num_slots` slots. Each step decodes one token in every slot.

    Args:
        model: a model loaded with ``attn_implementation="medusa_slots"`` (see `register`), on any device, in any precision.
        layer_types: ``full_attention`` or ``sliding_attention`` for each layer.
        sliding_window: how many tokens back a sliding-window layer attends.
        eos_token_ids: the tokens that end an answer.
        num_slots: number of requests decoded at the same time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer_types: list[str],
        sliding_window: int | None,
        eos_token_ids: list[int],
        num_slots: int = 64,
    ) -> None:
        self.model, self.device = model, model.device
        self.layer_types, self.sliding_window = set(layer_types), sliding_window
        self.eos = frozenset(eos_token_ids)
        self.slots: list[_Slot | None] = [None] * num_slots

    def answers(self, next_request: Callable[[], Request | None]) -> Generator[Answer | Made, None, None]:
        """Answer until there are no more requests and all slots are free. Each step also tells how many tokens it made.

        Raises:
            CapacityError: the device has too little memory for this many slots.
        """
        try:
            yield from self._decode(next_request)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{self.device} has too little memory for {len(self.slots)} slots; lower --batch-size"
            ) from error

    @torch.inference_mode()
    def _decode(self, next_request: Callable[[], Request | None]) -> Generator[Answer | Made, None, None]:
        slots = self.slots = [None] * len(self.slots)
        cache = SlotCache(len(slots))
        next_ids = torch.zeros(len(slots), dtype=torch.int64)  # [B] decided, but not in the cache yet
        few = max(1, len(slots) // 8)  # wait for this many free slots, since each prefill reads all weights
        while True:
            free = [index for index, slot in enumerate(slots) if slot is None]
            if len(free) >= few:
                self._join(free, next_request, cache, next_ids)
            if all(slot is None for slot in slots):
                return
            chosen = self._step(cache, next_ids)
            yield Made(sum(slot is not None for slot in slots))
            for index, slot in enumerate(slots):
                if slot is None:
                    cache.lengths[index] = 0
                    continue
                token = int(chosen[index])
                slot.token_ids.append(token)
                next_ids[index] = token
                if token in self.eos or len(slot.token_ids) == slot.request.max_new_tokens:
                    yield Answer(slot.request, slot.token_ids, "stop" if token in self.eos else "length")
                    slots[index] = None
                    cache.lengths[index] = 0

    def _join(
        self, free: list[int], next_request: Callable[[], Request | None], cache: SlotCache, next_ids: torch.Tensor
    ) -> None:
        """Fill free slots, and cache their prompts without the last token, which the next step reads."""
        joined: list[tuple[int, tuple[int, ...]]] = []
        for index in free:
            if (request := next_request()) is None:
                break
            self.slots[index] = _Slot(request)
            joined.append((index, request.prompt_ids))
            cache.reserve(len(request.prompt_ids) + request.max_new_tokens)
        joined.sort(key=lambda pair: len(pair[1]))
        while joined:
            size = max(1, PREFILL_TOKENS // len(joined[-1][1]))
            group, joined = joined[-size:], joined[:-size]
            rows, prompts = torch.tensor([index for index, _ in group]), [prompt for _, prompt in group]
            next_ids[rows] = torch.tensor([prompt[-1] for prompt in prompts])
            cache.lengths[rows] = torch.tensor([len(prompt) - 1 for prompt in prompts])
            self._prefill(cache, rows, [prompt[:-1] for prompt in prompts])

    def _prefill(self, cache: SlotCache, rows: torch.Tensor, prompts: list[tuple[int, ...]]) -> None:
        tokens = max(2, *map(len, prompts))  # at least two: by that the cache distinguishes a prefill from a step
        padded = torch.zeros(len(prompts), tokens, dtype=torch.int64)  # [b, T]; padding is overwritten later
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        positions = torch.arange(tokens)
        distance = positions[:, None] - positions[None, :]  # [T, T]
        cache.rows = rows
        self.model.base_model(
            input_ids=padded.to(self.device),
            position_ids=positions.expand(len(prompts), -1).to(self.device),
            attention_mask=self._masks((distance >= 0).expand(len(prompts), 1, -1, -1), distance[None, None]),
            past_key_values=cache,
            use_cache=True,
        )

    def _step(self, cache: SlotCache, next_ids: torch.Tensor) -> torch.Tensor:
        """Decode one token in every slot. Returns [B]."""
        used = int(cache.lengths.max()) + 1
        distance = cache.lengths[:, None] - torch.arange(used)[None, :]  # [B, S]
        cache.rows = torch.arange(len(self.slots))
        logits = self.model(
            input_ids=next_ids[:, None].to(self.device),
            position_ids=cache.lengths[:, None].to(self.device),
            attention_mask=self._masks((distance >= 0)[:, None, None], distance[:, None, None]),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, 0]  # [B, V]
        cache.lengths += 1
        return self._choose(logits)

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:  # [B, V] -> [B]
        active = [index for index, slot in enumerate(self.slots) if slot is not None]
        largest, chosen = largest_of(logits)
        if not bool(torch.isfinite(largest[active]).all()):  # the largest of numbers with a NaN is NaN
            kind = str(logits.dtype).removeprefix("torch.")
            raise CheckpointError(f"the model gives logits that are not finite numbers in {kind}; use --dtype bf16 or fp32")
        chosen = chosen.cpu()
        warm = [index for index, slot in enumerate(self.slots) if slot is not None and slot.request.temperature > 0]
        for index in warm:
            slot = self.slots[index]
            assert slot is not None
            # at most 0, so that dividing by a very low temperature cannot overflow
            below = logits[index].double() - largest[index]
            cumulative = torch.softmax(below / slot.request.temperature, -1).cumsum(-1)
            point = torch.tensor(slot.uniform.random(), dtype=torch.float64, device=self.device) * cumulative[-1]
            chosen[index] = int(torch.searchsorted(cumulative, point, right=True).clamp(max=len(cumulative) - 1))
        return chosen

    def _masks(self, seen: torch.Tensor, distance: torch.Tensor) -> Any:
        """The mask for each kind of layer, or a single mask if there is only one kind."""
        masks = {"full_attention": seen}
        if self.sliding_window is not None:
            masks["sliding_attention"] = seen & (distance < self.sliding_window)
        kept = {kind: masks[kind].to(self.device) for kind in self.layer_types}
        return kept if len(kept) > 1 else next(iter(kept.values()))


def largest_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row's numbers, and the first place where it stands. [B, V] -> [B] [B]

    PyTorch's `argmax` takes a tenth of a step's time on a CPU in bf16, `amax` a tenth of that. So blocks are compared first.
    """
    size = logits.shape[1]
    width = min(BLOCK, size)
    whole = size - size % width
    blocks = logits[:, :whole].unflatten(1, (-1, width)).amax(2)
    if whole < size:
        blocks = torch.cat([blocks, logits[:, whole:].amax(1, keepdim=True)], 1)
    start = (blocks.argmax(1, keepdim=True) * width).clamp(max=size - width)
    inside = logits.gather(1, start + torch.arange(width, device=logits.device)).argmax(1, keepdim=True)
    return blocks.amax(1), (start + inside)[:, 0]
