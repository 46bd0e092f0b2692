"""A server on a tiny bundle, whose chat template knows tools and reasoning. A browser, and pages of scripted servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import chromium, watched_page
from tests.support.scripted_server import Script, ScriptedServer
from tests.support.server import Running, serving, with_template


@pytest.fixture(scope="session")
def tools_bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(make_bundle(), tmp_path_factory.mktemp("tools") / "bundle")


@pytest.fixture(scope="module")
def server(tools_bundle: Path) -> Iterator[Running]:
    with serving(tools_bundle, served_model_name=("tiny", "alias")) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")  # not longer: while Playwright runs, no other test in this process can run an event loop
def browser() -> Iterator[Any]:
    """Chromium; the test is skipped if there is none."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens the page of a server that answers from scripts. Gives the page and the server."""
    with ExitStack() as stack:

        def open_page(
            *scripts: Script, api_key: str | None = None, root_path: str = "", **context: Any
        ) -> tuple[Any, ScriptedServer]:
            server = stack.enter_context(ScriptedServer(*scripts, api_key=api_key).serving(root_path))
            return stack.enter_context(watched_page(browser, server.url, **context)), server

        yield open_page
