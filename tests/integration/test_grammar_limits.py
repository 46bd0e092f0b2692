"""Structures made to hurt: deep ones, which would overflow a stack and end the process, and large ones."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_runtime import OptionError, TextCodec
from medusa_runtime.text.grammar import MAX_BYTES, GrammarCompiler
from medusa_runtime.text.stack import with_stack
from tests.support.patience import PATIENCE

DEPTH = 1500  # enough to overflow 8 MB, the usual stack of a thread
REFERENCES = {f"a{place}": {"$ref": f"#/$defs/a{place + 1}"} for place in range(DEPTH)}
OBJECTS = {f"a{place}": {"properties": {"x": {"$ref": f"#/$defs/a{place + 1}"}}, "required": ["x"]} for place in range(DEPTH)}
DEEP = {
    "objects": {"json_schema": {"$ref": "#/$defs/a0", "$defs": OBJECTS | {f"a{DEPTH}": {"type": "integer"}}}},
    "references": {"json_schema": {"$ref": "#/$defs/a0", "$defs": REFERENCES | {f"a{DEPTH}": {"type": "integer"}}}},
    "rules": {"grammar": "start: a0\n" + "".join(f'a{n}: "x" a{n + 1}\n' for n in range(3500)) + 'a3500: "y"'},
}
PROGRAM = """
import json, sys, threading
from medusa_runtime import TextCodec
from medusa_runtime.text.grammar import GrammarCompiler

def use():
    guide = GrammarCompiler(TextCodec(sys.argv[1]), 320, [1]).compile(json.loads(sys.stdin.read()))
    print(int(guide.copy().allowed([]).any()))

thread = threading.Thread(target=use)  # as the server does, not in the main thread
thread.start()
thread.join()
"""


@pytest.mark.parametrize("kind", DEEP)
def test_a_deep_structure_does_not_end_the_process(make_bundle: Callable[..., Path], kind: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(make_bundle())]
    done = subprocess.run(
        command, input=json.dumps(DEEP[kind]), capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


@pytest.mark.parametrize(
    "structure",
    [
        {"json_schema": {"enum": ["x" * MAX_BYTES["json_schema"]]}},
        {"regex": "x" * (MAX_BYTES["regex"] + 1)},
        {"choice": ["x" * 1000] * 300},
        {"grammar": "start: " + "b | " * 20_000 + 'b\nb: "x"'},
    ],
    ids=list(MAX_BYTES),
)
def test_a_large_structure_is_refused(make_bundle: Callable[..., Path], structure: dict[str, object]) -> None:
    [name] = structure
    with pytest.raises(OptionError, match=rf"{name} cannot be used: it has \d+ bytes; it must have at most"):
        GrammarCompiler(TextCodec(make_bundle()), 320, [1]).compile(structure)


def test_work_with_a_stack_of_its_own_leaves_the_size_of_others_alone() -> None:
    before = threading.stack_size()
    assert with_stack(1 << 26, lambda: threading.current_thread().name) != threading.current_thread().name
    assert threading.stack_size() == before
    with pytest.raises(KeyError, match="x"):
        with_stack(1 << 26, lambda: {}["x"])
