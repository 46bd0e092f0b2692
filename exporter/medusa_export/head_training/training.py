"""`medusa-export train`: reads a model and its training data, writes heads and a record of the run."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel

from medusa_export.bundle.default_tree import MIN_TOKENS
from medusa_export.head_training.torch_devices import fast_precision, torch_device
from medusa_export.model.checkpoint import Backbone, load_backbone
from medusa_export.model.tokenizer import load_tokenizer
from medusa_export.progress import count_stage, note, quiet, stage
from medusa_export.provenance import provenance
from medusa_heads.directories import alone_in, require_new
from medusa_heads.formats import native, save_heads
from medusa_heads.tokens import CheckpointCodec
from medusa_heads.train.checkpoints import LOG_NAME
from medusa_heads.train.examples import Example, read_examples
from medusa_heads.train.fit import News
from medusa_heads.train.overlap import WORDS, Overlap
from medusa_heads.train.run import Listener, Source, TrainResult
from medusa_heads.train.run import train as run
from medusa_heads.train.settings import TrainSettings
from medusa_runtime.bundle.files import json_text
from medusa_runtime.bundle.manifest import Precision
from medusa_runtime.drafting.ngrams import NGRAMS_NAME
from medusa_runtime.errors import MedusaError, MissingExtraError, OptionError, first_line

FEW_TOKENS = 50_000  # SmolLM2's heads give 1.8 tokens a step after 200,000 (docs/decisions/0025-reading-the-root.md)


@dataclass(frozen=True)
class TrainOptions:
    """Options of `medusa-export train`; the command's help describes each."""

    model: str
    data: tuple[Path, ...]
    output: Path
    settings: TrainSettings
    work: Path | None = None
    hidden: Path | None = None
    exclude: tuple[Path, ...] = ()
    device: str = "auto"
    threads: int = 0
    plot: bool = False
    force: bool = False
    trust_remote_code: bool = False


def train(options: TrainOptions) -> bool:
    """Train heads and write them. Returns whether this process is the one that wrote them.

    Raises:
        OptionError: an option cannot be used, the data is bad, or the stopped run to continue has other settings.
        CheckpointError: model or heads cannot be loaded, or do not fit each other.
        MedusaError: the loss is not finite.
        MissingExtraError: an option needs a package that is not installed.
    """
    require_new(options.output, native.is_alone, force=options.force, inputs=(options.model, *options.data))
    _require_sensible(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    work = options.work or options.output.with_name(f"{options.output.name}.work")
    accelerator = _accelerator(options)
    with quiet(not accelerator.is_main_process):
        codec = CheckpointCodec(load_tokenizer(options.model, trust_remote_code=options.trust_remote_code))
        examples, excluded = examples_without(options.data, options.exclude, codec, options.settings.max_length)
        num_tokens = sum(len(example.response_ids) for example in examples)
        note(f"{len(examples)} answers, {num_tokens} tokens")
        if num_tokens < FEW_TOKENS:
            note(f"fewer than {FEW_TOKENS:,} tokens: the heads will guess little; make more answers with medusa-export distill")
        with stage(f"load {options.model}"):
            backbone = _load(options, accelerator.device)
        source = Source(backbone.facts.name, backbone.model, lambda: _reload(options))
        result = _run(source, examples, options, work, accelerator)
    if result is None:
        return False
    _write(result, options, work, excluded)
    return True


def examples_without(
    data: Sequence[Path], exclude: Sequence[Path], codec: CheckpointCodec, max_length: int
) -> tuple[list[Example], int]:
    """The training examples, and the number of answers left out because they share words with the texts of `exclude`."""
    examples = read_examples(data, codec, max_length=max_length)
    if not exclude:
        return examples, 0
    overlap = Overlap(exclude)
    kept = [example for example in examples if not overlap.found_in(codec.decode((*example.prompt_ids, *example.response_ids)))]
    places = ", ".join(map(str, exclude))
    note(f"left out {len(examples) - len(kept)} answers that share {WORDS} words in a row with {places}")
    if not kept:
        raise OptionError("--exclude drops every answer; use other data or other texts")
    return kept, len(examples) - len(kept)


def _require_sensible(options: TrainOptions) -> None:
    settings = options.settings
    if settings.method == "medusa-2" and settings.load_in_4bit:
        raise OptionError("--load-in-4bit is only for medusa-1, since medusa-2 trains the backbone's weights; leave it out")
    if settings.backbone == "full" and settings.save_backbone == "adapter":
        raise OptionError(
            "--save-backbone adapter needs --backbone lora, since a fully trained backbone has no adapter; use merged"
        )
    if ignored := _ignored(settings):
        raise OptionError(f"--{ignored[0].replace('_', '-')} has no effect with these settings; leave it out")
    if options.plot:
        from medusa_export import plots  # noqa: F401, PLC0415 - if the extra is missing, fail now, not after the work


def _ignored(settings: TrainSettings) -> list[str]:
    """Settings that differ from their default but have no effect, since the feature they belong to is off."""
    joint = {name for name, field in TrainSettings.model_fields.items() if (field.description or "").startswith("medusa-2")}
    alone = {"soft_targets"} if settings.heads_first == 0 else set()
    if settings.backbone_dtype != "fp32":  # a backbone that is trained stays in fp32
        alone.add("backbone_dtype")
    without_effect = joint if settings.method == "medusa-1" else alone
    if settings.backbone == "full":
        without_effect |= {name for name in joint if name.startswith("lora")}
    default = TrainSettings()
    return sorted(name for name in without_effect if getattr(settings, name) != getattr(default, name))


def _accelerator(options: TrainOptions) -> Accelerator:
    device = torch_device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate then uses this device
    precision = options.settings.mixed_precision
    if precision == "auto":
        precision = "bf16" if fast_precision(device) == "bf16" else "no"
    if precision == "fp16" and device.type == "cpu":
        raise OptionError("--mixed-precision fp16 needs a GPU; use bf16 or no")
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of tied weights at every checkpoint
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = (
        "false"  # every process needs the weights to compute its share of the hidden states
    )
    AcceleratorState._reset_state()  # noqa: SLF001 - an earlier run in this process may have used another precision
    GradientState._reset_state()  # noqa: SLF001
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=options.settings.gradient_accumulation,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # buffers never change
    )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise OptionError(
            "FSDP is only supported on GPUs with --fsdp_version 2; use that, or --multi_gpu instead of --use_fsdp"
        )
    return accelerator


