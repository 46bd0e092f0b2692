"""The manifest, and files against it."""

from __future__ import annotations

import json

import pytest

from medusa_export.bundles import is_bundle
from medusa_runtime import BundleError, Manifest
from medusa_runtime.bundle.manifest import file_facts
from tests.support.fake_backend import fake_manifest


@pytest.fixture
def bundle(tmp_path):
    manifest = fake_manifest()
    for name in ("weights.bin", "step.onnx", "heads.onnx", "tokenizer.json", "chat.json"):
        (tmp_path / name).write_bytes(b"x" * 1000)
        manifest.files[name] = file_facts(tmp_path / name)
    manifest.save(tmp_path)
    return tmp_path


def test_a_manifest_reads_back_as_it_was_written(bundle) -> None:
    manifest = Manifest.load(bundle)
    manifest.save(bundle)
    assert Manifest.load(bundle) == manifest
    assert manifest.mismatches(bundle) == []
    assert {path.name for path in bundle.iterdir()} == {"manifest.json", *manifest.files}


def test_only_a_whole_bundle_of_the_kind_and_nothing_else_may_be_replaced(bundle, tmp_path) -> None:
    assert is_bundle(bundle, "onnx")
    (bundle / "validation.json").write_text("{}")
    assert is_bundle(bundle, "onnx")
    assert not is_bundle(bundle, "tensorrt")
    (bundle / ".tuning.json.partial-0123456789abcdef").write_text("")  # by a run that was killed
    assert is_bundle(bundle, "onnx")
    (bundle / "thesis.txt").write_text("")
    assert not is_bundle(bundle, "onnx")
    for text in ("{}", "[]", "{", '{"kind": "onnx", "files": {}}'):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "manifest.json").write_text(text)
        assert not is_bundle(tmp_path / "other", "onnx")


def test_a_directory_without_one_is_no_bundle(tmp_path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data | {"schema_version": 99}, "schema version 99, this medusa-export reads 1"),
        (lambda data: data | {"precision": "fp8"}, "precision"),
        (lambda data: data | {"surprise": 1}, "surprise"),
        (lambda data: data | {"graphs": {}}, "graphs: heads, step is missing"),
        (lambda data: data | {"files": {}}, "files: chat.json, heads.onnx, step.onnx, tokenizer.json, weights.bin is missing"),
        (lambda data: data | {"files": data["files"] | {"../x": {"size": 1, "sha256": ""}}}, "'../x' is not a plain file name"),
        (lambda data: {key: value for key, value in data.items() if key != "model"}, "model: Field required"),
        (lambda _: [1, 2], "schema version None"),
    ],
)
def test_a_manifest_of_another_form_is_refused_in_one_line(bundle, change, message) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.load(bundle)
    assert "\n" not in str(caught.value)


def test_a_cut_manifest_is_refused(bundle) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(BundleError, match="cannot be read"):
        Manifest.load(bundle)


def test_each_kind_of_damage_is_told(bundle) -> None:
    manifest, weights = Manifest.load(bundle), bundle / "weights.bin"
    weights.write_bytes(b"x" * 999 + b"y")
    assert "sha256" in manifest.mismatches(bundle)[0]
    weights.write_bytes(b"x" * 10)
    assert manifest.mismatches(bundle) == ["weights.bin has 10 bytes, the manifest says 1000"]
    weights.unlink()
    assert manifest.mismatches(bundle) == ["weights.bin is missing"]
    with pytest.raises(BundleError, match=r"does not match its manifest: weights\.bin is missing; export the bundle again"):
        manifest.require_intact(bundle)
