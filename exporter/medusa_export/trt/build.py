"""ONNX bundle in, TensorRT engine bundle out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from medusa_export.progress import stage
from medusa_export.provenance import provenance
from medusa_export.trt.flavor import TensorRT
from medusa_export.trt.options import EngineOptions, default_tree_nodes, engine_limits, load_source
from medusa_export.trt.plan import Network
from medusa_export.trt.profiles import heads_profiles, step_profiles
from medusa_export.trt.specialize import CAPACITY_AXIS, PAST_PREFIX, specialize
from medusa_runtime.errors import ExportError, OptionError
from medusa_runtime.files import new_directory, require_new
from medusa_runtime.manifest import (
    HEADS,
    STEP,
    EngineFacts,
    FileFacts,
    GraphFacts,
    Limits,
    Manifest,
    TensorFacts,
    ValidationFacts,
    is_bundle,
)
from medusa_runtime.ngrams import NGRAMS_NAME
from medusa_runtime.text import CHAT_NAME, TOKENIZER_NAME


@dataclass(frozen=True)
class _Job:
    options: EngineOptions
    source: Manifest
    limits: Limits
    capacity: int
    tensorrt: TensorRT
    capabilities: list[str]


def build_engines(options: EngineOptions) -> Manifest:
    """Build the step and the heads engine and write their bundle; whole or not at all.

    Raises:
        OptionError: an option cannot be used with this bundle or this flavour, or the output exists.
        BundleError: the bundle is missing, damaged, of the wrong kind, or failed its validation.
        MissingExtraError: the flavour's package is not installed.
        BackendError: the flavour needs a GPU and there is none.
        ExportError: TensorRT cannot build a graph, or what it built does not keep the contract.
    """
    require_new(options.output, _is_engine_bundle, force=options.force, inputs=(options.bundle,))
    source = load_source(options.bundle)
    limits = engine_limits(options, source)
    assert limits.capacity is not None
    tensorrt = TensorRT.load(options.flavor)
    capabilities = tensorrt.choose_compute_capabilities(options.compute_capabilities)
    if source.precision == "bf16" and "7.5" in capabilities:
        raise OptionError("--compute-capability is '7.5', which has no bf16; export the bundle with --dtype fp16")
    with stage("check the bundle"):
        source.require_intact(options.bundle)
    with new_directory(options.output, _is_engine_bundle, force=options.force, inputs=(options.bundle,)) as directory:
        manifest = _fill(directory, _Job(options, source, limits, limits.capacity, tensorrt, capabilities))
        manifest.save(directory)
    return manifest


def _is_engine_bundle(path: Path) -> bool:
    return is_bundle(path, "tensorrt")


def _fill(directory: Path, job: _Job) -> Manifest:
    """Write everything but the manifest into the engine bundle's directory. Returns the manifest."""
    bundle, source, tensorrt = job.options.bundle, job.source, job.tensorrt
    graphs = {name: plan_facts(source.graphs[name], name, tensorrt.target, job.capacity) for name in (STEP, HEADS)}
    profiles = {
        STEP: step_profiles(graphs[STEP], job.limits, default_tree_nodes(source)),
        HEADS: heads_profiles(graphs[HEADS], job.limits),
    }
    files: dict[str, FileFacts] = {}
    aliases: dict[str, str] = {}
    for name, facts in graphs.items():
        with stage(f"build {facts.file} with {tensorrt.name} {tensorrt.version} for {', '.join(job.capabilities)}"):
            network = _network(job, name, facts)
            aliases |= network.aliases()
            files[facts.file] = network.write_plan(directory / facts.file, profiles[name], job.capabilities)
            del network  # its weights, before the next graph's are read
    for name in (TOKENIZER_NAME, CHAT_NAME, *({NGRAMS_NAME} & source.files.keys())):
        shutil.copyfile(bundle / name, directory / name)
        files[name] = source.files[name]
    engine = EngineFacts(
        flavor=tensorrt.flavor,
        tensorrt_version=tensorrt.version,
        compute_capabilities=job.capabilities,
        profiles=profiles[STEP] | profiles[HEADS],
        aliases=aliases,
        source_bundle=source.content_digest(),
    )
    return source.model_copy(
        update={
            "kind": "tensorrt",
            "limits": job.limits,
            "graphs": graphs,
            "files": files,
            "provenance": provenance(),
            "validation": ValidationFacts(status="not run"),
            "engine": engine,
        }
    )


def _network(job: _Job, name: str, facts: GraphFacts) -> Network:
    """One of the bundle's graphs, specialised, parsed, and found to keep its contract."""
    model = ir.load(job.options.bundle / job.source.graphs[name].file)
    if name == STEP:
        specialize(model, job.source.precision, job.capacity)
    network = Network.parse(job.tensorrt, name, model, job.options.bundle)
    network.check_contract(facts)
    if name == STEP:
        _check_in_place(network.aliases(), job.source.model.num_layers)
    return network


def plan_facts(portable: GraphFacts, name: str, target: str, capacity: int) -> GraphFacts:
    """The contract of the engine that is built from a portable graph: the same, but for a static capacity."""
    symbols = {tensor.shape[CAPACITY_AXIS] for tensor in portable.inputs if tensor.name.startswith(PAST_PREFIX)}

    def fixed(tensor: TensorFacts) -> TensorFacts:
        return tensor.model_copy(update={"shape": [capacity if size in symbols else size for size in tensor.shape]})

    return GraphFacts(
        file=f"{name}.plan",
        target=target,
        inputs=[fixed(tensor) for tensor in portable.inputs],
        outputs=[fixed(tensor) for tensor in portable.outputs],
    )


def _check_in_place(aliases: dict[str, str], num_layers: int) -> None:
    for pair in (f"{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")):
        if (found := aliases.get(f"present.{pair}")) != f"past.{pair}":
            raise ExportError(f"present.{pair} is not past.{pair} updated in place, but an update of {found or 'no cache'}")
