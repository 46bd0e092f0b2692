"""`medusa-export trt inspect`: facts from a manifest and the headers of its plans, and on a GPU from the engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from medusa_export.engine.complaints import first_complaint
from medusa_export.engine.flavor import TensorRT
from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.backends.gpu.trt import error_log
from medusa_runtime.bundle.manifest import EngineFacts, GraphFacts, Limits, Manifest, Precision
from medusa_runtime.bundle.plans import open_plan, require_loadable
from medusa_runtime.errors import BackendError, BundleError


class BuiltEngine(BaseModel):
    """Facts of an engine that need a GPU."""

    device_memory: int = Field(description="bytes of activations, in the largest profile")
    layers: list[str]


class Inspection(BaseModel):
    """The facts of an engine bundle."""

    model: str
    precision: Precision
    limits: Limits
    graphs: dict[str, GraphFacts]
    file_sizes: dict[str, int]
    engine: EngineFacts
    headers: dict[str, str] = Field(description="the installed TensorRT's verdict on each plan's header")
    loads_here: str = Field(description="`yes`, or why not, or why it is unknown")
    engines: dict[str, BuiltEngine] = Field(description="by graph; empty without a GPU")


def inspect_engines(bundle: Path) -> Inspection:
    """Read the facts of an engine bundle.

    Raises:
        BundleError: the directory is not an engine bundle, or a file is missing, truncated or different.
    """
    manifest = Manifest.load(bundle)
    engine = manifest.engine
    if engine is None:
        raise BundleError(f"{bundle} has no engines; build them from it with: medusa-export trt")
    here = {"flavor": engine.flavor, "tensorrt_version": engine.tensorrt_version}
    require_loadable(manifest, bundle, **here)  # finds truncated plans; whether they run on this machine is checked below
    manifest.require_intact(bundle)
    headers, engines, loads_here = {}, {}, "yes"
    try:
        tensorrt = TensorRT.load(engine.flavor)
        headers = _headers(tensorrt, manifest, bundle)
        gpus = find_gpus().gpus
        require_loadable(
            manifest,
            bundle,
            flavor=tensorrt.flavor,
            tensorrt_version=tensorrt.version,
            compute_capability=gpus[0].compute_capability if gpus else None,
        )
        if gpus and engine.lean_runtime:
            loads_here = "not tried: the engines bring code, which runs when they are loaded"
        elif gpus:
            engines = {name: _built(tensorrt, manifest, bundle, name) for name in manifest.graphs}
        else:
            loads_here = f"unknown without a GPU ({find_gpus().why_none}); layers and memory need a GPU too"
    except BackendError as error:
        loads_here = f"no: {error}"
    return Inspection(
        model=manifest.model.name,
        precision=manifest.precision,
        limits=manifest.limits,
        graphs=manifest.graphs,
        file_sizes={name: facts.size for name, facts in manifest.files.items()},
        engine=engine,
        headers=headers,
        loads_here=loads_here,
        engines=engines,
    )


def _headers(tensorrt: TensorRT, manifest: Manifest, bundle: Path) -> dict[str, str]:
    trt = tensorrt.api
    if not hasattr(trt, "EngineInvalidityDiagnostics"):
        return {}
    runtime = trt.Runtime(error_log(trt))
    found = {}
    for name in manifest.graphs:
        with open_plan(manifest, bundle, name) as plan:
            validity, diagnostics = runtime.get_engine_validity(bytes(plan[: runtime.engine_header_size]))
        reasons = [
            reason.lower() for reason, bit in trt.EngineInvalidityDiagnostics.__members__.items() if diagnostics & int(bit)
        ]
        if reasons:
            found[name] = ", ".join(reasons).replace("_", " ")
        else:
            found[name] = (
                "valid" if validity == trt.EngineValidity.VALID else "well-formed; the rest can only be checked on a GPU"
            )
    return found


def _built(tensorrt: TensorRT, manifest: Manifest, bundle: Path, name: str) -> BuiltEngine:
    engine = _engine(tensorrt, manifest, bundle, name)
    told = engine.create_engine_inspector().get_engine_information(tensorrt.api.LayerInformationFormat.JSON)
    layers = json.loads(told).get("Layers", [])
    return BuiltEngine(
        device_memory=engine.device_memory_size_v2,
        layers=[layer if isinstance(layer, str) else layer["Name"] for layer in layers],
    )


def _engine(tensorrt: TensorRT, manifest: Manifest, bundle: Path, name: str) -> Any:
    trt = tensorrt.api
    log = error_log(trt)
    runtime = trt.Runtime(log)
    assert manifest.engine is not None
    with open_plan(manifest, bundle, name) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(
            f"{tensorrt.name} cannot load {bundle / manifest.graphs[name].file}: {first_complaint(log.errors)}; "
            "build the engines again"
        )
    return engine  # the engine keeps its runtime alive, and the runtime its log
