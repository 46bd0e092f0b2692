"""A reader who runs the commands and programs of README and of the guides, on a tiny model.

Names stand for what a reader has: MODEL, HEADS, and bundles in build/. A bundle that a page has not made itself is a tiny one.
What would take long is asked for at a smaller size, by options behind those of the page. A server runs until the next one
starts, or until the page ends.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner

from medusa_export.cli import main
from tests.support.documents import Block, Command

SMALLER = {
    "distill": "--self-prompts 6 --max-new-tokens 12 --max-prompt-tokens 60 --dtype fp32",
    "train": "--num-heads 2 --max-steps 3 --batch-tokens 64 --held-out 0.3 --max-length 100 --min-token-count 1"
    " --mixed-precision no --backbone-dtype fp32",
    "onnx": "--head-top-k 5 --no-validate",
    "validate": "--max-new-tokens 4",
    "trt": "--max-seq-len 128",
    "evaluate": "--max-length 100 --held-out 1 --dtype fp32",
    "tune": "--quick --max-seconds 1 --max-new-tokens 16",
}
HELD = {"tune": {0, 3}}  # exit codes: on a busy machine, a tuning may not hold
SERVED = "smollm2-135m-instruct"  # the model for which clients ask
PATIENCE = 60  # seconds until a server listens


class Reader:
    """Types the commands of a page, one after the other."""

    def __init__(self, model: Path, heads: Path, make_bundle: Callable[..., Path]) -> None:
        self.model, self.make_bundle = model, make_bundle
        self.names = {
            "MODEL": str(model), "path/to/model": str(model), "HEADS": str(heads), "BUNDLE": "build/bundle",
            "ENGINE": "build/engine", "OUT": "build/out", "MERGED": "build/merged", "DATA": "build/data",
        }  # fmt: skip
        self.made = {"build/merged": self.merged, "build/data": self.answers, "answers.jsonl": self.answers}
        self.port = free_port()
        self.servers: list[subprocess.Popen[str]] = []

    def run(self, command: Command) -> None:
        text = self.on_our_port(command.text)
        words = shlex.split(text, comments=True)
        if words[0].startswith("MODEL="):
            return  # the tiny model it is
        if words[:2] == ["medusa-export", "serve"] or "uvicorn" in words:
            self.serve(words, command)
        elif words[0] == "medusa-export":
            self.invoke(words[1:], command)
        else:
            done = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, check=False, env=environment())
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            assert not done.stdout.startswith('{"error"'), f"{command}\n{done.stdout}"

    def run_python(self, block: Block) -> None:
        self.with_names(re.findall(r'"(build/[\w.-]+)"', block.text))
        words = [sys.executable, "-c", self.on_our_port(block.text)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
        assert done.returncode == 0, f"{block.page.name}:{block.line}\n{done.stdout}{done.stderr}"

    def on_our_port(self, text: str) -> str:
        return text.replace("localhost:8000", f"localhost:{self.port}").replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")

    def invoke(self, words: list[str], command: Command) -> None:
        words = self.with_names(words)
        name = words[1] if words[0] in {"heads", "recipes", "tree"} or words[1:2] == ["inspect"] else words[0]
        result = CliRunner().invoke(main, [*words, *SMALLER.get(name, "").split()])
        assert result.exit_code in HELD.get(name, {0}), f"{command}\n{words}\n{result.output}\n{result.exception}"

    def with_names(self, words: list[str]) -> list[str]:
        """The words, with what is there for them: inputs exist, outputs do not."""
        told = [self.names.get(word, word).replace("$MODEL", str(self.model)) for word in words]
        for before, word in zip(["", *told], told, strict=False):
            if before in {"-o", "--output"}:
                shutil.rmtree(word, ignore_errors=True)
                Path(word).parent.mkdir(parents=True, exist_ok=True)
            elif not Path(word).exists():
                self.provide(word)
        return told

    def provide(self, name: str) -> None:
        """What a reader has by this name."""
        if name in self.made:
            self.made[name](name)
        elif name == "my-prompts.txt":
            Path(name).write_text("the quick brown fox\nover the lazy dog\n", encoding="utf-8")
        elif scheme := re.fullmatch(r"build/\S*(int4|int8)\S*", name):
            make("quantize", self.make_bundle(), "-o", name, "--scheme", scheme[1])
        elif re.fullmatch(r"build/[\w.-]+", name):
            shutil.copytree(self.make_bundle(precision="fp16") if "fp16" in name else self.make_bundle(), name)

    def merged(self, name: str) -> None:
        make("heads", "convert", self.names["HEADS"], "-o", name, "--format", "medusa-1.0", "--model", self.model)

    def answers(self, name: str) -> None:
        make("distill", self.model, *SMALLER["distill"].split(), "-o", "build/answers")
        shutil.move(Path("build/answers") / ("answers.jsonl" if name.endswith(".jsonl") else ""), name)

    def serve(self, words: list[str], command: Command) -> None:
        assigned = [word for word in words if re.match(r"[A-Z_]+=", word)]
        variables = dict(word.split("=", 1) for word in assigned)
        self.with_names(list(variables.values()))
        words = self.with_names(words[len(assigned) :])
        program, *others = words
        module = {"medusa-export": "medusa_export", "uvicorn": "uvicorn"}[program]
        if program == "medusa-export":
            others += ["--served-model-name", SERVED]
        self.stop()
        self.servers.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *others, "--port", str(self.port)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment() | variables,
            )
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not listens(self.port):
            assert self.servers[-1].poll() is None, f"{command}\n{self.servers[-1].communicate()[0]}"
            assert time.monotonic() < deadline, str(command)
            time.sleep(0.05)
        if program == "medusa-export":
            wait = f"curl -sf --retry {PATIENCE} --retry-delay 1 --retry-all-errors"
            self.run(replace(command, text=f"{wait} localhost:{self.port}/ready"))

    def stop(self) -> None:
        for server in self.servers:
            server.terminate()
            server.communicate(timeout=PATIENCE)
        self.servers.clear()
        self.port = free_port()


def make(*words: object) -> None:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output


def environment() -> dict[str, str]:
    """With the project's packages, also for programs that are not started by pytest."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
