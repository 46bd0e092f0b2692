"""The candidate tree that a bundle starts with."""

from __future__ import annotations

from pathlib import Path

from medusa_export.bundle.tree_shapes import prior_tree
from medusa_export.progress import note
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import native
from medusa_heads.replay import Evaluation
from medusa_runtime.drafting.tree import CandidateTree

MIN_TOKENS = 2000  # an evaluation on fewer tokens finds a tree that fits them by chance


def tree_for(heads_path: Path, digest_: str, num_heads: int, top_k: int, num_nodes: int) -> CandidateTree:
    """The tree a bundle starts with: the best of that size in the heads' evaluation, or else `prior_tree`.

    An evaluation on fewer than `MIN_TOKENS` tokens is not used.

    Args:
        heads_path: the heads' directory.
        digest_: the heads' digest; an evaluation of other heads is not used.
        num_heads: number of heads.
        top_k: candidates that each head will return.
        num_nodes: nodes of the tree, including the root.

    Raises:
        CheckpointError: the evaluation in the heads' directory is damaged.
    """
    place = heads_path / native.EVALUATION_NAME
    if heads_path.is_dir() and place.is_file():
        try:
            evaluation = Evaluation.model_validate_json(place.read_text(encoding="utf-8"))
            most = [max(result.tree["ranks"], default=0) for result in evaluation.trees]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{place} is damaged; make it again with: medusa-export heads evaluate") from error
        fitting = [
            result for result, rank in zip(evaluation.trees, most, strict=True) if result.nodes == num_nodes and rank < top_k
        ]
        if evaluation.tokens < MIN_TOKENS:
            note(
                f"{place} was made on {evaluation.tokens} tokens, too few to choose a tree by ({MIN_TOKENS} are needed), so a "
                "default tree is used; distil more answers, or run: medusa-export heads evaluate"
            )
        elif evaluation.heads != digest_:
            note(f"{place} is of other heads, so it is not used; make it again with: medusa-export heads evaluate")
        elif fitting:
            return CandidateTree.from_json(max(fitting, key=lambda result: result.tokens_per_step).tree)
        else:
            note(f"{place} has no tree of {num_nodes} nodes that needs only {top_k} candidates per head; using a default tree")
    return prior_tree(num_heads, top_k, num_nodes)
