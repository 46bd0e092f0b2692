"""`tuning.json`: its entries for devices, and when they are used."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medusa_export.bundle.kinds import is_bundle
from medusa_export.measure.tune.keep import keep
from medusa_runtime import BundleError, CandidateTree, DynamicTree, Manifest, StepCosts
from medusa_runtime.bundle import cpu
from medusa_runtime.bundle.cpu import cpu_name, device_key
from medusa_runtime.bundle.manifest import FileFacts, Provenance
from medusa_runtime.drafting.tuning import DeviceTuning, TunedBatch, TunedTree, Tuning, tuned
from tests.support.fake_backend import fake_manifest
from tests.support.odd_json import ODD, places, with_value
from tests.support.patience import PATIENCE

WITHOUT_AMX = Path(__file__).parents[2] / "bench" / "without_amx.py"
COSTS = StepCosts([1, 4], [1, 8], [64], [[[1.0, 2.0], [1.5, 5.0]]], [0.1, 0.2], [0.01, 0.02])
STATIC = CandidateTree.from_choices([[0], [0, 0], [1]])
HERE, THERE = "ort-cpu, this CPU, 2 threads on 2 cores", "ort-cpu, another CPU, 8 threads on 8 cores"


def tree(nodes: int, static: CandidateTree | None = None) -> TunedTree:
    return TunedTree(
        nodes=nodes,
        tokens_per_step=1.5,
        nodes_per_step=nodes,
        step_seconds=0.1,
        tokens_per_second=15.0,
        tree=static.to_json() if static else None,
    )


def batch(size: int, nodes: int, best: str = "dynamic") -> TunedBatch:
    return TunedBatch(batch_size=size, best=best, plain=tree(1), static=tree(4, STATIC), dynamic=tree(nodes))


def device(*batches: TunedBatch) -> DeviceTuning:
    return DeviceTuning(
        backend="ort-cpu",
        processor="this CPU",
        threads=2,
        cores=2,
        provenance=Provenance(command=["medusa-export", "tune"], versions={}, created=""),
        costs=COSTS,
        acceptance_from="nowhere",
        accuracy=[[0.5, 0.2]],
        capacity=64,
        batches=list(batches) or [batch(1, 12), batch(4, 6), batch(8, 2)],
    )


@pytest.fixture
def manifest() -> Manifest:
    found = fake_manifest()
    found.files["weights.bin"] = FileFacts(size=1, sha256="aa")
    return found


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.WARNING
        self.lines.append(record.getMessage())


@pytest.fixture
def warned():
    """The lines logged."""
    handler, log = Lines(), logging.getLogger("medusa_runtime.drafting.tuning")
    log.addHandler(handler)
    yield handler.lines
    log.removeHandler(handler)


def test_what_is_kept_reads_back(tmp_path, manifest, warned) -> None:
    keep(tmp_path, manifest, HERE, device())
    assert tuned(tmp_path, manifest, HERE) == device()
    assert warned == []
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]
    assert json.loads((tmp_path / "tuning.json").read_text())["schema_version"] == 3


def test_no_tuning_is_no_reason_for_a_warning(tmp_path, manifest, warned) -> None:
    assert tuned(tmp_path, manifest, HERE) is None
    assert warned == []


def test_devices_stand_side_by_side_and_the_same_one_is_replaced(tmp_path, manifest) -> None:
    keep(tmp_path, manifest, HERE, device())
    keep(tmp_path, manifest, THERE, device(batch(1, 3)))
    keep(tmp_path, manifest, HERE, device(batch(1, 5)))
    assert tuned(tmp_path, manifest, HERE) == device(batch(1, 5))
    assert tuned(tmp_path, manifest, THERE) == device(batch(1, 3))


def test_a_tuning_for_another_device_is_told_in_one_line(tmp_path, manifest, warned) -> None:
    keep(tmp_path, manifest, THERE, device())
    assert tuned(tmp_path, manifest, HERE) is None
    [line] = warned
    assert THERE in line
    assert HERE in line
    assert line.endswith(f"medusa-export tune {tmp_path}")


def test_a_tuning_of_other_files_is_not_used_nor_kept(tmp_path, manifest, warned) -> None:
    keep(tmp_path, manifest, HERE, device())
    manifest.files["weights.bin"] = FileFacts(size=1, sha256="bb")
    assert tuned(tmp_path, manifest, HERE) is None
    assert "is of other files" in warned[0]
    keep(tmp_path, manifest, THERE, device())
    assert list(Tuning.load(tmp_path).devices) == [THERE]


def changed(**changes: object) -> str:
    data = json.loads(Tuning(bundle="x", devices={HERE: device()}).model_dump_json())
    for path, value in changes.items():
        *inner, last = path.split("__")
        place = data
        for step in inner:
            place = place[HERE if step == "here" else int(step) if step.isdigit() else step]
        place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged (Expecting value"),
        ("{}", "Field required"),
        ("[1]", "is damaged ("),
        (changed(schema_version=4), "cannot be read (it has schema version 4, medusa-export "),
        (changed(schema_version="1"), "cannot be read (it has schema version '1', and a version is a number"),
        (changed(devices__here__costs__widths=[8, 1]), "its axes do not ascend"),
        (changed(devices__here__costs__host_seconds=[1.0]), "not as large as it says"),
        (changed(devices__here__costs__head_seconds=[1.0, -1.0]), "takes no time"),
        (changed(devices__here__batches=[]), "batches"),
        (changed(devices__here__batches__0__static__tree={"parents": [0], "ranks": [0]}), "cannot be read (a tree begins"),
        (changed(devices__here__batches__0__static__tree=None), "the static tree is missing"),
        (changed(devices__here__batches__0__dynamic__nodes=5000), "1 to 1024 nodes"),
        (changed(devices__here__surprise=1), "surprise"),
    ],
)
def test_a_damaged_tuning_is_told_in_one_line_and_stops_nothing(tmp_path, manifest, warned, text, message) -> None:
    (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(BundleError) as caught:
        Tuning.load(tmp_path)
    assert message in str(caught.value)
    assert tuned(tmp_path, manifest, HERE) is None
    [line] = warned
    assert "\n" not in line
    assert message in line
    keep(tmp_path, manifest, HERE, device())
    assert tuned(tmp_path, manifest, HERE) is not None


def test_a_tuning_of_the_first_schema_is_used(tmp_path, manifest, warned) -> None:
    keep(tmp_path, manifest, HERE, device())
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    assert tuned(tmp_path, manifest, HERE) == device()
    assert warned == []


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_field_holds_a_tuning_loads_or_is_refused_in_one_line(tmp_path, data: st.DataObject) -> None:
    facts = json.loads(changed())
    for _ in range(data.draw(st.integers(1, 3))):
        facts = with_value(facts, data.draw(st.sampled_from(list(places(facts)))), data.draw(ODD))
    (tmp_path / "tuning.json").write_text(json.dumps(facts))
    try:
        tuning = Tuning.load(tmp_path)
    except BundleError as error:
        told = str(error)
    else:
        assert tuning is not None
        told = "loaded"
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"devices": ' + '{"a":' * 100_000, "9" * 5000, "\ud800", "\ufeff{}"])
def test_json_that_no_tuning_is_made_of_is_refused_in_one_line(tmp_path, text: str) -> None:
    (tmp_path / "tuning.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(BundleError) as caught:
        Tuning.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_tree_that_the_heads_cannot_give_is_not_used(tmp_path, manifest, warned) -> None:
    deep = batch(1, 4).model_copy(update={"static": tree(6, CandidateTree.from_choices([[0] * 5]))})
    keep(tmp_path, manifest, HERE, device(deep))
    assert tuned(tmp_path, manifest, HERE) is None
    assert "5 deep" in warned[0]


def test_the_batch_that_may_come_chooses_the_tree() -> None:
    found = device()
    assert found.choice(1) == (DynamicTree(12), COSTS)
    assert found.choice(8) == (DynamicTree(12), COSTS)  # one sequence alone may come as well
    assert device(batch(4, 6), batch(8, 2)).choice(2) == (DynamicTree(6), COSTS)
    assert device(batch(4, 6), batch(8, 2)).choice(32) == (DynamicTree(6), COSTS)
    static = device(batch(1, 3, "static"), batch(4, 6, "static"))
    assert static.choice(1) == (STATIC, None)
    assert static.choice(4) == (DynamicTree(6), COSTS)


def test_prompt_lookup_has_room_in_the_tree() -> None:
    assert device().choice(8, 16) == (DynamicTree(16), COSTS)
    assert device(batch(1, 24)).choice(1, 16) == (DynamicTree(24), COSTS)
    assert device(batch(1, 3, "static")).choice(1, 16) == (DynamicTree(16), COSTS)
    assert device(batch(1, 1, "plain")).choice(1, 16) == (DynamicTree(1), COSTS)  # without heads: the engine has room then


def test_what_is_known_of_the_next_smaller_batch_is_taken() -> None:
    found = device()
    assert [found.batch(size).batch_size for size in (1, 3, 4, 100)] == [1, 1, 4, 8]
    assert device(batch(4, 6)).batch(1).batch_size == 4


def test_a_batch_has_a_sequence_at_least() -> None:
    assert batch(1, 12).batch_size == 1
    with pytest.raises(ValidationError, match="batch_size"):
        batch(0, 12)


def test_a_tuned_bundle_may_be_replaced(tmp_path, manifest) -> None:
    manifest.save(tmp_path)
    keep(tmp_path, manifest, HERE, device())
    assert is_bundle(tmp_path, "onnx")


def test_a_device_is_named_by_what_its_speed_depends_on(tmp_path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nmodel name\t: A  CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f sse\n\nprocessor : 1\nmodel name\t: B\n"
    )
    assert cpu_name(info) == "A CPU @ 2 GHz (avx512f avx2)"
    info.write_text("processor : 0\nFeatures : fp asimddp i8mm\nCPU part : 0xd40\n")  # as on Arm, which names no model
    assert cpu_name(info) == f"{platform.processor() or platform.machine()} (i8mm asimddp)"
    assert len({device_key("ort-cpu", num_threads=number) for number in (91, 92)}) == 2
    assert device_key("x", num_threads=3, processor="A GPU") == "x, A GPU"  # whatever the CPU beside it does


@pytest.mark.parametrize(("is_allowed", "name"), [(True, "A CPU (amx_int8 avx2)"), (False, "A CPU (avx2)")])
def test_a_device_that_may_not_use_amx_is_another_device(tmp_path, monkeypatch, is_allowed, name) -> None:
    """A sandbox may refuse it. Steps then take other kernels, so another tuning is needed."""
    info = tmp_path / "cpuinfo"
    info.write_text("model name : A CPU\nflags : avx2 amx_int8\n", encoding="utf-8")
    monkeypatch.setattr(cpu, "may_use_amx", lambda: is_allowed)
    assert cpu_name(info) == name


@pytest.mark.skipif("amx_int8" not in cpu_name(), reason="this processor has no AMX")
def test_a_process_whose_system_refuses_amx_knows_that_it_has_none() -> None:
    program = "from medusa_runtime.bundle.cpu import cpu_name; print(cpu_name())"
    command = [sys.executable, str(WITHOUT_AMX), sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ran.stdout.strip() == cpu_name().replace("amx_int8 ", "")


def test_a_machine_without_cpuinfo_has_a_name_too(tmp_path, monkeypatch) -> None:
    assert cpu_name(tmp_path / "none") == (platform.processor() or platform.machine())
    monkeypatch.setattr(platform, "processor", str)
    monkeypatch.setattr(platform, "machine", str)
    assert cpu_name(tmp_path / "none") == "unknown CPU"
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    assert device_key("ort-cpu") == "ort-cpu, unknown CPU, 6 threads on 6 cores"
