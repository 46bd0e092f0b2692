"""`medusa-export tree show`: a tree, and how often each of its nodes is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.tree import Tree

from medusa_export.measure.tune.run_tune import read_evaluation
from medusa_export.measure.tune.search import path_products
from medusa_export.placement import place
from medusa_runtime.bundle.cpu import Spin, device_key
from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.drafting.tuning import DeviceTuning, tuned


@dataclass(frozen=True)
class Device:
    """The device that a tree was tuned for, as given by a command's options."""

    backend: str = "auto"
    device: str = "auto"
    threads: int = 0
    spin: Spin = "auto"

    def key(self, manifest: Manifest) -> str:
        """The device's name in a bundle's `tuning.json`."""
        placement = place(manifest, self.backend, self.device, threads=self.threads, spin=self.spin)
        return device_key(placement.backend, num_threads=self.threads, spin=self.spin, processor=placement.processor)


@dataclass(frozen=True)
class ShownTree:
    """A tree, its source and its acceptance.

    Args:
        tree: the tree.
        source: where the tree comes from, in words.
        acceptance: how often each node is accepted, or None if unknown. [N]
    """

    tree: CandidateTree
    source: str
    acceptance: Sequence[float] | None = None

    def drawn(self) -> Tree:
        """The tree for a terminal: each node with its path of ranks."""
        drawn = Tree(f"root: {self.tree.num_nodes} nodes, {self.tree.depth} deep", highlight=False)
        branches, paths = {0: drawn}, {0: ""}
        for node in range(1, self.tree.num_nodes):
            parent, rank = self.tree.parents[node], self.tree.ranks[node]
            paths[node] = f"{paths[parent]}.{rank}".lstrip(".")
            branches[node] = branches[parent].add(f"{paths[node]}  {self.chance(node)}")
        return drawn

    def chance(self, node: int) -> str:
        """How often a node is accepted, as text."""
        return f"{self.acceptance[node]:.3f}" if self.acceptance is not None else "unknown"

    @property
    def expected(self) -> float | None:
        """Expected tokens per step, if steps start at random positions."""
        return float(np.sum(self.acceptance)) if self.acceptance is not None else None


def find_tree(path: Path, device: Device, batch_size: int, evaluation: Path | None) -> ShownTree:
    """The tree of a file, or a bundle's tree for a device and a batch size: the tuned one, or else the manifest's.

    Args:
        path: a bundle's directory, or a tree as JSON.
        device: the device that the bundle runs on.
        batch_size: sequences decoded at the same time.
        evaluation: an evaluation of the heads for the acceptance. By default the tuning has it.

    Raises:
        BundleError, TreeError, CheckpointError: a file is missing or damaged.
        OptionError, BackendError: the bundle does not run on the device.
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
    return ShownTree(tree, "the bundle's default tree; the bundle is not tuned for this device", _products(accuracy, tree))


def _tuned(found: DeviceTuning, batch_size: int, accuracy: list[list[float]] | None) -> ShownTree:
    batch = found.batch(batch_size)
    tree = CandidateTree.from_json(batch.static.tree)
    source = f"the best static tree for batch size {batch.batch_size} on this device"
    if batch.best == "dynamic":
        source += f"; decoding uses a faster dynamic tree instead, of at most {batch.dynamic.nodes} nodes, rebuilt at each step"
    return ShownTree(tree, source, _products(accuracy, tree) or batch.static.acceptance)


def _products(accuracy: list[list[float]] | None, tree: CandidateTree) -> list[float] | None:
    return path_products(np.array(accuracy), tree) if accuracy is not None else None
