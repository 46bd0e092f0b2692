"""Writes a model of a Triton model repository: the configuration, `model.py`, and the bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from medusa_runtime import Manifest, OptionError
from medusa_serve.triton.settings import ModelSettings
from medusa_serve.triton.tensors import INPUTS, OUTPUTS, TensorSpec

Placement = Literal["copy", "path"]
CONFIG_NAME = "config.pbtxt"
VERSION = "1"
MODEL_FILE = '''"""Triton loads this file. What it runs is installed with the package medusa-export, extra serve."""

from medusa_serve.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_HEADER = """# A Medusa bundle as a model of Triton's Python backend.
# Triton makes no batches: the runtime batches the requests that are under way. There must be one instance.
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def write_model(
    directory: Path, bundle: Path, name: str, settings: ModelSettings | None = None, *, files: Placement = "copy"
) -> None:
    """Fill the directory of one model, which has the model's name in the repository.

    Args:
        directory: an empty directory.
        bundle: the bundle.
        name: the model's name.
        settings: how the bundle is run; `bundle` in it is set here.
        files: how the bundle gets there. "copy" copies it; "path" writes its absolute path into the configuration. Hard links
            would make onnx refuse the bundle's weights from then on.

    Raises:
        BundleError: there is no bundle.
        OptionError: the name cannot be used, or the bundle has no tokenizer.
        OSError: a file cannot be written.
    """
    check_name(name)
    manifest = Manifest.load(bundle)
    if not manifest.has_text:
        raise OptionError(f"{bundle} has no tokenizer, and clients send text; it cannot be served")
    place = str(bundle.resolve()) if files == "path" else "bundle"
    settings = (settings or ModelSettings()).model_copy(update={"bundle": place})
    version = directory / VERSION
    version.mkdir()
    (version / "model.py").write_text(MODEL_FILE, encoding="utf-8")
    (directory / CONFIG_NAME).write_text(config_text(name, settings), encoding="utf-8")
    if files != "path":
        _copy_files(bundle, version / place)


def is_model(directory: Path) -> bool:
    """Whether a directory was filled by `write_model`, so that it can be replaced by another one."""
    try:
        written = (directory / VERSION / "model.py").read_text(encoding="utf-8")
        return written == MODEL_FILE and {entry.name for entry in directory.iterdir()} == {CONFIG_NAME, VERSION}
    except (OSError, UnicodeDecodeError):
        return False


def check_name(name: str) -> None:
    """Refuse a name that cannot be a directory and a part of an address.

    Raises:
        OptionError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise OptionError(f"the model's name is {name!r}; it must consist of letters, digits, _, - and ., and begin with one")


def config_text(name: str, settings: ModelSettings) -> str:
    """The model's configuration, as the text of a protobuf message."""
    lines = [
        f"name: {_quoted(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        "instance_group [ { count: 1, kind: KIND_MODEL } ]",
        *_declared("input", INPUTS, optional=True),
        *_declared("output", OUTPUTS, optional=False),
        *(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
            for key, value in settings.parameters.items()
        ),
    ]
    return _HEADER + "\n".join(lines) + "\n"


def _declared(kind: str, specs: Iterable[TensorSpec], *, optional: bool) -> list[str]:
    end = ", optional: true }" if optional else " }"
    return [
        f"{kind} {{ name: {_quoted(spec.name)}, data_type: {spec.data_type}, dims: [ {-1 if spec.is_list else 1} ]{end}"
        for spec in specs
    ]


def _quoted(text: str) -> str:
    """A string of protobuf's text format, of which JSON's strings are a part."""
    return json.dumps(text, ensure_ascii=False)


def _copy_files(bundle: Path, target: Path) -> None:
    target.mkdir()
    for file in bundle.iterdir():
        if file.is_file() and not file.name.startswith("."):  # such a name has a temporary file of another run
            shutil.copyfile(file, target / file.name)
