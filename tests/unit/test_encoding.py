"""Text files are UTF-8, whatever the locale says: with Latin-1, DeepSeek's markers would become other tokens silently."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from medusa_runtime.bundle.manifest import FileFacts
from medusa_runtime.text.codec import TextCodec
from tests.support.fake_backend import fake_manifest
from tests.support.models import tokenizer

ROOT = Path(__file__).parents[2]
BINARY = {("os", "open"), ("archive", "open")}  # a descriptor, and a member of a zip file
ROOMS = ("exporter", "runtime", "heads", "serving", "bench", "scripts", "examples")
MARKER = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"  # DeepSeek's


def forgotten(source: str) -> list[int]:
    """The lines of calls that read or write text and do not say in which encoding. Ruff's PLW1514 sees a quarter of them."""
    return [call.lineno for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call) and _is_forgotten(call)]


def _is_forgotten(call: ast.Call) -> bool:
    owner, name = (call.func.value, call.func.attr) if isinstance(call.func, ast.Attribute) else (None, None)
    name = call.func.id if isinstance(call.func, ast.Name) else name
    owner_name = owner.id if isinstance(owner, ast.Name) else None
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or (owner_name, name) in BINARY:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) == (name == "write_text")  # the encoding may come by position
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords or "universal_newlines" in keywords
    if name in ("open", "fdopen", "TextIOWrapper", "NamedTemporaryFile", "FileHandler"):
        is_method = owner is not None and owner_name not in ("os", "io")
        place = 0 if is_method or name == "NamedTemporaryFile" else 1
        mode = keywords.get("mode", call.args[place] if len(call.args) > place else None)
        if mode is None:
            return name != "NamedTemporaryFile"
        return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value
    return False


def programs() -> Iterator[Path]:
    for room in ROOMS:
        yield from sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text()",
        "path.write_text(text)",
        "path.read_text(errors='replace')",
        "path.write_text(text, newline='')",
        "open(path)",
        "path.open('a')",
        "os.fdopen(1, 'w')",
        "subprocess.run(command, text=True)",
    ],
)
def test_a_call_without_an_encoding_is_found(call: str) -> None:
    assert forgotten(call) == [1]


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text(encoding='utf-8')",
        "path.read_text('utf-8')",
        "path.write_text(text, 'utf-8')",
        "path.open('rb')",
        "open(path, mode='wb')",
        "os.open(path, os.O_RDONLY)",
    ],
)
def test_bytes_and_named_encodings_are_fine(call: str) -> None:
    assert forgotten(call) == []


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = {str(path.relative_to(ROOT)): forgotten(path.read_text(encoding="utf-8")) for path in programs()}
    assert len(found) > 200
    assert {path: lines for path, lines in found.items() if lines} == {}


READER = """
import importlib, json, locale, pkgutil, sys, warnings
from pathlib import Path

warnings.filterwarnings("error", category=EncodingWarning, module="medusa_")
assert locale.getencoding().lower().replace("-", "") != "utf8", locale.getencoding()

import medusa_runtime, medusa_export.cli
for package in (medusa_runtime, medusa_export.cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

from medusa_export.cli.generate import _read_schema
from medusa_export.measure.prompt_files import read_prompts
from medusa_runtime import Manifest
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.text.codec import TextCodec

bundle = Path(sys.argv[1])
manifest = Manifest.load(bundle)
manifest.save(bundle)
codec = TextCodec(bundle)
print(json.dumps({
    "ids": codec.encode("x"),
    "model": manifest.model.name,
    "schema": _read_schema(bundle / "schema.json"),
    "prompts": [read_prompts(bundle / name) for name in ("prompts.txt", "prompts.jsonl")],
    "tree": CandidateTree.from_file(bundle / "tree.json").num_nodes,
}))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    manifest = fake_manifest()
    manifest.model.name = MARKER
    for name in ("weights.bin", "step.onnx", "heads.onnx", "tokenizer.json", "chat.json"):
        manifest.files[name] = FileFacts(size=1, sha256="")
    manifest.save(tmp_path)
    tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    chat = {"template": MARKER + "{{ messages[0].content }}", "special_tokens": {}}
    for name, text in {
        "chat.json": json.dumps(chat, ensure_ascii=False),
        "schema.json": "\ufeff" + json.dumps({"const": MARKER}, ensure_ascii=False),
        "prompts.txt": f"\ufeff{MARKER}\r\ntwo\u2028lines\n",
        "prompts.jsonl": json.dumps({"prompt": f"{MARKER}\u2028"}, ensure_ascii=False) + "\n",
        "tree.json": "\ufeff[[0]]",
    }.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_another_locale_changes_nothing(bundle: Path, locale: str) -> None:
    """Where Latin-1 is not installed, that locale is C: ASCII."""
    manifest = (bundle / "manifest.json").read_bytes()
    settings = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNDEFAULTENCODING": "1"}
    command = [sys.executable, "-c", READER, str(bundle)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "ids": TextCodec(bundle).encode("x"),
        "model": MARKER,
        "schema": {"const": MARKER},
        "prompts": [[MARKER, "two\u2028lines"], [f"{MARKER}\u2028"]],
        "tree": 2,
    }
    assert (bundle / "manifest.json").read_bytes() == manifest
