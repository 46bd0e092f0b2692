"""A runtime's checks before it loads a plan, and stripped plans."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.engine.strip import Stored, find_regions, strip_plan
from medusa_runtime.bundle.manifest import (
    EngineFacts,
    FileFacts,
    GraphFacts,
    HeadFacts,
    Limits,
    Manifest,
    ModelFacts,
    PartFacts,
    Provenance,
    RegionFacts,
    SharedWeights,
    StrippedPlan,
    file_facts,
)
from medusa_runtime.bundle.plans import open_plan, plan_gaps, require_loadable, restore
from medusa_runtime.errors import BackendError, BundleError

RTX = {"flavor": "rtx", "tensorrt_version": "1.7.1.116"}
FULL = {"flavor": "tensorrt", "tensorrt_version": "11.1.0.20"}


def manifest(**engine: Any) -> Manifest:
    facts = {
        "flavor": "rtx",
        "tensorrt_version": "1.7.1.116",
        "compute_capabilities": ["8.6", "8.9"],
        "profiles": {},
        "aliases": {},
        "source_bundle": "",
    }
    return Manifest(
        kind="tensorrt",
        model=ModelFacts(
            name="tiny", architecture="Tiny", vocab_size=8, hidden_size=8, num_layers=1, num_attention_heads=1,
            num_kv_heads=1, head_dim=8, eos_token_ids=[],
        ),
        heads=HeadFacts(num_heads=1, num_layers=1, top_k=1, shared_lm_head=True, sha256=""),
        precision="fp16",
        opset=24,
        limits=Limits(max_seq_len=8),
        graphs={name: GraphFacts(file=f"{name}.plan", target="", inputs=[], outputs=[]) for name in ("step", "heads")},
        tree={},
        files={f"{name}.plan": FileFacts(size=4, sha256="") for name in ("step", "heads")},
        provenance=Provenance(command=[], versions={}, created=""),
        engine=EngineFacts.model_validate(facts | engine),
    )  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("step", "heads"):
        (tmp_path / f"{name}.plan").write_bytes(b"plan")
    return tmp_path


def test_a_manifest_from_before_loads() -> None:
    facts = manifest().engine
    assert facts is not None
    assert facts.weights == "as-is"
    assert facts.hardware_compatibility == "none"
    assert facts.shared_weights is None
    assert facts.built_with == facts.device_memory == {}


def test_what_an_engine_was_built_for_loads_it(directory: Path) -> None:
    for capability in ("8.6", "8.9", None):
        require_loadable(manifest(), directory, **RTX, compute_capability=capability)
    full = manifest(**FULL)
    require_loadable(full, directory, **FULL, compute_capability="8.9")


@pytest.mark.parametrize(
    ("engine", "here", "message"),
    [
        ({}, FULL, r"TensorRT-RTX 1\.7\.1\.116 and cannot be loaded with TensorRT 11\.1\.0\.20; .* --flavor tensorrt"),
        (FULL, RTX, r"TensorRT 11\.1\.0\.20 and cannot be loaded with TensorRT-RTX 1\.7\.1\.116; .* --flavor rtx"),
        ({}, RTX | {"tensorrt_version": "1.7.2.1"}, r"with TensorRT-RTX 1\.7\.1\.116, this machine has 1\.7\.2\.1; install"),
        ({"version_compatible": True}, RTX | {"tensorrt_version": "1.8"}, r"this machine has 1\.8"),
        (FULL, FULL | {"tensorrt_version": "11.2.0.1"}, r"this machine has 11\.2\.0\.1"),
        (FULL | {"version_compatible": True}, FULL | {"tensorrt_version": "11.0.9.9"}, r"this machine has 11\.0\.9\.9"),
        (FULL | {"version_compatible": True}, FULL | {"tensorrt_version": "12.0.0.1"}, r"this machine has 12\.0\.0\.1"),
        ({}, RTX | {"compute_capability": "12.0"}, r"capability 8\.6, 8\.9, this one has 12\.0; .* --compute-capability 12\.0"),
        (FULL, FULL | {"compute_capability": "9.0"}, r"8\.6, 8\.9, this one has 9\.0; .* --flavor tensorrt, on this machine"),
        (
            FULL | {"hardware_compatibility": "same-compute-capability"},
            FULL | {"compute_capability": "9.0"},
            r"8\.6, 8\.9, this one has 9\.0",
        ),
        (
            FULL | {"hardware_compatibility": "ampere-plus"},
            FULL | {"compute_capability": "7.5"},
            r"capability 8\.0 and later, this one has 7\.5",
        ),
    ],
)
def test_another_runtime_or_gpu_is_told_with_both_sides(
    directory: Path, engine: dict[str, Any], here: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError, match=message) as refused:
        require_loadable(manifest(**engine), directory, **here)
    assert str(directory) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_compatible_engines_load_in_more_places(directory: Path) -> None:
    newer = FULL | {"tensorrt_version": "11.10.0.1"}
    require_loadable(manifest(**FULL, version_compatible=True), directory, **newer)
    later = FULL | {"compute_capability": "12.0"}
    require_loadable(manifest(**FULL, hardware_compatibility="ampere-plus"), directory, **later)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"pla", "step.plan has 3 bytes, the manifest says 4: it is truncated; copy it again, or build them again"),
        (b"a plan", "step.plan has 6 bytes, the manifest says 4: it is another file"),
        (None, "step.plan is missing"),
    ],
)
def test_a_plan_that_is_not_whole_is_told(directory: Path, content: bytes | None, message: str) -> None:
    (directory / "step.plan").unlink()
    if content is not None:
        (directory / "step.plan").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        require_loadable(manifest(), directory, **RTX)


def test_a_bundle_without_engines_is_told(directory: Path) -> None:
    with pytest.raises(BundleError, match="holds no engines; build them from it with: medusa-export trt"):
        require_loadable(manifest().model_copy(update={"engine": None}), directory, **RTX)


def test_a_plan_is_its_file(directory: Path) -> None:
    with open_plan(manifest(), directory, "step") as plan:
        assert bytes(plan) == b"plan"


@pytest.fixture
def stripped(directory: Path) -> tuple[Path, Manifest, bytes]:
    """An engine bundle whose plans share the weights of another, its manifest, and the plan of its step as it was."""
    source = directory / "source"
    source.mkdir()
    weights = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    (source / "weights.bin").write_bytes(weights.tobytes())
    plan = b"12345678" + weights[1024:2048].tobytes() + b"end"
    facts, plans = {}, {}
    engine = directory / "engine"
    engine.mkdir()
    for name in ("step", "heads"):
        path = engine / f"{name}.plan"
        path.write_bytes(plan)
        tensors = [Stored(0, 8, 128), Stored(1024, 8, 128)]
        facts[path.name], plans[path.name] = strip_plan(path, source / "weights.bin", tensors, file_facts(path))
    shared = SharedWeights(source="../source", file=file_facts(source / "weights.bin"), plans=plans)
    return engine, manifest(shared_weights=shared).model_copy(update={"files": facts}), plan


def test_a_stripped_plan_is_put_together_again(stripped: tuple[Path, Manifest, bytes]) -> None:
    engine, facts, plan = stripped
    assert (engine / "step.plan").read_bytes() == b"12345678end"
    assert facts.files["step.plan"] == file_facts(engine / "step.plan")
    require_loadable(facts, engine, **RTX)
    with open_plan(facts, engine, "step") as whole:
        assert bytes(whole) == plan
    source = engine.parent / "source" / "weights.bin"
    shutil.copy(source, engine / "weights.bin")  # which comes first
    source.write_bytes(source.read_bytes()[::-1])
    require_loadable(facts, engine, **RTX)
    with open_plan(facts, engine, "heads") as whole:
        assert bytes(whole) == plan


def test_missing_and_other_weights_are_told(stripped: tuple[Path, Manifest, bytes]) -> None:
    engine, facts, _ = stripped
    weights = engine.parent / "source" / "weights.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[::-1])
    with pytest.raises(
        BundleError, match=r"step\.plan with the weights of .*weights\.bin has sha256 .*not the weights that it was built with"
    ):
        open_plan(facts, engine, "step").__enter__()
    for wrong in (content[:-1], None):
        weights.unlink()
        if wrong is not None:
            weights.write_bytes(wrong)
        with pytest.raises(BundleError, match=r"needs weights\.bin \(4096 bytes, .* neither in it nor in [^;]*source; .*copy"):
            require_loadable(facts, engine, **RTX)


def test_regions_that_do_not_fit_are_refused() -> None:
    def region(offset: int) -> RegionFacts:
        return RegionFacts(offset=offset, rows=2, parts=[PartFacts(source=0, row_bytes=8)])

    assert plan_gaps(40, [region(4), region(24)]) == [(0, 4), (20, 24), (40, 40)]
    for size, regions in ((40, [region(4), region(12)]), (40, [region(24), region(4)]), (30, [region(24)])):
        with pytest.raises(BundleError, match="overlap, or that end after the plan"):
            plan_gaps(size, regions)
    whole = StrippedPlan(size=24, sha256="", regions=[region(4)])
    for own, weights in ((b"1234567", b"w" * 16), (b"12345678", b"w" * 15)):
        with pytest.raises(BundleError, match="do not fit together"):
            restore(own, whole, weights)


@given(st.data())
def test_what_is_left_out_comes_back(data: st.DataObject) -> None:
    """Plans made of weights, single or interleaved, and of other bytes."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weights = random.integers(0, 256, 1 << 14, np.uint8)
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([32, 40, 64])), min_size=1, max_size=4))
    tensors, offset = [], 0
    for rows, row_bytes in shapes:
        tensors.append(Stored(offset, rows, row_bytes))
        offset += rows * row_bytes
    arrays = [weights[t.offset :][: t.rows * t.row_bytes].reshape(t.rows, t.row_bytes) for t in tensors]
    pieces = [random.integers(0, 256, 8 * data.draw(st.integers(0, 4)), np.uint8)]
    for group in data.draw(st.lists(st.lists(st.sampled_from(range(len(tensors))), min_size=1, max_size=3), max_size=4)):
        alike = [arrays[index] for index in group if tensors[index].rows == tensors[group[0]].rows]
        pieces += [np.concatenate(alike, axis=1).ravel(), random.integers(0, 256, 8 * data.draw(st.integers(0, 2)), np.uint8)]
    plan = np.concatenate(pieces)
    regions = list(find_regions(plan, weights, tensors))
    own = b"".join(plan[start:stop].tobytes() for start, stop in plan_gaps(plan.size, regions))
    whole = StrippedPlan(size=plan.size, sha256=hashlib.sha256(plan.data).hexdigest(), regions=regions)
    np.testing.assert_array_equal(restore(own, whole, weights.tobytes()), plan)


def test_tensors_side_by_side_are_found() -> None:
    weights = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    tensors = [Stored(0, 8, 64), Stored(1024, 8, 32), Stored(2048, 1, 512)]
    first, second = weights[:512].reshape(8, 64), weights[1024:1280].reshape(8, 32)
    plan = np.concatenate([weights[4000:4008], np.hstack([first, second]).ravel(), weights[2048:2560]])
    assert [region.model_dump() for region in find_regions(plan, weights, tensors)] == [
        {"offset": 8, "rows": 8, "parts": [{"source": 0, "row_bytes": 64}, {"source": 1024, "row_bytes": 32}]},
        {"offset": 776, "rows": 1, "parts": [{"source": 2048, "row_bytes": 512}]},
    ]
    assert not list(find_regions(plan[::-1].copy(), weights, tensors))


def test_what_only_begins_like_a_tensor_stays_in_the_plan() -> None:
    weights = np.random.default_rng(0).integers(0, 256, 1024, np.uint8)
    plan = weights[:512].copy()
    plan[-1] ^= 1
    assert not list(find_regions(plan, weights, [Stored(0, 8, 64)]))
    assert not list(find_regions(plan[:504], weights, [Stored(0, 8, 64)]))
