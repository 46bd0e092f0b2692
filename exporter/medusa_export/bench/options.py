"""What `medusa-export bench` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MODES = {
    "plain": "no drafts",
    "static": "Medusa with the bundle's own tree",
    "dynamic": "Medusa with a tree of that size made anew at each step",
    "tuned": "what MedusaLM.from_bundle does unless it is told otherwise",
    "lookup": "the same, with prompt lookup beside the heads",
}
USUAL_MODES = ("plain", "static", "dynamic", "tuned")
STEP_WIDTHS, PREFILL_LENGTHS, CONTEXT_LENGTHS = (1, 2, 4, 8, 16, 32, 64), (128, 512, 2048), (256, 1024)


@dataclass(frozen=True)
class Sources:
    """What other engines read: the weights that the bundles were made of."""

    checkpoint: Path | None = None  # a Hugging Face directory
    gguf: Path | None = None
    heads: Path | None = None
    openvino: Path | None = None  # a converted model's directory


@dataclass(frozen=True)
class BenchOptions:
    """The command's help tells what each means."""

    bundles: tuple[Path, ...]
    modes: tuple[str, ...] = USUAL_MODES
    prompts: Path | None = None
    limit: int | None = None
    max_new_tokens: int = 128
    rounds: int = 1
    backend: str = "auto"
    device: str = "auto"
    cuda_graphs: bool | None = None
    threads: int = 0
    steps: tuple[int, ...] = STEP_WIDTHS
    prefill: tuple[int, ...] = PREFILL_LENGTHS
    context: tuple[int, ...] = CONTEXT_LENGTHS
    peers: tuple[str, ...] = ()
    peers_python: Path | None = None
    peer_models: Path | None = None
    sources: Sources = field(default_factory=Sources)
