"""The training loop of every stage: batches in a fixed order, optimizer steps, log, checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator

from medusa_heads.train.batches import IntArray
from medusa_heads.train.checkpoints import WorkDirectory
from medusa_heads.train.objective import Losses
from medusa_heads.train.schedule import learning_rate_factor
from medusa_heads.train.settings import TrainSettings
from medusa_runtime.errors import MedusaError, OptionError


@dataclass
class Stage:
    """One stage of training: its objective and its data.

    Args:
        name: the stage's name in log and checkpoints.
        objective: a module whose forward pass gives `Losses`.
        groups: the optimizer's parameter groups, each with its learning rate.
        epochs: passes over the data.
        batches: all batches of an epoch, the same on every process.
        load: returns a batch's tensors and its number of answer tokens, given the step and the number of steps.
    """

    name: str
    objective: torch.nn.Module
    groups: list[dict[str, Any]]
    epochs: float
    batches: Callable[[int], Sequence[IntArray]]
    load: Callable[[IntArray, int, int], tuple[tuple[Any, ...], int]]


@dataclass(frozen=True)
class News:
    """The progress after a step."""

    stage: str
    step: int  # steps done
    num_steps: int
    tokens: int  # answer tokens of all processes since this process started the stage
    loss: float


def fit(
    stage: Stage,
    accelerator: Accelerator,
    work: WorkDirectory,
    settings: TrainSettings,
    tell: Callable[[News], None],
    after_epoch: Callable[[torch.nn.Module, int], None] = lambda *_: None,
) -> torch.nn.Module:
    """Train a stage to its end, starting from its checkpoint if there is one. Returns the objective, prepared by accelerate.

    Raises:
        OptionError: the data is too small for a single step.
        MedusaError: the loss or its gradient is not finite. The last checkpoint is kept.
    """
    share, accumulation = accelerator.num_processes, settings.gradient_accumulation
    batches, epoch = stage.batches(0), 0
    steps_per_epoch = len(batches) // (share * accumulation)
    if not steps_per_epoch:
        raise OptionError(
            f"the data has {len(batches)} batches, but a step needs {share * accumulation}; "
            "lower --batch-tokens or --gradient-accumulation, or use more data"
        )
    num_steps = min(settings.max_steps or math.inf, math.ceil(stage.epochs * steps_per_epoch))
    assert isinstance(num_steps, int)
    optimizer = torch.optim.AdamW(stage.groups, weight_decay=settings.weight_decay)
    _shard_own_layers(accelerator, stage.objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # accelerate uses deprecated functions of PyTorch
        objective, optimizer = accelerator.prepare(stage.objective, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps, settings.warmup)
    )
    meter = _Meter(accelerator)
    accelerator.register_for_checkpointing(scheduler, meter)
    first = work.resume(stage.name)
    objective.train()
    for step in range(first, num_steps):
        if epoch != step // steps_per_epoch:
            epoch = step // steps_per_epoch
            batches = stage.batches(epoch)
        place = step % steps_per_epoch * accumulation * share + accelerator.process_index
        # epochs can have different numbers of batches
        parts = [stage.load(batches[(place + part * share) % len(batches)], step, num_steps) for part in range(accumulation)]
        weights = _weights([num_tokens for _, num_tokens in parts], accelerator)
        for (inputs, num_tokens), weight in zip(parts, weights, strict=True):
            with accelerator.accumulate(objective):
                losses: Losses = objective(*inputs)
                accelerator.backward(losses.total * weight)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(objective.parameters(), settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            meter.add(losses, num_tokens, weight)
        rate = scheduler.get_last_lr()[0]
        scheduler.step()
        done = step + 1
        loss = meter.end_step()
        # a gradient scaler skips steps with infinite gradients by itself
        if not math.isfinite(loss) or (accelerator.scaler is None and not torch.isfinite(norm)):
            raise MedusaError(_not_finite(stage.name, done, loss, work))
        tell(News(stage.name, done, num_steps, meter.tokens_here, loss))
        if done % settings.log_every == 0 or done == num_steps:
            work.log(stage=stage.name, step=done, epoch=round(done / steps_per_epoch, 4), learning_rate=rate, **meter.entry())
        if done % steps_per_epoch == 0 or done == num_steps:
            objective.eval()
            after_epoch(objective, done)
            objective.train()
        if done % settings.checkpoint_every == 0 or done == num_steps:
            work.save(stage.name, done)
    objective.eval()
    return cast("torch.nn.Module", objective)


def _weights(num_tokens: list[int], accelerator: Accelerator) -> list[float]:
    """The weight of each batch of a step on this process, so that all tokens of the step have the same weight. Mean 1."""
    count = len(num_tokens) * accelerator.num_processes
    if count == 1:
        return [1.0]
    total = accelerator.reduce(torch.tensor(float(sum(num_tokens)), device=accelerator.device), "sum")
    mean = float(total) / count
    return [tokens / mean for tokens in num_tokens]


def _shard_own_layers(accelerator: Accelerator, objective: torch.nn.Module) -> None:
    """Under FSDP: shard by the layer classes of this objective instead of those of the previous stage."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.auto_wrap_policy is not None:
        plugin.auto_wrap_policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)  # the original policy
        plugin.transformer_cls_names_to_wrap = sorted(getattr(objective, "layers", ()))


