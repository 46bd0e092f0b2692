"""Other engines that can be measured: their names, their requirements, and the commands that start them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_export.measure.bench.bench_options import Sources
from medusa_export.measure.bench.process import REQUEST_LOOP
from medusa_export.model.download import cache_directory
from medusa_export.progress import stage
from medusa_heads.directories import new_directory
from medusa_runtime.errors import MedusaError, OptionError

ALL = "all"
TORCH = ("torch", "transformers", "accelerate")
OPENVINO = ("openvino-genai", "openvino-tokenizers")
FLAGS = {"checkpoint": "--checkpoint", "gguf": "--gguf", "heads": "--heads", "openvino": "--openvino"}  # by source
VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Peer:
    """One engine at one precision.

    Args:
        family: the engine, which is the first part of the name.
        variant: the second part of the name.
        packages: packages for `pip install`.
        module: its module in `workers/`.
        sources: fields of `Sources` that it reads.
        settings: more settings for the module.
        builder: the module whose `build` makes the model from the first source, if one is needed.
        build_packages: packages that the builder needs.
        drafts: whether it verifies several tokens per step.
    """

    family: str
    variant: str
    packages: tuple[str, ...]
    module: str
    sources: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    builder: str | None = None
    build_packages: tuple[str, ...] = ()
    drafts: bool = False

    @property
    def name(self) -> str:
        """The peer's name in options and results."""
        return f"{self.family}-{self.variant}"


PEERS = (
    Peer("transformers", "fp32", TORCH, "with_transformers", ("checkpoint",), {"dtype": "float32"}),
    Peer("transformers", "bf16", TORCH, "with_transformers", ("checkpoint",), {"dtype": "bfloat16"}),
    Peer(
        "transformers", "lookup", TORCH, "with_transformers", ("checkpoint",), {"dtype": "float32", "lookup": 10},
        drafts=True,
    ),
    Peer(
        "torch-medusa", "fp32", (*TORCH, "safetensors"), "with_torch_medusa", ("checkpoint", "heads"), {"dtype": "float32"},
        drafts=True,
    ),
    *(
        Peer(
            "onnxruntime-genai", precision, ("onnxruntime-genai",), "with_genai", ("checkpoint",), {"precision": precision},
            builder="with_genai", build_packages=("onnx", "onnx-ir", "torch", "transformers"),
        )
        for precision in ("fp32", "int8", "int4")
    ),
    Peer("openvino-genai", "converted", OPENVINO, "with_openvino", ("openvino",)),
    Peer("openvino-genai", "gguf", OPENVINO, "with_openvino", ("gguf",)),
    Peer(
        "openvino-genai", "q8_0", OPENVINO, "with_openvino", ("gguf",), {"precision": "q8_0"},
        builder="with_llama_cpp", build_packages=("llama-cpp-python",),
    ),
    *(
        Peer(
            "llama.cpp", precision, ("llama-cpp-python",), "with_llama_cpp", ("gguf",), {"precision": precision},
            builder="with_llama_cpp",
        )
        for precision in ("f32", "q8_0", "q4_1")
    ),
)  # fmt: skip


@dataclass
class Chosen:
    """The peers that take part, and the reasons why others do not."""

    peers: list[Peer]
    absent: dict[str, str]  # name → reason
    versions: dict[str, str]  # package → version


def choose_peers(names: Sequence[str], sources: Sources, python: Path | None) -> Chosen:
    """Find the peers of these names or families (or `all`) that can be measured on this machine.

    Raises:
        OptionError: a name is unknown, or nothing of that name can be measured because a package or a source is missing.
    """
    if not names:
        return Chosen([], {}, {})
    known = [*dict.fromkeys(peer.family for peer in PEERS), *(peer.name for peer in PEERS)]
    if unknown := [name for name in names if name not in {ALL, *known}]:
        raise OptionError(f"there is no peer {unknown[0]!r}; use {ALL}, or some of: {', '.join(known)}")
    chosen = Chosen([], {}, _versions(python))
    for peer in PEERS:
        if not {ALL, peer.family, peer.name} & set(names):
            continue
        if problem := _problem(peer, sources, chosen.versions):
            chosen.absent[peer.name] = problem
        else:
            chosen.peers.append(peer)
    for name in names:
        if name != ALL and not any(name in {peer.family, peer.name} for peer in chosen.peers):
            raise OptionError(f"{name}: {next(why for absent, why in chosen.absent.items() if absent.startswith(name))}")
    return chosen


def _problem(peer: Peer, sources: Sources, versions: dict[str, str]) -> str | None:
    """The reason why a peer cannot take part, in one line; None if it can."""
    if missing := [name for name in peer.packages if name not in versions]:
        return f"{missing[0]} is not installed; install it with: pip install {' '.join(peer.packages)}"
    if missing := [name for name in peer.build_packages if name not in versions]:
        return f"{missing[0]}, which builds its model, is not installed; install it with: pip install {missing[0]}"
    if missing := [source for source in peer.sources if getattr(sources, source) is None]:
        return f"it needs {' and '.join(FLAGS[source] for source in missing)}"
    return None


def _versions(python: Path | None) -> dict[str, str]:
    """Versions of the peers' installed packages."""
    wanted = sorted({name for peer in PEERS for name in (*peer.packages, *peer.build_packages)})
    command = [str(python or sys.executable), "-c", VERSIONS, json.dumps(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
        versions: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise OptionError(f"--peers-python {python} cannot be run as Python; give the path of a Python interpreter") from error
    return versions


def peer_command(peer: Peer, sources: Sources, python: Path | None, models: Path | None, **settings: Any) -> list[str]:
    """The command that starts a peer. If it needs a model that is not built yet, that is built first.

    Raises:
        MedusaError: the model cannot be built.
    """
    settings = peer.settings | settings
    for source in peer.sources:
        settings[source] = str(getattr(sources, source).resolve())
    script = [str(python or sys.executable), str(REQUEST_LOOP)]
    if peer.builder:
        settings["model"] = str(_built(peer, [*script, peer.builder], settings, models or cache_directory() / "peers"))
    elif "checkpoint" not in settings:
        settings["model"] = settings[peer.sources[0]]
    return [*script, peer.module, json.dumps(settings)]


def _built(peer: Peer, command: list[str], settings: dict[str, Any], models: Path) -> Path:
    """The built model's directory, or the GGUF file in it."""
    assert peer.builder is not None
    source = Path(settings[peer.sources[0]])
    directory = models / f"{peer.builder.removeprefix('with_')}-{peer.settings['precision']}-{_identity(source)}"
    place = "model.gguf" if peer.sources[0] == "gguf" else ""
    if not directory.is_dir():
        with stage(f"build the model of {peer.name}"), new_directory(directory, lambda _: False) as target:
            wanted = json.dumps(settings | {"output": str(target / place)})
            done = subprocess.run(
                [*command, wanted, "--build"], capture_output=True, encoding="utf-8", errors="replace", check=False
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise MedusaError(f"{peer.name}: its model cannot be built: {last[:300]}")
    return directory / place


def _identity(source: Path) -> str:
    """A name that changes with the source's files."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr((str(source), facts)).encode()).hexdigest()[:12]
