"""The loop that every stage of training runs: batches in a fixed order, steps of the optimizer, log, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    """What one stage trains, and on what.

    Args:
        name: in the log and the checkpoints.
        objective: a module whose forward pass gives `Losses`.
        groups: the optimizer's parameter groups, each with its learning rate.
        epochs: passes over the data.
        batches: all batches of an epoch, the same on every process.
        load: a batch's tensors, and how many answer tokens it holds; told the step and the number of steps.
    """

    name: str
    objective: torch.nn.Module
    groups: list[dict[str, Any]]
    epochs: float
    batches: Callable[[int], Sequence[IntArray]]
    load: Callable[[IntArray, int, int], tuple[tuple[Any, ...], int]]


@dataclass(frozen=True)
class News:
    """Told after every step."""

    stage: str
    step: int  # done
    num_steps: int
    tokens: int  # answer tokens taken since the loop began, on all processes
    loss: float


def fit(
    stage: Stage,
    accelerator: Accelerator,
    work: WorkDirectory,
    settings: TrainSettings,
    tell: Callable[[News], None],
    after_epoch: Callable[[torch.nn.Module, int], None] = lambda *_: None,
) -> torch.nn.Module:
    """Train a stage to its end, from its checkpoint where there is one. Returns the objective, prepared by accelerate.

    Raises:
        OptionError: there is less data than one step takes.
        MedusaError: the loss is no finite number. The last checkpoint stays.
    """
    share, accumulation = accelerator.num_processes, settings.gradient_accumulation
    batches, epoch = stage.batches(0), 0
    steps_per_epoch = len(batches) // (share * accumulation)
    if not steps_per_epoch:
        raise OptionError(
            f"the data makes {len(batches)} batches, a step takes {share * accumulation}: "
            "lower --batch-tokens or --gradient-accumulation, or use more data"
        )
    num_steps = min(settings.max_steps or math.inf, math.ceil(stage.epochs * steps_per_epoch))
    assert isinstance(num_steps, int)
    objective, optimizer = accelerator.prepare(
        stage.objective, torch.optim.AdamW(stage.groups, weight_decay=settings.weight_decay)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps, settings.warmup)
    )
    accelerator.register_for_checkpointing(scheduler)
    first = work.resume(stage.name)
    objective.train()
    meter = _Meter(accelerator)
    for step in range(first, num_steps):
        if epoch != step // steps_per_epoch:
            epoch = step // steps_per_epoch
            batches = stage.batches(epoch)
        place = step % steps_per_epoch * accumulation * share + accelerator.process_index
        for part in range(accumulation):
            inputs, num_tokens = stage.load(batches[place + part * share], step, num_steps)
            with accelerator.accumulate(objective):
                losses: Losses = objective(*inputs)
                accelerator.backward(losses.total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(objective.parameters(), settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            meter.add(losses, num_tokens)
        rate = scheduler.get_last_lr()[0]
        scheduler.step()
        done = step + 1
        loss = meter.read()
        if not math.isfinite(loss):
            raise MedusaError(_not_finite(stage.name, done, loss, work, settings))
        tell(News(stage.name, done, num_steps, meter.tokens, loss))
        if done % settings.log_every == 0 or done == num_steps:
            work.log(stage=stage.name, step=done, epoch=round(done / steps_per_epoch, 4), learning_rate=rate, **meter.entry())
        if done % steps_per_epoch == 0 or done == num_steps:
            objective.eval()
            after_epoch(objective, done)
            objective.train()
        if done % settings.checkpoint_every == 0 and done < num_steps:
            work.save(stage.name, done)
    objective.eval()
    return objective


class _Meter:
    """Means since the last line of the log, over all processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.tokens = 0
        self.started = time.perf_counter()
        self._reset()

    def add(self, losses: Losses, num_tokens: int) -> None:
        backbone = losses.total.new_zeros(1) if losses.backbone is None else losses.backbone.reshape(1)
        self.latest = torch.cat([losses.total.detach().reshape(1).float(), backbone.float(), losses.heads.float()])
        self.sums = self.latest if self.sums is None else self.sums + self.latest
        self.parts += 1
        self.tokens += num_tokens * self.accelerator.num_processes
        self.has_backbone = losses.backbone is not None

    def read(self) -> float:
        """The last part's loss, meaned over the processes: all of them see the same, and stop together."""
        return float(self.accelerator.reduce(self.latest, "mean")[0])

    def entry(self) -> dict[str, Any]:
        assert self.sums is not None  # something was added
        mean = self.accelerator.reduce(self.sums / self.parts, "mean").tolist()
        entry = {"loss": mean[0], "head_losses": [round(value, 5) for value in mean[2:]]}
        if self.has_backbone:
            entry["backbone_loss"] = mean[1]
        seconds = time.perf_counter() - self.started
        self._reset()
        return entry | {"tokens": self.tokens, "tokens_per_second": round(self.tokens / seconds, 1)}

    def _reset(self) -> None:
        self.sums: torch.Tensor | None = None
        self.parts = 0


def _not_finite(stage: str, step: int, loss: float, work: WorkDirectory, settings: TrainSettings) -> str:
    kept = (step - 1) // settings.checkpoint_every * settings.checkpoint_every
    place = f"the checkpoint after step {kept} stays in {work.path}" if kept else "there is no checkpoint yet"
    return f"the loss is {loss} at step {step} of {stage}; {place}. Lower --learning-rate, or use --mixed-precision no"
