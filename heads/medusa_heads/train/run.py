"""A training run: the backbone's hidden states, then the heads alone, then for Medusa-2 heads and backbone together."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from medusa_heads.config import HeadsConfig
from medusa_heads.errors import CheckpointError
from medusa_heads.evaluate import evaluate, target_ranks
from medusa_heads.formats import load_heads, native
from medusa_heads.modules import MedusaHeads
from medusa_heads.ngrams import draft_ngrams
from medusa_heads.replay import Evaluation, accuracies
from medusa_heads.train import batches
from medusa_heads.train.checkpoints import WorkDirectory
from medusa_heads.train.examples import Example, digest, split
from medusa_heads.train.fit import News, Stage, fit
from medusa_heads.train.hidden import HiddenStates, backbone_digest, cached_hidden_states
from medusa_heads.train.joint import JOINT, JointResult, perplexity, train_jointly
from medusa_heads.train.objective import HeadsObjective, LmHead, lm_head_of
from medusa_heads.train.settings import TrainSettings
from medusa_runtime.drafting.ngrams import NGrams
from medusa_runtime.errors import MedusaError, OptionError

SOFT_BLOCK = 32  # adjacent rows that stay together, as they share states for soft targets
LOG_ROWS = 4096  # held-out rows for the accuracies in the log


@dataclass(frozen=True)
class Source:
    """The model to train heads for."""

    name: str
    model: PreTrainedModel  # in inference mode, on its device
    reload: Callable[[], PreTrainedModel]  # loads the same model again, in fp32 on the CPU


@dataclass(frozen=True)
class Listener:
    """Functions that receive the progress of a run."""

    cached: Callable[[int, int], None] = lambda *_: None  # answer tokens with hidden states, and the total
    step: Callable[[News], None] = lambda *_: None
    note: Callable[[str], None] = lambda *_: None


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    heads: MedusaHeads
    evaluation: Evaluation | None  # None without held-out answers
    joint: JointResult | None  # None for medusa-1
    ngrams: NGrams | None  # None if the answers are too short
    facts: dict[str, Any]  # for the record of the run


def train(
    source: Source,
    examples: list[Example],
    settings: TrainSettings,
    work_path: Path,
    hidden_path: Path,
    accelerator: Accelerator,
    listener: Listener,
) -> TrainResult | None:
    """Train heads, or continue an interrupted run.

    Args:
        source: the model.
        examples: the model's answers.
        settings: the training settings.
        work_path: directory of checkpoints and log.
        hidden_path: directory of hidden states.
        accelerator: the processes that share the work.
        listener: receives the progress.

    Returns:
        The result; None on processes other than the main one.

    Raises:
        OptionError: there is too little data, or `work_path` has a run with other settings.
        CheckpointError: the heads to start from do not fit the model.
        MedusaError: the loss or a hidden state is not finite, or the backbone changed under Medusa-1.
    """
    training, held_out = split(examples, settings.held_out)
    if not training:
        raise OptionError("all conversations are held out; lower --held-out or use more data")
    identity = backbone_digest(source.model)
    work = WorkDirectory(work_path, _identity(settings, identity, training, held_out, accelerator), accelerator)
    run = _Run(source, settings, hidden_path, identity, accelerator, work, listener)
    states = run.hidden_states(training, "train")
    held_states = run.hidden_states(held_out, "held-out") if held_out else None
    heads = run.train_heads(states, held_states)
    joint = run.train_jointly(heads, training, states) if settings.method == "medusa-2" else None
    if joint is None and backbone_digest(source.model) != identity:
        raise MedusaError("the backbone's weights changed during the training of its heads; this is a bug, please report it")
    if not accelerator.is_main_process:
        return None
    kept = _kept_tokens(states, settings, source.model.config.get_text_config().vocab_size)
    draft_ids = None if kept is None else kept.tolist()
    facts: dict[str, Any] = {
        "backbone_sha256": identity,
        "backbone_unchanged": joint is None,
        "answers": {"training": len(training), "held_out": len(held_out)},
        "tokens": {"training": len(states.next_ids), "held_out": sum(len(e.response_ids) for e in held_out)},
        "data_sha256": digest(examples),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    if joint is None:
        heads = _as_kept(heads.cpu().eval(), settings)
        heads.draft_ids = draft_ids
        evaluation = _evaluation(heads, source.model, held_states, digest(held_out))
        return TrainResult(heads, evaluation, None, _ngrams(heads, source.model, training, held_states), facts)
    heads = MedusaHeads(heads.config)  # new modules: the earlier ones may be sharded
    heads.load_state_dict(_of_heads(joint.state))
    heads = _as_kept(heads.eval(), settings)
    heads.draft_ids = draft_ids
    if held_out:
        held_states = joint.hidden_states(held_out, hidden_path / "held-out-joint", backbone_digest(joint.model))
        original: Any = source.reload()
        first, last = perplexity(original.to(accelerator.device), held_out), perplexity(joint.model, held_out)
        facts["perplexity"] = {"original": first, "trained": last}
    evaluation = _evaluation(heads, joint.model, held_states, digest(held_out))
    return TrainResult(heads, evaluation, joint, _ngrams(heads, joint.model, training, held_states), facts)


@dataclass(frozen=True)
class _Run:
    """Objects that the parts of a run share."""

    source: Source
    settings: TrainSettings
    hidden_path: Path
    identity: str  # digest of the backbone
    accelerator: Accelerator
    work: WorkDirectory
    listener: Listener

    def hidden_states(self, examples: list[Example], name: str) -> HiddenStates:
        """The backbone's hidden states. For Medusa-2 they are computed in the precision of its training."""
        accelerator, total = self.accelerator, sum(len(example.response_ids) for example in examples)
        learns = self.settings.method == "medusa-2"
        with accelerator.autocast() if learns else nullcontext():
            return cached_hidden_states(
                self.source.model,
                examples,
                self.hidden_path / name,
                identity=f"{self.identity} {accelerator.mixed_precision}" if learns else self.identity,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                barrier=accelerator.wait_for_everyone,
                tell=lambda done: self.listener.cached(done, total),
            )

    def train_heads(self, states: HiddenStates, held_states: HiddenStates | None) -> MedusaHeads:
        """Train the heads alone: this is all of Medusa-1, and the first stage of Medusa-2."""
        settings, heads = self.settings, _new_heads(self.source, self.settings)
        epochs = settings.epochs if settings.method == "medusa-1" else settings.heads_first
        if not epochs or self.work.stage == JOINT:  # the stage is done; the joint stage's checkpoint has the heads
            return heads
        lm_head = _lm_head(self.source, states, settings, self.accelerator, self.listener)
        heads.draft_ids = None if lm_head.token_ids is None else lm_head.token_ids.tolist()
        stage = _heads_stage(copy.deepcopy(heads), lm_head, states, settings, epochs, self.accelerator.device)
        log: Callable[[torch.nn.Module, int], None] = lambda *_: None  # noqa: E731 - used if nothing is held out
        if held_states is not None:
            log = _AccuracyLog(heads, self.work, self.source, held_states, self.listener)
        objective = fit(stage, self.accelerator, self.work, settings, self.listener.step, log)
        heads.load_state_dict(_learned(objective, self.accelerator))
        _forget(self.accelerator)
        return heads

    def train_jointly(self, heads: MedusaHeads, training: list[Example], states: HiddenStates) -> JointResult:
        """Medusa-2's second stage."""
        source, accelerator = self.source, self.accelerator
        lm_head = _lm_head(source, states, self.settings, accelerator, self.listener)
        joint = train_jointly(
            source.model,
            source.reload,
            heads,
            lm_head,
            training,
            states,
            self.settings,
            accelerator,
            self.work,
            self.listener.step,
        )
        _forget(accelerator)
        return joint


