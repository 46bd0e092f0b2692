"""What was measured of a bundle on a device: `tuning.json`, written by `medusa-export tune`, read when the bundle is opened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from medusa_runtime.bundle.files import write_whole
from medusa_runtime.bundle.manifest import TUNING_NAME, Manifest, Provenance, first_problem
from medusa_runtime.drafting.costs import StepCosts
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import BundleError, MedusaError, first_line

Kind = Literal["plain", "static", "dynamic"]
log = logging.getLogger(__name__)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TunedTree(_Model):
    """A way to decode, and what it is expected to give."""

    nodes: int = Field(ge=1, description="of a dynamic tree the most; 1 is plain decoding")
    tokens_per_step: float = Field(ge=0, description="bonus token included")
    nodes_per_step: float = Field(ge=0, description="verified for each sequence")
    step_seconds: float = Field(gt=0, description="heads and the host's work included")
    tokens_per_second: float = Field(gt=0, description="of all sequences together")
    tree: dict[str, list[int]] | None = Field(None, description="parents and ranks, where it is static")
    acceptance: list[float] | None = Field(None, description="for each node of a static tree, how often it is accepted. [N]")


class Check(_Model):
    """A prediction and what decoding with the bundle then gave, on the same prompts."""

    prompts: int
    steps: int
    predicted_tokens_per_second: float
    measured_tokens_per_second: float
    plain_predicted_tokens_per_second: float
    plain_measured_tokens_per_second: float

    @property
    def error(self) -> float:
        """How far the measurement is from the prediction, as a part of it."""
        return self.measured_tokens_per_second / self.predicted_tokens_per_second - 1


class TunedBatch(_Model):
    """What is best where so many sequences decode at a time."""

    batch_size: int = Field(ge=1)
    best: Kind
    plain: TunedTree
    static: TunedTree
    dynamic: TunedTree
    check: Check | None = None
    as_predicted: bool | None = Field(None, description="whether the check came within tolerance; none: not checked")

    @model_validator(mode="after")
    def _whole(self) -> TunedBatch:
        if self.static.tree is None or CandidateTree.from_json(self.static.tree).num_nodes != self.static.nodes:
            raise ValueError("the static tree is missing or of another size")
        DynamicTree(self.dynamic.nodes)
        return self


class LookupCheck(_Model):
    """What decoding gave with prompt lookup and without, on the same prompts in turn."""

    prompts: int = Field(description="decoded each way; where there are few, the same ones again")
    tokens_per_second: float = Field(description="with it")
    tokens_per_second_without: float
    ratio: float = Field(description="of the two: the median over prompts, or over groups of as many as decode at a time")


class DeviceTuning(_Model):
    """What was measured on one device."""

    backend: str
    processor: str
    threads: int = Field(description="of a CPU backend; 0 on a GPU")
    cores: int
    provenance: Provenance
    costs: StepCosts
    acceptance_from: str = Field(description="where the acceptance is from")
    accuracy: list[list[float]] = Field(description="[K][M]: how often the token of rank r of head k is the right one")
    capacity: int = Field(gt=0, description="entries in use in the fullest slot, for which the trees were chosen")
    batches: list[TunedBatch] = Field(min_length=1, description="by batch size, ascending")
    prompt_lookup: bool = Field(False, description="whether drafts copied from the prompt pay")
    lookup_check: LookupCheck | None = Field(None, description="from which that is known; none: not tried")

    @field_validator("costs")
    @classmethod
    def _sound(cls, costs: StepCosts, _: ValidationInfo) -> StepCosts:
        costs.check()
        return costs

    def batch(self, batch_size: int) -> TunedBatch:
        """What was tuned for that batch size, or else for the next smaller one, or the smallest."""
        fitting = [batch for batch in self.batches if batch.batch_size <= batch_size]
        return fitting[-1] if fitting else self.batches[0]

    def choice(self, max_batch_size: int, lookup_nodes: int = 0) -> tuple[CandidateTree | DynamicTree, StepCosts | None]:
        """The tree and the costs for an engine that decodes up to so many sequences at a time.

        The batch changes from step to step, and with the costs a dynamic tree changes with it: so it is the largest that is
        best at any of these batch sizes. A static tree is right for one batch size alone: it is taken, and verified whole,
        where no other batch is possible and it was better.

        A static tree has no room for what prompt lookup finds, and a tree as large as the heads are good for has little: with
        lookup it is a dynamic one, and may grow larger. Where heads do not pay at all, they are not asked then either, and the
        engine makes the room.

        Args:
            max_batch_size: of the engine.
            lookup_nodes: what a tree should have room for where the engine looks prompts up, 0 where it does not.
        """
        if max_batch_size == 1 and self.batch(1).best == "static" and not lookup_nodes:
            return CandidateTree.from_json(self.batch(1).static.tree), None
        fitting = [batch for batch in self.batches if batch.batch_size <= max_batch_size] or self.batches[:1]
        nodes = max(batch.dynamic.nodes for batch in fitting)
        return DynamicTree(max(nodes, lookup_nodes) if nodes > 1 else 1), self.costs


class Tuning(_Model):
    """`tuning.json`. See docs/bundle-format.md."""

    schema_version: Literal[1] = 1
    bundle: str = Field(description="content digest of the bundle that was measured")
    devices: dict[str, DeviceTuning] = Field(description="by `device_key`")

    @classmethod
    def load(cls, bundle: str | Path) -> Tuning | None:
        """A bundle's tuning; none where there is none.

        Raises:
            BundleError: it is damaged, or of another version.
        """
        path = Path(bundle) / TUNING_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise BundleError(f"{path} is damaged or of another version ({first_problem(error)})") from error
        except (OSError, MedusaError, ArithmeticError, TypeError) as error:
            raise BundleError(f"{path} cannot be read ({first_line(error)})") from error

    def save(self, bundle: str | Path) -> None:
        """Write it into a bundle, at once or not at all."""
        write_whole(Path(bundle) / TUNING_NAME, self.model_dump_json(indent=1, exclude_none=True) + "\n")


def tuned(bundle: str | Path, manifest: Manifest, device: str) -> DeviceTuning | None:
    """What was tuned for a bundle on a device. Where there is a tuning that does not fit, one warning says why.

    Args:
        bundle: the bundle's directory.
        manifest: the bundle's.
        device: from `device_key`.
    """
    try:
        tuning = Tuning.load(bundle)
        if tuning is None:
            return None
        if tuning.bundle != (digest := manifest.content_digest()):
            raise BundleError(
                f"{Path(bundle) / TUNING_NAME} is of other files ({tuning.bundle[:12]}…, these are {digest[:12]}…)"
            )
        if device not in tuning.devices:
            others = "; ".join(tuning.devices) or "nothing"
            raise BundleError(f"{Path(bundle) / TUNING_NAME} is for {others}; this is {device}")
        found = tuning.devices[device]
        for batch in found.batches:
            CandidateTree.from_json(batch.static.tree).check_fits(manifest.heads.num_heads, manifest.heads.top_k)
    except MedusaError as error:
        log.warning("%s: costs are learned instead; measure them with: medusa-export tune %s", error, bundle)
        return None
    return found
