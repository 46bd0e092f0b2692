"""Bodies that schemathesis makes of the server's own OpenAPI description, and mangled ones: see `bench/http_fuzz.py`."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from bench.http_fuzz import PLAIN, Fuzz, mangled

from tests.support.server import Running, serving

EXAMPLES = 30


@pytest.mark.filterwarnings("ignore")  # schemathesis and jsonschema warn of what they will change
def test_no_body_finds_a_fault(tools_bundle: Path) -> None:
    with serving(tools_bundle, served_model_name=("tiny",)) as running:
        fuzz = Fuzz(running.url, EXAMPLES)
        operations = fuzz.run()
        assert not fuzz.failures, "\n".join(fuzz.failures)
        running.wait_until_idle()
    for path in PLAIN:
        for kind in ("positive", "negative", "nearly right", "mangled"):
            statuses = operations[f"POST {path} {kind}"]["statuses"]
            assert sum(statuses.values()) >= EXAMPLES / 2
            assert statuses.keys() <= {"200", "400", "404", "422"}
            assert kind in {"positive", "nearly right"} or "400" in statuses
        assert operations[f"POST {path} nearly right"]["statuses"].get("200", 0) >= 3  # some get as far as the model


def test_a_right_body_of_each_operation_is_answered(server: Running) -> None:
    for path, body in PLAIN.items():
        assert server.post(path, body).status_code == 200


def test_mangled_bodies_differ() -> None:
    body = json.dumps(PLAIN["/tokenize"]).encode()
    rng = random.Random(1)
    assert len({mangled(rng, body) for _ in range(100)}) > 90


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("broken", "told"), [(lambda *_, **__: ["no token"], "ST108"), (lambda *_, **__: 1 / 0, "500")])
def test_the_fuzzer_sees_what_is_wrong(
    server: Running, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., object], told: str
) -> None:
    """A server that answers with what it does not declare, and one that fails."""
    fuzz = Fuzz(server.url, 5)
    [tokenize] = [operation for operation in fuzz._operations if operation.path == "/tokenize"]
    monkeypatch.setattr(fuzz, "_operations", [tokenize])
    monkeypatch.setattr("medusa_serve.prompts.PromptReader.messages", broken)
    monkeypatch.setattr(logging.getLogger("medusa_serve.recorder"), "disabled", True)
    fuzz.run()
    assert any(told in failure for failure in fuzz.failures), fuzz.failures
