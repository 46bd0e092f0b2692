"""The runtime on a real bundle of a tiny model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medusa_runtime import (
    BackendError,
    BundleError,
    CandidateTree,
    CapacityError,
    DecodingEngine,
    Manifest,
    MedusaLM,
    OptionError,
    TreeError,
)
from medusa_runtime.backends.base import CAPACITY_BUCKET
from medusa_runtime.backends.choosing import open_backend

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture(scope="module")
def lm(bundle: Path) -> MedusaLM:
    return MedusaLM.from_bundle(bundle)


@pytest.mark.parametrize(
    "choices",
    [[], [[0]], [[0, 0, 0]], [[r] for r in range(10)], [[a, b, c] for a in (0, 3) for b in (0, 1) for c in (0, 9)]],
)
def test_any_tree_gives_the_tokens_of_plain_decoding(lm: MedusaLM, choices) -> None:
    plain = lm.generate(PROMPT, max_new_tokens=60, medusa=False, ignore_eos=True)
    medusa = lm.generate(PROMPT, max_new_tokens=60, tree=CandidateTree.from_choices(choices), ignore_eos=True)
    assert medusa.token_ids == plain.token_ids
    assert medusa.stats.num_steps <= plain.stats.num_steps == 59
    assert len(set(plain.token_ids)) > 5  # a model that repeats one token would prove little


def test_streaming_gives_the_text_of_the_whole(lm: MedusaLM) -> None:
    whole = lm.generate(PROMPT, max_new_tokens=40)
    chunks = list(lm.stream(PROMPT, max_new_tokens=40))
    assert "".join(chunk.text for chunk in chunks) == whole.text == lm.codec.decode(whole.token_ids)
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert all(len(chunk.token_ids) == chunk.num_accepted + 1 for chunk in chunks[:-1])


def test_a_request_is_the_same_whatever_runs_before_and_beside_it(lm: MedusaLM) -> None:
    first = lm.generate(PROMPT, max_new_tokens=30).token_ids
    lm.generate("over the lazy dog " * 9, max_new_tokens=50)
    stream = lm.stream("a small model", max_new_tokens=50, ignore_eos=True)
    begun = [next(stream), next(stream)]
    assert lm.generate(PROMPT, max_new_tokens=30).token_ids == first
    whole = [token for chunk in [*begun, *stream] for token in chunk.token_ids]
    assert whole == lm.generate("a small model", max_new_tokens=50, ignore_eos=True).token_ids


def test_what_an_earlier_request_left_in_the_cache_cannot_reach_a_later_one(bundle: Path) -> None:
    lm = MedusaLM.from_bundle(bundle, max_batch_size=2, reuse_prefixes=False)
    first = lm.generate(PROMPT, max_new_tokens=20).token_ids
    for array in lm.engine.backend._cache.arrays:
        array[:, :, :, :20] = np.nan  # what that request wrote
    assert lm.generate(PROMPT, max_new_tokens=20).token_ids == first
    assert lm.generate("a small model", max_new_tokens=20).token_ids  # in the other slot, which was never written


def test_a_long_request_does_not_slow_later_ones_for_long(bundle: Path) -> None:
    lm = MedusaLM.from_bundle(bundle)
    backend = lm.engine.backend
    backend.resize(8, 5 * CAPACITY_BUCKET)
    assert len({tuple(lm.generate(PROMPT, max_new_tokens=5).token_ids) for _ in range(9)}) == 1
    assert backend.capacity == CAPACITY_BUCKET


def test_a_batch_gives_each_prompt_its_own_answer(bundle: Path, lm: MedusaLM) -> None:
    prompts = [lm.codec.encode(text) for text in (PROMPT, "dog", "a small model learns to speak in many words")]
    engine = DecodingEngine(open_backend(bundle, Manifest.load(bundle)))
    answers: list[list[int]] = [[] for _ in prompts]
    for steps in engine.generate(prompts, 25):
        for step in steps:
            answers[step.sequence] += step.token_ids
    alone = [[token for [step] in lm.engine.generate([prompt], 25) for token in step.token_ids] for prompt in prompts]
    assert answers == alone


def test_generate_batch_gives_what_generate_gives(bundle: Path) -> None:
    lm = MedusaLM.from_bundle(bundle)
    prompts = [PROMPT, "dog", [{"role": "user", "content": "a small model"}]]
    batch = lm.generate_batch(prompts, max_new_tokens=20)
    for prompt, result in zip(prompts, batch, strict=True):
        alone = lm.generate(prompt, max_new_tokens=20)
        assert (result.text, result.token_ids, result.finish_reason) == (alone.text, alone.token_ids, alone.finish_reason)
    with pytest.raises(OptionError, match="no prompt"):
        lm.generate_batch([])


def test_the_cache_grows_in_buckets_and_keeps_what_it_holds(make_bundle: Callable[..., Path]) -> None:
    bundle = make_bundle("llama", max_seq_len=200)
    backend = open_backend(bundle, Manifest.load(bundle))
    engine = DecodingEngine(backend)
    assert backend.capacity == 0
    backend.resize(1, 10)
    assert backend.capacity == CAPACITY_BUCKET
    ids = np.arange(20, 40)[None]

    def step(tokens: np.ndarray, cached: int) -> np.ndarray:
        count = tokens.shape[1]
        positions = np.arange(cached, cached + count)[None]
        mask = np.tri(count, dtype=bool)[None]
        rows = np.arange(count)[None]
        return backend.step(tokens, positions, mask, np.array([cached]), rows, with_logits=True).logits

    whole = step(ids, 0).copy()
    step(ids[:, :12], 0)
    backend.resize(1, CAPACITY_BUCKET + 1, [12])
    assert backend.capacity == 2 * CAPACITY_BUCKET
    np.testing.assert_allclose(step(ids[:, 12:], 12), whole[:, 12:], atol=1e-5)
    assert engine.tree.num_nodes == 16


def test_a_step_past_the_capacity_is_refused(bundle: Path) -> None:
    backend = open_backend(bundle, Manifest.load(bundle))
    backend.resize(1, 1)
    with pytest.raises(
        CapacityError, match=f"needs {CAPACITY_BUCKET + 1} cache entries a slot, the cache has {CAPACITY_BUCKET}"
    ):
        backend.step(
            np.ones((1, 2), int),
            np.arange(2)[None],
            np.tri(2, dtype=bool)[None],
            np.array([CAPACITY_BUCKET - 1]),
            np.array([[1]]),
        )


@pytest.mark.parametrize("batch", [1, 2])
def test_the_cache_is_written_in_place(bundle: Path, batch: int) -> None:
    """Where past and present are different memory, what is cached is copied; the graph for several sequences warns of it."""
    program = """
