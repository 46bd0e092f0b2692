"""What works for a decoder type: each check that the table in docs/architectures.md has, on the type's tiny checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from medusa_export.bundle.export import export_bundle
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.model.checkpoint import load_backbone
from medusa_export.quantize import quantize_bundle
from medusa_export.trace import attention_node
from medusa_export.trace.skeleton import require_traceable
from medusa_runtime.errors import MedusaError, first_line
from tests.support.eager_step import compare
from tests.support.models import save_random_heads
from tests.support.software_gpu import settings
from tests.support.zoo import save_zoo_model

PROMPTS = ("the lazy dog learns to speak, while the quick model jumps over many words", "a fox")
NEW_TOKENS = 24
MOST_APART = 1e-3  # logits, between what would be traced and the model; wrong masks or positions give a hundred times as much

VERDICTS = {"prompts": "logits of prompts", "tree": "logits of tree", "greedy": "greedy"}  # column -> how a verdict begins

Outcome = Literal["passes", "refused", "fails"]
Work = Literal["none", "loaded", "traced"]  # what was done before a refusal


@dataclass
class Row:
    """What was found for one type. An outcome other than `passes` has a reason."""

    model_type: str
    architecture: str = ""
    outcome: Outcome = "fails"
    reason: str = ""
    work: Work = "none"
    checks: dict[str, str] = field(default_factory=dict)  # "passes", or why not
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON."""
        return asdict(self) | {"seconds": {name: round(value, 1) for name, value in self.seconds.items()}}


def check_type(
    model_type: str,
    directory: Path,
    *,
    export: bool = True,
    quantize: bool = True,
    engines: bool = True,
    webgpu: bool = False,
) -> Row:
    """Make a type's tiny model in an empty directory, compare what would be traced, export it, and compare what comes out."""
    row = Row(model_type)
    model, bundle = directory / "model", directory / "bundle"
    with _timed(row, "make"):
        save_zoo_model(model, model_type)
        heads = save_random_heads(model, directory / "heads")
        row.architecture = _architecture(model)
    try:
        with _watched(row):
            with _timed(row, "traced"):
                row.checks["traced"] = _traced(model)
            if export:
                with _timed(row, "export"):
                    export_bundle(ExportOptions(str(model), heads, bundle))
    except MedusaError as error:
        row.outcome, row.reason = "refused", str(error).replace(str(directory), "DIR")
        return row
    except Exception as error:  # noqa: BLE001 - a traceback is an outcome, of the worst kind
        row.reason = _last_line(error)
        return row
    if export:
        _check(row, "validate", lambda: _compared(row, bundle, model, heads))
    if row.checks.get("validate") == "passes":
        if quantize:
            _check(row, "int8", lambda: _quantized(bundle, model, directory / "int8"))
        if engines:
            _check(row, "engines", lambda: _built(bundle, directory / "engine"))
        if webgpu:
            _check(row, "webgpu", lambda: _on_webgpu(bundle, model, heads))
    # A provider that lacks an operator's form says nothing of the type: its column says no.
    failed = {name: found for name, found in row.checks.items() if found != "passes" and name != "webgpu"}
    row.outcome, row.reason = ("fails", "; ".join(f"{n}: {f}" for n, f in failed.items())) if failed else ("passes", "")
    return row


def _traced(model: Path) -> str:
    """Compare what would be traced, run in PyTorch, with the model."""
    attention_node.register()
    backbone = load_backbone(str(model), attention=attention_node.ATTENTION_NAME, before_loading=require_traceable)
    found, wanted = compare(backbone, load_backbone(str(model)))
    difference = float(np.abs(found - wanted).max())
    return "passes" if difference < MOST_APART < np.ptp(wanted) / 100 else f"logits differ by {difference:.1e}"


