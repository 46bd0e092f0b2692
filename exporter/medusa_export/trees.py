"""Which tree a bundle starts with."""

from __future__ import annotations

from pathlib import Path

from medusa_export.progress import note
from medusa_heads.formats import native
from medusa_heads.replay import Evaluation
from medusa_runtime.errors import CheckpointError
from medusa_runtime.tree import CandidateTree, prior_tree


def tree_for(heads_path: Path, digest_: str, num_heads: int, top_k: int, num_nodes: int) -> CandidateTree:
    """The tree a bundle starts with: the best of that size by the heads' own evaluation, else one for heads not known.

    Args:
        heads_path: where the heads are.
        digest_: of the heads; an evaluation of others is not used.
        num_heads: of the heads.
        top_k: candidates a head will return.
        num_nodes: the size wanted.

    Raises:
        CheckpointError: the evaluation beside the heads is damaged.
    """
    place = heads_path / native.EVALUATION_NAME
    if heads_path.is_dir() and place.is_file():
        try:
            evaluation = Evaluation.model_validate_json(place.read_text())
        except ValueError as error:
            raise CheckpointError(f"{place} is damaged; make it again with: medusa-export heads evaluate") from error
        fitting = [result for result in evaluation.trees if result.nodes == num_nodes and max(result.tree["ranks"]) < top_k]
        if evaluation.heads != digest_:
            note(f"{place} is of other heads and not used; make it again with: medusa-export heads evaluate")
        elif fitting:
            return CandidateTree.from_json(max(fitting, key=lambda result: result.tokens_per_step).tree)
        else:
            note(
                f"{place} has no tree of {num_nodes} nodes within the best {top_k} of a head: a tree for unknown heads is used"
            )
    return prior_tree(num_heads, top_k, num_nodes)
