"""`medusa-export trt`: reads an ONNX bundle, writes an engine bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from medusa_export.bundle.kinds import is_bundle
from medusa_export.bundle.weights_file import write_weights
from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.engine.design import Design, design_engines
from medusa_export.engine.flavor import gpu_here
from medusa_export.engine.network import Network
from medusa_export.engine.plan import write_plan
from medusa_export.engine.strip import stored_tensors, strip_plan
from medusa_export.errors import ExportError
from medusa_export.progress import note, stage
from medusa_export.provenance import provenance
from medusa_heads.directories import new_directory, require_new
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import (
    HEADS,
    STEP,
    WEIGHTS_NAME,
    EngineFacts,
    FileFacts,
    Manifest,
    SharedWeights,
    StrippedPlan,
    ValidationFacts,
)
from medusa_runtime.drafting.ngrams import NGRAMS_NAME
from medusa_runtime.errors import OptionError
from medusa_runtime.text.codec import CHAT_NAME, TOKENIZER_NAME


def build_engines(options: EngineOptions) -> Manifest:
    """Build the step and the heads engine and write their bundle. It appears whole or not at all.

    Raises:
        OptionError: an option cannot be used with this bundle or this flavour, or the output exists.
        BundleError: the bundle is missing, damaged, of the wrong kind, or failed its validation.
        MissingExtraError: the flavour's package is not installed.
        BackendError: the flavour needs a GPU and there is none.
        ExportError: TensorRT cannot build a graph, or the built engine has other inputs or outputs than it should.
        KeyboardInterrupt: after Ctrl-C, once TensorRT has finished its current step.
    """
    require_new(options.output, _is_engine_bundle, force=options.force, inputs=(options.bundle,))
    design = design_engines(options)
    with stage("check the bundle"):
        design.source.require_intact(options.bundle)
    with new_directory(options.output, _is_engine_bundle, force=options.force, inputs=(options.bundle,)) as directory:
        manifest = _fill(directory, design)
        manifest.save(directory)
    return manifest


def _is_engine_bundle(path: Path) -> bool:
    return is_bundle(path, "tensorrt")


def _fill(directory: Path, design: Design) -> Manifest:
    """Write all files of the engine bundle except the manifest. Returns the manifest."""
    options, source, tensorrt = design.options, design.source, design.tensorrt
    files: dict[str, FileFacts] = {}
    aliases: dict[str, str] = {}
    for name, facts in design.graphs.items():
        target = f"{tensorrt.name} {tensorrt.version} for {', '.join(design.capabilities)}"
        with stage(f"build {facts.file} with {target}") as tell, _network(design, name, directory) as network:
            aliases |= network.aliases()
            path = directory / facts.file
            files[facts.file] = write_plan(network, path, design.profiles[name], design.capabilities, options, tell)
    shared = _strip(directory, design, files) if options.strip_weights else None
    for name in (TOKENIZER_NAME, CHAT_NAME, *({NGRAMS_NAME} & source.files.keys())):
        shutil.copyfile(options.bundle / name, directory / name)
        files[name] = source.files[name]
    engine = EngineFacts(
        flavor=tensorrt.flavor,
        tensorrt_version=tensorrt.version,
        compute_capabilities=design.capabilities,
        profiles=design.profiles[STEP] | design.profiles[HEADS],
        aliases=aliases,
        source_bundle=source.content_digest(),
        weights=options.weights,
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        lean_runtime=options.version_compatible,
        built_with=_built_with(options),
        device_memory=design.device_memory(),
        shared_weights=shared,
    )
    return source.model_copy(
        update={
            "kind": "tensorrt",
            "limits": design.limits,
            "graphs": design.graphs,
            "files": files,
            "provenance": provenance(),
            "validation": ValidationFacts(status="not run"),
            "engine": engine,
        }
    )


@contextmanager
def _network(design: Design, name: str, directory: Path) -> Iterator[Network]:
    """One of the bundle's graphs, parsed and checked. While open, its quantised weights are in files on disk."""
    options, model = design.options, design.graph(name)
    tell = note if options.verbose else None
    with TemporaryDirectory(prefix=".weights-", dir=directory) as scratch:
        weights = options.bundle
        if options.weights != "as-is":
            weights = Path(scratch)
            write_weights([model], weights)
        network = Network.parse(design.tensorrt, name, model, weights, tell)
        network.check_contract(design.graphs[name])
        if name == STEP:
            _check_in_place(network.aliases(), CacheLayout.of(design.graphs[name]))
        yield network


def _check_in_place(aliases: dict[str, str], layout: CacheLayout) -> None:
    for tensor in layout.tensors:
        if (found := aliases.get(tensor.present)) != tensor.past:
            raise ExportError(
                f"{tensor.present} must be {tensor.past} updated in place, but TensorRT updates {found or 'no cache'}"
            )


def _strip(directory: Path, design: Design, files: dict[str, FileFacts]) -> SharedWeights:
    """Remove from the plans the weights that the bundle has. Changes the plans' facts in `files`."""
    bundle = design.options.bundle
    plans: dict[str, StrippedPlan] = {}
    with stage(f"remove the weights that {WEIGHTS_NAME} holds"):
        for name, facts in design.graphs.items():
            tensors, whole = stored_tensors(design.portable(name)), files[facts.file]
            files[facts.file], plans[facts.file] = strip_plan(directory / facts.file, bundle / WEIGHTS_NAME, tensors, whole)
    for name, plan in plans.items():
        note(f"{name}: {files[name].size / 1e6:.0f} MB of {plan.size / 1e6:.0f} MB remain")
    try:
        source = os.path.relpath(bundle.resolve(), design.options.output.resolve())
    except ValueError as error:  # on Windows
        raise OptionError("--strip-weights needs BUNDLE and ENGINE on the same drive") from error
    return SharedWeights(source=Path(source).as_posix(), file=design.source.files[WEIGHTS_NAME], plans=plans)


def _built_with(options: EngineOptions) -> dict[str, str]:
    settings = {
        "opt_level": options.opt_level,
        "workspace": None if options.workspace is None else f"{options.workspace} MB",
    }
    return gpu_here() | {name: str(value) for name, value in settings.items() if value is not None}
