"""`medusa-export distill`: chooses prompts and a model to answer them, and reports the progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from medusa_export.command_options.distill_options import DistillOptions
from medusa_export.placement import place
from medusa_export.progress import count_stage, note, stage
from medusa_export.provenance import provenance
from medusa_heads.distill import loop
from medusa_heads.distill.answerer import Answerer, Codec
from medusa_heads.distill.prompts import Conversation, read_prompts, read_starts, select, self_prompted
from medusa_heads.distill.store import AnswerStore, DataFacts, Settings, require_place
from medusa_heads.vocabulary import vocabulary_digest
from medusa_runtime.bundle.manifest import MANIFEST_NAME, WEIGHTS_NAME, Manifest
from medusa_runtime.errors import MedusaError, OptionError

TOLD_REFUSALS = 10  # refused prompts that are listed


@dataclass(frozen=True)
class _Model:
    answerer: Answerer
    codec: Codec
    tokenizer: str  # digest
    weights: str  # digest, or the endpoint's name for the model
    dtype: str


def distill(options: DistillOptions) -> str:
    """Make training data, or continue an interrupted run. Returns one line about the data.

    Raises:
        OptionError: an option cannot be used, a prompt is bad, or the output was started with other settings.
        CheckpointError, BundleError: the model cannot be loaded.
        EndpointError: the endpoint cannot be reached, fails, or its answers cannot be learned from.
        MedusaError: no prompt could be answered.
    """
    backend = _backend(options)
    _require_meant(options, backend)
    conversations = _conversations(options)
    require_place(options.output)
    with stage(f"load {options.model}"):
        model = _OPENERS[backend](options)
    settings = Settings(
        model=_name(options.model),
        tokenizer=model.tokenizer,
        weights=model.weights,
        backend=backend,
        dtype=model.dtype,
        prompts=loop.digest(conversations),
        prompt_temperature=options.prompt_temperature,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        max_prompt_tokens=options.max_prompt_tokens,
    )
    sources = Counter(conversation.source for conversation in conversations)
    facts = DataFacts(settings=settings, provenance=provenance(), sources=dict(sorted(sources.items())))
    answer_options = loop.AnswerOptions(
        options.max_new_tokens,
        options.max_prompt_tokens,
        options.temperature,
        options.prompt_temperature,
        options.seed,
        skip_refused=options.skip_refused,
    )
    with AnswerStore(options.output, facts) as store:
        try:
            steps = loop.distill(conversations, model.answerer, model.codec, store, answer_options)
            progress = _run(steps, store, options.max_tokens)
        except (KeyboardInterrupt, MedusaError, OSError):
            if store.rows:
                note(f"{len(store.rows)} answers are in {options.output}; run the same command again to continue")
            raise
        if skipped := progress.skipped - progress.skipped_refused:
            note(f"skipped {skipped} prompts: too long, or written by the model and unusable")
        if progress.refused:
            note(f"skipped {len(progress.refused)} prompts that were refused:")
            for key, reason in list(progress.refused.items())[:TOLD_REFUSALS]:
                note(f"  {key}: {reason}")
            if (more := len(progress.refused) - TOLD_REFUSALS) > 0:
                note(f"  and {more} more")
        if not store.rows:
            raise MedusaError(
                "no prompt was answered: all are too long, or the model wrote none; raise --max-prompt-tokens, or use others"
            )
        return f"{options.output}: {len(store.rows)} answers, {store.num_tokens} tokens"


def _name(model: str) -> str:
    """A model's name: of a directory its last part, whatever its path."""
    path = Path(model)
    return (path.name if path.name not in {"", ".."} else path.resolve().name) if path.exists() else model


def _run(steps: Generator[loop.Progress, None, None], store: AnswerStore, max_tokens: int | None) -> loop.Progress:
    """Answer until all prompts are done or the store holds `max_tokens` tokens. A later run can continue from there."""
    with count_stage("answers") as tell, closing(steps):
        for progress in steps:
            made = max(progress.made_tokens, progress.new_tokens)  # an endpoint tells only of whole answers
            tell(progress.done + progress.skipped, progress.resumed, made, progress.total)
            if max_tokens is not None and store.num_tokens >= max_tokens:
                note(f"stopped at {store.num_tokens} tokens; raise --max-tokens to continue")
                break
    return progress


def _conversations(options: DistillOptions) -> list[Conversation]:
    found = [conversation for path in options.prompts for conversation in read_prompts(path)]
    if not found and not options.self_prompts:
        raise OptionError("there are no prompts; give --prompts FILE, --self-prompts N, or both")
    if options.mix and not found:
        raise OptionError("--mix selects from --prompts, but there are none; give --prompts FILE")
    if not options.self_prompts and (options.prompt_starts is not None or options.self_turns > 1):
        raise OptionError("--prompt-starts and --self-turns are for prompts that the model writes; give --self-prompts N, too")
    starts = read_starts(options.prompt_starts) if options.prompt_starts is not None else ()
    own = self_prompted(options.self_prompts, starts=starts, turns=options.self_turns, seed=options.seed)
    if repeated := [key for key, count in Counter(conversation.key for conversation in [*found, *own]).items() if count > 1]:
        name = repeated[0].rpartition("-")[0]
        raise OptionError(
            f"two sources of prompts have the name {name!r}, and answers are identified by it; rename one of the files"
        )
    chosen = select(found, mix=options.mix, seed=options.seed) if found else []
    return select([*chosen, *own], limit=options.limit, seed=options.seed)


