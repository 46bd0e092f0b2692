"""`medusa-export trt`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medusa_export.cli.commands import Group, format_groups
from medusa_export.cli.fields import options_from, parse
from medusa_export.cli.json_options import print_bundle
from medusa_export.command_options.engine_options import EngineOptions

if TYPE_CHECKING:
    from rich.table import Table

    from medusa_export.engine.design import Design
    from medusa_export.engine.inspection import Inspection

DEFAULT = "build"


class _DefaultGroup(Group):
    """A click group that runs `build` if the first argument is not a subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = args[:1] and (args[0] in {*self.commands, *ctx.help_option_names} or self._is_misspelt(args[0]))
        return super().parse_args(ctx, args if named else [DEFAULT, *args])

    def _is_misspelt(self, word: str) -> bool:
        return not Path(word).exists() and bool(difflib.get_close_matches(word, self.commands, n=1, cutoff=0.75))

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help(ctx, formatter)
        with formatter.section(f"{DEFAULT}, the default command, has these options"):
            format_groups(ctx, self.commands[DEFAULT], formatter, f"{ctx.info_name} {DEFAULT}")


@click.group("trt", cls=_DefaultGroup)
def command() -> None:
    """Build TensorRT engines from the ONNX bundle BUNDLE, or inspect built ones.

    medusa-export trt BUNDLE -o ENGINE [OPTIONS]: TensorRT-RTX (rtx) builds for the GPUs that you name and needs no GPU.
    Full TensorRT (tensorrt) builds for the GPU of this machine. The precision is that of the bundle.
    """


@command.command(DEFAULT)
@click.argument("bundle", type=click.Path(path_type=Path))
@options_from(EngineOptions, leave_out={"bundle"})
@click.option("--dry-run", is_flag=True, help="Build nothing; print what would be built and the memory it would need.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the facts of the engines, built or only planned, as one JSON object."
)
def build(*, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Build TensorRT engines from the ONNX bundle BUNDLE."""
    asked = parse(EngineOptions, values)
    from medusa_export.engine.build import build_engines
    from medusa_export.engine.design import design_engines
    from medusa_export.progress import note
    from medusa_runtime.bundle.files import json_text

    if dry_run:
        design = design_engines(asked)
        if as_json:
            click.echo(json_text(_planned(design), indent=1))
        else:
            _tell_design(design)
        return
    manifest = build_engines(asked)
    for name, facts in manifest.files.items():
        if name.endswith(".plan"):
            note(f"{name}: {facts.size / 1e6:.0f} MB")
    print_bundle(asked.output, as_json=as_json)


@command.command("inspect")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect(engine: Path, *, as_json: bool) -> None:
    """Print the GPUs, shapes and shared weights of the engine bundle ENGINE; on a GPU, its layers too."""
    from medusa_export.engine.inspection import inspect_engines

    found = inspect_engines(engine)
    if as_json:
        click.echo(found.model_dump_json(indent=2, exclude={"engine": {"shared_weights": {"plans"}}}))
    else:
        _tell_inspection(found)


def _planned(design: Design) -> dict[str, Any]:
    """The facts of engines that are not built."""
    return {
        "model": design.source.model.name,
        "tensorrt": design.tensorrt.name,
        "tensorrt_version": design.tensorrt.version,
        "compute_capabilities": list(design.capabilities),
        "limits": design.limits.model_dump(exclude_none=True),
        "profiles": {name: profile for group in design.profiles.values() for name, profile in group.items()},
        "plan_sizes": design.plan_sizes(),
        "device_memory": design.device_memory(),
    }


def _tell_design(design: Design) -> None:
    from medusa_export.console import stdout_console
    from medusa_runtime.bundle.cache_layout import CacheLayout
    from medusa_runtime.bundle.manifest import STEP

    facts, limits = design.source.model, design.limits
    console = stdout_console()
    console.print(f"{design.tensorrt.name} {design.tensorrt.version} for {', '.join(design.capabilities)}, {facts.name}")
    profiles = {name: profile for group in design.profiles.values() for name, profile in group.items()}
    console.print(_profile_table(profiles))
    console.print(_size_table("plans on disk (approximate)", design.plan_sizes()))
    console.print(_size_table("GPU memory (approximate upper bound)", _in_words(design.device_memory())))
    console.print(
        f"KV cache = {limits.max_batch_size} sequences · ({CacheLayout.of(design.graphs[STEP]).describe()}), "
        f"S = {limits.capacity} entries",
        soft_wrap=True,
    )


def _tell_inspection(found: Inspection) -> None:
    from rich.table import Table

    from medusa_export.console import stdout_console

    engine = found.engine
    console = stdout_console()
    for what, value in (
        ("built with", f"{engine.flavor} {engine.tensorrt_version}"),
        ("for GPUs of", f"{', '.join(engine.compute_capabilities)} (hardware compatibility: {engine.hardware_compatibility})"),
        ("runs with", "newer versions of the same major too" if engine.version_compatible else "this version only"),
        ("model", f"{found.model}, {found.precision}, weights {engine.weights}"),
        ("weights from", engine.shared_weights.source if engine.shared_weights else "the plans"),
        *((f"built: {name}", value) for name, value in engine.built_with.items()),
        *((f"header of {name}", value) for name, value in found.headers.items()),
        ("loads here", found.loads_here),
    ):
        console.print(f"{what}: {value}", markup=False, soft_wrap=True)
    tensors = Table(
        "graph", "tensor", "type", "shape", "shares memory with", title="inputs and outputs (of the KV cache: layer 0's keys)"
    )
    for name, graph in found.graphs.items():
        for tensor in (*graph.inputs, *graph.outputs):
            if not _is_further_cache(tensor.name):
                tensors.add_row(name, tensor.name, tensor.dtype, _shape(tensor.shape), engine.aliases.get(tensor.name, ""))
    console.print(tensors)
    console.print(_profile_table(engine.profiles))
    console.print(_size_table("files", found.file_sizes))
    console.print(_size_table("GPU memory (approximate upper bound)", _in_words(engine.device_memory)))
    for name, built in found.engines.items():
        console.print(f"{name}: {len(built.layers)} layers, {built.device_memory / 1e6:.1f} MB of activations")


def _is_further_cache(tensor: str) -> bool:
    """Whether the tensor is part of the KV cache but not one of layer 0, which stand for all of them."""
    return tensor.startswith(("past.", "present.")) and tensor.split(".")[1] != "0"


def _profile_table(profiles: dict[str, dict[str, dict[str, list[int]]]]) -> Table:
    from rich.table import Table

    table = Table("profile", "input", "min", "opt", "max", title="profiles")
    for name, inputs in profiles.items():
        for tensor, bounds in inputs.items():
            if not _is_further_cache(tensor):
                table.add_row(name, tensor, *(_shape(bounds[bound]) for bound in ("min", "opt", "max")))
    return table


def _size_table(title: str, sizes: dict[str, int]) -> Table:
    from rich.table import Table

    table = Table("", "MB", title=title)
    for name, size in {**sizes, "all": sum(sizes.values())}.items():
        table.add_row(name, f"{size / 1e6:.1f}")
    return table


def _in_words(sizes: dict[str, int]) -> dict[str, int]:
    return {name.replace("_", " "): size for name, size in sizes.items()}


def _shape(shape: list[int] | list[int | str]) -> str:
    return " x ".join(map(str, shape))
