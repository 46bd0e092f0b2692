"""A real server on a bundle, in a thread of the test's process."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from medusa_runtime import Manifest, MedusaLM, choose_backend
from medusa_runtime.bundle.manifest import FileFacts
from medusa_serve.run import Server, address, listening, make_server
from medusa_serve.settings import ServerSettings
from medusa_serve.state import ServedBundle

TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinks %}<think>\n{% endif %}{% endif %}{# </think> #}"
)


@dataclass
class Running:
    """A server that runs."""

    server: Server
    url: str
    client: httpx2.Client

    @property
    def lm(self) -> MedusaLM:
        return self.server.state.lm

    def post(self, path: str, body: Any = None, **words: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **words) if body is not None else self.client.post(path, **words)

    def chat(self, text: str = "the quick brown fox", **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12, **fields}
        return self.post("/v1/chat/completions", body)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream; the last of a chat is the text [DONE]."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        return [one if one == "[DONE]" else json.loads(one) for one in data]

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while (stats := self.lm.stats()).num_active + stats.num_waiting or self.server.state.num_under_way:
            assert time.monotonic() < deadline, stats
            time.sleep(0.01)


@contextmanager
def serving(
    bundle: Path, *, ready: bool = True, max_batch_size: int = 4, max_queue: int = 8, **settings: Any
) -> Iterator[Running]:
    """Serve a bundle. ready: wait until it takes requests."""
    manifest = Manifest.load(bundle)
    placement = choose_backend(manifest)

    def open_model() -> MedusaLM:
        return MedusaLM.from_bundle(bundle, placement.backend, max_batch_size=max_batch_size, max_queue=max_queue)

    with serving_model(ServedBundle(manifest, placement, open_model), ready=ready, **settings) as running:
        yield running


@contextmanager
def serving_model(served: ServedBundle, *, ready: bool = True, **settings: Any) -> Iterator[Running]:
    chosen = ServerSettings(**({"port": 0, "grace": 5.0, "access_log": "off"} | settings))
    server = make_server(chosen, served)
    with listening(chosen) as listener:
        url = address(chosen, listener)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        transport = httpx2.HTTPTransport(uds=str(chosen.uds)) if chosen.uds is not None else None
        with httpx2.Client(base_url="http://localhost" if transport else url, transport=transport, timeout=60) as client:
            try:
                deadline = time.monotonic() + 60
                while ready and client.get("/ready").status_code != 200:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                yield Running(server, url, client)
            finally:
                server.handle_exit(signal.SIGTERM, None)
                thread.join(60)
                assert not thread.is_alive()


def with_template(bundle: Path, target: Path, template: str = TOOLS_TEMPLATE) -> Path:
    """A copy of a bundle with another chat template."""
    shutil.copytree(bundle, target)
    chat = json.loads((target / "chat.json").read_text(encoding="utf-8"))
    (target / "chat.json").write_text(json.dumps(chat | {"template": template}), encoding="utf-8")
    manifest = Manifest.load(target)
    data = (target / "chat.json").read_bytes()
    manifest.files["chat.json"] = FileFacts(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest.save(target)
    return target
