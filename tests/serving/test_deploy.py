"""What deploy/ has to start the server: it parses, and its flags, ports and paths are the server's own."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from medusa_export.cli.fields import parse
from medusa_export.cli.serve import command as serve_command
from medusa_runtime import OptionError
from medusa_serve.app import OPEN
from medusa_serve.guards.keys import Keys
from medusa_serve.run import LAST_SECONDS
from medusa_serve.settings import ServerSettings
from tests.support.patience import PATIENCE
from tests.support.programs import program

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERFILES = ["Containerfile", "Containerfile.gpu"]
PORT = ServerSettings().port
STEPS = program("scripts/container_steps.py")


def parsed(words: list[str]) -> tuple[Path, ServerSettings]:
    """The bundle and the settings of `medusa-export serve`, as the command itself reads its arguments."""
    given = serve_command.make_context("serve", list(words)).params
    fields = {name: value for name, value in given.items() if name in ServerSettings.model_fields}
    return given["bundle"], parse(ServerSettings, fields)


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile, each with its value."""
    found: list[tuple[str, str]] = STEPS.instructions((DEPLOY / name).read_text(encoding="utf-8"))
    return found


def kubernetes() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def container() -> dict[str, Any]:
    (only,) = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(DEPLOY / "medusa-serve.service", encoding="utf-8")
    return parser["Service"]


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_containers_have_no_fault(name: str) -> None:
    assert STEPS.lint(instructions(name)) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("FROM docker.io/library/python:3.12-slim AS", "FROM python AS", "FROM python: name the registry"),
        ("python:3.12-slim AS", "python:latest AS", "a tag that is not latest"),
        ("--from=build", "--from=builder", "there is no stage builder before it"),
        ("WORKDIR /source", "WORKDIR source", "WORKDIR source: it is not absolute"),
        ('CMD ["/bundle"', 'CMD /bundle "', "write it as a JSON list"),
        (" --constraint constraints.txt", "", "each build has other versions"),
        ("USER 10001:10001", "USER root", "USER root: the server needs no root"),
        ("USER 10001:10001\n", "", "the last stage has no USER"),
        ("EXPOSE", "EXPOZE", "EXPOZE: it is none of"),
        ("FROM docker.io/library/python:3.12-slim AS build\n", "", "ENV comes before FROM"),
    ],
)
def test_a_fault_in_a_container_file_is_told(old: str, new: str, told: str) -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    assert old in text
    problems = STEPS.lint(STEPS.instructions(text.replace(old, new)))
    assert any(told in problem for problem in problems), problems


def test_paths_of_a_container_file_lie_in_the_directory(tmp_path: Path) -> None:
    stage = STEPS.Stage(tmp_path, tmp_path)
    assert stage.inside("/app/bin/pip install '/source[cpu]'") == f"{tmp_path}/app/bin/pip install '{tmp_path}/source[cpu]'"
    for text in ("COPY a b/c ./", "urlopen('http://127.0.0.1:8000/health')", "PIP_EXTRA_INDEX_URL=https://pypi.nvidia.com"):
        assert stage.inside(text) == text
    STEPS.step(stage, "ENV", "A=/app B=$A:x", {}, {"A": "1"})
    assert stage.variables == {"A": f"{tmp_path}/app", "B": "1:x"}
    STEPS.step(stage, "WORKDIR", "/source", {}, {})
    STEPS.step(stage, "COPY", "LICENSE deploy/grafana ./", {}, {})
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == ["LICENSE", "medusa.json"]
    STEPS.step(stage, "RUN", "cp LICENSE /copied && echo $A > /told", {}, {})
    assert (tmp_path / "copied").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (tmp_path / "told").read_text(encoding="utf-8") == f"{tmp_path}/app\n"


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_containers_run_the_server_on_its_port(name: str) -> None:
    given = instructions(name)
    (entry,) = [json.loads(value) for word, value in given if word == "ENTRYPOINT"]
    (words,) = [json.loads(value) for word, value in given if word == "CMD"]
    assert entry == ["medusa-export", "serve"]
    bundle, settings = parsed(words)
    assert (bundle, settings.host, settings.port) == (Path("/bundle"), "0.0.0.0", PORT)
    assert settings.api_key_file is not None
    assert ("EXPOSE", str(PORT)) in given
    (check,) = [value for word, value in given if word == "HEALTHCHECK"]
    assert f"http://127.0.0.1:{PORT}/health" in check
    (user,) = [value for word, value in given if word == "USER"]
    assert user.split(":")[0] not in {"0", "root"}


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_containers_are_built_from_what_there_is(name: str) -> None:
    given = instructions(name)
    copied = [word for kind, value in given if kind == "COPY" and "--from" not in value for word in value.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"^packages = \[(.*)\]", project, re.MULTILINE)
    assert packages is not None
    assert {path.split("/")[0] for path in re.findall(r'"([^"]+)"', packages[1])} <= set(copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "recipes"} <= set(copied)
    (install,) = [value for word, value in given if word == "RUN" and "pip install" in value]
    chosen = next((value.removeprefix("EXTRAS=") for word, value in given if word == "ARG"), None)
    extras = (chosen or re.search(r"\.\[(.*)\]", install)[1]).split(",")  # type: ignore[index]
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    assert "serve" in extras


def test_the_systemd_unit_starts_the_server_and_lets_it_end() -> None:
    program, command, *words = shlex.split(unit()["ExecStart"])
    assert (Path(program).name, command) == ("medusa-export", "serve")
    _, settings = parsed(words)
    assert settings.port == PORT
    assert settings.is_local
    assert str(settings.api_key_file) == "${CREDENTIALS_DIRECTORY}/api-keys"
    assert unit()["LoadCredential"].startswith("api-keys:")
    assert int(unit()["TimeoutStopSec"]) > settings.grace + LAST_SECONDS


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "medusa-export"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    text = (DEPLOY / "medusa-serve.service").read_text(encoding="utf-8")
    copy = tmp_path / "medusa-serve.service"
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", text), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    told = [line for line in done.stderr.splitlines() if str(copy) in line or copy.name in line]
    assert (done.returncode, told) == (0, [])


def test_kubernetes_starts_the_server_with_its_own_flags() -> None:
    bundle, settings = parsed(container()["args"])
    (port,) = container()["ports"]
    assert settings.port == port["containerPort"] == PORT
    assert settings.host == "0.0.0.0"
    mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    assert mounts[str(bundle)] == "bundle"
    keys = settings.api_key_file
    assert keys is not None
    assert mounts[str(keys.parent)] == "keys"
    assert keys.name in kubernetes()["Secret"]["stringData"]
    pod = kubernetes()["Deployment"]["spec"]["template"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(PORT)
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == set(mounts.values())
    assert kubernetes()["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert kubernetes()["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def test_kubernetes_probes_what_the_server_tells() -> None:
    paths = {route.path for route in OPEN}
    probes = {kind: container()[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert set(probes.values()) <= paths


def test_kubernetes_waits_until_requests_have_ended() -> None:
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    before = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + parsed(container()["args"])[1].grace + LAST_SECONDS


def test_kubernetes_comes_without_a_key_that_all_know(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(kubernetes()["Secret"]["stringData"]["keys"], encoding="utf-8")
    with pytest.raises(OptionError, match="holds no API key"):
        Keys.from_file(file)