def _as_kept(heads: MedusaHeads, settings: TrainSettings) -> MedusaHeads:
    kept = heads.to(native.DTYPES[settings.heads_dtype])
    if not all(parameter.isfinite().all() for parameter in kept.parameters()):
        raise MedusaError(f"the heads' weights overflow in {settings.heads_dtype}; use another --heads-dtype")
    return kept


def _evaluation(heads: MedusaHeads, model: PreTrainedModel, states: HiddenStates | None, data: str) -> Evaluation | None:
    """Evaluate the heads with their stored weights, computing in the model's precision."""
    if states is None:
        return None
    output: Any = model.get_output_embeddings()
    judged = copy.deepcopy(heads).to(output.weight.device, output.weight.dtype)
    return evaluate(judged, output, states, digest=heads.digest(), data=data)


def _ngrams(heads: MedusaHeads, model: PreTrainedModel, training: list[Example], states: HiddenStates | None) -> NGrams | None:
    output: Any = model.get_output_embeddings()
    judged = copy.deepcopy(heads).to(output.weight.device, output.weight.dtype)
    judged.draft_ids = heads.draft_ids
    return draft_ngrams(judged, output, training, states)


def _identity(
    settings: TrainSettings, backbone: str, training: list[Example], held_out: list[Example], accelerator: Accelerator
) -> dict[str, Any]:
    """All that the result of a run depends on. A run can only be resumed if it is equal."""
    free = {"checkpoint_every", "log_every", "heads_dtype", "save_backbone"}
    begun = {} if settings.start_from is None else {"start_from_sha256": load_heads(settings.start_from).digest()}
    data = {"backbone": backbone, "data": digest([*training, *held_out]), "processes": accelerator.num_processes}
    return data | begun | settings.model_dump(exclude=free) | {"mixed_precision": accelerator.mixed_precision}


