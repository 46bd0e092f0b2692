"""Two replicas on Ray Serve: load spreads, streams pass, a killed replica comes back, a client that retries loses nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from pydantic import ValidationError

from medusa_runtime import MedusaLM, OptionError
from medusa_serve.ray_settings import QUIET, RaySettings
from tests.support.models import save_random_heads, save_tiny_model
from tests.support.patience import PATIENCE
from tests.support.ray_cluster import RayCluster, ray_cluster

ray_app = pytest.importorskip("medusa_serve.ray_app", reason="Ray is not installed (extra ray)", exc_type=ImportError)
if (os.cpu_count() or 1) < 2:
    pytest.skip("two replicas need two cores", allow_module_level=True)

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "small", "models", "learn"]
PROMPTS = [" ".join(WORDS[first : first + 4]) for first in range(8)]
ENDLESS = {"max_tokens": 7000, "ignore_eos": True, "medusa": {"enabled": False}}  # takes some seconds


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a long context, so that a stream can be interrupted."""
    from medusa_export.bundle.export import export_bundle
    from medusa_export.command_options.export_options import ExportOptions

    folder = tmp_path_factory.mktemp("long")
    model = save_tiny_model(folder / "model", "llama", max_position_embeddings=8192)
    export_bundle(ExportOptions(str(model), save_random_heads(model, folder / "heads"), folder / "bundle"))
    return folder / "bundle"


@pytest.fixture(scope="module")
def cluster(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    options = ("--replicas", "2", "--threads", "1", "--served-model-name", "tiny", "--max-batch-size", "4", "--grace", "30")
    with ray_cluster(bundle, tmp_path_factory.mktemp("ray") / "output.txt", *options) as running:
        yield running


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[str, str]:
    """The runtime's own answers."""
    with MedusaLM.from_bundle(bundle, num_threads=1) as lm:
        return {text: lm.generate(messages(text), max_new_tokens=40).text for text in PROMPTS}


def messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": messages(text), "temperature": 0, "max_tokens": 40, **fields}


def test_load_spreads_and_no_token_is_wrong(cluster: RayCluster, expected: dict[str, str]) -> None:
    def ask(text: str) -> tuple[str, str, str]:
        response = cluster.client.post("/v1/chat/completions", json=chat(text))
        assert response.status_code == 200, response.text
        return text, response.json()["choices"][0]["message"]["content"], response.headers["x-replica-id"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, PROMPTS * 4))
    assert all(answer == expected[text] for text, answer, _ in answers)
    assert len({replica for _, _, replica in answers}) == 2


def test_metrics_are_those_of_all_replicas(cluster: RayCluster) -> None:
    assert list(cluster.metric("medusa_ready").values()) == [1.0, 1.0]
    as_openmetrics = cluster.client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert as_openmetrics.text.endswith("# EOF\n")
    assert as_openmetrics.text.count("# TYPE medusa_ready gauge") == 1


def test_headers_are_not_doubled(cluster: RayCluster) -> None:
    response = cluster.client.get("/version", headers={"X-Request-Id": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]


def test_a_stream_passes_as_it_is_made_and_a_client_that_goes_away_frees_its_slot(cluster: RayCluster) -> None:
    with cluster.client.stream("POST", "/v1/chat/completions", json=chat(PROMPTS[0], stream=True, **ENDLESS)) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["object"] == "chat.completion.chunk"
        replica = response.headers["x-replica-id"]
        assert cluster.metric("vllm:num_requests_running")[replica] == 1  # it goes on, and we have its first chunk
    _wait(lambda: not any(cluster.metric("vllm:num_requests_running").values()))
    assert cluster.metric("medusa_answers_total", outcome="cancelled")[replica] == 1
    _wait(lambda: cluster.metric("medusa_http_requests_total", status="499").get(replica) == 1, told=lambda: _requests(cluster))


def test_a_killed_replica_comes_back_and_a_client_that_retries_loses_nothing(
    cluster: RayCluster, expected: dict[str, str]
) -> None:
    before = cluster.pids("ServeReplica:medusa")
    assert len(before) == 2
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=8, timeout=120) as client:

        def ask(text: str) -> tuple[str, str | None]:
            answer = client.chat.completions.create(model="tiny", messages=messages(text), temperature=0, max_tokens=40)
            return text, answer.choices[0].message.content

        with ThreadPoolExecutor(8) as pool:
            under_way = [pool.submit(ask, text) for text in PROMPTS * 20]
            _wait(lambda: sum(one.done() for one in under_way) >= 16)
            os.kill(before[0], signal.SIGKILL)
            answers = [one.result() for one in under_way]
    assert all(answer == expected[text] for text, answer in answers)
    _wait(lambda: len(cluster.metric("medusa_ready")) == 2)
    after = cluster.pids("ServeReplica:medusa")
    assert len(after) == 2
    assert before[0] not in after


