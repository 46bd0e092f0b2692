"""Engine bundles for the stand-in of TensorRT: everything `medusa-export trt` writes, but graphs where the plans would be."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.engine.design import plan_facts
from medusa_export.engine.engine_checks import default_tree_nodes, engine_limits
from medusa_export.engine.profiles import heads_profiles, step_profiles
from medusa_export.passes.tensorrt.accept_greedily import AcceptGreedily, with_acceptance
from medusa_export.passes.tensorrt.specialize import specialize
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import HEADS, STEP, EngineFacts, Manifest, file_facts
from tests.support.stand_in_tensorrt import VERSION, write_plan


def stand_in_engine(bundle: Path, directory: Path, flavor: str = "rtx", *, accepts: bool = True, **limits: int) -> Path:
    """Write an engine bundle.

    Args:
        bundle: the ONNX bundle.
        directory: a new one.
        flavor: `rtx` or `tensorrt`.
        accepts: whether the step's graph accepts greedily by itself.
        **limits: fields of `EngineOptions`.
    """
    source = Manifest.load(bundle)
    found = engine_limits(EngineOptions(bundle, directory, **limits), source)
    assert found.capacity is not None
    graphs = {name: plan_facts(source.graphs[name], name, "tensorrt-rtx", found.capacity) for name in (STEP, HEADS)}
    models = {name: ir.load(bundle / source.graphs[name].file) for name in (STEP, HEADS)}
    specialize(models[STEP], source.precision, found.capacity)
    if accepts:
        AcceptGreedily()(models[STEP])
    aliases = {tensor.present: tensor.past for tensor in CacheLayout.of(graphs[STEP]).tensors}
    profiles = {
        STEP: step_profiles(graphs[STEP], found, default_tree_nodes(source)),
        HEADS: heads_profiles(graphs[HEADS], found),
    }
    if accepts:
        graphs[STEP] = with_acceptance(graphs[STEP])
    directory.mkdir()
    files = {}
    for name, model in models.items():
        ir.external_data.load_to_model(model)
        path = directory / graphs[name].file
        write_plan(path, model, aliases if name == STEP else {}, list(profiles[name].values()))
        files[path.name] = file_facts(path)
    for name in ("tokenizer.json", "chat.json"):
        shutil.copyfile(bundle / name, directory / name)
        files[name] = source.files[name]
    manifest = source.model_copy(
        update={
            "kind": "tensorrt",
            "limits": found,
            "graphs": graphs,
            "files": files,
            "engine": EngineFacts(
                flavor=flavor,
                tensorrt_version=VERSION,
                compute_capabilities=["8.9"],
                profiles=profiles[STEP] | profiles[HEADS],
                aliases=aliases,
                source_bundle=source.content_digest(),
            ),
        }
    )
    manifest.save(directory)
    return directory