def _load(options: TrainOptions, device: torch.device) -> Backbone:
    """The backbone: in fp32 if it is trained, else in the precision that is fast."""
    settings = options.settings
    dtype: Precision = fast_precision(device) if settings.backbone_dtype == "auto" else settings.backbone_dtype
    extra: dict[str, Any] = {}
    if settings.load_in_4bit:
        try:
            import bitsandbytes  # noqa: F401, PLC0415 - to name it if it is missing
        except ImportError as error:
            raise MissingExtraError("bitsandbytes", "quant") from error
        extra["quantization"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    backbone = load_backbone(
        options.model,
        "fp32" if settings.method == "medusa-2" else dtype,
        attention="sdpa",
        trust_remote_code=options.trust_remote_code,
        **extra,
    )
    if settings.max_length > backbone.max_seq_len:
        raise OptionError(
            f"--max-length is {settings.max_length}, but the model takes at most {backbone.max_seq_len} tokens; lower it"
        )
    if not settings.load_in_4bit:  # bitsandbytes has put a 4-bit model on its device
        backbone.model.to(device)  # type: ignore[arg-type] # Transformers' wrapper has no types
    return backbone


def _reload(options: TrainOptions) -> PreTrainedModel:
    return load_backbone(options.model, attention="sdpa", trust_remote_code=options.trust_remote_code).model


def _run(
    source: Source, examples: list[Example], options: TrainOptions, work: Path, accelerator: Accelerator
) -> TrainResult | None:
    with count_stage("hidden states", 1) as tell_cached, count_stage("steps", 1) as tell_step:
        first: dict[str, int] = {}  # the count when this process started

        def cached(done: int, total: int) -> None:
            before = first.setdefault(f"{total} tokens", done)
            tell_cached(done, before, done - before, total)

        def step(news: News) -> None:
            before = first.setdefault(news.stage, news.step - 1)
            tell_step(news.step, before, news.tokens, news.num_steps)

        listener, hidden = Listener(cached, step, note), options.hidden or work / "hidden"
        with ExitStack() as directories:
            if accelerator.is_main_process:
                directories.enter_context(alone_in(work))
                directories.enter_context(alone_in(hidden))
            return run(source, examples, options.settings, work, hidden, accelerator, listener)


def _write(result: TrainResult, options: TrainOptions, work: Path, excluded: int) -> None:
    settings = options.settings
    facts: dict[str, Any] = {
        "provenance": provenance().model_dump(),
        "settings": settings.model_dump() | {"start_from": Path(settings.start_from).name if settings.start_from else None},
        "data": [path.name for path in options.data],
        "overlap": {"words": WORDS, "files": [path.name for path in options.exclude], "answers_left_out": excluded},
        **result.facts,
    }

    def beside(directory: Path) -> None:
        if result.evaluation is not None:
            (directory / native.EVALUATION_NAME).write_text(
                result.evaluation.model_dump_json(indent=1) + "\n", encoding="utf-8"
            )
        if result.ngrams is not None:
            result.ngrams.save(directory / NGRAMS_NAME)
        if result.joint is not None:
            place = directory / settings.save_backbone
            base = Path(options.model)
            try:
                result.joint.save(place, settings.save_backbone, str(base.resolve()) if base.exists() else options.model)
            except (RuntimeError, SafetensorError) as error:  # safetensors raises its own errors if the disk is full
                raise MedusaError(f"{options.output} cannot be written: {first_line(error)}") from error
            if settings.save_backbone == "merged":  # a complete checkpoint needs a tokenizer
                load_tokenizer(options.model, trust_remote_code=options.trust_remote_code).save_pretrained(place)
        shutil.copy(work / LOG_NAME, directory / native.LOG_NAME)
        (directory / native.RUN_NAME).write_text(json_text(facts, indent=2) + "\n", encoding="utf-8")
        if options.plot:
            from medusa_export.plots import training_curves  # noqa: PLC0415 - an extra

            training_curves(directory / native.LOG_NAME, directory / native.CURVES_NAME)

    save_heads(result.heads, options.output, force=options.force, beside=beside)
    _tell(result, options)
    if options.work is None:
        shutil.rmtree(work)


def _tell(result: TrainResult, options: TrainOptions) -> None:
    """Say what the heads achieve on held-out answers, and what comes next."""
    found = result.evaluation
    if found is not None and found.trees:
        top1 = ", ".join(f"{100 * found.top(head, 1):.0f}%" for head in range(len(found.accuracy)))
        note(f"on {found.tokens} held-out tokens, the heads' first guess is right for {top1} of the tokens")
        told = ", ".join(f"{tree.tokens_per_step:.2f} with {tree.nodes} nodes" for tree in found.trees)
        note(f"expected tokens per step by tree: {told}" + (" (few tokens: not reliable)" if found.tokens < MIN_TOKENS else ""))
    model = options.model
    if result.joint is not None:
        model = str(options.output / options.settings.save_backbone)
    note(f"next: medusa-export onnx {model} --heads {options.output} -o BUNDLE")
