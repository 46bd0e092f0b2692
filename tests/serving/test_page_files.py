"""The files of the page at `/`, as a server sends them. No browser is needed here."""

from __future__ import annotations

import hashlib
import re
from importlib import resources

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from medusa_serve import page

ROOT = resources.files(page)
ADDRESS = re.compile(r"""(?:from|import|src=|href=|url\()\s*["']?((?:[a-z]+:)?/?[\w./-]+\.(?:js|mjs|css|svg))""")


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=page.routes()))


def test_every_file_comes_with_its_type_and_the_security_headers(client: TestClient) -> None:
    types = {}
    for route in page.routes():
        response = client.get(route.path)
        assert response.status_code == 200
        assert {name: response.headers[name] for name in page.SECURITY_HEADERS} == page.SECURITY_HEADERS
        types[route.path] = response.headers["Content-Type"].partition(";")[0]
    assert types["/"] == "text/html"
    assert types["/page/icon.svg"] == "image/svg+xml"
    assert types["/page/js/app.js"] == types["/page/vendor/purify.es.mjs"] == "text/javascript"
    assert types["/page/style/base.css"] == "text/css"


def test_the_policy_allows_nothing_but_the_server_itself() -> None:
    directives = dict(part.split(" ", 1) for part in page.CONTENT_SECURITY_POLICY.split("; "))
    assert directives.pop("default-src") == "'none'"
    assert directives.pop("require-trusted-types-for") == "'script'"
    assert directives.pop("trusted-types") == "dompurify"
    assert set(directives.values()) == {"'none'", "'self'"}


def test_a_file_that_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/js/app.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again = client.get("/page/js/app.js", headers={"If-None-Match": f'"other", W/{first.headers["ETag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["Content-Security-Policy"] == page.CONTENT_SECURITY_POLICY
    assert client.get("/page/js/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_other_files_of_the_package_are_not_served(client: TestClient) -> None:
    for path in ("/page/__init__.py", "/page/vendor/README.md", "/page/js/../__init__.py", "/page/index.html"):
        assert client.get(path).status_code == 404
    assert client.post("/").status_code == 405


def test_every_address_in_the_files_is_relative_and_served(client: TestClient) -> None:
    served = {route.path for route in page.routes()}
    found = set()
    for path in served - {"/page/icon.svg"}:
        if path.startswith("/page/vendor/"):
            continue
        for address in ADDRESS.findall(client.get(path).text):
            if address.startswith("import"):
                continue
            assert ":" not in address
            assert not address.startswith("/")
            found.add(str(client.base_url.join(path).join(address).path))
    assert found <= served
    assert found >= {path for path in served if path.endswith((".css", ".js", ".mjs"))}


def test_nothing_is_inline() -> None:
    html = (ROOT / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", html) == []
    assert re.findall(r"<script(?![^>]*\ssrc=)", html) == []


def test_vendored_files_are_those_that_were_published() -> None:
    vendor = ROOT / "vendor"
    table = re.findall(
        r"\| `([\w.]+)` \| (\w+) ([\d.]+),.*`([0-9a-f]{64})` \|", (vendor / "README.md").read_text(encoding="utf-8")
    )
    assert {name for name, *_ in table} == {file.name for file in vendor.iterdir() if file.name.endswith(("js",))}
    for name, _, version, digest in table:
        body = (vendor / name).read_bytes()
        assert hashlib.sha256(body).hexdigest() == digest
        assert version.encode() in body[:300]
        assert (vendor / f"{name.partition('.')[0]}.LICENSE").is_file()
