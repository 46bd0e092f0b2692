"""Every backend gives what PyTorch and the CPU give: logits, trees, heads, and greedy answers token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from medusa_export.check import validate
from medusa_runtime import Backend, CandidateTree, DynamicTree, MedusaLM
from tests.gpu.conftest import Open
from tests.gpu.here import IN_SOFTWARE, WEBGPU, a_gpus, device_of, in_each_precision, on_each_backend

pytestmark = a_gpus
Make = Callable[..., Path]
PROMPTS = ("a small model learns", "the quick brown fox jumps over the lazy dog " * 3, "dog")
OVERLONG = "over the lazy dog while a small model learns " * 3  # more than a prompt's chunk of the engines


@in_each_precision
@on_each_backend
def test_logits_trees_heads_and_answers_are_pytorchs(
    backend: str, precision: str, bundle_for: Make, make_model: Make, make_heads: Make
) -> None:
    if (backend, precision) == (WEBGPU, "bf16"):
        pytest.skip("WebGPU has no bfloat16")
    if (backend, precision) == (WEBGPU, "fp16") and IN_SOFTWARE:
        pytest.skip("the driver in software has no float16")
    bundle = bundle_for(backend, precision)
    report = validate(
        bundle,
        str(make_model()),
        heads=make_heads(),
        prompts=PROMPTS,
        max_new_tokens=32,
        backend=backend,
        device=device_of(backend),
    )
    assert report.status == "passed", report.verdicts()
    assert (report.backend, report.precision) == (backend, precision)
    assert sum(row.num_tokens for row in report.greedy) > 32


@on_each_backend
@pytest.mark.parametrize("medusa", [True, False])
def test_greedy_answers_are_the_cpus(backend: str, medusa: bool, bundle_for: Make, make_bundle: Make) -> None:
    with (
        MedusaLM.from_bundle(make_bundle("llama", precision="fp32"), "ort-cpu") as right,
        MedusaLM.from_bundle(bundle_for(backend), backend, device=device_of(backend)) as lm,
    ):
        for prompt in (*PROMPTS, OVERLONG):
            want = right.generate(prompt, max_new_tokens=60, ignore_eos=True, medusa=False)
            found = lm.generate(prompt, max_new_tokens=60, ignore_eos=True, medusa=medusa)
            assert found.token_ids == want.token_ids


@on_each_backend
def test_a_batch_whose_sequences_come_and_go(backend: str, bundle_for: Make, make_bundle: Make) -> None:
    """More requests than slots, of other lengths and options: each gets what it gets alone on the CPU."""
    wanted = [
        {"max_new_tokens": count, "tree": tree, "ignore_eos": True}
        for count, tree in [(3, None), (40, DynamicTree(8)), (17, CandidateTree.root_only()), (25, DynamicTree(3)), (9, None)]
    ]
    prompts = [*PROMPTS, OVERLONG, "learns to speak in many words"]
    with MedusaLM.from_bundle(make_bundle("llama", precision="fp32"), "ort-cpu", max_batch_size=1) as right:
        alone = [right.generate(prompt, **fields).token_ids for prompt, fields in zip(prompts, wanted, strict=True)]
    with MedusaLM.from_bundle(bundle_for(backend), backend, device=device_of(backend), max_batch_size=3) as lm:
        for _ in range(3):
            handles = [lm.submit(prompt, **fields) for prompt, fields in zip(prompts, wanted, strict=True)]
            assert [handle.result(60).token_ids for handle in handles] == alone


@on_each_backend
def test_a_sampled_answer_is_the_same_with_medusa_and_without(backend: str, bundle_for: Make) -> None:
    with MedusaLM.from_bundle(bundle_for(backend), backend, device=device_of(backend)) as lm:
        fields = {"temperature": 0.8, "top_k": 5, "seed": 3, "max_new_tokens": 40, "ignore_eos": True}
        assert lm.generate(PROMPTS[0], **fields).token_ids == lm.generate(PROMPTS[0], **fields, medusa=False).token_ids


@on_each_backend
def test_the_heads_say_the_same_ahead_and_on_demand(backend: str, open_gpu: Open, cpu: Backend) -> None:
    """Whichever row and root are asked for: those that the GPU accepts and decides by itself, or others."""
    gpu = open_gpu(backend)
    ids, found = [5, 9, 14, 21], {}
    cpu.resize(1, 64)
    decided = cpu.step(*chain(ids)).greedy_ids[0].tolist()
    asked = [(row, root) for row in range(len(ids)) for root in (decided[row], 7)]
    for name, one, ahead in (("ahead", gpu, True), ("demanded", gpu, False), ("right", cpu, False)):
        one.resize(1, 64)
        for place in asked:
            one.step(*chain(ids), propose_ahead=ahead)
            found[name, place] = one.propose(*(np.array([number]) for number in place))
    for place in asked:
        for name in ("ahead", "demanded"):
            np.testing.assert_array_equal(found[name, place].token_ids, found["right", place].token_ids)
            np.testing.assert_allclose(found[name, place].log_probs, found["right", place].log_probs, atol=5e-3)


def chain(ids: list[int]) -> tuple[npt.NDArray[Any], ...]:
    """Inputs of a step: tokens one after the other in an empty slot, all rows evaluated."""
    places = np.arange(len(ids))[None]
    return np.array([ids]), places, np.tri(len(ids), dtype=np.bool_)[None], np.array([0]), places
