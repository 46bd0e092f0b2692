"""The tensors of the cache, read off a step graph."""

from __future__ import annotations

import pytest

from medusa_runtime.backends.base import cache_entry_bytes
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import GraphFacts, TensorFacts
from medusa_runtime.errors import BundleError
from tests.support.caches import UNEQUAL, layout_of, step_facts
from tests.support.fake_backend import fake_manifest


def test_tensors_of_a_layer_may_differ_and_a_layer_may_have_none() -> None:
    layout = layout_of(UNEQUAL)
    assert [tensor.name for tensor in layout.tensors] == list(UNEQUAL)
    assert next((tensor.past, tensor.present) for tensor in layout.tensors) == ("past.0.key", "present.0.key")
    assert layout.tensors[1].shape(3, 64) == (3, 2, 64, 8)
    assert layout.entry_bytes == (2 * 16 + 2 * 8 + 24 + 2 * 16 + 2 * 8) * 4


def test_equal_tensors_are_one_group() -> None:
    groups = [[tensor.name for tensor in group] for group in layout_of(UNEQUAL).groups]
    assert groups == [["0.key", "4.key"], ["0.value", "4.value"], ["1.conv"]]
    assert layout_of(UNEQUAL).describe() == "2 of [2, S, 16] float + 2 of [2, S, 8] float + 1 of [1, S, 24] float"


def test_dtypes_are_told_apart() -> None:
    layout = layout_of({"0.key": (1, 4), "0.decay": (1, 4)}, dtypes={"0.key": "float16"})
    assert (len(layout.groups), layout.entry_bytes) == (2, 4 * 2 + 4 * 4)


def test_a_manifest_of_any_age_says_what_an_entry_takes() -> None:
    assert cache_entry_bytes(fake_manifest()) == 2 * 8 * 4


@pytest.mark.parametrize(
    "shape", [["batch", 2, "capacity"], ["batch", "heads", "capacity", 4], ["batch", 2, "capacity", 0], [1, 2, "capacity", 4]]
)
def test_a_tensor_of_another_form_is_refused(shape: list[int | str]) -> None:
    tensors = [[TensorFacts(name=f"{when}.0.key", dtype="float", shape=shape)] for when in ("past", "present")]
    with pytest.raises(
        BundleError, match=r"^step\.onnx has the cache input past\.0\.key as float \[.*export the bundle again$"
    ):
        CacheLayout.of(GraphFacts(file="step.onnx", target="portable", inputs=tensors[0], outputs=tensors[1]))


def test_a_tensor_of_integers_is_refused() -> None:
    with pytest.raises(BundleError, match=r"the cache input past\.0\.key as int64"):
        layout_of({"0.key": (1, 4)}, dtypes={"0.key": "int64"})


def test_a_tensor_that_is_not_returned_as_it_is_is_refused() -> None:
    step = step_facts(UNEQUAL)
    step.outputs[1].shape = ["batch", 2, "capacity", 9]
    with pytest.raises(
        BundleError, match=r"must return past\.0\.value as present\.0\.value, float .* but has float \['batch', 2"
    ):
        CacheLayout.of(step)
    del step.outputs[1]
    with pytest.raises(BundleError, match="but has no such output"):
        CacheLayout.of(step)


def test_a_step_without_a_cache_is_refused() -> None:
    with pytest.raises(BundleError, match=r"step\.onnx has no cache"):
        layout_of({})
