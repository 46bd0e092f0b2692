"""Writes a bundle's graphs: the portable ones, those derived for one backend, and the weights that they share."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from medusa_export.bundle.weights_file import total_bytes, write_weights
from medusa_export.passes.common.roles import KEY, keep_roles
from medusa_export.passes.ort_cpu.variants import for_one_sequence, for_ort_cpu
from medusa_export.passes.webgpu.for_webgpu import for_webgpu
from medusa_export.progress import byte_stage, note
from medusa_runtime.backends.webgpu.adapters import PRECISIONS
from medusa_runtime.bundle.manifest import (
    HEADS,
    ORT_CPU,
    ORT_CPU_SINGLE,
    ORT_WEBGPU,
    PORTABLE,
    STEP,
    WEIGHTS_NAME,
    FileFacts,
    GraphFacts,
    Precision,
    TensorFacts,
    file_facts,
)

HEADS_ACTIVATION_BITS = 8  # a guess that rounding changes costs a draft, never a token
PROMISED_BYTES = 256 << 20  # the largest buffer that WebGPU promises on any GPU: its default limit


def write_graphs(
    graphs: dict[str, ir.Model], directory: Path, precision: Precision, *, activation_bits: int = 16
) -> tuple[dict[str, FileFacts], dict[str, GraphFacts]]:
    """Write the portable graphs, the graphs for ONNX Runtime's CPU provider, and their weights, each tensor once.

    Args:
        graphs: the portable graphs by name. Afterwards they refer to the written weights.
        directory: the bundle's directory.
        precision: the graphs' precision. Only float32 graphs get variants for the CPU, which has no fused kernels for others.
        activation_bits: of the step graphs; see `for_ort_cpu`.

    Returns:
        The entries of the files and of the graphs for the manifest.
    """
    place = directory / WEIGHTS_NAME  # smaller than all tensors together: what two graphs share is written once
    with byte_stage("write the weights", total_bytes(graphs.values()), lambda: place.stat().st_size) as advance:
        files = {WEIGHTS_NAME: write_weights(graphs.values(), directory, advance)}
    facts = {}
    for name, model in graphs.items():
        facts[name] = _save(model, name, directory, PORTABLE)
        if precision == "fp32":
            derived = model.clone()
            for_ort_cpu(derived, HEADS_ACTIVATION_BITS if name == HEADS else activation_bits)
            facts[f"{name}.{ORT_CPU}"] = _save(derived, f"{name}.{ORT_CPU}", directory, ORT_CPU)
    if precision in PRECISIONS:
        derived_for_webgpu = for_webgpu(graphs)
        _warn_of_large_tensors(derived_for_webgpu.values())
        for name, model in derived_for_webgpu.items():
            facts[f"{name}.{ORT_WEBGPU}"] = _save(model, f"{name}.{ORT_WEBGPU}", directory, ORT_WEBGPU)
    if precision == "fp32" and for_one_sequence(single := graphs[STEP].clone(), activation_bits):
        facts[f"{STEP}.{ORT_CPU_SINGLE}"] = _save(single, f"{STEP}.{ORT_CPU_SINGLE}", directory, ORT_CPU_SINGLE)
    return files | {graph.file: file_facts(directory / graph.file) for graph in facts.values()}, facts


def _warn_of_large_tensors(graphs: Iterable[ir.Model]) -> None:
    values = [value for model in graphs for value in model.graph.initializers.values()]
    sizes = {value.name: value.const_value.nbytes for value in values if value.const_value is not None}
    if sizes and (size := max(sizes.values())) > PROMISED_BYTES:
        note(
            f"{max(sizes, key=sizes.__getitem__)} has {size / 1e6:.0f} MB; WebGPU promises buffers of "
            f"{PROMISED_BYTES / 1e6:.0f} MB. Most GPUs take larger ones: ask `medusa-export doctor` there"
        )


def _save(model: ir.Model, name: str, directory: Path, target: str) -> GraphFacts:
    roles = keep_roles(model)
    ClearMetadataAndDocStringPass()(model)
    for node, role in roles.items():
        node.metadata_props[KEY] = role
    model.graph.name = name
    model.opset_imports.pop("medusa.trace", None)
    model.opset_imports.pop("pkg.onnxscript.torch_lib.common", None)
    model.producer_name = "medusa-export"
    model.producer_version = importlib.metadata.version("medusa-export")
    file = f"{name}.onnx"
    ir.save(model, directory / file)
    return GraphFacts(
        file=file,
        target=target,
        inputs=[_facts(value) for value in model.graph.inputs],
        outputs=[_facts(value) for value in model.graph.outputs],
    )


def _facts(value: ir.Value) -> TensorFacts:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    return TensorFacts(name=value.name, dtype=value.dtype.name.lower(), shape=shape)
