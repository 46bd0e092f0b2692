"""Installs only what decoding needs, and prints the size: on a CPU, or on engines, without TensorRT and CUDA themselves.

    python scripts/lean_runtime.py TARGET                          for engines; then run with PYTHONPATH=TARGET
    python scripts/lean_runtime.py TARGET --backend cpu            with ONNX Runtime, for the CPU
    python scripts/lean_runtime.py TARGET --numpy WHEEL            with a NumPy built without BLAS (docs/edge-guide.md)
    python scripts/lean_runtime.py TARGET --wheels DIR             without network

It leaves out the command line, the server, the exporter and packages that only they use, tests, all of the CUDA bindings except
the driver's, and the parts of ONNX Runtime that make graphs. At the end everything is imported once, to check that nothing is
missing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
NUMPY = "numpy"
PACKAGES = (
    "pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection", "tokenizers", "jinja2",
    "markupsafe",
)  # fmt: skip
BACKENDS = {"trt": ("cuda-bindings", "cuda-pathfinder"), "cpu": ("onnxruntime",)}
OWN = "medusa_runtime"
OF_THE_COMMAND_LINE = ("medusa_export", "medusa_heads", "medusa_serve", "bin")
BINDINGS = (
    "__init__",
    "_version",
    "driver",
    "cydriver",
    "_internal",
    "utils",
)  # the files of cuda/bindings to keep, by the first part of their names
INTERNAL = ("__init__", "driver", "utils", "_fast_enum")
GRAPH_MAKERS = ("quantization", "transformers", "tools", "datasets")  # of onnxruntime
SOURCES = (".pxd", ".pyx", ".pyi", ".h")
MODULES = {"trt": "medusa_runtime.backends.gpu.trt, cuda.bindings.driver", "cpu": "medusa_runtime.backends.ort_cpu"}
PROGRAM = (  # the runtime imports its names when they are used, so use all of them
    "import medusa_runtime, medusa_runtime.text.template, {}\n"
    "for name in medusa_runtime.__all__: getattr(medusa_runtime, name)\n"
    "print(medusa_runtime.__file__)"
)


def install(target: Path, backend: str, numpy: str, wheels: Path | None) -> None:
    """Install packages without their dependencies: the lists above name all that are needed."""
    from_ = ["--no-index", "--find-links", str(wheels)] if wheels else []
    own = [str(ROOT)] if wheels is None else ["medusa-export"]
    words = ["--quiet", "--no-compile", "--no-deps", "--target", str(target), "-c", str(ROOT / "constraints.txt"), *from_]
    if numpy != NUMPY:  # the user's own wheel is not in the constraints
        subprocess.run([sys.executable, "-m", "pip", "install", *words[:5], numpy], check=True)
    names = [*own, *PACKAGES, *BACKENDS[backend], *([NUMPY] if numpy == NUMPY else [])]
    subprocess.run([sys.executable, "-m", "pip", "install", *words, *names], check=True)


def trim(target: Path) -> None:
    """Delete files that decoding never reads."""
    for name in OF_THE_COMMAND_LINE:
        shutil.rmtree(target / name, ignore_errors=True)
    for name in GRAPH_MAKERS:
        shutil.rmtree(target / "onnxruntime" / name, ignore_errors=True)
    for folder, kept in ((target / "cuda" / "bindings", BINDINGS), (target / "cuda" / "bindings" / "_internal", INTERNAL)):
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.name.partition(".")[0] not in kept or entry.suffix in SOURCES:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for tests in [path for path in (target / "numpy").rglob("tests") if path.is_dir()]:
        shutil.rmtree(tests)
    for file in [path for path in target.rglob("*") if path.suffix in SOURCES]:
        file.unlink()


def megabytes(path: Path) -> float:
    """Size of all files in a directory, in MB."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="trt", show_default=True, help="What decodes.")
@click.option("--numpy", default=NUMPY, help="A wheel to install instead of the one on PyPI.")
@click.option(
    "--wheels", type=click.Path(path_type=Path, exists=True), help="Directory of wheels to install from, without network."
)
def main(target: Path, backend: str, numpy: str, wheels: Path | None) -> None:
    """Install the runtime into TARGET, a new directory."""
    if target.exists():
        raise click.UsageError(f"{target} exists; give a new directory")
    install(target, backend, numpy, wheels)
    trim(target)
    program = PROGRAM.format(MODULES[backend])
    command = [sys.executable, "-S", "-B", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {program}"]
    found = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    if str(target.resolve()) not in str(Path(found.strip()).resolve()):
        raise click.ClickException(
            f"the runtime is imported from {found.strip()} instead of {target}; use a Python that does not see the former"
        )
    for entry in sorted(target.iterdir(), key=megabytes, reverse=True)[:8]:
        click.echo(f"{megabytes(entry):6.1f} MB  {entry.name}")
    click.echo(f"{megabytes(target):6.1f} MB  in all")


if __name__ == "__main__":
    main()
