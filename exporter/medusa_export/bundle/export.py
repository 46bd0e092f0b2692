"""`medusa-export onnx`: reads a checkpoint and heads, writes an ONNX bundle."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from medusa_export.bundle.default_tree import tree_for
from medusa_export.bundle.kinds import is_bundle
from medusa_export.bundle.text_files import TextFiles
from medusa_export.bundle.write_graphs import write_graphs
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.model.checkpoint import Backbone, load_backbone
from medusa_export.model.generation_settings import describe, generation_facts
from medusa_export.opsets import MAX_OPSET, MIN_OPSET
from medusa_export.progress import note, stage
from medusa_export.provenance import provenance
from medusa_export.trace import attention_node as attention
from medusa_export.trace.heads_graph import reads_lm_head_rows, trace_heads
from medusa_export.trace.skeleton import require_traceable
from medusa_export.trace.step_graph import trace_step
from medusa_export.trace.stored_layers import cast_all_but_layers
from medusa_heads.directories import new_directory, require_new
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import load_heads
from medusa_heads.formats.locating import locate, locate_merged
from medusa_heads.formats.merged import has_heads
from medusa_heads.modules import MedusaHeads
from medusa_runtime.bundle.manifest import (
    HEADS,
    STEP,
    FileFacts,
    GenerationFacts,
    GraphFacts,
    HeadFacts,
    Limits,
    Manifest,
    file_facts,
)
from medusa_runtime.drafting.ngrams import NGRAMS_NAME, NGrams
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.errors import OptionError

HEAD_TOP_K = 32  # n-grams can only raise tokens that are among the candidates (docs/decisions/0019-draft-ngrams.md)


@dataclass(frozen=True)
class Traced:
    """A model and its heads as graphs, with all that their bundle's manifest says of them."""

    backbone: Backbone
    graphs: dict[str, ir.Model]  # the portable ones by name
    text: TextFiles
    heads_path: Path
    facts: dict[str, Any]  # fields of the manifest

    def manifest(self, directory: Path, files: dict[str, FileFacts], graphs: dict[str, GraphFacts]) -> Manifest:
        """Write the files beside graphs and weights, and make the manifest of all."""
        files = files | self.text.write(directory) | _copy_ngrams(self.heads_path, directory)
        return Manifest(kind="onnx", graphs=graphs, files=files, provenance=provenance(), **self.facts)


def export_bundle(options: ExportOptions) -> Manifest:
    """Trace the model, simplify the graphs and write a bundle. It appears whole or not at all.

    Raises:
        OptionError: an option cannot be used with this model, or the output exists.
        CheckpointError: model or heads are missing, damaged, or do not fit each other.
        ExportError: the model cannot be traced.
    """
    if options.quantize is not None:
        raise OptionError("export_bundle writes float weights alone; medusa_export.quantize.export rounds them too")
    traced = trace_bundle(options)
    with new_directory(options.output, is_onnx_bundle, force=options.force, inputs=options.inputs) as directory:
        files, graphs = write_graphs(traced.graphs, directory, options.precision)
        manifest = traced.manifest(directory, files, graphs)
        manifest.save(directory)
    return manifest


def trace_bundle(options: ExportOptions) -> Traced:
    """Load and trace a model and its heads. Nothing is written. Errors are those of `export_bundle`."""
    require_new(options.output, is_onnx_bundle, force=options.force, inputs=options.inputs)
    if not MIN_OPSET <= options.opset <= MAX_OPSET:
        raise OptionError(
            f"--opset must be {MIN_OPSET} or {MAX_OPSET}, not {options.opset} "
            f"({MIN_OPSET} is the first with an in-place KV cache)"
        )
    heads_path = heads_place(options.model, options.heads)
    heads = load_heads(heads_path, note)
    attention.register()
    with stage(f"load {options.model}"):
        backbone = load_backbone(
            options.model,
            options.precision,
            attention=attention.ATTENTION_NAME,
            trust_remote_code=options.trust_remote_code,
            layers_as_stored=True,
            before_loading=require_traceable,
        )
        cast_all_but_layers(backbone.model, backbone.dtype)
        text = TextFiles.load(options.model, trust_remote_code=options.trust_remote_code)
    text.check(backbone)
    if backbone.is_multimodal:
        note(f"{options.model} reads more than text; the bundle has its language model, without images, video or sound")
    if options.precision == "bf16":
        note("a bf16 bundle runs on GPUs alone: ONNX Runtime has no bfloat16 kernels for CPUs. For both, export fp16")
    generation = _generation(backbone)
    limits = _limits(options, backbone)
    require_matching(heads, backbone, heads_path)
    draft_ids = _draft_ids(options, heads)
    top_k = _top_k(options, backbone.facts.vocab_size, draft_ids)
    head_facts = _head_facts(top_k, heads, draft_ids)  # read first: tracing casts the heads
    tree = _tree(options, heads_path, head_facts)
    with stage("trace the backbone"):
        step = trace_step(backbone, options.opset, note, lm_head_as_table=reads_lm_head_rows(heads, draft_ids))
    with stage("trace the heads"):
        graphs = {STEP: step, HEADS: trace_heads(backbone, heads, top_k, options.opset, draft_ids)}
    facts = {
        "model": backbone.facts,
        "heads": head_facts,
        "precision": options.precision,
        "opset": options.opset,
        "limits": limits,
        "generation": generation,
        "tree": tree.to_json(),
    }
    return Traced(backbone, graphs, text, heads_path, facts)


