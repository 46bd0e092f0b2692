"""Runs the steps of a container file without a container engine: in a temporary directory that stands for the file system.

    python scripts/container_steps.py deploy/Containerfile BUNDLE

It lints the file first. Then it makes each stage in turn: COPY copies, RUN runs, WORKDIR and ENV hold for what follows, and
a path that the file names (/app, /source) lies in the directory. Then it starts the last stage's command, with BUNDLE as
/bundle, a key as /keys and a free port, waits until the file's own health check succeeds, makes a request, and ends the
server by STOPSIGNAL.

What this does not show: the base image, for which this machine's Python stands, and USER. It needs pip's package index, and
for the file of a GPU that GPU.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
PATHS = re.compile(r"(?:^|(?<=[\s\"'=:]))/(?=\w)")  # where an absolute path begins
KEY = "a-key-for-this-run-only"
PATIENCE = 300  # seconds until the server must be healthy


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a container file, each with its value. Lines that end with a backslash are joined."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines)]


def lint(steps: list[tuple[str, str]]) -> list[str]:
    """What is wrong with a container file, one line each."""
    problems = [f"{word}: it is none of {', '.join(sorted(KNOWN))}" for word, _ in steps if word not in KNOWN]
    stages: list[str] = []
    for word, value in steps:
        if word == "FROM":
            image, _, name = value.partition(" AS ")
            registry, _, tag = image.rpartition(":")
            if "/" not in registry or "." not in registry.split("/")[0] or tag in ("", "latest"):
                problems.append(f"FROM {image}: name the registry, and a tag that is not latest")
            stages.append(name)
        elif not stages and word != "ARG":
            problems.append(f"{word} comes before FROM")
        elif word == "COPY" and (source := re.match(r"--from=(\S+)", value)) and source[1] not in stages[:-1]:
            problems.append(f"COPY {value}: there is no stage {source[1]} before it")
        elif word == "WORKDIR" and not value.startswith("/"):
            problems.append(f"WORKDIR {value}: it is not absolute")
        elif word in ("ENTRYPOINT", "CMD") and not _is_list(value):
            problems.append(f"{word} {value}: write it as a JSON list, so that signals reach the program")
        elif word == "RUN" and re.search(r"\bpip install\b(?!.*(--constraint|-c) constraints\.txt)", value):
            problems.append(f"RUN {value}: without --constraint constraints.txt, each build has other versions")
    begins = [place for place, (word, _) in enumerate(steps) if word == "FROM"]
    given = dict(steps[begins[-1] :] if begins else steps)
    problems += [
        f"the last stage has no {word}" for word in ("USER", "ENTRYPOINT", "HEALTHCHECK", "EXPOSE") if word not in given
    ]
    if given.get("USER", "1").split(":")[0] in ("0", "root"):
        problems.append(f"USER {given['USER']}: the server needs no root")
    return problems


def _is_list(value: str) -> bool:
    try:
        return isinstance(json.loads(value), list)
    except ValueError:
        return False


@dataclass
class Stage:
    """A stage: the directory that stands for its file system, and what holds for the next step."""

    root: Path
    workdir: Path
    variables: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)  # ENTRYPOINT, CMD, HEALTHCHECK, STOPSIGNAL

    def inside(self, text: str) -> str:
        """A text whose absolute paths lie in the directory."""
        return PATHS.sub(lambda _: f"{self.root}/", text)

    def environment(self) -> dict[str, str]:
        """The variables of a step: the file's, and pip's settings of this machine."""
        inherited = {name: value for name, value in os.environ.items() if name == "LANG" or name.startswith(("PIP_", "SSL_"))}
        path = f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}"  # the base image's Python
        return inherited | {"PATH": path, "HOME": str(self.root)} | self.variables


def make(steps: list[tuple[str, str]], place: Path) -> Stage:
    """Run all steps. Stages have the same directory one after the other, since what is installed knows where it lies."""
    root, done, name, stage = place / "root", {}, "", None
    arguments: dict[str, str] = {}
    for word, value in steps:
        click.echo(f"{word} {value}")
        if word == "FROM":
            if stage is not None:
                done[name] = root.rename(place / f"stage-{len(done)}")
            name = value.partition(" AS ")[2]
            root.mkdir()
            stage = Stage(root, root)
        elif word == "ARG":
            key, _, default = value.partition("=")
            arguments[key] = default
        elif stage is not None:
            step(stage, word, value, done, arguments)
    assert stage is not None
    return stage


def step(stage: Stage, word: str, value: str, done: dict[str, Path], arguments: dict[str, str]) -> None:
    """Run one step of a stage."""
    if word == "ENV":
        known = stage.environment() | arguments
        for pair in shlex.split(value):
            key, _, text = pair.partition("=")
            text = re.sub(r"\$(\w+)", lambda match: known.get(match[1], ""), stage.inside(text))
            stage.variables[key] = text
    elif word == "WORKDIR":
        stage.workdir = Path(stage.inside(value))
        stage.workdir.mkdir(parents=True, exist_ok=True)
    elif word == "COPY":
        *options, last = shlex.split(value)
        source = next((done[one.removeprefix("--from=")] for one in options if one.startswith("--from=")), None)
        names = [one for one in options if not one.startswith("--")]
        into = Path(stage.inside(last)) if last.startswith("/") else stage.workdir / last
        for one in names:
            copy((ROOT if source is None else source) / one.lstrip("/"), into, is_folder=last.endswith("/"))
    elif word == "RUN":
        variables = stage.environment() | arguments
        code = subprocess.run(["sh", "-c", stage.inside(value)], cwd=stage.workdir, env=variables, check=False).returncode
        if code:
            raise click.ClickException(f"RUN {value} ended with {code}")
    else:
        stage.facts[word] = value


def copy(source: Path, into: Path, *, is_folder: bool) -> None:
    """Copy as COPY does: a folder's content, or a file into a folder."""
    if source.is_dir():
        shutil.copytree(source, into, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target = into / source.name if is_folder or into.is_dir() else into
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def serve(stage: Stage, bundle: Path) -> str:
    """Start the command, wait for the health check, ask for a completion, and end the server. Returns what it answered."""
    (stage.root / "bundle").symlink_to(bundle.resolve())
    keys = stage.root / "keys"
    keys.write_text(f"{KEY}\n", encoding="utf-8")
    keys.chmod(0o600)
    port = free_port()
    words = [*json.loads(stage.inside(stage.facts["ENTRYPOINT"])), *json.loads(stage.inside(stage.facts.get("CMD", "[]")))]
    named = stage.facts["EXPOSE"]
    words = [{"0.0.0.0": "127.0.0.1", named: str(port)}.get(word, word) for word in words]
    check = json.loads(re.sub(rf":{named}/", f":{port}/", stage.facts["HEALTHCHECK"].partition("CMD ")[2]))
    variables = stage.environment()
    program = shutil.which(words[0], path=variables["PATH"]) or words[0]
    server = subprocess.Popen([program, *words[1:]], cwd=stage.workdir, env=variables)
    try:
        wait_for(server, [shutil.which(check[0], path=variables["PATH"]) or check[0], *check[1:]], variables)
        answer = ask(f"http://127.0.0.1:{port}/v1/completions", {"prompt": "Once", "max_tokens": 8, "temperature": 0})
        server.send_signal(getattr(signal, stage.facts.get("STOPSIGNAL", "SIGTERM")))
        if code := server.wait(timeout=60):
            raise click.ClickException(f"the server ended with {code} after {stage.facts.get('STOPSIGNAL', 'SIGTERM')}")
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    return str(answer["choices"][0]["text"])


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(server: subprocess.Popen[bytes], check: list[str], variables: dict[str, str]) -> None:
    """Run the health check until it succeeds, and /ready with it.

    Raises:
        ClickException: the server ends, or is not healthy after PATIENCE seconds.
    """
    ready = [word.replace("/health", "/ready") for word in check]
    end = time.monotonic() + PATIENCE
    while any(subprocess.run(one, env=variables, capture_output=True, check=False).returncode for one in (check, ready)):
        if server.poll() is not None:
            raise click.ClickException(f"the server ended with {server.returncode} before it was healthy")
        if time.monotonic() > end:
            raise click.ClickException(f"the health check fails after {PATIENCE} seconds")
        time.sleep(1)


def ask(url: str, body: dict[str, object]) -> dict[str, list[dict[str, object]]]:
    """The server's answer to a request."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, list[dict[str, object]]] = json.load(response)
    return answer


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(file: Path, bundle: Path) -> None:
    """Run the steps of a container FILE, and serve BUNDLE with what they make."""
    steps = instructions(file.read_text(encoding="utf-8"))
    if problems := lint(steps):
        raise click.ClickException("\n".join(problems))
    with tempfile.TemporaryDirectory() as place:
        told = serve(make(steps, Path(place)), bundle)
    click.echo(f"the server of {file} answered {told!r} and ended by itself")


if __name__ == "__main__":
    main()
