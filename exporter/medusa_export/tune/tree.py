"""What `medusa-export tree show` draws: a tree, and how often each of its nodes is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.tree import Tree

from medusa_export.placement import place
from medusa_export.tune.run import read_evaluation
from medusa_export.tune.search import path_products
from medusa_runtime.bundle.cpu import device_key
from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.drafting.tuning import DeviceTuning, tuned


@dataclass(frozen=True)
class Device:
    """Where a tree was tuned for, as commands name it."""

    backend: str = "auto"
    device: str = "auto"
    threads: int = 0

    def key(self, manifest: Manifest) -> str:
        """Its name in a bundle's `tuning.json`."""
        placement = place(manifest, self.backend, self.device, threads=self.threads)
        return device_key(placement.backend, num_threads=self.threads, processor=placement.processor)


@dataclass(frozen=True)
class ShownTree:
    """A tree with what is known of it.

    Args:
        tree: the tree.
        source: where it is from, in words.
        acceptance: for each node how often it is accepted, or none. [N]
    """

    tree: CandidateTree
    source: str
    acceptance: Sequence[float] | None = None

    def drawn(self) -> Tree:
        """The tree for a terminal: each node with its rank path."""
        drawn = Tree(f"root: {self.tree.num_nodes} nodes, {self.tree.depth} deep", highlight=False)
        branches, paths = {0: drawn}, {0: ""}
        for node in range(1, self.tree.num_nodes):
            parent, rank = self.tree.parents[node], self.tree.ranks[node]
            paths[node] = f"{paths[parent]}.{rank}".lstrip(".")
            branches[node] = branches[parent].add(f"{paths[node]}  {self.chance(node)}")
        return drawn

    def chance(self, node: int) -> str:
        """How often a node is accepted, in words."""
        return f"{self.acceptance[node]:.3f}" if self.acceptance is not None else "unknown"

    @property
    def expected(self) -> float | None:
        """Tokens a step, if steps began anywhere."""
        return float(np.sum(self.acceptance)) if self.acceptance is not None else None


def find_tree(path: Path, device: Device, batch_size: int, evaluation: Path | None) -> ShownTree:
    """A tree from a file, or a bundle's for a device and a batch size: the tuned one, or else the manifest's.

    Args:
        path: a bundle's directory, or a tree as JSON.
        device: where the bundle runs.
        batch_size: sequences decoded at a time.
        evaluation: of the heads; without it the tuning tells what is accepted.

    Raises:
        BundleError, TreeError, CheckpointError: a file is missing or damaged.
        OptionError, BackendError: the bundle does not run there.
    """
    accuracy = read_evaluation(evaluation).accuracy if evaluation is not None else None
    if not path.is_dir():
        tree = CandidateTree.from_file(path)
        return ShownTree(tree, str(path), _products(accuracy, tree))
    manifest = Manifest.load(path)
    found = tuned(path, manifest, device.key(manifest))
    if found is not None:
        return _tuned(found, batch_size, accuracy)
    tree = CandidateTree.from_json(manifest.tree)
    return ShownTree(tree, "the bundle's own tree; it is not tuned for this device", _products(accuracy, tree))


def _tuned(found: DeviceTuning, batch_size: int, accuracy: list[list[float]] | None) -> ShownTree:
    batch = found.batch(batch_size)
    tree = CandidateTree.from_json(batch.static.tree)
    source = f"the best fixed tree for batch {batch.batch_size} on this device"
    if batch.best == "dynamic":
        source += f"; better, and used, is one of {batch.dynamic.nodes} nodes at most, made anew at each step"
    return ShownTree(tree, source, _products(accuracy, tree) or batch.static.acceptance)


def _products(accuracy: list[list[float]] | None, tree: CandidateTree) -> list[float] | None:
    return path_products(np.array(accuracy), tree) if accuracy is not None else None
