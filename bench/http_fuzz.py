"""Sends bodies that schemathesis makes of the server's own OpenAPI description, right ones and wrong ones, and mangled ones.

    python bench/http_fuzz.py BUNDLE [--examples 1000] [-o bench/results/http_fuzz.json]

Each operation gets this many requests of each kind. Use a tiny bundle, since this tests the server and not the model. It is a
failure if a status is 5xx, if a status or a body is not declared, if there is no answer within a minute, and if requests are
still under way at the end. Exit code 1 if there is any.
"""

from __future__ import annotations

import functools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish
from http_servers import medusa_server

HANG_SECONDS = 60
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
PLAIN: dict[str, dict[str, Any]] = {  # a right body for each operation that takes one
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 3, "stop": ["x"], "seed": 1},
    "/v1/completions": {"prompt": ["fox", [5, 6]], "max_tokens": 3, "logprobs": 2, "logit_bias": {"5": 1.5}},
    "/v1/responses": {
        "input": [{"role": "user", "content": "fox"}],
        "max_output_tokens": 3,
        "text": {"format": {"type": "text"}},
    },
    "/tokenize": {"messages": [{"role": "user", "content": "fox"}], "add_generation_prompt": True},
    "/detokenize": {"tokens": [5, 6, 7], "skip_special_tokens": True},
}


@dataclass
class Tally:
    """What came of the requests of one kind to one operation."""

    statuses: Counter[int] = field(default_factory=Counter)
    slowest_seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        """For the JSON file."""
        counts = {str(status): count for status, count in sorted(self.statuses.items())}
        return {"requests": self.statuses.total(), "statuses": counts, "slowest_seconds": round(self.slowest_seconds, 3)}