def test_a_stream_of_a_killed_replica_breaks_off_for_all_to_see(cluster: RayCluster) -> None:
    import httpx2

    with (
        pytest.raises(httpx2.RemoteProtocolError),
        cluster.client.stream("POST", "/v1/chat/completions", json=chat(PROMPTS[0], stream=True, **ENDLESS)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        for pid in cluster.pids("ServeReplica:medusa"):
            os.kill(pid, signal.SIGKILL)
        for _ in lines:
            pass
    _wait(lambda: len(cluster.metric("medusa_ready")) == 2)


def test_the_end_waits_for_what_is_under_way_and_leaves_no_process(cluster: RayCluster) -> None:
    """The last test of this file: it ends the cluster."""
    with cluster.client.stream("POST", "/v1/chat/completions", json=chat(PROMPTS[0], stream=True, **ENDLESS)) as response:
        lines = response.iter_lines()
        next(lines)
        cluster.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert cluster.process.wait(120) == 0, cluster.output.read_text(encoding="utf-8")
    _wait(lambda: not cluster.pids())


def _wait(done: Callable[[], bool], seconds: float = 120, told: Callable[[], object] = lambda: None) -> None:
    """Wait until something is so. told: what is shown if it does not come to be."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def _requests(cluster: RayCluster) -> str:
    """The counts of requests, and what the server printed last."""
    lines = cluster.client.get("/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("medusa_http_requests_total")]
    return "\n".join([*counts, *cluster.output.read_text(encoding="utf-8").splitlines()[-40:]])


def test_the_yaml_file_makes_the_application(bundle: Path) -> None:
    root = Path(__file__).parents[2]
    [application] = yaml.safe_load((root / "deploy/ray.yaml").read_text(encoding="utf-8"))["applications"]
    assert application["import_path"] == "medusa_serve.ray_app:app"
    settings = RaySettings.model_validate(application["args"] | {"bundle": bundle})
    assert (settings.num_replicas, settings.threads) == (2, 1)
    options = ray_app.deployment_options(settings)
    assert options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}
    assert "max_replicas_per_node" not in options


def test_the_application_takes_what_ray_reads_from_a_command_line(bundle: Path) -> None:
    words = {"bundle": str(bundle), "num_replicas": "2", "served_model_name": "tiny"}  # all of them are texts
    assert isinstance(ray_app.app(words), ray_app.serve.Application)
    with pytest.raises(ValidationError, match="num_replica\n"):
        ray_app.app(words | {"num_replica": "2"})


def test_replicas_scale_by_requests_and_take_a_machine_each_without_threads(bundle: Path) -> None:
    settings = RaySettings.model_validate({"bundle": bundle, "max_replicas": "4", "max_batch_size": "6", "max_queue": "10"})
    options = ray_app.deployment_options(settings)
    scaling = options["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 6)
    assert options["max_ongoing_requests"] >= 6 + 10
    assert options["max_replicas_per_node"] == 1
    assert "num_replicas" not in options


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"port": 80}, "port is not for replicas"),
        ({"num_replicas": 2, "max_replicas": 3}, "but not both"),
        ({"min_replicas": 2}, "need max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3, but max_replicas is 2"),
        ({"gpus": 1, "threads": 2}, "threads is only for the CPU"),
        ({"gpus": 1, "spin": "off"}, "spin is only for the CPU"),
        ({"spin": "sometimes"}, "spin\n.*'auto', 'on' or 'off'"),
        ({"backend": "abacus"}, "it must be one of"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        RaySettings.model_validate({"bundle": "b", **fields})


def test_replicas_that_do_not_fit_are_refused() -> None:
    from medusa_serve.ray_run import check_room

    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    check_room(RaySettings(bundle=Path("b"), num_replicas=2, threads=2), nodes)
    with pytest.raises(OptionError, match="3 replicas do not fit, there is room for 2"):
        check_room(RaySettings(bundle=Path("b"), num_replicas=3, threads=2), nodes)
    with pytest.raises(OptionError, match="room for 1: a replica has a machine to itself"):
        check_room(RaySettings(bundle=Path("b"), num_replicas=2), nodes)
    with pytest.raises(OptionError, match="a replica has a GPU"):
        check_room(RaySettings(bundle=Path("b"), gpus=1), nodes)


def test_a_call_that_the_proxy_cancels_is_a_client_that_has_gone() -> None:
    from ray.exceptions import TaskCancelledError

    seen: list[Any] = []

    async def waits(_: object, receive: Callable[[], Any], __: object) -> None:
        seen.append(await receive())

    async def cancelled() -> dict[str, Any]:
        raise TaskCancelledError

    asyncio.run(ray_app.BehindTheProxy(waits, "replica")({"type": "http"}, cancelled, None))
    assert seen == [{"type": "http.disconnect"}]


def test_a_wrong_bundle_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medusa_export", "ray", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "is not a bundle" in done.stderr


@pytest.mark.parametrize(
    ("options", "hosts", "warns"),
    [((), {"127.0.0.1", "::1", "localhost"}, False), (("--host", "0.0.0.0"), None, True)],
)
def test_the_address_decides_which_host_names_are_trusted(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], hosts: set[str] | None, warns: bool
) -> None:
    from click.testing import CliRunner

    from medusa_export.cli.ray import command
    from medusa_serve import ray_run

    seen: list[RaySettings] = []
    monkeypatch.setattr(ray_run, "serve_on_ray", lambda settings, *_: seen.append(settings))
    for name in QUIET:
        monkeypatch.setenv(name, "0")
    done = CliRunner().invoke(command, [str(bundle), "--replicas", "2", *options])
    assert done.exit_code == 0, done.output
    assert ("without a key" in done.output) == warns
    assert seen[0].trusted_hosts == hosts
    assert seen[0].num_replicas == 2
