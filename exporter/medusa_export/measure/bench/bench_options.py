"""Options of `medusa-export bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medusa_runtime.bundle.cpu import Spin

MODES = {
    "plain": "no drafts",
    "static": "Medusa with the bundle's default tree",
    "dynamic": "Medusa with a tree of that size, rebuilt at each step",
    "tuned": "the default of MedusaLM.from_bundle, with prompt lookup if tune found that it pays",
    "heads": "like tuned, without prompt lookup",
    "lookup": "like tuned, with prompt lookup",
}
USUAL_MODES = ("plain", "static", "dynamic", "tuned")
STEP_WIDTHS, PREFILL_LENGTHS, CONTEXT_LENGTHS = (1, 2, 4, 8, 16, 32, 64), (128, 512, 2048), (256, 1024)


@dataclass(frozen=True)
class Sources:
    """Files for other engines, with the weights that the bundles were made from."""

    checkpoint: Path | None = None  # a directory of a Hugging Face model
    gguf: Path | None = None
    heads: Path | None = None
    openvino: Path | None = None  # the directory of a converted model


@dataclass(frozen=True)
class BenchOptions:
    """Options of `medusa-export bench`; the command's help describes each."""

    bundles: tuple[Path, ...]
    modes: tuple[str, ...] = USUAL_MODES
    prompts: Path | None = None
    limit: int | None = None
    max_new_tokens: int = 128
    rounds: int = 1
    backend: str = "auto"
    device: str = "auto"
    cuda_graphs: bool | None = None
    allow_engine_code: bool = False
    threads: int = 0
    spin: Spin = "auto"
    steps: tuple[int, ...] = STEP_WIDTHS
    prefill: tuple[int, ...] = PREFILL_LENGTHS
    context: tuple[int, ...] = CONTEXT_LENGTHS
    peers: tuple[str, ...] = ()
    peers_python: Path | None = None
    peer_models: Path | None = None
    sources: Sources = field(default_factory=Sources)
