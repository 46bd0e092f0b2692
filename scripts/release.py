"""Makes what a release consists of: the sdist, the wheel that is built from it, and bills of materials with licences.

    python scripts/release.py dist                                           the packages, and what cpu,serve installs
    python scripts/release.py dist --extras cpu,serve --extras cpu,train     the same, with what cpu,train installs

Everything is built and installed in new environments, with the versions of constraints.txt, from pip's package index. A bill is
a CycloneDX file (JSON) that cyclonedx-bom writes from what is installed; this program adds the JavaScript libraries of the
server's page, and licences that cyclonedx-bom does not read. It ends with 1 if a package tells no licence at all.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
VENDORED = ROOT / "serving/medusa_serve/page/vendor/README.md"
LIBRARY = re.compile(r"^\| `[^`]+` \| (?P<name>\S+) (?P<version>[\d.]+), [^|]*\| (?P<licences>[^|]+) \|", re.MULTILINE)
TOLD = re.compile(r"[A-Z]+[\w.-]*\d[\w.-]*|MIT")  # SPDX identifiers, in the table of that file
CLASSIFIER = "License :: OSI Approved :: "


def environment(place: Path, *, with_pip: bool = False) -> Path:
    """Make a virtual environment. Returns its Python."""
    venv.create(place, with_pip=with_pip, symlinks=os.name != "nt")
    return place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def tools(place: Path) -> Path:
    """Make an environment with what the extra `release` names. Returns its Python, whose pip installs into others too."""
    python = environment(place, with_pip=True)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]["release"]
    run(python, "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, *wanted)
    return python


def build(python: Path, output: Path) -> tuple[Path, Path]:
    """Build the sdist from the sources and the wheel from the sdist. Returns both files.

    Args:
        python: of the tools' environment.
        output: a directory.
    """
    run(python, "-m", "build", "--outdir", output, ROOT, PIP_CONSTRAINT=str(CONSTRAINTS))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return output / f"medusa_export-{version}.tar.gz", output / f"medusa_export-{version}-py3-none-any.whl"


def install(python: Path, package: Path, extras: str, place: Path, *, with_pip: bool = False) -> Path:
    """Install a package with extras into a new environment, which has a pip of its own only if asked. Returns its Python."""
    into = environment(place, with_pip=with_pip)
    wanted = f"{package}[{extras}]" if extras else str(package)
    run(python, "-m", "pip", "--python", into, "install", "--quiet", "-c", CONSTRAINTS, wanted)
    return into


def bill(python: Path, installed: Path) -> dict[str, Any]:
    """The bill of materials of an environment: every package with its version and licences, and the page's libraries."""
    options = ("--output-reproducible", "--pyproject", ROOT / "pyproject.toml")
    text = run(python, "-m", "cyclonedx_py", "environment", *options, installed)
    found: dict[str, Any] = json.loads(text)
    folders = json.loads(run(installed, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"))
    metadata = {one.metadata["Name"]: one.metadata for one in importlib.metadata.distributions(path=folders)}
    for component in found["components"]:
        if not component.get("licenses") and (licence := metadata[component["name"]].get("License")):
            component["licenses"] = [{"license": {"name": licence.splitlines()[0], "acknowledgement": "declared"}}]
    found["components"] += [
        {
            "type": "library",
            "bom-ref": f"pkg:npm/{library['name']}@{library['version']}",
            "purl": f"pkg:npm/{library['name']}@{library['version']}",
            "name": library["name"],
            "version": library["version"],
            "licenses": [{"expression": " OR ".join(TOLD.findall(library["licences"]))}],
        }
        for library in LIBRARY.finditer(re.sub(r"`[^`]*(LICENSE)[^`]*`", "", VENDORED.read_text(encoding="utf-8")))
    ]
    return found


def licences(component: dict[str, Any]) -> str:
    """The licences of a component as one text; empty if it tells none."""
    told = [
        one.get("expression") or one["license"].get("id") or one["license"]["name"] for one in component.get("licenses", [])
    ]
    return ", ".join(dict.fromkeys(name.removeprefix(CLASSIFIER) for name in told))


def run(*words: object, **variables: str) -> str:
    """Run a command. Returns its stdout; what it says on stderr is shown only if it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(word) for word in words]
    done = subprocess.run(command, env=inherited | variables, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise click.ClickException(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--extras", multiple=True, default=["cpu,serve"], show_default=True, help="Extras to write a bill for.")
def main(output: Path, extras: tuple[str, ...]) -> None:
    """Write the sdist, the wheel and the bills of materials into OUTPUT."""
    with tempfile.TemporaryDirectory() as made:
        python = tools(Path(made) / "tools")
        packages = build(python, output)
        for package in packages:
            click.echo(f"{package.stat().st_size / 1e6:5.1f} MB  {package}")
        untold: list[str] = []
        for number, wanted in enumerate(extras):
            found = bill(python, install(python, packages[1], wanted, Path(made) / str(number)))
            place = output / f"{packages[1].name.split('-py3')[0]}.{wanted.replace(',', '-')}.cdx.json"
            place.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            click.echo(f"\n{place}: {len(found['components'])} components")
            for component in found["components"]:
                told = licences(component)
                click.echo(f"{component['name']:40} {component['version']:16} {told or 'no licence told'}")
                untold += [] if told else [component["name"]]
    if untold:
        raise click.ClickException(f"no licence is told by: {', '.join(sorted(set(untold)))}; look it up before the release")


if __name__ == "__main__":
    main()