OF_FORM = {  # settings of the heads' form -> their names in the heads' config
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "own_lm_head": "shared_lm_head",
    "read_root": "reads_root",
}


def _new_heads(source: Source, settings: TrainSettings) -> MedusaHeads:
    config = source.model.config.get_text_config()
    wanted = HeadsConfig(
        base_model=source.name,
        num_heads=settings.num_heads,
        num_layers=settings.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        shared_lm_head=not settings.own_lm_head,
        reads_root=settings.read_root,
    )
    if settings.start_from is None:
        heads = MedusaHeads(wanted)
        heads.start_from(source.model.get_output_embeddings())
        return heads
    heads = load_heads(settings.start_from).float()
    if foreign := heads.config.foreign():
        told = ", ".join(f"{name} {value}" for name, value in foreign.items())
        raise CheckpointError(f"the heads in {settings.start_from} can be exported but not trained ({told}); start from others")
    if heads.config.vocab_size is None:
        heads.config = heads.config.model_copy(update={"vocab_size": wanted.vocab_size})
    for setting, name in {**OF_FORM, "hidden_size": "hidden_size", "vocab_size": "vocab_size"}.items():
        found, asked = getattr(heads.config, name), getattr(wanted, name)
        if setting in OF_FORM and setting not in settings.model_fields_set:  # nobody asked: they stay as they are
            wanted = wanted.model_copy(update={name: found})
        elif found != asked:
            hint = "" if name != "reads_root" else f"; give --{'no-' if asked else ''}read-root"
            raise CheckpointError(f"the heads in {settings.start_from} have {name} {found}, but this run needs {asked}{hint}")
    heads.config = wanted  # they may come from another model of this shape
    return heads