class Fuzz:
    """Requests to a server, and what is wrong with its responses.

    Args:
        url: the server's.
        examples: requests of each kind to each operation.
    """

    def __init__(self, url: str, examples: int) -> None:
        self.failures: list[str] = []
        self._url, self._examples = url, examples
        self._tallies: dict[str, Tally] = {}
        self._session = requests.Session()
        document = self._session.get(f"{url}/openapi.json", timeout=HANG_SECONDS).json()
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=url)
        self._operations = [result.ok() for result in schema.get_all_operations()]

    def run(self) -> dict[str, Any]:
        """Send all requests. Returns what came, by operation and kind; `failures` has what is wrong."""
        for operation in self._operations:
            self._made(operation, GenerationMode.POSITIVE)
            if operation.path in PLAIN:
                self._made(operation, GenerationMode.NEGATIVE)
                self._made(operation, GenerationMode.POSITIVE, is_plain=True)
                self._mangled(operation.path)
        self._check_end()
        return {name: tally.told() for name, tally in self._tallies.items()}

    def _made(self, operation: Any, mode: GenerationMode, *, is_plain: bool = False) -> None:
        """Bodies by schemathesis.

        Args:
            operation: of the description.
            mode: whether bodies follow the description.
            is_plain: take no more than a few fields of each, and the others from a right body. Most are answered then.
        """
        name = f"{operation.label} {'nearly right' if is_plain else mode.value}"
        rng = random.Random(name)

        def send(case: Case) -> None:
            if is_plain and isinstance(case.body, dict):
                others = sorted(case.body.keys() - PLAIN[operation.path].keys() - {"model"})
                chosen = rng.sample(others, min(len(others), rng.randint(1, 3)))
                case.body = PLAIN[operation.path] | {field: case.body[field] for field in chosen}
            response = self._timed(name, lambda: case.call(session=self._session, timeout=HANG_SECONDS))
            if response is None:
                return
            try:
                case.validate_response(response, checks=CHECKS)
            except (Failure, FailureGroup) as failure:
                self._note(f"{name}: {failure!r} for {case.body!r:.300}")
            self._check_status(name, response.status_code, case.body)

        self._examples_of(operation.as_strategy(generation_mode=mode), send)

    def _examples_of(self, cases: Any, send: Callable[[Any], None]) -> None:
        chosen = settings(
            max_examples=self._examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        chosen(given(cases)(send))()

    def _mangled(self, path: str) -> None:
        """Right bodies of which some bytes were lost, doubled or changed."""
        rng, name = random.Random(path), f"POST {path} mangled"
        for _ in range(self._examples):
            body = mangled(rng, json.dumps(PLAIN[path]).encode())
            response = self._timed(name, functools.partial(self._posted, path, body))
            if response is None:
                continue
            self._check_status(name, response.status_code, body)
            if response.status_code >= 400 and response.json()["error"].keys() != {"message", "type", "param", "code"}:
                self._note(f"{name}: {response.text:.200} is no error of OpenAI's shape, for {body!r:.300}")

    def _posted(self, path: str, body: bytes) -> requests.Response:
        headers = {"Content-Type": "application/json"}
        return self._session.post(self._url + path, data=body, headers=headers, timeout=HANG_SECONDS)

    def _timed(self, name: str, send: Callable[[], Any]) -> Any:
        tally, since = self._tallies.setdefault(name, Tally()), time.perf_counter()
        try:
            response = send()
        except UnicodeError:
            return None  # the client cannot even send it
        except requests.RequestException as error:
            self._note(f"{name}: {type(error).__name__}: {error}")
            return None
        tally.statuses[response.status_code] += 1
        tally.slowest_seconds = max(tally.slowest_seconds, time.perf_counter() - since)
        return response

    def _check_status(self, name: str, status: int, body: Any) -> None:
        if status >= 500:
            self._note(f"{name}: status {status} for {body!r:.300}")

    def _check_end(self) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while under_way := self._under_way():
            if time.monotonic() > deadline:
                self._note(f"{under_way:g} answers are still under way")
                return
            time.sleep(0.1)
        if self._session.get(f"{self._url}/health", timeout=HANG_SECONDS).status_code != 200:
            self._note("the server is not alive at the end")

    def _under_way(self) -> float:
        text = self._session.get(f"{self._url}/metrics", timeout=HANG_SECONDS).text
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(names))

    def _note(self, failure: str) -> None:
        if len(self.failures) < 100:
            self.failures.append(failure)


def mangled(rng: random.Random, body: bytes) -> bytes:
    """A body with one to four changes: bytes lost, doubled, changed, or put in from a list of bad ideas."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(body) + 1)
        end = min(len(body), start + rng.choice([0, 1, 1, 2, 5, 20]))
        ideas = [b"", body[start:end] * 2, bytes(rng.randrange(256) for _ in range(end - start)), rng.choice(IDEAS)]
        body = body[:start] + rng.choice(ideas) + body[end:]
    return body


IDEAS = [
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 400,
    b'""',
    b"[" * 200,
    b'{"a":' * 50,
    b"\\ud800",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"true",
    b"{}",
    b"[]",
    b'"x"',
    b",",
    b"<|end|>",
]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--examples", type=click.IntRange(1), default=1000, show_default=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("bench/results/http_fuzz.json"), show_default=True
)
def main(bundle: Path, examples: int, output: Path) -> None:
    """Fuzz a server of BUNDLE."""
    with medusa_server(bundle, 4) as server:
        fuzz = Fuzz(server.url, examples)
        since = time.perf_counter()
        operations = fuzz.run()
    total = sum(one["requests"] for one in operations.values())
    results = {
        "requests": total,
        "seconds": round(time.perf_counter() - since),
        "failures": fuzz.failures,
        "operations": operations,
    }
    publish({"environment": environment(), "examples": examples} | results, output)
    click.echo(f"{total} requests, {len(fuzz.failures)} failures")
    for failure in fuzz.failures[:20]:
        click.echo(f"  {failure}")
    sys.exit(1 if fuzz.failures else 0)


if __name__ == "__main__":
    main()
