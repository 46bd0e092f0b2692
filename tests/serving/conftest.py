"""A server on a tiny bundle, whose chat template knows tools and reasoning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.server import Running, serving, with_template


@pytest.fixture(scope="session")
def tools_bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(make_bundle(), tmp_path_factory.mktemp("tools") / "bundle")


@pytest.fixture(scope="module")
def server(tools_bundle: Path) -> Iterator[Running]:
    with serving(tools_bundle, served_model_name=("tiny", "alias")) as running:
        yield running
        running.wait_until_idle()