def _lm_head(
    source: Source, states: HiddenStates, settings: TrainSettings, accelerator: Accelerator, listener: Listener
) -> LmHead:
    """The LM head in the precision of the matrix products."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    lm_head = lm_head_of(source.model, dtype, _kept_tokens(states, settings, source.model.config.get_text_config().vocab_size))
    if lm_head.token_ids is not None:
        listener.note(f"the loss counts {len(lm_head.token_ids)} of {len(lm_head.index)} tokens")
    return lm_head


def _kept_tokens(states: HiddenStates, settings: TrainSettings, vocab_size: int) -> torch.Tensor | None:
    if settings.min_token_count == 1:
        return None
    counts = Counter(states.next_ids.tolist())
    kept = sorted(token for token, count in counts.items() if count >= settings.min_token_count and token < vocab_size)
    if not kept:
        raise OptionError(f"no token occurs {settings.min_token_count} times in the data; lower --min-token-count")
    return torch.tensor(kept)


def _heads_stage(
    heads: MedusaHeads,
    lm_head: LmHead,
    states: HiddenStates,
    settings: TrainSettings,
    epochs: float,
    device: torch.device,
) -> Stage:
    num_heads, block = heads.config.num_heads, SOFT_BLOCK if settings.soft_targets else 1

    def on_device(index: batches.IntArray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(states.rows[index])).to(device, lm_head.weight.dtype)

    def load(rows: batches.IntArray, *_: int) -> tuple[tuple[Any, ...], int]:
        index = np.sort(rows)
        arrays = (states.next_ids[index], states.targets(index, num_heads))
        inputs = (on_device(index), *(torch.from_numpy(array).to(device) for array in arrays))
        if not settings.soft_targets:
            return inputs, len(rows)
        last = len(states.next_ids) - 1
        ahead, places = np.unique(np.minimum(index[:, None] + 1 + np.arange(num_heads), last), return_inverse=True)
        return (*inputs, on_device(ahead), torch.from_numpy(places).to(device)), len(rows)

    return Stage(
        name="heads",
        objective=HeadsObjective(heads, lm_head, settings.loss_decay, settings.soft_targets),
        groups=[{"params": list(heads.parameters()), "lr": settings.learning_rate}],
        epochs=epochs,
        batches=lambda epoch: batches.row_batches(len(states.next_ids), settings.batch_tokens, settings.seed, epoch, block),
        load=load,
    )


def _of_heads(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The heads' weights of an objective's state."""
    return {name.removeprefix("heads."): value.cpu() for name, value in state.items() if name.startswith("heads.")}


def _learned(objective: torch.nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The heads' weights on every process. If the objective is sharded, only the main process has them at first."""
    own = _of_heads(accelerator.get_state_dict(objective))
    state: dict[str, torch.Tensor] = broadcast_object_list([own])[0]
    return state


def _forget(accelerator: Accelerator) -> None:
    """Unregister a finished stage, so that the next stage's checkpoints do not contain it."""
    accelerator.free_memory()
    accelerator._custom_objects.clear()  # noqa: SLF001 - free_memory does not remove them


class _AccuracyLog:
    """Writes the held-out accuracies after each epoch."""

    def __init__(
        self, heads: MedusaHeads, work: WorkDirectory, source: Source, states: HiddenStates, listener: Listener
    ) -> None:
        self.heads, self.work, self.source, self.states, self.listener = heads, work, source, states, listener
        generator = np.random.default_rng(0)
        self.rows = generator.permutation(len(states.next_ids))[:LOG_ROWS]

    def __call__(self, objective: torch.nn.Module, step: int) -> None:
        state = _of_heads(self.work.accelerator.get_state_dict(objective))
        if not self.work.accelerator.is_main_process:
            return
        output: Any = self.source.model.get_output_embeddings()
        heads = copy.deepcopy(self.heads)
        heads.load_state_dict(state)
        heads = heads.to(output.weight.device, output.weight.dtype)
        accuracy = accuracies(target_ranks(heads, output, self.states, self.rows))
        top1, top5 = accuracy[:, 0].round(4).tolist(), accuracy[:, :5].sum(1).round(4).tolist()
        self.work.log(stage="heads", step=step, held_out_top1=top1, held_out_top5=top5)
        told = ", ".join(f"{100 * share:.1f}%" for share in top1)
        self.listener.note(f"step {step}: top-1 accuracy of the heads on held-out answers: {told}")
