"""A bundle's manifest: the schema of `manifest.json`, and the check of the bundle's files against it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from medusa_runtime.bundle.files import read_json, write_whole
from medusa_runtime.bundle.versions import FileVersions
from medusa_runtime.errors import BundleError, first_line

MANIFEST_NAME = "manifest.json"
REPORT_NAME = "validation.json"
TUNING_NAME = "tuning.json"  # not part of the digest, and neither is the report
RUNTIME_CACHE = "runtime-cache.sm{}.bin"  # kernels that TensorRT-RTX compiled for a GPU; not part of the digest either
WEIGHTS_NAME = "weights.bin"
TEXT_FILES = ("tokenizer.json", "chat.json")  # a bundle has both, or neither
Precision = Literal["fp32", "fp16", "bf16"]
Scheme = Literal["int8", "int8-blocks", "int4", "int8-int4"]
EngineWeights = Literal["as-is", "int8", "int4", "fp8"]
HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]
PORTABLE, ORT_CPU, ORT_CUDA = "portable", "ort-cpu", "ort-cuda"  # the backends that a graph can be made for
ORT_WEBGPU = "ort-webgpu"
ORT_CPU_SINGLE = "ort-cpu-single"  # for ONNX Runtime's CPU provider and steps of one sequence
STEP, HEADS = "step", "heads"
CACHE = "cache"  # the graph that edits a cache where the runtime cannot do so by itself
PREFILL, VERIFY = "prefill", "verify"  # profiles of an engine's step; the heads' profile is called `heads`


MAX_NAME_BYTES = 255  # of a file; most file systems take no more


def _plain_name(name: str) -> str:
    """Refuse whatever could lead out of the bundle, or could stand for another file on some system."""
    is_path = name in ("", ".", "..") or any(letter in "/\\:" for letter in name)
    if is_path or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{name[:80]!r} is not a plain file name")
    return name


def _directory(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError(f"{path[:80]!r} is not a directory's name")
    return path


FileName = Annotated[str, AfterValidator(_plain_name)]
Count = Annotated[int, Field(gt=0, lt=1 << 31)]


# Version 2 adds fields, all optional: of rotations (0.2.0). The form of 1 is not a different one.
VERSIONS = FileVersions("schema_version", newest=3, steps={1: lambda data: data, 2: lambda data: data})


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")


class ModelFacts(_Model):
    """The facts about the backbone that the runtime needs."""

    name: str = Field(description="the checkpoint, as the user named it")
    architecture: str = Field(description="the Transformers class that was traced")
    vocab_size: Count
    hidden_size: Count
    num_layers: Count
    num_attention_heads: Count
    num_kv_heads: Count
    head_dim: Count
    bos_token_id: int | None = None
    eos_token_ids: list[int] = Field(description="any of these ends an answer")

    @field_validator("eos_token_ids")
    @classmethod
    def _in_vocabulary(cls, token_ids: list[int], info: ValidationInfo) -> list[int]:
        """Leave out ids that the model has no row for: no answer can end with them. Bundles may hold them from checkpoints."""
        return [token for token in token_ids if 0 <= token < info.data.get("vocab_size", 0)]


class HeadFacts(_Model):
    """The facts about the Medusa heads that the runtime needs."""

    num_heads: Count
    num_layers: int = Field(ge=0, lt=1 << 31, description="residual blocks of each head")
    top_k: Count = Field(description="candidates that a head returns")
    shared_lm_head: bool
    reads_root: bool = Field(default=False, description="they read the root token: their graph has the input `root_ids`")
    draft_vocab_size: Count | None = Field(default=None, description="tokens that the heads choose among; omitted: all")
    sha256: str = Field(description="of the heads' weights as they were read")


class Limits(_Model):
    """The largest requests and steps that the bundle takes."""

    max_seq_len: Count = Field(description="prompt and answer together, in tokens")
    max_batch_size: Count | None = Field(default=None, description="omitted: only memory limits it")
    max_tree_nodes: Count | None = Field(default=None, description="omitted: only memory limits it")
    max_prefill_tokens: Count | None = Field(default=None, description="prompt tokens in a step; omitted: any number")
    capacity: Count | None = Field(default=None, description="cache entries of each sequence, if the engine fixes them")


class TensorFacts(_Model):
    """An input or output of a graph. A dimension with a name is dynamic."""

    name: str
    dtype: str
    shape: list[int | str]


class GraphFacts(_Model):
    """One graph of the bundle."""

    file: FileName
    target: str = Field(description="`portable` runs on every backend; others name the backend that they are made for")
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]


class RotationFacts(_Model):
    """How activations were rotated before the rounding, by changing weights alone."""

    values: bool = Field(description="whether the values of attention were rotated, as the residual stream was")
    difference: float = Field(
        description="largest difference between the rotated graph's outputs and the original's in float32, over their range"
    )


class QuantizationFacts(_Model):
    """How a bundle's weights are rounded, and how much that changed."""

    scheme: Scheme
    activation_bits: Literal[8, 16] = Field(description="of the numbers that int8 weights are multiplied with on the CPU")
    smoothing: float = Field(ge=0, le=1, description="how far outliers were moved from activations to weights; 0: not at all")
    rotation: RotationFacts | None = Field(default=None, description="omitted: nothing was rotated")
    not_rotated: str | None = Field(default=None, description="why nothing was rotated, if that was tried")
    products_with_16_bits: int | None = Field(
        default=None, ge=0, description="of the step's integer products, those for which 8 bits are too few; omitted: no choice"
    )
    num_products: int | None = Field(default=None, ge=0, description="the step's integer products; omitted as well")
    kept_grids: int | None = Field(
        default=None, ge=0, description="weights that lay on grids of 4 bits before, and keep their values; omitted: none"
    )
    source_bundle: str | None = Field(
        default=None, description="content digest of the bundle that was quantised; omitted: it was made from the checkpoint"
    )
    quality: dict[str, float] = Field(description="compared with that bundle, on texts that the model wrote")
    max_kl: float | None = Field(default=None, description="the largest mean KL divergence that was allowed, in nats")


