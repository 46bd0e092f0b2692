"""The facts of a bundle, from its manifest, its files and its tuning. Neither PyTorch nor a backend is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from medusa_runtime.bundle.manifest import (
    REPORT_NAME,
    TUNING_NAME,
    EngineFacts,
    GenerationFacts,
    HeadFacts,
    Limits,
    Manifest,
    ModelFacts,
    Precision,
    Provenance,
    QuantizationFacts,
    ValidationFacts,
)
from medusa_runtime.drafting.ngrams import NGRAMS_NAME
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.drafting.tuning import DeviceTuning, TunedBatch, Tuning
from medusa_runtime.errors import BundleError, TreeError

BESIDE = (REPORT_NAME, TUNING_NAME)  # files of a bundle that are not part of its digest


class FileReport(BaseModel):
    """One file of a bundle."""

    size: int = Field(description="in bytes, as the manifest says; of a file beside it, as it is")
    sha256: str | None = Field(None, description="as the manifest says")
    role: str = Field(description="the graphs that it holds, or its purpose")
    problem: str | None = Field(None, description="how the file differs from the manifest")


class TreeReport(BaseModel):
    """A candidate tree in numbers."""

    nodes: int
    depth: int
    parents: list[int]
    ranks: list[int]


class BatchReport(BaseModel):
    """What tuning found for one batch size."""

    batch_size: int
    best: Literal["plain", "static", "dynamic"]
    nodes: int = Field(description="of the best tree; 1: Medusa does not pay")
    tokens_per_step: float
    tokens_per_second: float = Field(description="as predicted, of all sequences together")
    speedup: float = Field(description="over plain decoding, as predicted")
    measured_speedup: float | None = Field(None, description="over plain decoding, as measured; omitted: not checked")


class DeviceReport(BaseModel):
    """What tuning found on one device."""

    batches: list[BatchReport]
    acceptance_from: str
    prompt_lookup: bool
    prompt_lookup_ratio: float | None = Field(None, description="speed with prompt lookup over that without")
    was_quiet: bool | None = Field(None, description="whether nothing else ran on the machine; omitted: unknown")
    created: str


class BundleReport(BaseModel):
    """Everything that `medusa-export inspect` tells of a bundle."""

    bundle: str
    kind: Literal["onnx", "tensorrt"]
    schema_version: int
    digest: str = Field(description="of all files; validation and tuning do not change it")
    precision: Precision
    opset: int
    size: int = Field(description="of all files in the manifest, in bytes")
    model: ModelFacts
    heads: HeadFacts
    limits: Limits
    tree: TreeReport
    has_tokenizer: bool
    has_ngrams: bool = Field(description="whether counts of n-grams correct the heads' guesses")
    generation: GenerationFacts | None
    quantization: QuantizationFacts | None
    validation: ValidationFacts
    tuning: dict[str, DeviceReport] = Field(description="by device")
    engine: EngineFacts | None
    files: dict[str, FileReport]
    provenance: Provenance
    problems: list[str] = Field(description="what is wrong with the bundle's files")


def report_of(bundle: Path, *, digests: bool = False) -> BundleReport:
    """Collect the facts of a bundle.

    Args:
        bundle: its directory.
        digests: read all files and compare their digests too, which takes a second a gigabyte or more. Without, their sizes
            are compared.

    Raises:
        BundleError: it is not a bundle, or its manifest is damaged or of another version.
    """
    manifest = Manifest.load(bundle)
    files = _files(bundle, manifest, digests=digests)
    problems = [found.problem for found in files.values() if found.problem is not None]
    tuning: dict[str, DeviceReport] = {}
    try:
        tuning, problem = _tuning(bundle, manifest)
    except BundleError as error:
        problem = str(error)
    return BundleReport(
        bundle=str(bundle),
        kind=manifest.kind,
        schema_version=manifest.schema_version,
        digest=manifest.content_digest(),
        precision=manifest.precision,
        opset=manifest.opset,
        size=sum(facts.size for facts in manifest.files.values()),
        model=manifest.model,
        heads=manifest.heads,
        limits=manifest.limits,
        tree=_tree(bundle, manifest.tree),
        has_tokenizer=manifest.has_text,
        has_ngrams=NGRAMS_NAME in manifest.files,
        generation=manifest.generation,
        quantization=manifest.quantization,
        validation=manifest.validation,
        tuning=tuning,
        engine=manifest.engine,
        files=files,
        provenance=manifest.provenance,
        problems=[*problems, *([] if problem is None else [problem])],
    )


def _files(bundle: Path, manifest: Manifest, *, digests: bool) -> dict[str, FileReport]:
    graphs: dict[str, list[str]] = {}
    for name, graph in manifest.graphs.items():
        graphs.setdefault(graph.file, []).append(name)
    wrong = dict(_differences(bundle, manifest, digests=digests))
    found = {
        name: FileReport(
            size=facts.size,
            sha256=facts.sha256,
            role=f"graph {', '.join(graphs[name])}" if name in graphs else _role(name),
            problem=wrong.get(name),
        )
        for name, facts in manifest.files.items()
    }
    for name in BESIDE:
        if (path := bundle / name).is_file():
            found[name] = FileReport(size=path.stat().st_size, role=_role(name))
    return found


def _differences(bundle: Path, manifest: Manifest, *, digests: bool) -> list[tuple[str, str]]:
    if digests:
        return [(line.partition(" ")[0], line) for line in manifest.mismatches(bundle)]
    found = []
    for name, facts in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            found.append((name, f"{name} is missing"))
        elif (size := path.stat().st_size) != facts.size:
            found.append((name, f"{name} has {size} bytes, the manifest says {facts.size}"))
    return found


def _role(name: str) -> str:
    return {
        "weights.bin": "the weights of all graphs",
        "tokenizer.json": "tokenizer",
        "chat.json": "chat templates and special tokens",
        NGRAMS_NAME: "counts of n-grams, which correct the heads",
        REPORT_NAME: "report of the last validation",
        TUNING_NAME: "trees and costs by device",
    }.get(name, "")


def _tree(bundle: Path, tree: dict[str, list[int]]) -> TreeReport:
    try:
        found = CandidateTree.from_json(tree)
    except TreeError as error:
        raise BundleError(f"{bundle}: {error}; export the bundle again") from error
    return TreeReport(nodes=found.num_nodes, depth=found.depth, parents=tree["parents"], ranks=tree["ranks"])


def _tuning(bundle: Path, manifest: Manifest) -> tuple[dict[str, DeviceReport], str | None]:
    """What tuning found, by device, and why it is not used."""
    tuning = Tuning.load(bundle)
    if tuning is None:
        return {}, None
    problem = None
    if tuning.bundle != manifest.content_digest():
        problem = f"{TUNING_NAME} is of other files, so it is not used; tune again"
    return {device: _device(found) for device, found in tuning.devices.items()}, problem


def _device(found: DeviceTuning) -> DeviceReport:
    return DeviceReport(
        batches=[_batch(batch) for batch in found.batches],
        acceptance_from=found.acceptance_from,
        prompt_lookup=found.prompt_lookup,
        prompt_lookup_ratio=None if found.lookup_check is None else found.lookup_check.ratio,
        was_quiet=None if found.measurement is None else found.measurement.is_quiet,
        created=found.provenance.created,
    )


def _batch(batch: TunedBatch) -> BatchReport:
    best, check = {"plain": batch.plain, "static": batch.static, "dynamic": batch.dynamic}[batch.best], batch.check
    return BatchReport(
        batch_size=batch.batch_size,
        best=batch.best,
        nodes=best.nodes,
        tokens_per_step=best.tokens_per_step,
        tokens_per_second=best.tokens_per_second,
        speedup=best.tokens_per_second / batch.plain.tokens_per_second,
        measured_speedup=None if check is None else check.measured_tokens_per_second / check.plain_measured_tokens_per_second,
    )


def as_data(report: BaseModel) -> dict[str, Any]:
    """A report as JSON values, without what does not apply."""
    return report.model_dump(mode="json", exclude_none=True)