import sys, numpy as np, onnxruntime as ort
from medusa_runtime import Manifest
from medusa_runtime import open_backend
backend, batch = open_backend(sys.argv[1], Manifest.load(sys.argv[1])), int(sys.argv[3])
backend.resize(batch, 64)
[cache] = backend._cache.arrays
cache[:] = 0.25
step = [np.tile(part, (batch, 1)) for part in ([5, 6], [3, 4])] + [np.tile(np.tri(2, dtype=bool), (batch, 1, 1))]
step += [np.full(batch, 3), np.ones((batch, 1), int)]
while not backend.step(*step).is_warm:  # until the graph for so many is open
    pass
cache[:] = 0.25
before, others = cache.copy(), []
if sys.argv[2] == "apart":
    for layer in range(4):
        for part in ("key", "value"):
            others.append(ort.OrtValue.ortvalue_from_numpy(np.zeros_like(before[0])))
            binding = backend._binding(backend._steps.session, 0, batch, with_logits=False)
            binding.bind_ortvalue_output(f"present.{layer}.{part}", others[-1])
backend.step(*step)
copied = sum(int((other.numpy() == 0.25).all(axis=(0, 1, 3)).sum()) for other in others)
print(int((cache != before).any(axis=(0, 1, 2, 4)).sum()), copied)
"""
    runs = {
        kind: subprocess.run(
            [sys.executable, "-c", program, str(bundle), kind, str(batch)], capture_output=True, text=True, check=True
        )
        for kind in ("shared", "apart")
    }
    assert runs["shared"].stdout == "2 0\n"  # entries of our own array that were written
    assert runs["shared"].stderr == ""
    written, copied = map(int, runs["apart"].stdout.split())  # so that the lines above can fail
    assert written == 0
    assert copied >= 8 * 3
    assert ("copy" in runs["apart"].stderr.lower()) == (batch == 2)


def test_a_request_that_cannot_fit_is_refused_at_the_call(lm: MedusaLM) -> None:
    with pytest.raises(CapacityError, match="together more than the bundle's 256"):
        lm.stream(PROMPT, max_new_tokens=250)
    with pytest.raises(CapacityError):
        lm.generate("word " * 400)


def test_a_tree_deeper_or_wider_than_the_heads_is_refused(bundle: Path, lm: MedusaLM) -> None:
    with pytest.raises(TreeError, match="4 deep, the bundle has 3 heads"):
        lm.generate(PROMPT, tree=CandidateTree.from_choices([[0] * 4]))
    with pytest.raises(TreeError, match="--head-top-k 33"):
        MedusaLM.from_bundle(bundle, tree=CandidateTree.from_choices([[32]]))


def test_an_unknown_backend_is_refused(bundle: Path) -> None:
    with pytest.raises(
        OptionError, match=r"^the backend is 'tpu'; there are: auto, ort-cpu, ort-cuda, ort-webgpu, trt, trt-rtx$"
    ):
        MedusaLM.from_bundle(bundle, backend="tpu")


def test_a_bfloat16_bundle_says_that_the_cpu_cannot_run_it(make_bundle: Callable[..., Path]) -> None:
    with pytest.raises(BackendError, match="no bf16 kernels for the CPU"):
        MedusaLM.from_bundle(make_bundle("llama", precision="bf16"))


def test_a_bundle_whose_files_do_not_match_is_refused(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    with (copy / "weights.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"\x00\x01\x02")
    with pytest.raises(BundleError, match=r"weights\.bin has sha256"):
        MedusaLM.from_bundle(copy)
    MedusaLM.from_bundle(copy, verify_files=False)  # on the caller's own word


@pytest.mark.parametrize("axis", [1, 3])
def test_a_manifest_that_does_not_describe_its_graphs_is_refused(bundle: Path, axis: int) -> None:
    manifest = Manifest.load(bundle)
    for graph in manifest.graphs.values():
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.name.endswith("1.value"):
                tensor.shape[axis] = 3
    with pytest.raises(BackendError, match=r"step\.ort-cpu-single\.onnx has the input .*, the manifest says"):
        open_backend(bundle, manifest)


def test_step_graphs_with_caches_of_different_shapes_are_refused(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    step = manifest.graphs["step"]
    for tensor in (*step.inputs, *step.outputs):
        if tensor.name.endswith("1.value"):
            tensor.shape[3] = 8
    found = r"step\.ort-cpu-single\.onnx is 8 of \[2, S, 16\] float, that of the bundle's step is 7 of .* \+ 1 of \[2, S, 8\]"
    with pytest.raises(BackendError, match=found):
        open_backend(bundle, manifest)
