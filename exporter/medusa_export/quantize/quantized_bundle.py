"""`medusa-export quantize`: reads a bundle, writes a quantised bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from medusa_export.bundle.export import is_onnx_bundle
from medusa_export.bundle.read_graph import read_graph
from medusa_export.bundle.weights_file import write_weights
from medusa_export.bundle.write_graphs import write_graphs
from medusa_export.check.builtin_prompts import token_prompts
from medusa_export.check.quality import Quality, compare
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.errors import QualityError
from medusa_export.measure.prompt_files import read_prompts
from medusa_export.passes.quantize.choose_terms import ChooseTerms
from medusa_export.passes.quantize.expert_weights import BLOCK_SIZES, QuantizeExperts
from medusa_export.passes.quantize.integer_weights import QuantizeWeights, Storage, tables
from medusa_export.passes.quantize.own_grids import has_grids, own_grids
from medusa_export.passes.quantize.smooth import Smooth, Vector, junctions, with_maxima
from medusa_export.progress import note, step_stage, told
from medusa_export.provenance import provenance
from medusa_export.quantize.calibration_text import CALIBRATION_PROMPTS, QUALITY_PROMPTS, answered, pieces
from medusa_export.quantize.rotation import NotRotatedError, rotate
from medusa_export.quantize.run_step import run_step
from medusa_export.quantize.weight_rounding import RoundedWeights, round_weights, stored_in
from medusa_heads.directories import new_directory, require_new, scratch_beside
from medusa_runtime import DecodingEngine, DynamicTree
from medusa_runtime.backends.choosing import open_backend
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import HEADS, STEP, Manifest, QuantizationFacts, Scheme, ValidationFacts, file_facts
from medusa_runtime.drafting.ngrams import NGRAMS_NAME, NGrams
from medusa_runtime.errors import BundleError, OptionError
from medusa_runtime.text.codec import CHAT_NAME, TOKENIZER_NAME, Prompt
from medusa_runtime.text.token_ids import open_codec

SMOOTHING = 0.5  # best in the paper for models like Llama, and in our measurements for SmolLM2
LAYERS = frozenset({"layers", "h", "blocks"})  # the names that models give to their list of layers
MLP = ("mlp", "feed_forward", "ffn")


def quantize_bundle(options: QuantizeOptions) -> Manifest:
    """Quantise a bundle's weights, measure the loss of quality, and write a new bundle. It appears whole or not at all.

    Raises:
        OptionError: the output exists, a text file cannot be used, or the model cannot be rotated though that was asked for.
        BundleError: the bundle is not a float32 ONNX bundle, is already quantised, or has files that do not match its manifest.
        QualityError: the result differs from the original by more than `max_kl`. Nothing is written.
    """
    require_new(options.output, is_onnx_bundle, force=options.force, inputs=[options.bundle])
    source = _source(options.bundle)
    codec = open_codec(options.bundle, source)
    require_int8("--scheme", options.scheme, activation_bits=options.activation_bits)
    quality_prompts = prompts_for(options.quality_prompts, QUALITY_PROMPTS, source)
    calibration_prompts = prompts_for(options.calibration_prompts, CALIBRATION_PROMPTS, source)
    before = open_backend(options.bundle, source, "ort-cpu")
    ngrams = NGrams.of_bundle(options.bundle, source)
    engine = DecodingEngine(before, DynamicTree(len(source.tree["parents"])), ngrams=ngrams)
    text = None if options.quality_text is None else pieces(options.quality_text, codec, source.limits.max_seq_len)
    with step_stage("answer prompts with the original", len(quality_prompts) + len(calibration_prompts)) as one_more:
        answers, stats = answered(engine, codec, told(quality_prompts, one_more))
        known = answered(engine, codec, told(calibration_prompts, one_more))[0]
    with scratch_beside(options.output) as scratch:
        graphs, rounding = _rounded(options, source, known, scratch)
        with new_directory(options.output, is_onnx_bundle, force=options.force, inputs=[options.bundle]) as directory:
            bits = rounding["activation_bits"]
            files, facts = write_graphs(graphs, directory, source.precision, activation_bits=bits)
            for name in sorted({TOKENIZER_NAME, CHAT_NAME, NGRAMS_NAME} & source.files.keys()):
                shutil.copyfile(options.bundle / name, directory / name)
                files[name] = file_facts(directory / name)
            manifest = source.model_copy(
                update={
                    "graphs": facts,
                    "files": files,
                    "provenance": provenance(),
                    "validation": ValidationFacts(status="not run"),
                }
            )
            texts = text or answers
            with step_stage("measure the quality", len(texts) + len(quality_prompts)) as one_more:
                after = open_backend(directory, manifest, "ort-cpu")
                quality = compare(before, after, told(texts, one_more))
                engine_after = DecodingEngine(after, engine.tree, ngrams=ngrams)
                _, stats_after = answered(engine_after, codec, told(quality_prompts, one_more))
                quality.tokens_per_step_before, quality.tokens_per_step = stats.tokens_per_step, stats_after.tokens_per_step
            note(quality.line())
            require_close(quality, options.max_kl)
            manifest.quantization = QuantizationFacts(
                scheme=options.scheme,
                source_bundle=source.content_digest(),
                quality=quality.model_dump(exclude_none=True),
                max_kl=options.max_kl,
                **rounding,
            )
            manifest.save(directory)
    return manifest


def require_int8(flag: str, scheme: Scheme, **values: object) -> None:
    """Raise an `OptionError` if an option is given that only int8 has. `flag` is the option that names the scheme."""
    for name, value in values.items():
        if value is not None and scheme != "int8":
            raise OptionError(f"--{name.replace('_', '-')} only applies to {flag} int8, not {scheme}; leave it out")


def wants_rotation(scheme: Scheme, activation_bits: int | None, rotate: bool | None) -> bool:
    """Whether a model is to be rotated, if that is exact for it."""
    return rotate if rotate is not None else scheme == "int8" and activation_bits == 8


def _rounded(
    options: QuantizeOptions, source: Manifest, known: Sequence[Sequence[int]], scratch: Path
) -> tuple[dict[str, ir.Model], dict[str, Any]]:
    """The bundle's graphs with weights as integers, and how they were rounded: fields of `QuantizationFacts`.

    Args:
        options: how to round.
        source: the bundle's manifest.
        known: token ids of the texts that activations are measured on.
        scratch: an empty directory, in which rotated weights lie until they are rounded.
    """
    graphs = {name: read_graph(options.bundle / source.graphs[name].file) for name in (STEP, HEADS)}
    bits = options.activation_bits
    facts: dict[str, Any] = {"activation_bits": bits or (16 if options.scheme == "int8" else 8), "smoothing": 0.0}
    rotated, weights = None, options.bundle
    if wants_rotation(options.scheme, bits, options.rotate):
        try:
            rotated = rotate(graphs, options.bundle, source, known, scratch)
        except NotRotatedError as error:
            if options.rotate:
                raise OptionError(f"the model cannot be rotated: {error}; leave --rotate out") from error
            note(f"the activations are not rotated: {error}")
            facts["not_rotated"] = str(error)
        else:
            graphs, facts["rotation"], weights = rotated.graphs, rotated.facts, scratch
    if rotated is None and bits == 8 and SMOOTHING:
        with step_stage("find the outliers of the activations", len(known)) as one_more:
            Smooth(_maxima(options.bundle, source, told(known, one_more)), SMOOTHING)(graphs[STEP])
            write_weights(graphs.values(), scratch)
        facts["smoothing"], weights = SMOOTHING, scratch
    layout, storage = CacheLayout.of(source.graphs[STEP]), storage_of(options.scheme, rotated=rotated is not None)
    grids = own_grids(graphs[STEP].graph, storage)
    if options.scheme in ("int8", "int8-blocks") and has_grids(graphs[STEP].graph):
        note("the weights lie on grids of 16 values a block: --scheme int4 would keep their values, and need half the memory")
    storage = told_of_grids(storage, grids)
    shared = stored_in(graphs[HEADS])
    rounded = round_weights(graphs[STEP], weights, layout, known, scratch, storage, shared, frozenset(grids))
    rounded.blocks.update(grids)
    gathered = tables(graphs.values())
    for name, model in graphs.items():
        quantize_graph(model, storage, gathered, rounded if name == STEP else None)
    if grids:
        facts["kept_grids"] = len(grids)
    if rotated is not None and bits == 8:
        choice = ChooseTerms(rotated.errors)
        choice(graphs[STEP])
        note(f"8 bits are too few for the activations of {choice.num_with_two} of the step's {choice.num_products} products")
        facts |= {"products_with_16_bits": choice.num_with_two, "num_products": choice.num_products}
    return graphs, facts


def quantize_graph(
    model: ir.Model, storage: Callable[[str], Storage], gathered: frozenset[int], rounded: RoundedWeights | None = None
) -> list[str]:
    """Store a graph's weights as integers, in place. Returns the names of those whose known codes in blocks were taken.

    Args:
        model: a float32 graph.
        storage: how to store each weight, by its name.
        gathered: where weights lie from which any graph gathers rows; see `tables`.
        rounded: codes of weights that are known: the checkpoint has them, or they were found before.
    """
    known = rounded or RoundedWeights()
    rounding = QuantizeWeights(storage, gathered, known.blocks, known.channels)
    rounding(model)
    experts = QuantizeExperts(storage)
    experts(model)
    if experts.left:
        note(
            f"{len(experts.left)} weights of experts, such as {experts.left[0]}, stay float32: inputs cannot be divided "
            f"into blocks of {BLOCK_SIZES[-1]}, or they are tiny"
        )
    return rounding.kept


def require_close(quality: Quality, max_kl: float | None) -> None:
    """Raise a `QualityError` if a result differs from the original by more than was allowed."""
    if max_kl is not None and not quality.mean_kl <= max_kl:
        raise QualityError(
            f"the mean KL divergence is {quality.mean_kl:.4f} nats, more than --max-kl {max_kl}; nothing was "
            "written. The closest to the original are int8-blocks, and int8 with --activation-bits 16"
        )


def prompts_for(path: Path | None, usual: Sequence[str], source: Manifest) -> Sequence[Prompt | list[int]]:
    """The prompts of a file, or else the usual ones, or else token ids for a bundle without a tokenizer."""
    if path is not None:
        return read_prompts(path)
    return usual if source.has_text else list(token_prompts(source.model.vocab_size).values())


def _source(bundle: Path) -> Manifest:
    source = Manifest.load(bundle)
    if source.kind != "onnx":
        raise BundleError(f"{bundle} is a {source.kind} bundle; quantize the ONNX bundle that it was built from")
    if source.quantization is not None:
        raise BundleError(
            f"{bundle} is already quantised ({source.quantization.scheme}); quantize the bundle that it was made from"
        )
    if source.precision != "fp32":
        raise BundleError(f"{bundle} is in {source.precision}; quantize a bundle that was exported with --dtype fp32")
    source.require_intact(bundle)
    return source


def storage_of(scheme: Scheme, *, rotated: bool = False) -> Callable[[str], Storage]:
    """How to store each weight, by its name. Embeddings, LM head and Medusa heads keep 8 bits, as 4 bits hurt them most.

    Rotated activations have no outliers, so more of them can share a scale.
    """

    def storage(name: str) -> Storage:
        if scheme == "int8-blocks" and rotated:
            return "int8-wide-blocks"
        if scheme in ("int8", "int8-blocks"):
            return scheme
        parts = name.lower().split(".")
        in_layers = parts[0] != "heads" and not LAYERS.isdisjoint(parts)
        is_mlp = any(piece in part for part in parts for piece in MLP)
        return "int4" if in_layers and (scheme == "int4" or is_mlp) else "int8-blocks"

    return storage


def told_of_grids(storage: Callable[[str], Storage], grids: Collection[str]) -> Callable[[str], Storage]:
    """How to store each weight, if those of some names lie on grids of 4 bits already; see `storage_of`.

    A file in 4 bits has more bits for the weights that lose most, so the weights without a grid have 8.
    """
    if not grids:
        return storage
    note(f"{len(grids)} weights lie on grids of 16 values a block already: they keep their values; the others have 8 bits")

    def told(name: str) -> Storage:
        usual = storage(name)
        return "int8-blocks" if usual == "int4" and name not in grids else usual

    return told


def _maxima(bundle: Path, source: Manifest, texts: Iterable[Sequence[int]]) -> dict[str, Vector]:
    """Measure on texts the largest magnitude per channel of each activation that can be smoothed."""
    model = read_graph(bundle / source.graphs[STEP].file)
    found = junctions(model)
    names = with_maxima(model, found)
    if not names:
        raise OptionError("the activations of this model cannot be smoothed, so 8 bits are too few; use --activation-bits 16")
    largest: dict[str, Vector] = {}
    for measured in run_step(model, bundle, CacheLayout.of(source.graphs[STEP]), texts, names):
        for junction, values in zip(found, measured, strict=True):
            name = junction.activation.name or ""
            largest[name] = np.maximum(largest.get(name, values), values)
    return largest