def heads_place(model: str, heads: Path | None) -> Path:
    """The path of the heads: those given, or those in the model, if it is a merged checkpoint.

    Raises:
        OptionError: no heads are given, and the model has none.
        CheckpointError: there are none where they should be, or a file is damaged.
    """
    if heads is not None:
        place = locate(heads)
        if has_heads(place) and place.resolve() != Path(model).resolve():
            note(f"{heads} is a merged checkpoint: its model was trained with its heads, which may guess badly on {model}")
        return place
    merged = locate_merged(model)
    if merged is not None:
        return merged
    raise OptionError(f"{model} has no heads in it; give some with --heads (medusa-export train and heads init make them)")


def _draft_ids(options: ExportOptions, heads: MedusaHeads) -> list[int] | None:
    if not options.full_head_vocabulary:
        return heads.draft_ids
    if heads.config.draft_rows:
        raise OptionError("--full-head-vocabulary does not go with these heads: their LM heads know only the draft vocabulary")
    return None


def _tree(options: ExportOptions, heads_path: Path, heads: HeadFacts) -> CandidateTree:
    if options.tree is None:
        return tree_for(heads_path, heads.sha256, heads.num_heads, heads.top_k, options.tree_nodes)
    tree = CandidateTree.from_file(options.tree)
    tree.check_fits(heads.num_heads, heads.top_k)
    return tree


def is_onnx_bundle(path: Path) -> bool:
    """Whether a directory is an earlier output of this command."""
    return is_bundle(path, "onnx")


def _generation(backbone: Backbone) -> GenerationFacts | None:
    """The checkpoint's generation settings. A note says which of them the runtime follows."""
    if outside := sorted({*backbone.eos_token_ids} - {*backbone.facts.eos_token_ids}):
        note(
            f"{backbone.source} names end-of-sequence tokens outside the vocabulary of {backbone.facts.vocab_size}: "
            f"{', '.join(map(str, outside))}; they are left out"
        )
    facts = generation_facts(backbone)
    if facts is not None:
        note(describe(facts))
    return facts


def _limits(options: ExportOptions, backbone: Backbone) -> Limits:
    longest = backbone.max_seq_len
    max_seq_len = options.max_seq_len or longest
    if max_seq_len > longest:
        raise OptionError(f"--max-seq-len is {max_seq_len}, but the model supports at most {longest}; lower it")
    return Limits(max_seq_len=max_seq_len)


def _top_k(options: ExportOptions, vocab_size: int, draft_ids: list[int] | None) -> int:
    """Candidates that each head returns: the option's value, or 32, or all if the vocabulary is smaller."""
    known = vocab_size if draft_ids is None else len(draft_ids)
    top_k = options.head_top_k or min(HEAD_TOP_K, known)
    if top_k > vocab_size:
        raise OptionError(f"--head-top-k is {top_k}, but the vocabulary has only {vocab_size} tokens; lower it")
    if top_k > known:
        raise OptionError(
            f"--head-top-k is {top_k}, but the heads know only {known} tokens; lower it, or give --full-head-vocabulary"
        )
    return top_k


def _head_facts(top_k: int, heads: MedusaHeads, draft_ids: list[int] | None) -> HeadFacts:
    return HeadFacts(
        num_heads=heads.config.num_heads,
        num_layers=heads.config.num_layers,
        top_k=top_k,
        shared_lm_head=heads.config.shared_lm_head,
        reads_root=heads.reads_tokens,
        draft_vocab_size=None if draft_ids is None else len(draft_ids),
        sha256=heads.digest(),
    )


def _copy_ngrams(heads: Path, directory: Path) -> dict[str, FileFacts]:
    """Copy the draft n-grams from the heads' directory, if there are any."""
    source = heads / NGRAMS_NAME
    if not source.is_file():
        return {}
    NGrams.load(source)  # raises if the file is damaged
    shutil.copyfile(source, directory / NGRAMS_NAME)
    return {NGRAMS_NAME: file_facts(directory / NGRAMS_NAME)}


def require_matching(heads: MedusaHeads, backbone: Backbone, path: Path) -> None:
    """Raise a `CheckpointError` if the heads were made for a model of another shape.

    If they do not tell the size of the vocabulary, it is the model's from here on.
    """
    if heads.config.vocab_size is None:
        heads.config = heads.config.model_copy(update={"vocab_size": backbone.facts.vocab_size})
    for name in ("hidden_size", "vocab_size"):
        want, found = getattr(backbone.facts, name), getattr(heads.config, name)
        if want != found:
            raise CheckpointError(
                f"the heads in {path} have {name} {found}, but {backbone.source} has {want}; "
                f"they were made for {heads.config.base_model}"
            )
