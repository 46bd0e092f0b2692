"""Medusa-2's second stage: heads and backbone are trained together, and the backbone is kept close to the original.

Source: Cai et al., "Medusa", sections 2.2.2 (a warm-up of the heads, another learning rate for the backbone) and 2.3.2 (for
self-distilled data, the KL divergence from the original model).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F  # noqa: N812 - the usual name
from transformers import PreTrainedModel

from medusa_heads.logits import shaped_logits
from medusa_heads.modules import MedusaHeads
from medusa_heads.train import batches
from medusa_heads.train.checkpoints import WorkDirectory
from medusa_heads.train.examples import Example
from medusa_heads.train.fit import News, Stage, fit
from medusa_heads.train.hidden import HiddenStates, cached_hidden_states, pad_right, response_states
from medusa_heads.train.objective import JointObjective, LmHead, lm_head_of
from medusa_heads.train.schedule import weight_factor
from medusa_heads.train.settings import TrainSettings

JOINT = "joint"  # the stage's name
PERPLEXITY_ROWS = 512  # rows whose logits are in memory at a time


@dataclass(frozen=True)
class JointResult:
    """The trained heads and backbone."""

    state: dict[str, torch.Tensor]  # state of the objective: heads.…
    model: PreTrainedModel  # the trained backbone in fp32, with the adapter merged into it
    adapter: PeftModel | None  # the adapter around that model, if only an adapter was trained

    def save(self, directory: Path, mode: Literal["merged", "adapter"], base: str) -> None:
        """Write the backbone as a checkpoint, or only its adapter with the name of its `base` model.

        Call it last: it removes the adapter's layers from the model.
        """
        if self.adapter is None:
            self.model.save_pretrained(directory)
        elif mode == "merged":
            self.adapter.unload().save_pretrained(directory)  # the merged weights stay
        else:
            self.adapter.peft_config["default"].base_model_name_or_path = base
            self.adapter.save_pretrained(str(directory), save_embedding_layers=False)

    def hidden_states(self, examples: Sequence[Example], directory: Path, identity: str) -> HiddenStates:
        """Hidden states of answers by the trained backbone."""
        return cached_hidden_states(self.model, examples, directory, identity=identity)


def train_jointly(
    backbone: PreTrainedModel,
    reload: Callable[[], PreTrainedModel],
    heads: MedusaHeads,
    lm_head: LmHead,
    examples: Sequence[Example],
    states: HiddenStates,
    settings: TrainSettings,
    accelerator: Accelerator,
    work: WorkDirectory,
    tell: Callable[[News], None],
) -> JointResult:
    """Train heads and backbone together; see `medusa_heads.train.run.train`.

    Args:
        backbone: the original model in fp32; it is changed.
        reload: loads the original model again.
        heads: the heads after the first stage.
        lm_head: the original's LM head, for the tokens that count in the loss.
        examples: the training examples.
        states: the original's hidden states of the examples.
        settings: the training settings.
        accelerator: the processes that share the work.
        work: the directory of log and checkpoints.
        tell: called after every step.
    """
    original = lm_head_of(backbone, lm_head.weight.dtype)
    set_seed(settings.seed)  # for the adapter's initial weights, and dropout
    if settings.backbone == "lora":
        _with_adapter(backbone, settings)  # this adds its layers to the backbone
    objective = JointObjective(backbone, heads, lm_head, original, settings.loss_decay, settings.backbone_loss)
    slow = settings.learning_rate / settings.heads_rate_multiple
    lengths = [example.num_tokens - 1 for example in examples]
    stage = Stage(
        name=JOINT,
        objective=objective,
        groups=[
            {"params": list(heads.parameters()), "lr": settings.learning_rate},
            {"params": [p for p in backbone.parameters() if p.requires_grad], "lr": slow},
        ],
        epochs=settings.epochs,
        batches=lambda epoch: batches.sequence_batches(lengths, settings.batch_tokens, settings.seed, epoch),
        load=_Loader(examples, states, settings, heads.config.num_heads, accelerator.device),
    )
    state = accelerator.get_state_dict(fit(stage, accelerator, work, settings, tell))
    if not accelerator.is_main_process:
        return JointResult(state, backbone, None)
    return _result(state, reload().to(accelerator.device), settings)


def _with_adapter(model: PreTrainedModel, settings: TrainSettings) -> PeftModel:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type] # any number is allowed
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",  # peft leaves the LM head out
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls deprecated functions, and warns about GPT-2's layers
        return get_peft_model(model, config)


class _Loader:
    """Makes the tensors of a batch of complete conversations."""

    def __init__(
        self,
        examples: Sequence[Example],
        states: HiddenStates,
        settings: TrainSettings,
        num_heads: int,
        device: torch.device,
    ) -> None:
        self.examples, self.states, self.settings = examples, states, settings
        self.num_heads, self.device = num_heads, device

    def __call__(self, batch: batches.IntArray, step: int, num_steps: int) -> tuple[tuple[Any, ...], int]:
        chosen = [self.examples[place] for place in batch]
        tokens = pad_right([[*example.prompt_ids, *example.response_ids[:-1]] for example in chosen])  # [B, T]
        places, rows = [], []
        for line, (place, example) in enumerate(zip(batch, chosen, strict=True)):
            count = len(example.response_ids)
            places.append(line * tokens.shape[1] + len(example.prompt_ids) - 1 + np.arange(count))
            rows.append(self.states.starts[place] + np.arange(count))
        index = np.concatenate(rows)  # [N]
        weight = self.settings.heads_loss_weight * weight_factor(step, num_steps, self.settings.heads_loss_schedule)
        arrays = (
            np.concatenate(places),
            self.states.next_ids[index],
            self.states.targets(index, self.num_heads),
            np.asarray(self.states.rows[index]),
        )
        tensors = (tokens, *(torch.from_numpy(array) for array in arrays))
        return (*(tensor.to(self.device) for tensor in tensors), weight), len(index)


def _result(state: dict[str, torch.Tensor], fresh: PreTrainedModel, settings: TrainSettings) -> JointResult:
    """Load the trained weights into a fresh copy of the backbone."""
    adapter = _with_adapter(fresh, settings) if settings.backbone == "lora" else None
    learned = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    strange = fresh.load_state_dict(
        learned, strict=False
    ).unexpected_keys  # not strict, as tied weights may be stored only once
    assert not strange, strange
    if adapter is not None:
        adapter.merge_adapter()
    return JointResult(state, fresh.eval(), adapter)


@torch.no_grad()
def perplexity(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Perplexity of answers given their prompts, over all tokens of the answers."""
    total, count = 0.0, 0
    lm_head, config = model.get_output_embeddings(), model.config.get_text_config()
    for example in examples:
        [hidden] = response_states(model, [example])  # [R, C]
        wanted = torch.tensor(example.response_ids, device=hidden.device)
        for start in range(0, len(hidden), PERPLEXITY_ROWS):
            logits = shaped_logits(lm_head(hidden[start : start + PERPLEXITY_ROWS]).float(), config)
            total += float(F.cross_entropy(logits, wanted[start : start + PERPLEXITY_ROWS], reduction="sum"))
        count += len(example.response_ids)
    return float(np.exp(total / max(1, count)))