class DecodingDefaults(_Model):
    """Options of every request that does not set them. Names and ranges are those of `DecodingOptions`."""

    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    min_new_tokens: int | None = Field(default=None, ge=0)
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None


class SamplingDefaults(_Model):
    """Options of requests that sample and do not set them. The temperature is only a recommendation: none is applied."""

    temperature: float | None = Field(default=None, gt=0, le=100)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)


class GenerationFacts(_Model):
    """What the checkpoint's generation_config.json asks for."""

    defaults: DecodingDefaults = DecodingDefaults()
    sampling: SamplingDefaults = SamplingDefaults()
    ignored: dict[str, Any] = Field(default_factory=dict, description="its settings that the runtime does not follow")


class FileFacts(_Model):
    """A file's size in bytes and its digest."""

    size: int = Field(ge=0)
    sha256: str


class Provenance(_Model):
    """The command, the versions and the time that made the bundle."""

    command: list[str]
    versions: dict[str, str]
    created: str = Field(description="UTC, ISO 8601")


class ValidationFacts(_Model):
    """The result of the last comparison with the reference; the file `report` has the details."""

    status: Literal["passed", "failed", "not run"]
    report: str | None = None
    summary: dict[str, Any] = Field(default_factory=dict)


class PartFacts(_Model):
    """One weight of a region: the rows of a region are made of the rows of its weights, side by side."""

    source: int = Field(ge=0, description="offset of its first row in the weights file, in bytes; the other rows follow")
    row_bytes: int = Field(gt=0)


class RegionFacts(_Model):
    """A run of a plan that holds only weights. Each of its rows holds one row of each part, side by side."""

    offset: int = Field(ge=0, description="where the run begins in the plan, in bytes")
    rows: int = Field(gt=0)
    parts: list[PartFacts] = Field(min_length=1)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, with all parts."""
        return sum(part.row_bytes for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the region."""
        return self.rows * self.row_bytes


