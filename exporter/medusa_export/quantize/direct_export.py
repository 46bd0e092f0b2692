"""Exports a checkpoint to a quantised bundle in one go: no float bundle is written in between."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from medusa_export.bundle.export import Traced, export_bundle, is_onnx_bundle, trace_bundle
from medusa_export.bundle.write_graphs import write_graphs
from medusa_export.check.quality import Quality, compare
from medusa_export.check.sides import is_large
from medusa_export.check.torch_logits import TorchLogits
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.model.packed.tensors import LazyIntegers
from medusa_export.passes.quantize.given_codes import Array, GivenCodes, given_codes
from medusa_export.passes.quantize.integer_weights import tables
from medusa_export.passes.quantize.own_grids import own_grids
from medusa_export.progress import note, step_stage, told
from medusa_export.quantize.calibration_text import QUALITY_PROMPTS, answered
from medusa_export.quantize.quantized_bundle import (
    prompts_for,
    quantize_bundle,
    quantize_graph,
    require_close,
    require_int8,
    storage_of,
    told_of_grids,
)
from medusa_export.quantize.weight_rounding import RoundedWeights
from medusa_heads.directories import new_directory, require_new, scratch_beside
from medusa_runtime import DecodingEngine, DynamicTree
from medusa_runtime.backends.choosing import open_backend
from medusa_runtime.bundle.manifest import STEP, Manifest, QuantizationFacts, Scheme
from medusa_runtime.drafting.ngrams import NGrams
from medusa_runtime.errors import OptionError
from medusa_runtime.text.token_ids import open_codec

NUM_OPERATIONS = 5e12  # of PyTorch, for the comparison: with a large model, fewer prompts are compared
TOKENS_PER_PROMPT = 128
LEAST_PROMPTS = 2


def export(options: ExportOptions) -> Manifest:
    """Export a checkpoint to a bundle, quantised if the options say so.

    A float bundle is written first and deleted, since weights are rounded for activations that are measured with it. If the
    model is large, or the checkpoint's weights are integers, weights go from the checkpoint to a quantised bundle one by one.
    Codes of the checkpoint are then kept as they are if the scheme has blocks of as many bits; others are the nearest codes.
    The quality is measured against the model in PyTorch.

    Raises:
        OptionError: the precision is not fp32 though the bundle is to be quantised, or an option needs `quantize`.
        MedusaError: see `export_bundle` and `quantize_bundle`.
    """
    scheme = options.quantize
    if scheme is None:
        if not {options.max_kl, options.activation_bits, options.rotate} <= {None}:
            raise OptionError("--max-kl, --activation-bits and --rotate need --quantize; leave them out, or give --quantize")
        return export_bundle(options)
    require_new(options.output, is_onnx_bundle, force=options.force, inputs=options.inputs)
    if options.precision != "fp32":
        raise OptionError(f"--dtype is {options.precision}, but --quantize needs fp32; leave --dtype out")
    require_int8("--quantize", scheme, activation_bits=options.activation_bits)
    traced = trace_bundle(options)
    if scheme != "int8" and traced.backbone.integers and not options.rotate:
        return _quantized(traced, options, scheme)
    if is_large(traced.backbone.model) and options.activation_bits != 8 and not options.rotate:
        note("the model is large: weights are rounded to the nearest codes, without a float bundle to measure activations with")
        return _quantized(traced, options, scheme)
    return _measured(traced, options, scheme)


def _measured(traced: Traced, options: ExportOptions, scheme: Scheme) -> Manifest:
    with scratch_beside(options.output) as scratch:
        source = scratch / "bundle"
        source.mkdir()
        traced.manifest(source, *write_graphs(traced.graphs, source, "fp32")).save(source)
        return quantize_bundle(
            QuantizeOptions(
                source,
                options.output,
                scheme,
                options.activation_bits,
                options.rotate,
                max_kl=options.max_kl,
                force=options.force,
            )
        )


def _quantized(traced: Traced, options: ExportOptions, scheme: Scheme) -> Manifest:
    activation_bits: Literal[8, 16] = 16 if scheme == "int8" else 8
    kept_grids = _quantize(traced, scheme)
    with new_directory(options.output, is_onnx_bundle, force=options.force, inputs=options.inputs) as directory:
        files, graphs = write_graphs(traced.graphs, directory, "fp32", activation_bits=activation_bits)
        manifest = traced.manifest(directory, files, graphs)
        quality = _quality(traced, manifest, directory)
        note(quality.line())
        require_close(quality, options.max_kl)
        manifest.quantization = QuantizationFacts(
            scheme=scheme,
            activation_bits=activation_bits,
            smoothing=0.0,
            kept_grids=kept_grids,
            quality=quality.model_dump(exclude_none=True),
            max_kl=options.max_kl,
        )
        manifest.save(directory)
    return manifest


def _quantize(traced: Traced, scheme: Scheme) -> int | None:
    """Store the weights as integers, in place. Returns how many of them lie on grids of their own; None if none does."""
    gathered, given, storage = tables(traced.graphs.values()), _given(traced), storage_of(scheme)
    grids = {} if traced.backbone.integers else own_grids(traced.graphs[STEP].graph, storage)
    storage = told_of_grids(storage, grids)
    kept: list[str] = []
    for model in traced.graphs.values():
        kept += quantize_graph(model, storage, gathered, RoundedWeights(blocks=given | grids))
    if given and kept:
        count = len(traced.backbone.integers)
        rest = "" if len(kept) == count else f"; {scheme} stores the others in another form"
        note(f"{len(kept)} of the checkpoint's {count} integer weights keep their own codes{rest}")
    elif traced.backbone.integers:
        note(f"the weights of the checkpoint are integers, but none that {scheme} can keep; they are rounded again")
    return len(grids) or None


def _given(traced: Traced) -> dict[str, GivenCodes]:
    """The codes of the checkpoint's weights, by the names of the step graph. Weights that the model merges have none there."""
    found: dict[str, GivenCodes] = {}
    names = set(traced.backbone.model.state_dict())
    for name, lazy in traced.backbone.integers.items():
        if name not in names:
            continue
        weight = lazy.make()
        if (codes := given_codes(partial(_arrays, lazy), weight.bits, weight.block_size)) is not None:
            found[f"model.{name}"] = codes
    return found


def _arrays(lazy: LazyIntegers) -> tuple[Array, Array, Array]:
    weight = lazy.make()
    return weight.codes.numpy(), weight.scales.numpy(), weight.zeros.numpy()


def _quality(traced: Traced, manifest: Manifest, place: Path) -> Quality:
    """Compare the bundle with PyTorch, on prompts with the answers that the bundle gives."""
    after = open_backend(place, manifest, "ort-cpu")
    ngrams = NGrams.of_bundle(place, manifest)
    engine = DecodingEngine(after, DynamicTree(len(manifest.tree["parents"])), ngrams=ngrams)
    size = sum(parameter.numel() for parameter in traced.backbone.model.parameters())
    limit = max(LEAST_PROMPTS, int(NUM_OPERATIONS / (2 * size * TOKENS_PER_PROMPT)))
    prompts = prompts_for(None, QUALITY_PROMPTS, manifest)[:limit]
    with step_stage("measure the quality against PyTorch", 2 * len(prompts)) as one_more:
        texts, stats = answered(engine, open_codec(place, manifest), told(prompts, one_more))
        quality = compare(TorchLogits(traced.backbone), after, told(texts, one_more))
    quality.tokens_per_step = stats.tokens_per_step
    return quality
