"""The state of a running benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_export.measure.bench.bench_options import BenchOptions
from medusa_export.measure.bench.bench_prompts import BenchPrompt
from medusa_export.measure.bench.contest import Answer, Contestant
from medusa_export.measure.bench.peers import Chosen
from medusa_runtime.backends.choosing import Placement
from medusa_runtime.bundle.cpu import num_cores
from medusa_runtime.bundle.manifest import Manifest


@dataclass
class Bench:
    """What to measure, and the measurements so far."""

    options: BenchOptions
    bundles: dict[str, tuple[Path, Manifest]]  # by the bundle's name in results
    prompts: list[BenchPrompt]
    chosen: Chosen
    placements: dict[str, Placement]  # by bundle
    contestants: list[Contestant] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)  # by bundle or peer
    sections: dict[str, Any] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)  # by bundle
    failed: dict[str, str] = field(default_factory=dict)  # peers that did not start, with the reason

    @property
    def threads(self) -> int:
        """CPU threads of every contestant."""
        return self.options.threads or num_cores()

    @property
    def longest(self) -> int:
        """The longest sequence that every bundle supports, in tokens."""
        return min(manifest.limits.max_seq_len for _, manifest in self.bundles.values())

    @property
    def tree_nodes(self) -> int:
        """Nodes of the largest of the bundles' trees."""
        return max(len(manifest.tree["parents"]) for _, manifest in self.bundles.values())

    @property
    def widest(self) -> int:
        """The widest step with all rows evaluated that every bundle supports, in tokens."""
        return min(manifest.limits.max_tree_nodes or self.longest for _, manifest in self.bundles.values())

    def fitting(self, lengths: Sequence[int], room: int) -> list[int]:
        """The lengths that leave `room` more tokens in every bundle."""
        return [length for length in lengths if length + room <= self.longest]
