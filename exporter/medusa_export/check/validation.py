"""`medusa-export validate`: compares a bundle with PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from medusa_export.bundle.export import require_matching
from medusa_export.bundle.tree_shapes import paths, pruned
from medusa_export.check.builtin_prompts import PROMPTS, label, token_prompts
from medusa_export.check.compare import divergences, first_divergence, logits_difference
from medusa_export.check.sides import BundleSide, Reference, ReferenceSide, by_target, is_large, runnable_bundle
from medusa_export.check.validation_report import (
    ALLOWED_KL,
    GreedyComparison,
    LogitsDifference,
    ValidationReport,
    tolerance,
)
from medusa_export.command_options.validate_settings import DEFAULT_NEW_TOKENS
from medusa_export.errors import ValidationMismatchError
from medusa_export.model.checkpoint import DTYPES
from medusa_export.model.generation_settings import shown, switched_off
from medusa_export.placement import place, require_usable
from medusa_export.progress import console, count_stage, note, stage, told
from medusa_export.provenance import provenance
from medusa_heads.formats import load_heads
from medusa_heads.modules import MedusaHeads
from medusa_runtime import CandidateTree, DecodingEngine, DecodingOptions, DecodingStats, Manifest
from medusa_runtime.backends.choosing import Placement
from medusa_runtime.backends.names import AUTO
from medusa_runtime.bundle.cpu import Spin
from medusa_runtime.bundle.files import write_whole
from medusa_runtime.bundle.manifest import ORT_CPU, ORT_CPU_SINGLE, REPORT_NAME, GenerationFacts
from medusa_runtime.errors import MedusaError, OptionError
from medusa_runtime.options import with_defaults
from medusa_runtime.text.codec import Prompt
from medusa_runtime.text.token_ids import open_codec

LARGE_PROMPTS, LARGE_NEW_TOKENS = 2, 8  # of a model whose layers are cast one at a time
ON_CPU = Placement(ORT_CPU, "cpu", "all graphs of an ONNX bundle can be compared there")


def validate(
    bundle: Path,
    reference: str,
    *,
    heads: Path | None = None,
    prompts: Sequence[Prompt] = PROMPTS,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    backend: str = AUTO,
    device: str = AUTO,
    threads: int = 0,
    spin: Spin = "auto",
    cuda_graphs: bool | None = None,
    allow_engine_code: bool = False,
    trust_remote_code: bool = False,
) -> ValidationReport:
    """Compare logits and greedy decoding of a bundle with PyTorch; `ValidationReport` lists the comparisons.

    If the bundle has graphs for the backend besides the portable ones, the logits of both are compared, and the backend's
    graphs decode. A quantised bundle is compared with itself (reading a text at once against decoding it), and with PyTorch
    only by the KL divergence of the next-token distributions. If a bundle cannot be opened on a GPU, the error is raised rather
    than reported as a failed check, since the GPU or a package may be the cause.

    Prompts and answers are shortened to the bundle's longest sequence. Nothing is written; see `record`.

    Raises:
        BundleError: the directory is not a bundle.
        BackendError, MissingExtraError: a GPU or a package to run it with is missing.
        CheckpointError: the reference or the heads cannot be loaded.
        OptionError: the reference or the heads are not those of the bundle, or a prompt cannot be used.
    """
    manifest = Manifest.load(bundle)
    if not prompts:
        raise OptionError("there are no prompts to validate with; give a file with at least one")
    placement = _placement(manifest, backend, device, threads=threads, spin=spin, cuda_graphs=cuda_graphs)
    on_gpu = placement.backend != ORT_CPU
    report = ValidationReport(
        reference=reference,
        backend=placement.backend,
        processor=placement.processor,
        precision=manifest.precision,
        quantization=None if manifest.quantization is None else manifest.quantization.scheme,
        tolerance=tolerance(
            manifest.precision,
            activation_bits=None if manifest.quantization is None else manifest.quantization.activation_bits,
            on_gpu=on_gpu,
        ),
        allowed_kl=_allowed_kl(manifest),
        targets=list(by_target(manifest, placement.backend)),
        provenance=provenance(),
    )
    with stage("check the files"):
        report.file_mismatches = manifest.mismatches(bundle)
    with stage(f"load {reference} in PyTorch"):
        torch_side = ReferenceSide.load(reference, manifest, trust_remote_code=trust_remote_code)
    _require_same_model(manifest, torch_side)
    _compare_generation(report, manifest.generation, torch_side.generation)
    given = _matching_heads(heads, manifest, torch_side) if heads is not None else None
    with count_stage("compare") as tell:
        try:
            encoded, new_tokens = _encoded(report, bundle, manifest, prompts, max_new_tokens, torch_side)
            with runnable_bundle(bundle, manifest, on_gpu=on_gpu) as (runnable, runnable_manifest, notes):
                report.notes += notes
                if given is not None and report.quantization is not None:
                    report.notes.append("the heads are quantised as well; the manifest has the effect, as tokens per step")
                variants = by_target(runnable_manifest, placement.backend)
                steps, whole = itertools.count(1), len(encoded) * len(variants)
                tell(0, 0, 0, whole)
                for target, variant in variants.items():
                    side = BundleSide(
                        runnable,
                        variant,
                        placement,
                        target,
                        num_threads=threads,
                        spin=spin,
                        cuda_graphs=cuda_graphs,
                        allow_engine_code=allow_engine_code,
                    )
                    _compare(report, encoded, new_tokens, side, torch_side, given, lambda: tell(next(steps), 0, 0, whole))
                    side.backend.save()
                    side.backend.close()  # free its weights before the next one's are loaded
        except MedusaError as error:  # a bundle that does not run fails its validation
            if isinstance(error, OptionError) or (on_gpu and not report.prompt_logits):  # the prompts or the GPU are the cause
                raise
            report.errors.append(str(error))
    report.conclude()
    return report


def _encoded(
    report: ValidationReport,
    bundle: Path,
    manifest: Manifest,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    torch_side: ReferenceSide,
) -> tuple[dict[str, list[int]], int]:
    """The prompts' tokens by their labels, and how many more to decode, within the bundle's limits and what is affordable."""
    built_in = prompts is PROMPTS
    if built_in and is_large(torch_side.backbone.model):
        prompts, max_new_tokens = PROMPTS[:LARGE_PROMPTS], min(max_new_tokens, LARGE_NEW_TOKENS)
        report.notes.append(
            f"the model is large: {LARGE_PROMPTS} of {len(PROMPTS)} built-in prompts are compared, and "
            f"{max_new_tokens} new tokens of each; give --prompts to compare more"
        )
    new_tokens = min(max_new_tokens, manifest.limits.max_seq_len // 2)
    if built_in and not manifest.has_text:
        encoded = dict(list(token_prompts(manifest.model.vocab_size).items())[: len(prompts)])
    else:
        codec = open_codec(bundle, manifest)
        encoded = {label(prompt): codec.encode(prompt) for prompt in prompts}
    return {name: ids[: manifest.limits.max_seq_len - new_tokens] for name, ids in encoded.items()}, new_tokens


def _placement(
    manifest: Manifest, backend: str, device: str, *, threads: int, spin: Spin, cuda_graphs: bool | None
) -> Placement:
    if (backend, device, manifest.kind) != (AUTO, AUTO, "onnx"):
        return place(manifest, backend, device, threads=threads, spin=spin, cuda_graphs=cuda_graphs)
    require_usable(ON_CPU, threads=threads, spin=spin, cuda_graphs=cuda_graphs)
    note(f"runs with {ON_CPU}")
    return ON_CPU


def _allowed_kl(manifest: Manifest) -> float | None:
    """The largest mean KL of a quantised bundle from PyTorch: three times the limit it was made with, as the texts differ."""
    if manifest.quantization is None:
        return None
    return ALLOWED_KL if manifest.quantization.max_kl is None else 3 * manifest.quantization.max_kl


def record(bundle: Path, report: ValidationReport) -> None:
    """Write a report to its bundle, set the bundle's validation status, and print the report.

    Raises:
        ValidationMismatchError: a check failed.
        MedusaError: the report cannot be written; the bundle then does not count as validated.
    """
    manifest = Manifest.load(bundle)
    manifest.validation = report.facts()
    try:
        write_whole(bundle / REPORT_NAME, report.model_dump_json(indent=2) + "\n")
        manifest.save(bundle)
    except OSError as error:
        report.show(console)
        reason = f"{error.filename or bundle / REPORT_NAME}: {error.strerror or error}"
        raise MedusaError(f"{bundle} is not validated: the result cannot be written ({reason})") from error
    report.show(console)
    if report.status == "failed":
        failed = ", ".join(manifest.validation.summary["failed_checks"])
        raise ValidationMismatchError(f"{bundle} is marked as failed ({failed}); see {bundle / REPORT_NAME}")


def _compare(
    report: ValidationReport,
    prompts: dict[str, list[int]],
    new_tokens: int,
    side: BundleSide,
    torch_side: ReferenceSide,
    heads: MedusaHeads | None,
    one_more: Callable[[], None],
) -> None:
    tree = pruned(CandidateTree.from_json(side.backend.manifest.tree), new_tokens - 1)
    reference: Reference = torch_side if report.quantization is None else side
    for text, prompt_ids in told(prompts.items(), one_more):
        _compare_logits(report, text, prompt_ids, side, reference, tree)
        if side.target == report.targets[0]:
            report.greedy.append(_compare_greedy(text, prompt_ids, side, reference, torch_side, new_tokens))
        if report.quantization is not None:
            found = logits_difference(text, side.logits(prompt_ids), torch_side.logits(prompt_ids), side.target)
            report.from_reference.append(found)
    if heads is not None and report.quantization is None and side.target != ORT_CPU_SINGLE:  # uses another's heads graph
        report.head_log_probs.append(_compare_heads(next(iter(prompts.values())), side, torch_side, heads))


def _matching_heads(path: Path, manifest: Manifest, reference: ReferenceSide) -> MedusaHeads:
    heads = load_heads(path, note)
    require_matching(heads, reference.backbone, path)
    known = manifest.heads.draft_vocab_size
    if heads.digest() != manifest.heads.sha256 or (known is not None and known != len(heads.draft_ids or ())):
        raise OptionError(
            f"the heads in {path} are not those that the bundle was made from; give those, or export the bundle again"
        )
    return heads.to(DTYPES[manifest.precision]).to(reference.backbone.dtype)  # rounded as the bundle stores them


def _require_same_model(manifest: Manifest, reference: ReferenceSide) -> None:
    ours, theirs = manifest.model, reference.backbone.facts
    for name in ("architecture", "vocab_size", "hidden_size", "num_layers"):
        if getattr(ours, name) != getattr(theirs, name):
            raise OptionError(
                f"the reference has {name} {getattr(theirs, name)}, but the bundle has {getattr(ours, name)}; "
                f"it was made from {ours.name}, give that as the reference"
            )


def _compare_logits(
    report: ValidationReport,
    text: str,
    prompt_ids: list[int],
    side: BundleSide,
    reference_side: Reference,
    tree: CandidateTree,
) -> None:
    reference = reference_side.logits(prompt_ids)
    chunk = len(prompt_ids) // 2 + 1
    report.prompt_logits += [
        logits_difference(text, side.prompt_logits(prompt_ids), reference, side.target),
        logits_difference(f"{text} in chunks", side.prompt_logits(prompt_ids, chunk), reference, side.target),
    ]
    tokens, found = side.tree_logits(prompt_ids, tree)
    tree_paths = paths(tree)
    references = reference_side.path_logits(prompt_ids, [tokens[path].tolist() for path in tree_paths])
    for path, rows in zip(tree_paths, references, strict=True):
        report.tree_logits.append(logits_difference(f"{text} + nodes {path}", found[path], rows, side.target))


def _compare_generation(report: ValidationReport, ours: GenerationFacts | None, theirs: GenerationFacts | None) -> None:
    """Note which generation settings greedy decoding is compared with, and which of them the bundle lacks."""
    found, wanted = [{} if facts is None else facts.defaults.model_dump(exclude_none=True) for facts in (ours, theirs)]
    if found != wanted:
        report.generation_mismatch = (
            f"generation_config.json asks for {shown(wanted) or 'nothing'}, the bundle has {shown(found) or 'nothing'}; "
            "export it again"
        )
    report.generation = found
    report.switched_off = {} if theirs is None else {name: theirs.ignored[name] for name in switched_off(theirs)}
    if found:
        report.notes.append(f"greedy decoding is compared with the settings of generation_config.json: {shown(found)}")
    if report.switched_off:
        report.notes.append(
            f"transformers' generate decodes otherwise: it follows {shown(report.switched_off)}, which the runtime does not; "
            "greedy decoding is compared without"
        )


def _compare_greedy(
    text: str, prompt_ids: list[int], side: BundleSide, reference_side: Reference, torch_side: ReferenceSide, new_tokens: int
) -> GreedyComparison:
    """Compare greedy decoding with Medusa, without Medusa, and the reference's choice after every prefix.

    One forward pass over prompt and answer gives the reference's logits at each position, and Transformers' logits processors
    give its choice there. If all choices are equal to the answer, the reference's own `generate` gives the same answer.
    """
    engine, stats, generation = DecodingEngine(side.backend), DecodingStats(), side.backend.manifest.generation
    options = with_defaults(DecodingOptions.of(max_new_tokens=new_tokens), generation)
    plain = [token for [step] in engine.generate([prompt_ids], options=options, medusa=False) for token in step.token_ids]
    medusa = [token for [step] in engine.generate([prompt_ids], options=options, stats=stats) for token in step.token_ids]
    reference = reference_side.logits([*prompt_ids, *plain])[len(prompt_ids) - 1 : -1]  # [A, V]
    reference = torch_side.processed(prompt_ids, plain, reference)
    return GreedyComparison(
        prompt=text,
        num_tokens=len(plain),
        plain_vs_reference=divergences(plain, reference),
        medusa_vs_plain=first_divergence(medusa, plain, reference),
        tokens_per_step=stats.tokens_per_step,
    )


def _compare_heads(prompt_ids: list[int], side: BundleSide, torch_side: ReferenceSide, heads: MedusaHeads) -> LogitsDifference:
    """Compare the heads' log-probabilities of the bundle's candidates. Each row is one head."""
    side.prompt_logits(prompt_ids)
    found = side.proposed()
    known = heads.draft_ids if side.backend.manifest.heads.draft_vocab_size else None
    with torch.no_grad():
        model, root_ids = torch_side.backbone.model, torch.tensor([side.root_id])
        guesses = torch.from_numpy(
            found.token_ids[:, :-1, 0]
        )  # Hydra heads read these; near ties must not change what they read
        lm_head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        logits = heads(torch_side.hidden(prompt_ids), lm_head, root_ids, embedding, guesses)  # [1, K, V]
        if known is not None:
            unknown = torch.ones(logits.shape[-1], dtype=torch.bool)
            unknown[known] = False
            logits[..., unknown] = -torch.inf
        reference = logits.log_softmax(-1).numpy()[0]
    best = np.sort(reference, axis=-1)[:, ::-1][:, : found.token_ids.shape[-1]]  # [K, M]
    # a wrong candidate has a lower log-probability than the best
    named = np.take_along_axis(reference, found.token_ids[0], axis=-1)
    difference = logits_difference("heads", found.log_probs[0], best, side.target)
    other = logits_difference("heads", named, best, side.target)
    return difference if difference.max_abs >= other.max_abs else other
