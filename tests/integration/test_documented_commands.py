"""The commands and Python programs of README and of the guides run, in the order of each page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.documents import PAGES_THAT_RUN, ROOT, blocks
from tests.support.reader import Reader

Make = Callable[..., Path]
EMBEDDING = ROOT / "docs" / "embedding.md"  # tests/integration/test_examples.py runs its programs, in one session


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reader(
    make_model: Make, make_heads: Make, make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "recipes", "scripts", "deploy"):
        Path(name).symlink_to(ROOT / name)
    reader = Reader(make_model(), make_heads(num_layers=1, reads_root=False, shared_lm_head=False), make_bundle)
    yield reader
    reader.stop()


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=[str(page.relative_to(ROOT)) for page in PAGES_THAT_RUN])
def test_what_a_page_says_runs(page: Path, reader: Reader) -> None:
    for block in blocks(page):
        if block.language == "python" and page != EMBEDDING:
            reader.run_python(block)
        if block.language == "console":
            for command in block.commands():
                if command.mark is None:
                    reader.run(command)