def _backend(options: DistillOptions) -> str:
    guess = "endpoint" if options.base_url else "bundle" if (Path(options.model) / MANIFEST_NAME).is_file() else "transformers"
    backend = guess if options.backend == "auto" else options.backend
    if (backend == "endpoint") != bool(options.base_url):
        raise OptionError("--base-url and --backend endpoint need each other; give both or neither")
    if backend == "bundle" and guess != "bundle":
        raise OptionError(f"--backend bundle needs an exported bundle, and {options.model} is not one")
    if backend == "bundle" and options.self_prompts:
        raise OptionError("--self-prompts does not work with a bundle; give the checkpoint that it was made from")
    if backend == "endpoint" and options.self_prompts:
        raise OptionError(
            "--self-prompts does not work with an endpoint, which only writes answers; use --backend transformers"
        )
    return backend


def _require_meant(options: DistillOptions, backend: str) -> None:
    """Refuse options that would have no effect or make no sense."""
    if options.served_model and backend != "endpoint":
        raise OptionError("--served-model is only for an endpoint; give its --base-url too")
    if options.dtype != "auto" and backend != "transformers":
        raise OptionError(f"--dtype is only for --backend transformers; the backend is {backend}")
    if options.device != "auto" and backend == "endpoint":
        raise OptionError("--device is only for transformers or a bundle; an endpoint chooses its own device")
    if options.cuda_graphs is not None and backend != "bundle":
        raise OptionError(f"--cuda-graphs and --no-cuda-graphs are only for --backend bundle; the backend is {backend}")


def _open_transformers(options: DistillOptions) -> _Model:
    import torch  # noqa: PLC0415 - bundles need no PyTorch

    from medusa_export.head_training.torch_devices import fast_precision, torch_device  # noqa: PLC0415
    from medusa_export.model.checkpoint import load_backbone  # noqa: PLC0415
    from medusa_export.model.tokenizer import load_tokenizer  # noqa: PLC0415
    from medusa_heads.distill import slots  # noqa: PLC0415
    from medusa_heads.tokens import CheckpointCodec  # noqa: PLC0415
    from medusa_heads.train.hidden import backbone_digest  # noqa: PLC0415

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch_device(options.device)
    dtype = fast_precision(device) if options.dtype == "auto" else options.dtype
    slots.register()
    codec = CheckpointCodec(load_tokenizer(options.model, trust_remote_code=options.trust_remote_code))
    backbone = load_backbone(
        options.model,
        dtype,
        attention=slots.ATTENTION_NAME,
        trust_remote_code=options.trust_remote_code,
    )
    _require_room(options, backbone.max_seq_len)
    weights = backbone_digest(backbone.model)
    decoder = slots.SlotDecoder(
        backbone.model.to(device),  # type: ignore[arg-type] # its decorator hides the signature
        backbone.layer_types,
        backbone.sliding_window,
        backbone.facts.eos_token_ids,
        options.batch_size or 64,
    )
    return _Model(decoder, codec, codec.digest, weights, dtype)


def _open_bundle(options: DistillOptions) -> _Model:
    from medusa_heads.distill.bundle import BundleAnswerer, BundleCodec  # noqa: PLC0415
    from medusa_runtime import MedusaLM  # noqa: PLC0415

    manifest = Manifest.load(options.model)
    placement = place(manifest, device=options.device, threads=options.threads, cuda_graphs=options.cuda_graphs)
    lm = MedusaLM.from_bundle(
        options.model,
        placement.backend,
        max_batch_size=options.batch_size,
        device=placement.device,
        num_threads=options.threads,
        cuda_graphs=options.cuda_graphs,
        allow_engine_code=options.allow_engine_code,
    )
    _require_room(options, manifest.limits.max_seq_len)
    digest = vocabulary_digest(lm.codec.tokenizer.get_vocab())
    weights = manifest.files[WEIGHTS_NAME].sha256 if WEIGHTS_NAME in manifest.files else manifest.content_digest()
    return _Model(BundleAnswerer(lm.engine), BundleCodec(lm.codec), digest, weights, manifest.precision)


def _open_endpoint(options: DistillOptions) -> _Model:
    from medusa_export.model.tokenizer import load_tokenizer  # noqa: PLC0415
    from medusa_heads.distill.endpoint import EndpointAnswerer  # noqa: PLC0415
    from medusa_heads.tokens import CheckpointCodec  # noqa: PLC0415

    assert options.base_url  # `_backend` has checked it
    codec = CheckpointCodec(load_tokenizer(options.model, trust_remote_code=options.trust_remote_code))
    if not codec.is_chat:
        raise OptionError("this model has no chat template, and an endpoint is asked in messages; use --backend transformers")
    served_model, batch_size = options.served_model or options.model, options.batch_size or 64
    answerer = EndpointAnswerer(options.base_url, served_model, codec.text_ids, codec.closing(), batch_size, tell=note)
    return _Model(answerer, codec, codec.digest, served_model, "unknown")


def _require_room(options: DistillOptions, max_seq_len: int) -> None:
    if (asked := options.max_prompt_tokens + options.max_new_tokens) > max_seq_len:
        raise OptionError(
            f"--max-prompt-tokens plus --max-new-tokens is {asked}, but the model takes at most {max_seq_len} tokens; lower one"
        )


_OPENERS = {"transformers": _open_transformers, "bundle": _open_bundle, "endpoint": _open_endpoint}