class _Meter:
    """Means over all processes since the last line of the log. It is part of checkpoints, so that the log continues exactly."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.started = time.perf_counter()
        self.tokens = self.tokens_before = self.steps = 0
        self.has_backbone = False
        self.parts: list[torch.Tensor] = []  # the losses of this step's batches on this process
        self.sums = torch.zeros(0)  # sums over steps: the loss, the backbone's loss, each head's loss

    def add(self, losses: Losses, num_tokens: int, weight: float) -> None:
        """Add the losses of one batch of a step. weight: from `_weights`."""
        self.has_backbone = losses.backbone is not None
        backbone = losses.total.new_zeros(()) if losses.backbone is None else losses.backbone
        means = torch.stack([number.float() for number in (losses.total.detach(), backbone, *losses.heads)]) * weight
        self.parts.append(torch.cat([means, means.new_tensor([num_tokens])]))

    def end_step(self) -> float:
        """The step's loss, averaged over all processes. All get the same number, so all stop together if it is not finite."""
        own = torch.stack(self.parts)  # [parts, 2 + K + 1]
        shared: torch.Tensor = self.accelerator.reduce(torch.cat([own[:, :-1].mean(0), own[:, -1:].sum(0)]), "sum")
        means = shared[:-1].double().cpu() / self.accelerator.num_processes
        self.tokens += int(shared[-1])
        self.sums = self.sums + means if self.steps else means
        self.steps += 1
        self.parts = []
        return float(means[0])

    @property
    def tokens_here(self) -> int:
        """Answer tokens since this process started the stage."""
        return self.tokens - self.tokens_before

    def entry(self) -> dict[str, Any]:
        """The contents of a line of the log. The means start anew."""
        loss, backbone, *heads = (round(value, 6) for value in (self.sums / self.steps).tolist())
        self.steps = 0
        entry = {"loss": loss, "head_losses": heads} | ({"backbone_loss": backbone} if self.has_backbone else {})
        rate = self.tokens_here / (time.perf_counter() - self.started)
        return entry | {"tokens": self.tokens, "tokens_per_second": round(rate, 1)}

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "steps": self.steps, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = self.tokens_before = state["tokens"]
        self.steps, self.sums = state["steps"], state["sums"]


def _not_finite(stage: str, step: int, loss: float, work: WorkDirectory) -> str:
    found = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    return (
        f"{found} at step {step} of {stage}; {work.kept}. Start again with a lower --learning-rate or --mixed-precision no, "
        "and another --work; --hidden reuses the hidden states"
    )
