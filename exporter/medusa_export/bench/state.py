"""A benchmark while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_export.bench.contest import Answer, Contestant
from medusa_export.bench.options import BenchOptions
from medusa_export.bench.peers import Chosen
from medusa_export.bench.prompts import BenchPrompt
from medusa_runtime.backends.choosing import Placement
from medusa_runtime.bundle.cpu import num_cores
from medusa_runtime.bundle.manifest import Manifest


@dataclass
class Bench:
    """What is measured, and what was found so far."""

    options: BenchOptions
    bundles: dict[str, tuple[Path, Manifest]]  # by the name it has in results
    prompts: list[BenchPrompt]
    chosen: Chosen
    placements: dict[str, Placement]  # by bundle
    contestants: list[Contestant] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)  # by bundle or peer
    sections: dict[str, Any] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)  # by bundle
    failed: dict[str, str] = field(default_factory=dict)  # peers that did not start

    @property
    def threads(self) -> int:
        """Threads that every contestant gets."""
        return self.options.threads or num_cores()

    @property
    def longest(self) -> int:
        """Tokens of a sequence that every bundle takes."""
        return min(manifest.limits.max_seq_len for _, manifest in self.bundles.values())

    @property
    def tree_nodes(self) -> int:
        """The largest of the bundles' trees."""
        return max(len(manifest.tree["parents"]) for _, manifest in self.bundles.values())

    @property
    def widest(self) -> int:
        """Tokens of a step that is evaluated whole, of which every bundle takes as many."""
        return min(manifest.limits.max_tree_nodes or self.longest for _, manifest in self.bundles.values())

    def fitting(self, lengths: Sequence[int], room: int) -> list[int]:
        """Those lengths that leave room in every bundle."""
        return [length for length in lengths if length + room <= self.longest]