class StrippedPlan(FileFacts):
    """A plan whose weights were left out: its size and digest with the weights, and the regions they go to, in order."""

    regions: list[RegionFacts]


class SharedWeights(_Model):
    """Weights that the plans leave out, because the bundle that they were built from holds the same bytes."""

    source: Annotated[str, AfterValidator(_directory)] = Field(
        description="the directory of the weights file, absolute or as seen from the engine bundle; it may be anywhere, "
        "because size and digest say whether it is the right file. A copy in the engine bundle itself comes first"
    )
    file: FileFacts = Field(description=f"of {WEIGHTS_NAME}")
    plans: dict[FileName, StrippedPlan] = Field(description="by file name")


class EngineFacts(_Model):
    """What TensorRT engines were built for, and what they were built with."""

    flavor: Literal["tensorrt", "rtx"]
    tensorrt_version: str
    compute_capabilities: list[str]
    profiles: dict[str, dict[str, dict[str, list[int]]]] = Field(description="profile → input → min, opt and max shape")
    aliases: dict[str, str] = Field(description="output → the input whose memory the output must share")
    source_bundle: str = Field(description="content digest of the ONNX bundle that the engines were built from")
    weights: EngineWeights = Field(default="as-is", description="how the weights of matrix products are stored")
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = Field(default=False, description="newer runtimes of the same major version load the engines too")
    lean_runtime: bool = Field(default=False, description="the plans contain a runtime, so loading them runs their code")
    built_with: dict[str, str] = Field(default_factory=dict, description="options; GPU, driver and CUDA if there were any")
    device_memory: dict[str, int] = Field(default_factory=dict, description="estimate at the largest shapes, bytes by use")
    shared_weights: SharedWeights | None = None


