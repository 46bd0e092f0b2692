"""The engines to build from a bundle: chosen, checked and estimated before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from medusa_export.bundle.read_graph import read_graph
from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.engine.engine_checks import (
    default_tree_nodes,
    engine_limits,
    load_source,
    require_flavor_takes,
    require_gpus_take,
)
from medusa_export.engine.estimate import activation_bytes, cache_bytes, io_bytes, plan_bytes, weight_bytes
from medusa_export.engine.flavor import TensorRT
from medusa_export.engine.profiles import Profile, heads_profiles, largest_sizes, step_profiles
from medusa_export.passes.common.roles import parts
from medusa_export.passes.portable.expand_experts import EXPERTS_PART
from medusa_export.passes.tensorrt.accept_greedily import AcceptGreedily, with_acceptance
from medusa_export.passes.tensorrt.engine_weights import QuantizeEngineWeights
from medusa_export.passes.tensorrt.specialize import specialize
from medusa_export.progress import note
from medusa_runtime.bundle.cache_layout import CAPACITY_AXIS, PAST
from medusa_runtime.bundle.manifest import HEADS, STEP, GraphFacts, Limits, Manifest, TensorFacts


@dataclass(frozen=True)
class Design:
    """The engines to build, with their limits, profiles and expected sizes."""

    options: EngineOptions
    source: Manifest
    tensorrt: TensorRT
    capabilities: list[str]
    limits: Limits
    capacity: int
    graphs: dict[str, GraphFacts]  # by name
    profiles: dict[str, dict[str, Profile]]  # by graph, then by name

    def portable(self, name: str) -> ir.Model:
        """One of the bundle's graphs, read from its file."""
        return read_graph(self.options.bundle / self.source.graphs[name].file)

    def graph(self, name: str) -> ir.Model:
        """One of the bundle's graphs, read from its file and specialised for TensorRT."""
        model = self.portable(name)
        if name == STEP:
            specialize(model, self.source.precision, self.capacity)
            AcceptGreedily()(model)
        if (weights := self.options.weights) != "as-is":
            eight_bits = name == HEADS and weights == "int4"  # 4 bits hurt the heads most
            QuantizeEngineWeights("int8" if eight_bits else weights)(model)
        return model

    def plan_sizes(self) -> dict[str, int]:
        """Estimated bytes on disk of each plan, by file."""
        return {facts.file: plan_bytes(name, self.graph(name)) for name, facts in self.graphs.items()}

    def device_memory(self) -> dict[str, int]:
        """Estimated GPU memory at the largest shapes, in bytes by use."""
        cached = {"capacity": self.capacity}
        sizes = {
            name: [largest_sizes(self.graphs[name], profile) | cached for profile in profiles.values()]
            for name, profiles in self.profiles.items()
        }
        models = {name: self.portable(name) for name in self.graphs}
        scores = self.source.precision == "fp32" or any("softcap" in node.attributes for node in models[STEP].graph)
        return {
            "weights": sum(weight_bytes(self.graph(name)) for name in models),
            "kv_cache": cache_bytes(self.graphs[STEP], sizes[STEP][0]),
            "inputs_and_outputs": sum(max(io_bytes(self.graphs[name], each) for each in sizes[name]) for name in models),
            "activations": max(activation_bytes(models[name], each, scores=scores) for name in models for each in sizes[name]),
        }


def design_engines(options: EngineOptions) -> Design:
    """Choose and check the engines to build.

    Raises:
        OptionError: an option cannot be used with this bundle or this flavour.
        BundleError: the bundle is missing, of the wrong kind, or failed its validation.
        MissingExtraError: the flavour's package is not installed.
        BackendError: the flavour needs a GPU and there is none.
    """
    source = load_source(options.bundle)
    limits = engine_limits(options, source)
    assert limits.capacity is not None
    tensorrt = TensorRT.load(options.flavor)
    require_flavor_takes(options, tensorrt)
    capabilities = tensorrt.choose_compute_capabilities(options.compute_capabilities)
    require_gpus_take(options.weights, source.precision, capabilities)
    graphs = {name: plan_facts(source.graphs[name], name, tensorrt.target, limits.capacity) for name in (STEP, HEADS)}
    graphs[STEP] = with_acceptance(graphs[STEP])
    profiles = {
        STEP: step_profiles(graphs[STEP], limits, default_tree_nodes(source)),
        HEADS: heads_profiles(graphs[HEADS], limits),
    }
    design = Design(options, source, tensorrt, capabilities, limits, limits.capacity, graphs, profiles)
    if options.weights != "as-is" and (layers := len(parts(design.portable(STEP).graph, EXPERTS_PART))):
        note(f"--weights {options.weights} leaves the experts of {layers} layers in {source.precision}")
    return design


def plan_facts(portable: GraphFacts, name: str, target: str, capacity: int) -> GraphFacts:
    """The facts of the engine built from a portable graph: the same, except for a static capacity."""
    symbols = {tensor.shape[CAPACITY_AXIS] for tensor in portable.inputs if tensor.name.startswith(PAST)}

    def fixed(tensor: TensorFacts) -> TensorFacts:
        return tensor.model_copy(update={"shape": [capacity if size in symbols else size for size in tensor.shape]})

    return GraphFacts(
        file=f"{name}.plan",
        target=target,
        inputs=[fixed(tensor) for tensor in portable.inputs],
        outputs=[fixed(tensor) for tensor in portable.outputs],
    )