def _compared(row: Row, bundle: Path, model: Path, heads: Path) -> str:
    """Compare a bundle with PyTorch. Each of the page's columns gets its part of the verdicts."""
    report = validate(bundle, str(model), heads=heads, prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    for column, start in VERDICTS.items():
        parts = {name: verdict for name, verdict in report.verdicts().items() if name.startswith(start)}
        row.checks[column] = _failures(parts)
    return _failures(report.verdicts())


def _failures(verdicts: Mapping[str, tuple[bool, str]]) -> str:
    failed = [f"{name}: {found}" for name, (passed, found) in verdicts.items() if passed is False]
    return "; ".join(failed) or "passes"


def _quantized(bundle: Path, model: Path, output: Path) -> str:
    prompts = output.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    quantize_bundle(QuantizeOptions(bundle, output, quality_prompts=prompts, max_kl=0.25))
    return _failures(validate(output, str(model), prompts=PROMPTS, max_new_tokens=NEW_TOKENS).verdicts())


def _built(bundle: Path, output: Path) -> str:
    from medusa_export.command_options.engine_options import EngineOptions
    from medusa_export.engine.build import build_engines

    build_engines(
        EngineOptions(bundle, output, max_seq_len=64, max_prefill_tokens=32, max_tree_nodes=16, max_batch_size=2, opt_level=0)
    )
    return "passes"


def _on_webgpu(bundle: Path, model: Path, heads: Path) -> str:
    """The comparison with PyTorch on WebGPU, or its driver in software: on less, since that is slow."""
    os.environ.update(settings())
    report = validate(bundle, str(model), heads=heads, prompts=PROMPTS[:1], max_new_tokens=8, device="gpu")
    return _failures(report.verdicts())


def _architecture(model: Path) -> str:
    from transformers import AutoConfig

    return str((AutoConfig.from_pretrained(model).architectures or [""])[0])


def _check(row: Row, name: str, check: Callable[[], str]) -> None:
    with _timed(row, name):
        try:
            row.checks[name] = check()
        except MedusaError as error:
            row.checks[name] = str(error)
        except Exception as error:  # noqa: BLE001 - as above
            row.checks[name] = _last_line(error)


def _last_line(error: BaseException) -> str:
    """The last line of a traceback, with the place that raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({Path(place.filename).name}:{place.lineno})"


@contextmanager
def _timed(row: Row, name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        row.seconds[name] = time.perf_counter() - start


@contextmanager
def _watched(row: Row) -> Iterator[None]:
    """Note how far an export comes: whether it loads the weights, and whether it traces."""
    load, trace = PreTrainedModel.from_pretrained.__func__, torch.onnx.export

    def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
        row.work = "loaded"
        return load(cls, *args, **kwargs)

    def tracing(*args: Any, **kwargs: Any) -> Any:
        row.work = "traced"
        return trace(*args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(loading)
    torch.onnx.export = tracing
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = classmethod(load)
        torch.onnx.export = trace


def warm_up() -> None:
    """Let the libraries build their tables once, before processes are forked: that takes as long as tracing a tiny model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),), dynamo=True, verbose=False)


def check_apart(model_type: str, directory: Path, timeout: float, **parts: bool) -> Row:
    """As `check_type`, in a process of its own, which may crash or hang. The directory is deleted."""
    context = multiprocessing.get_context("fork")  # so that the libraries are imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, model_type, directory, parts))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return Row(model_type, reason=f"it does not end within {timeout:.0f} seconds")
        found: Row = receiver.recv()
        return found
    except EOFError:
        process.join()
        return Row(model_type, reason=f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        shutil.rmtree(directory, ignore_errors=True)


def _send(sender: Any, model_type: str, directory: Path, parts: dict[str, bool]) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    warnings.simplefilter("ignore")
    directory.mkdir(parents=True)
    try:
        row = check_type(model_type, directory, **parts)
    except Exception as error:  # noqa: BLE001 - as above
        row = Row(model_type, reason=f"its tiny model cannot be made: {_last_line(error)}")
    sender.send(row)
    sender.close()