class Manifest(_Model):
    """`manifest.json`. See docs/bundle-format.md."""

    schema_version: int = VERSIONS.newest
    kind: Literal["onnx", "tensorrt"]
    model: ModelFacts
    heads: HeadFacts
    precision: Precision
    opset: int
    limits: Limits
    generation: GenerationFacts | None = None
    quantization: QuantizationFacts | None = None
    graphs: dict[str, GraphFacts] = Field(description="`step` and `heads`; `NAME.TARGET` for graphs made for one backend")
    tree: dict[str, list[int]] = Field(description="the candidate tree used by default: parents and ranks")
    files: dict[FileName, FileFacts]
    provenance: Provenance
    validation: ValidationFacts = ValidationFacts(status="not run")
    engine: EngineFacts | None = None

    @classmethod
    def load(cls, bundle: str | Path) -> Manifest:
        """Read and check a bundle's manifest. One of an older schema is brought to the newest form; the file stays as it is.

        Raises:
            BundleError: there is none, it is damaged, or its schema is newer than this package.
        """
        path = Path(bundle) / MANIFEST_NAME
        try:
            if not path.is_file():
                raise BundleError(f"{bundle} is not a bundle: it has no {MANIFEST_NAME}; make one with: medusa-export onnx")
            data = read_json(path)
            if not isinstance(data, dict) or VERSIONS.name not in data:
                raise BundleError(f"{path} has no {VERSIONS.name}, so it is no manifest; export the bundle again")
            if problem := VERSIONS.problem(data, "make the bundle again"):
                raise BundleError(f"{path} cannot be read: {problem}")
            manifest = cls.model_validate(VERSIONS.migrated(data))
        except ValidationError as error:
            raise BundleError(f"{path}: {first_problem(error)}; export the bundle again") from error
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{path} cannot be read ({first_line(error)}); export the bundle again") from error
        if problem := manifest.incompleteness():
            raise BundleError(f"{path}: {problem}; {manifest.remedy}")
        return manifest

    @property
    def has_text(self) -> bool:
        """Whether the bundle has a tokenizer. Without one, it takes and gives token ids alone."""
        return not self.files.keys().isdisjoint(TEXT_FILES)

    @property
    def remedy(self) -> str:
        """What to do if the bundle is damaged."""
        if self.kind == "onnx":
            return "export the bundle again"
        return "copy the engines again, or build them again with: medusa-export trt"

    def incompleteness(self) -> str | None:
        """What is missing or contradictory in a manifest of the right form; None if it is complete."""
        if missing := {STEP, HEADS} - self.graphs.keys():
            return f"graphs: {', '.join(sorted(missing))} is missing"
        needed = {graph.file for graph in self.graphs.values()} | (set(TEXT_FILES) if self.has_text else set())
        needed |= {WEIGHTS_NAME} if self.kind == "onnx" else set()
        if missing := needed - self.files.keys():
            return f"files: {', '.join(sorted(missing))} is missing"
        parents, ranks = self.tree.get("parents", []), self.tree.get("ranks", [])
        if self.tree.keys() != {"parents", "ranks"} or not parents or len(parents) != len(ranks):
            return "tree: it must have parents and ranks, one of each for every node"
        defaults = DecodingDefaults() if self.generation is None else self.generation.defaults
        suppressed = [*(defaults.suppress_tokens or []), *(defaults.begin_suppress_tokens or [])]
        if outside := [token for token in suppressed if not 0 <= token < self.model.vocab_size]:
            return f"generation.defaults: the token {outside[0]} is outside the vocabulary of {self.model.vocab_size}"
        if (self.engine is None) != (self.kind == "onnx"):
            return f"kind is {self.kind}, and there is {'no' if self.engine is None else 'an'} engine"
        return None if self.engine is None else self._engine_incompleteness(self.engine)

    def _engine_incompleteness(self, engine: EngineFacts) -> str | None:
        if missing := [name for name, limit in self.limits.model_dump().items() if limit is None]:
            return f"limits: {missing[0]} is missing"
        if lacking := {PREFILL, VERIFY, HEADS} - engine.profiles.keys():
            return f"engine.profiles: {min(lacking)} is missing"
        outputs = {tensor.name for tensor in self.graphs[STEP].outputs if tensor.name.startswith("present.")}
        if unshared := outputs - engine.aliases.keys():
            return f"engine.aliases: {min(unshared)} is missing"
        plans = self.files if engine.shared_weights is None else engine.shared_weights.plans
        if lacking := {self.graphs[name].file for name in (STEP, HEADS)} - plans.keys():
            return f"engine.shared_weights.plans: {min(lacking)} is missing"
        return None

    def graph(self, name: str, backend: str = PORTABLE) -> GraphFacts:
        """The graph of that name for a backend: one made for it, or else the portable one."""
        return self.graphs.get(f"{name}.{backend}", self.graphs[name])

    def save(self, bundle: str | Path) -> None:
        """Write the manifest into a bundle directory, at once or not at all."""
        write_whole(Path(bundle) / MANIFEST_NAME, self.model_dump_json(indent=2, exclude_none=True) + "\n")

    def content_digest(self) -> str:
        """One SHA-256 over all files: it stays the same if the bundle is validated again."""
        lines = "".join(f"{facts.sha256}  {name}\n" for name, facts in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def mismatches(self, bundle: str | Path) -> list[str]:
        """Compare every file with its size and digest. Returns one line for each file that differs."""
        problems = []
        for name, facts in self.files.items():
            path = Path(bundle) / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif (size := path.stat().st_size) != facts.size:
                problems.append(f"{name} has {size} bytes, the manifest says {facts.size}")
            elif (digest := sha256_of(path)) != facts.sha256:
                problems.append(f"{name} has sha256 {digest[:12]}…, the manifest says {facts.sha256[:12]}…")
        return problems

    def require_intact(self, bundle: str | Path) -> None:
        """Raise a `BundleError` naming the first file that does not match the manifest."""
        if problems := self.mismatches(bundle):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise BundleError(f"{bundle} does not match its manifest: {problems[0]}{more}; {self.remedy}")


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, in one line: the field's path and why."""
    first = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return " ".join(f"{field[:120]}: {first['msg']}".split())


def file_facts(path: Path) -> FileFacts:
    """Size and digest of a file."""
    return FileFacts(size=path.stat().st_size, sha256=sha256_of(path))


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
