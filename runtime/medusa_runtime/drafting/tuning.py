"""The measurements of a bundle on devices: `tuning.json`. `medusa-export tune` writes it, and opening the bundle reads it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from medusa_runtime.bundle.files import read_json, write_whole
from medusa_runtime.bundle.manifest import TUNING_NAME, Manifest, Provenance, first_problem
from medusa_runtime.bundle.versions import FileVersions
from medusa_runtime.drafting.costs import StepCosts
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import BundleError, MedusaError, first_line

Kind = Literal["plain", "static", "dynamic"]
# 2 has `measurement`, and 3 has `draft_seconds` among the costs; both are optional
VERSIONS = FileVersions("schema_version", newest=3, steps={1: lambda data: data, 2: lambda data: data})
log = logging.getLogger(__name__)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TunedTree(_Model):
    """One way to decode, and the speed that is expected of it."""

    nodes: int = Field(ge=1, description="for a dynamic tree, the most it may have; 1 is plain decoding")
    tokens_per_step: float = Field(ge=0, description="bonus token included")
    nodes_per_step: float = Field(ge=0, description="nodes verified for each sequence")
    step_seconds: float = Field(gt=0, description="with the heads and the host's work")
    tokens_per_second: float = Field(gt=0, description="of all sequences together")
    tree: dict[str, list[int]] | None = Field(None, description="parents and ranks of a static tree")
    acceptance: list[float] | None = Field(None, description="how often each node of a static tree is accepted. [N]")


class Check(_Model):
    """A prediction, and the speed that was then measured by decoding the same prompts."""

    prompts: int
    steps: int
    rounds: int = Field(1, ge=1, description="how often the prompts were decoded: more than once if that was too slow")
    predicted_tokens_per_second: float
    measured_tokens_per_second: float
    plain_predicted_tokens_per_second: float
    plain_measured_tokens_per_second: float
    same_prompts: bool = Field(True, description="whether the prediction is for these prompts, and not for an evaluation's")

    @property
    def error(self) -> float:
        """How far the measurement is from the prediction, as a fraction of the prediction.

        If the prediction is for other prompts, other drafts are accepted, which says nothing about the costs. Then it is the
        error of plain decoding.
        """
        if not self.same_prompts:
            return self.plain_measured_tokens_per_second / self.plain_predicted_tokens_per_second - 1
        return self.measured_tokens_per_second / self.predicted_tokens_per_second - 1


class TunedBatch(_Model):
    """The best ways to decode with one batch size."""

    batch_size: int = Field(ge=1)
    best: Kind
    plain: TunedTree
    static: TunedTree
    dynamic: TunedTree
    check: Check | None = None
    as_predicted: bool | None = Field(None, description="whether the check was within tolerance; omitted: not checked")

    @model_validator(mode="after")
    def _whole(self) -> TunedBatch:
        if self.static.tree is None or CandidateTree.from_json(self.static.tree).num_nodes != self.static.nodes:
            raise ValueError("the static tree is missing or of another size")
        DynamicTree(self.dynamic.nodes)
        return self


class LookupCheck(_Model):
    """The speed of decoding with prompt lookup and without it, on the same prompts in turn."""

    prompts: int = Field(description="prompts decoded each way; a few prompts are decoded several times")
    tokens_per_second: float = Field(description="with prompt lookup")
    tokens_per_second_without: float
    ratio: float = Field(description="of the two speeds; in tunings by version 0.2.0, the median over prompts")


class Measurement(_Model):
    """How well the costs of steps could be measured. Other programs on the machine make steps slower, some more than others."""

    rounds: int = Field(ge=1, description="how often each step was timed")
    noise: float = Field(ge=0, description="how much longer the median step took than the costs say, as a fraction")
    other_cores: float | None = Field(None, ge=0, description="cores that other programs used meanwhile; omitted: unknown")
    is_quiet: bool = Field(description="whether noise and other programs were below the limits that tuning had")


class DeviceTuning(_Model):
    """The measurements on one device."""

    backend: str
    processor: str
    threads: int = Field(description="of a CPU backend; 0 for a GPU")
    cores: int
    provenance: Provenance
    measurement: Measurement | None = Field(None, description="of the costs; omitted: by a version that did not record it")
    costs: StepCosts
    acceptance_from: str = Field(description="the source of the acceptance rates")
    accuracy: list[list[float]] = Field(description="[K][M]: how often the token of rank r of head k is right")
    capacity: int = Field(gt=0, description="the entries in use in the fullest slot that the trees were chosen for")
    batches: list[TunedBatch] = Field(min_length=1, description="by batch size, ascending")
    prompt_lookup: bool = Field(False, description="whether drafts copied from the prompt make decoding faster")
    lookup_check: LookupCheck | None = Field(None, description="the measurement that says so; omitted: not measured")

    @field_validator("costs")
    @classmethod
    def _sound(cls, costs: StepCosts, _: ValidationInfo) -> StepCosts:
        costs.check()
        return costs

    def batch(self, batch_size: int) -> TunedBatch:
        """The tuning for that batch size; or else for the next smaller one, or for the smallest."""
        fitting = [batch for batch in self.batches if batch.batch_size <= batch_size]
        return fitting[-1] if fitting else self.batches[0]

    def choice(self, max_batch_size: int, lookup_nodes: int = 0) -> tuple[CandidateTree | DynamicTree, StepCosts | None]:
        """The tree and the costs for an engine that decodes up to `max_batch_size` sequences at a time.

        A dynamic tree, with the costs, adapts to the batch of each step. So it may have as many nodes as are best at any of
        the batch sizes. A static tree is best at one batch size only: it is used, and always verified whole, if the engine
        decodes one sequence at a time and the static tree was faster.

        With prompt lookup, use a dynamic tree of at least `lookup_nodes`: drafts that are looked up need nodes of their own.
        If the heads never pay, the tree has one node; the engine then makes room for lookup alone.

        Args:
            max_batch_size: the engine's.
            lookup_nodes: nodes that the tree needs for prompt lookup; 0 without lookup.
        """
        if max_batch_size == 1 and self.batch(1).best == "static" and not lookup_nodes:
            return CandidateTree.from_json(self.batch(1).static.tree), None
        fitting = [batch for batch in self.batches if batch.batch_size <= max_batch_size] or self.batches[:1]
        nodes = max(batch.dynamic.nodes for batch in fitting)
        return DynamicTree(max(nodes, lookup_nodes) if nodes > 1 else 1), self.costs


class Tuning(_Model):
    """`tuning.json`. See docs/bundle-format.md."""

    schema_version: int = VERSIONS.newest
    bundle: str = Field(description="content digest of the bundle that was measured")
    devices: dict[str, DeviceTuning] = Field(description="by `device_key`")

    @classmethod
    def load(cls, bundle: str | Path) -> Tuning | None:
        """A bundle's tuning, in the newest form; None if the bundle was not tuned.

        Raises:
            BundleError: it is damaged, or newer than this package.
        """
        path = Path(bundle) / TUNING_NAME
        if not path.exists():
            return None
        try:
            data = read_json(path)
            if problem := VERSIONS.problem(data, "measure again"):
                raise BundleError(problem)
            return cls.model_validate(VERSIONS.migrated(data) if isinstance(data, dict) else data)
        except ValidationError as error:
            raise BundleError(f"{path} is damaged ({first_problem(error)})") from error
        except ValueError as error:
            raise BundleError(f"{path} is damaged ({first_line(error)})") from error
        except (OSError, RecursionError, MedusaError, ArithmeticError, TypeError) as error:
            raise BundleError(f"{path} cannot be read ({first_line(error)})") from error

    def save(self, bundle: str | Path) -> None:
        """Write the tuning into a bundle, at once or not at all."""
        write_whole(Path(bundle) / TUNING_NAME, self.model_dump_json(indent=1, exclude_none=True) + "\n")


def tuned(bundle: str | Path, manifest: Manifest, device: str) -> DeviceTuning | None:
    """The tuning of a bundle for a device. If the bundle has a tuning that does not fit, one warning says why.

    Args:
        bundle: the bundle's directory.
        manifest: the bundle's.
        device: the device's name, from `device_key`.
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
