"""What is told of requests that have ended, by a real server: the access log and the metrics."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.server import serving


def test_requests_are_logged_and_counted_but_probes_are_not_logged(tools_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    with serving(tools_bundle, access_log=str(log), served_model_name=("tiny",), log_texts=True) as server:
        for path in ("/health", "/ready", "/metrics", "/nowhere", "/page/js/nothing.js"):
            server.client.get(path)
        told = server.chat("fox", max_tokens=5).json()
        server.events("/v1/completions", {"prompt": "fox", "max_tokens": 4, "temperature": 0})
        server.chat(temperature=-1)
        metrics = server.client.get("/metrics").text
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("other", 404),
        ("/page", 404),
        ("/v1/chat/completions", 200),
        ("/v1/completions", 200),
        ("/v1/chat/completions", 400),
    ]
    chat, completion = lines[2], lines[3]
    assert chat["answer"] == told["choices"][0]["message"]["content"]
    assert "fox" in chat["prompt"]
    assert (chat["completion_tokens"], chat["streamed"], chat["finish_reasons"]) == (5, False, ["length"])
    assert (completion["completion_tokens"], completion["streamed"]) == (4, True)
    assert "temperature" in lines[4]["error"]
    assert 'medusa_http_requests_total{method="POST",path="/v1/chat/completions",status="200"} 1.0' in metrics
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 2.0' in metrics
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="tiny"} 2.0' in metrics


def test_texts_are_not_logged_unless_asked(tools_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    with serving(tools_bundle, access_log=str(log)) as server:
        server.chat("unmistakable", max_tokens=3)
        server.post("/v1/chat/completions", {"messages": [{"role": "unmistakable"}]})
        server.post("/v1/chat/completions", {"messages": [], "unmistakable": "unmistakable"})
    text = log.read_text(encoding="utf-8")
    assert len(text.splitlines()) == 3
    assert "unmistakable" not in text
