"""The manifest, and files against it."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_export.bundle.kinds import is_bundle
from medusa_runtime import BundleError, Manifest
from medusa_runtime.bundle.manifest import VERSIONS, file_facts
from tests.support.fake_backend import fake_manifest
from tests.support.odd_json import ODD, places, with_value


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
        (lambda data: data | {"schema_version": 99}, "it has schema version 99, medusa-export .* reads 1 to 3; read it with"),
        (lambda data: data | {"precision": "fp8"}, "precision"),
        (lambda data: data | {"surprise": 1}, "surprise"),
        (lambda data: data | {"graphs": {}}, "graphs: heads, step is missing"),
        (lambda data: data | {"files": {}}, "files: heads.onnx, step.onnx, weights.bin is missing"),
        (lambda data: data | {"tree": {}}, "tree: it must have parents and ranks"),
        (lambda data: data | {"tree": {"parents": [-1, 0], "ranks": [0]}}, "tree: it must have parents and ranks"),
        (lambda data: data | {"files": data["files"] | {"x": {"size": -1, "sha256": ""}}}, "files.x.size: "),
        (lambda data: data | {"model": data["model"] | {"vocab_size": 10**30}}, "model.vocab_size: "),
        (lambda data: data | {"a\nb": 1}, "a b: Extra inputs"),
        (lambda data: data | {"schema_version": "9" * 1000}, "it has schema version '9{39}, and a version is"),
        (lambda data: {key: value for key, value in data.items() if key != "model"}, "model: Field required"),
        (lambda data: data | {"schema_version": 0}, "it has schema version 0, and a version is a number from 1 on; make"),
        (lambda data: data | {"schema_version": True}, "it has schema version True, and a version is"),
        (lambda data: {key: value for key, value in data.items() if key != "schema_version"}, "has no schema_version"),
        (lambda _: [1, 2], "has no schema_version, so it is no manifest; export the bundle again"),
    ],
)
def test_a_manifest_of_another_form_is_refused_in_one_line(bundle, change, message) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.load(bundle)
    assert "\n" not in str(caught.value)


def test_a_bundle_of_the_first_schema_is_read_and_its_file_stays(bundle) -> None:
    path, newest = bundle / "manifest.json", Manifest.load(bundle)
    old = json.dumps(json.loads(path.read_text()) | {"schema_version": 1})
    path.write_text(old)
    assert Manifest.load(bundle) == newest
    assert path.read_text() == old
    Manifest.load(bundle).save(bundle)  # as `validate` does
    assert json.loads(path.read_text())["schema_version"] == VERSIONS.newest == 3


def test_a_newer_bundle_names_the_version_that_reads_it(bundle) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text()) | {"schema_version": 4, "field_of_tomorrow": {}}
    data["provenance"]["versions"] = {"medusa-export": "9.1.0", "torch": "3"}
    path.write_text(json.dumps(data))
    here = importlib.metadata.version("medusa-export")
    with pytest.raises(BundleError) as caught:
        Manifest.load(bundle)
    assert str(caught.value) == (
        f"{path} cannot be read: it has schema version 4, medusa-export {here} reads 1 to 3; "
        "read it with medusa-export 9.1.0, which made it, or a later one, or make the bundle again"
    )


NO_NAMES = ("../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0b", "a\nb", "\x7f", "x" * 256, "é" * 128)


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_could_lead_out_of_the_bundle_is_refused_wherever_it_stands(bundle, name: str) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    facts = {"size": 1, "sha256": ""}
    engine = an_engine(name)
    for changed in (
        data | {"files": data["files"] | {name: facts}},
        data | {"graphs": data["graphs"] | {"step": data["graphs"]["step"] | {"file": name}}},
        data | {"engine": engine},
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(BundleError, match=r"is not a plain file name; export the bundle again") as caught:
            Manifest.load(bundle)
        assert "\n" not in str(caught.value)


def an_engine(plan: str, source: str = "../source") -> dict:
    """An engine's facts, as far as they are needed."""
    whole = {"size": 1, "sha256": "", "regions": []}
    return {
        "flavor": "rtx", "tensorrt_version": "1", "compute_capabilities": [], "source_bundle": "",
        "aliases": {f"present.0.{part}": f"past.0.{part}" for part in ("key", "value")},
        "profiles": {"prefill": {}, "verify": {}, "heads": {}},
        "shared_weights": {"source": source, "file": {"size": 1, "sha256": ""}, "plans": {plan: whole}},
    }  # fmt: skip


def test_plans_that_share_weights_need_their_entries(bundle) -> None:
    path = bundle / "manifest.json"
    limits = {"max_seq_len": 8, "max_batch_size": 1, "max_tree_nodes": 4, "max_prefill_tokens": 8, "capacity": 8}
    data = json.loads(path.read_text()) | {"kind": "tensorrt", "limits": limits}
    path.write_text(json.dumps(data | {"engine": an_engine("step.onnx")}))
    with pytest.raises(BundleError, match=r"engine\.shared_weights\.plans: heads\.onnx is missing; copy the engines again"):
        Manifest.load(bundle)
    path.write_text(json.dumps(data | {"engine": an_engine("step.onnx", "a\0b")}))
    with pytest.raises(BundleError, match=r"shared_weights\.source: Value error, .* is not a directory's name"):
        Manifest.load(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "cannot be read .it is nested too deeply.; export"),
        ('{"schema_version": 1, "tree": ' + '{"a":' * 100_000, "cannot be read .it is nested too deeply.; export"),
        ('{"schema_version": ' + "[" * 900 + "]" * 900 + "}", "schema version |cannot be read"),
        ("9" * 5000, "cannot be read .Exceeds the limit"),
        ('{"schema_version": 1, "kind": "\\ud800"}', "kind: "),
        ("\ufeff{}", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_json_that_no_manifest_is_made_of_is_refused_in_one_line(bundle, text: str, message: str) -> None:
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.load(bundle)
    assert "\n" not in str(caught.value)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_field_holds_a_manifest_loads_or_is_refused_in_one_line(bundle, data: st.DataObject) -> None:
    path, kept = bundle / "manifest.json", bundle / "kept.json"
    if not kept.exists():
        kept.write_bytes(path.read_bytes())
    facts = json.loads(kept.read_text())
    if data.draw(st.booleans()):
        facts |= {"kind": "tensorrt", "engine": an_engine("step.onnx")}
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(facts))))
        facts = with_value(facts, place, data.draw(ODD))
    path.write_text(json.dumps(facts))
    try:
        manifest = Manifest.load(bundle)
    except BundleError as error:
        refusal = str(error)
    else:
        refusal = "loaded"
    assert len(refusal.splitlines()) == 1
    if refusal != "loaded":
        return
    manifest.save(bundle)
    assert manifest.mismatches(bundle) is not None
    assert manifest.content_digest()


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
