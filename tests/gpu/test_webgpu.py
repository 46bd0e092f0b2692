"""WebGPU: what runs where, more architectures, refusals, and memory. What it shares with other GPUs is in the other files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.bundle.write_graphs import PROMISED_BYTES
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.quantize import QuantizeOptions, export, quantize_bundle
from medusa_runtime import (
    BackendError,
    CapacityError,
    DynamicTree,
    Manifest,
    MedusaLM,
    OptionError,
    choose_backend,
    open_backend,
)
from medusa_runtime.backends.webgpu import webgpu_backend
from medusa_runtime.backends.webgpu.adapters import PROVIDER, find_adapters
from medusa_runtime.backends.webgpu.vulkan import device_of, find_vulkan_devices
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import STEP, QuantizationFacts, Scheme
from tests.gpu.conftest import logits
from tests.gpu.here import GPUS, IN_SOFTWARE, WEBGPU, WHY_NOT, a_gpus
from tests.support.models import put_on_grids, save_random_heads, save_tiny_model
from tests.support.zoo import save_zoo_model

pytestmark = [a_gpus, pytest.mark.skipif(WHY_NOT[WEBGPU] is not None, reason=str(WHY_NOT[WEBGPU]))]
Make = Callable[..., Path]
PROMPTS = ("a small model learns", "the quick brown fox jumps over the lazy dog " * 2)
ARCHITECTURES = {  # type -> what it shows
    "gpt_neox": "partial rotation, LayerNorm, biases",
    "gemma2": "soft caps, sliding windows",
    "gpt_oss": "sinks, experts",
    "bloom": "a bias by position for each head",
    "deepseek_v3": "latent cache, values of another width",
    "cohere": "norms of queries with gains for each head, parallel blocks",
    "lfm2": "short convolutions beside attention",
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_other_architectures_are_pytorchs(model_type: str, tmp_path: Path) -> None:
    model = save_zoo_model(tmp_path / "model", model_type)
    heads = save_random_heads(model, tmp_path / "heads")
    export_bundle(ExportOptions(str(model), heads, tmp_path / "bundle"))
    report = validate(tmp_path / "bundle", str(model), heads=heads, prompts=PROMPTS[:1], max_new_tokens=8, device="gpu")
    assert report.status == "passed", report.verdicts()
    assert (report.backend, report.targets) == (WEBGPU, [WEBGPU])


@pytest.mark.parametrize(
    ("scheme", "rotate"),
    [("int8-blocks", None), ("int8-blocks", True), ("int4", None)],  # rotated: in wider blocks
)
def test_weights_in_blocks_are_multiplied_on_the_gpu(
    scheme: Scheme, rotate: bool | None, make_bundle: Make, make_model: Make, tmp_path: Path
) -> None:
    """In float32, as the portable graph says; the CPU's own graphs round activations."""
    quantize_bundle(QuantizeOptions(make_bundle("llama", precision="fp32"), tmp_path / "bundle", scheme, rotate=rotate))
    _is_the_portable_one(tmp_path / "bundle", make_model("llama"))


def test_weights_on_grids_and_the_sums_that_they_read_are_multiplied_on_the_gpu(tmp_path: Path) -> None:
    model = put_on_grids(save_tiny_model(tmp_path / "model", "llama", num_key_value_heads=4))
    export_bundle(ExportOptions(str(model), save_random_heads(model, tmp_path / "heads"), tmp_path / "float"))
    manifest = quantize_bundle(QuantizeOptions(tmp_path / "float", tmp_path / "bundle", "int4"))
    assert manifest.quantization is not None
    assert manifest.quantization.kept_grids == 4 * 7
    _is_the_portable_one(tmp_path / "bundle", model)


def _is_the_portable_one(bundle: Path, model: Path) -> None:
    """Check that a quantised bundle gives on the GPU what its portable graph gives."""
    tokens, manifest = [5, 9, 14, 21], Manifest.load(bundle)
    gpu = open_backend(bundle, manifest, device="gpu")
    gpu.resize(1, 64)
    np.testing.assert_allclose(logits(gpu, tokens), _portable(bundle, manifest, tokens), rtol=1e-4, atol=1e-4)
    report = validate(bundle, str(model), prompts=PROMPTS[:1], max_new_tokens=8, device="gpu")
    assert report.status == "passed", report.verdicts()
    assert report.targets == [WEBGPU]


def _portable(bundle: Path, manifest: Manifest, tokens: list[int]) -> np.ndarray:
    """The logits of the portable graph as it is written: no operator is fused. [T, V]"""
    options, count = ort.SessionOptions(), len(tokens)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle / manifest.graphs[STEP].file, options, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": np.array([tokens]),
        "position_ids": np.arange(count)[None],
        "tree_mask": np.tri(count, dtype=np.bool_)[None],
        "cache_lengths": np.array([0]),
        "logit_rows": np.arange(count)[None],
    }
    feeds |= {
        tensor.past: np.zeros(tensor.shape(1, 64), np.float32) for tensor in CacheLayout.of(manifest.graphs[STEP]).tensors
    }
    found: np.ndarray = session.run(["logits"], feeds)[0]
    return found[0]


@pytest.mark.parametrize("scheme", [None, "int8-blocks"])
def test_layers_run_on_the_gpu_and_copies_do_not_grow_with_them(
    scheme: Scheme | None, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = [
        _placed(make_model("llama", num_hidden_layers=layers), scheme, tmp_path / str(layers), monkeypatch) for layers in (2, 4)
    ]
    assert counted[0]["CPUExecutionProvider"] == counted[1]["CPUExecutionProvider"]  # masks, angles and indices, once a step
    on_cpu = {"MatMul", "MatMulNBits", "Softmax", "ScatterND", "RMSNormalization"} & counted[0]["CPUExecutionProvider"].keys()
    assert not on_cpu
    assert counted[0][PROVIDER]["MatMul" if scheme is None else "MatMulNBits"] > 2 * 4
    copies = [{name: count for name, count in one[PROVIDER].items() if name.startswith("Memcpy")} for one in counted]
    assert copies[0] == copies[1]
    assert 0 < sum(copies[0].values()) < 20


def _placed(model: Path, scheme: Scheme | None, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[str]]:
    """How often each operator ran on each provider in one step of four tokens, by ONNX Runtime's profile."""
    export(ExportOptions(str(model), save_random_heads(model, place / "heads"), place / "bundle", quantize=scheme))
    sessions: list[ort.InferenceSession] = []

    def open_profiled(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        options.enable_profiling, options.profile_file_prefix = True, str(place / path.stem)
        sessions.append(ort_session(path, options))
        return sessions[-1]

    ort_session = ort.InferenceSession
    with monkeypatch.context() as patched:
        patched.setattr(webgpu_backend.ort, "InferenceSession", open_profiled)
        gpu = open_backend(place / "bundle", Manifest.load(place / "bundle"), WEBGPU)
    gpu.resize(1, 64)
    logits(gpu, [5, 9, 14, 21])
    events: list[dict[str, Any]] = json.loads(Path(sessions[0].end_profiling()).read_text())
    found: dict[str, Counter[str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["args"]["provider"], Counter())[event["args"]["op_name"]] += 1
    return found


def test_a_cache_that_grows_keeps_its_entries(make_bundle: Make) -> None:
    bundle = make_bundle("llama", precision="fp32")
    prompt, fields = " ".join(PROMPTS), {"max_new_tokens": 80, "ignore_eos": True, "tree": DynamicTree(8)}
    with MedusaLM.from_bundle(bundle, device="cpu") as right, MedusaLM.from_bundle(bundle, device="gpu") as lm:
        before = lm.engine.backend.capacity
        assert lm.generate(prompt, **fields).token_ids == right.generate(prompt, **fields).token_ids
        assert lm.engine.backend.capacity > max(before, 64)


def test_sampled_answers_prefixes_and_cancelled_requests_are_the_cpus(make_bundle: Make) -> None:
    bundle = make_bundle("llama", precision="fp32")
    fields = {"temperature": 0.8, "top_k": 5, "seed": 3, "max_new_tokens": 12, "ignore_eos": True}
    longer = PROMPTS[1] + "and more"
    with (
        MedusaLM.from_bundle(bundle, device="cpu", max_batch_size=2) as right,
        MedusaLM.from_bundle(bundle, device="gpu", max_batch_size=2) as lm,
    ):
        for prompt in (PROMPTS[1], longer):  # the second begins as the first
            assert lm.generate(prompt, **fields).token_ids == right.generate(prompt, **fields).token_ids
        cancelled, other = lm.submit(PROMPTS[0], max_new_tokens=200, ignore_eos=True), lm.submit(longer, **fields)
        cancelled.cancel()
        assert other.result(120).token_ids == right.generate(longer, **fields).token_ids
        assert lm.generate(PROMPTS[0], **fields).token_ids == right.generate(PROMPTS[0], **fields).token_ids


def test_memory_is_constant(make_bundle: Make) -> None:
    """The driver in software takes the host's memory; a real one's memory is not told.

    A leak grows in every round of requests. An allocator takes a large piece in some rounds, so the median round is judged.
    """
    bundle = make_bundle("llama", precision="fp32")
    with MedusaLM.from_bundle(bundle, device="gpu", max_batch_size=2) as lm:
        _ask(lm, 40)
        sizes = [_resident()]
        for _ in range(5):
            _ask(lm, 20)
            sizes.append(_resident())
        assert np.median(np.diff(sizes)) < 1 << 20, sizes


def _ask(lm: MedusaLM, count: int) -> None:
    rng = np.random.default_rng(0)
    words = PROMPTS[1].split()
    for _ in range(count // 2):
        lm.generate_batch([" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(2)], max_new_tokens=2)


def _resident() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell a process's memory in /proc")
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform == "darwin", reason="there is no Vulkan on a Mac")
def test_vulkan_tells_the_limits() -> None:
    [adapter, *_], devices = find_adapters(), find_vulkan_devices()
    device = device_of(adapter, devices)
    assert device is not None
    assert (device.is_software, bool(device.name)) == (adapter.is_software, True)
    assert device.largest_buffer >= PROMISED_BYTES
    assert device.memory > PROMISED_BYTES


@pytest.mark.skipif(not IN_SOFTWARE, reason="a real GPU may have the memory")
def test_a_cache_for_which_there_is_no_memory_is_refused_and_the_old_one_stays(make_bundle: Make) -> None:
    """The provider tells nobody that a buffer could not be made; whoever uses it is told that it is invalid."""
    bundle = make_bundle("llama", precision="fp32")
    gpu = open_backend(bundle, Manifest.load(bundle), device="gpu")
    gpu.resize(1, 64)
    before = logits(gpu, [5, 9, 14])
    with pytest.raises(CapacityError, match=r"^the device has no memory for a cache of 1 times \d+ entries \("):
        gpu.resize(1, 1 << 24, [3])  # 2 GiB a tensor
    assert gpu.capacity == 64
    np.testing.assert_array_equal(logits(gpu, [5, 9, 14]), before)


LOSS = """
import os, sys
from pathlib import Path

from medusa_runtime import ClosedError, DeviceLostError, MedusaLM

bundle, lost, fields = sys.argv[1], Path(os.environ["LOSSY_WHILE"]), {"max_new_tokens": 12, "ignore_eos": True}
with MedusaLM.from_bundle(bundle, device="gpu", max_batch_size=2) as lm:
    before = lm.generate("the quick fox", **fields).token_ids
    lost.touch()
    for handle in [lm.submit("the lazy dog", **fields) for _ in range(2)]:
        try:
            raise AssertionError(f"an answer from a lost device: {handle.result(60)}")
        except DeviceLostError as error:
            print(error)
    health = lm.health()
    assert not health.is_alive, health
    assert health.why_not.endswith("open the model again"), health
    try:
        raise AssertionError(f"an answer after the loss: {lm.generate('the quick fox', **fields)}")
    except ClosedError as error:
        assert str(error) == health.why_not
lost.unlink()
with MedusaLM.from_bundle(bundle, device="gpu") as lm:
    assert lm.generate("the quick fox", **fields).token_ids == before
print("as before")
"""


@pytest.mark.skipif(not IN_SOFTWARE or shutil.which("cc") is None, reason="needs the driver in software, and a C compiler")
def test_a_lost_device_is_an_error_and_the_model_can_be_opened_again(make_bundle: Make, tmp_path: Path) -> None:
    """In a process of its own: its driver passes everything to the driver in software, but refuses work when it is told to."""
    library, description = tmp_path / "lossy.so", tmp_path / "lossy.json"
    source = Path(__file__).parents[1] / "support/lossy_vulkan.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    described = {"library_path": str(library), "api_version": "1.1"}
    description.write_text(json.dumps({"file_format_version": "1.0.0", "ICD": described}), encoding="utf-8")
    real = Path(os.environ["VK_DRIVER_FILES"])
    named = json.loads(real.read_text(encoding="utf-8"))["ICD"]["library_path"]
    lossy = {
        "LOSSY_DRIVER": str(real.parent / named),
        "LOSSY_WHILE": str(tmp_path / "lost"),
        "VK_DRIVER_FILES": str(description),
    }
    command = [sys.executable, "-c", LOSS, str(make_bundle("llama", precision="fp32"))]
    done = subprocess.run(command, env=os.environ | lossy, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert "was lost: its driver was reset or failed; open the model again" in first
    assert last == "as before"


def test_what_webgpu_does_not_run_is_refused_in_one_line(make_bundle: Make) -> None:
    bundle = make_bundle("llama", precision="fp32")
    manifest = Manifest.load(bundle)
    older = manifest.model_copy(update={"graphs": {n: g for n, g in manifest.graphs.items() if g.target != WEBGPU}})
    quantised = QuantizationFacts(scheme="int8", activation_bits=16, smoothing=0.0, quality={})
    with pytest.raises(BackendError, match=r"^this bundle has no graphs for WebGPU; export it again$"):
        open_backend(bundle, older, WEBGPU)
    with pytest.raises(BackendError, match=r"^this bundle of the scheme int8 has no graphs for WebGPU; quantize again with "):
        open_backend(bundle, older.model_copy(update={"quantization": quantised}), device="gpu")
    with pytest.raises(OptionError, match=f"^the device is gpu:99, but WebGPU finds {len(find_adapters())} here"):
        open_backend(bundle, manifest, device="gpu:99")
    bf16 = make_bundle("llama", precision="bf16")
    with pytest.raises(BackendError, match=r"^ort-webgpu does not run a bundle in bf16; use one in fp32 or fp16$"):
        open_backend(bf16, Manifest.load(bf16), device="gpu")


@pytest.mark.skipif(not IN_SOFTWARE, reason="this GPU computes in fp16")
def test_a_device_without_fp16_says_so(make_bundle: Make) -> None:
    bundle = make_bundle("llama", precision="fp16")
    with (
        MedusaLM.from_bundle(bundle, device="gpu") as lm,
        pytest.raises(
            BackendError, match=r"^a software driver \(.*\) cannot compute in fp16 through WebGPU; use a bundle in fp32$"
        ),
    ):
        lm.generate(PROMPTS[0], max_new_tokens=2)


def test_a_driver_in_software_is_not_used_unless_it_is_asked_for(make_bundle: Make) -> None:
    manifest = Manifest.load(make_bundle("llama", precision="fp32"))
    assert (choose_backend(manifest).backend == WEBGPU) == (GPUS.why_none is not None and not IN_SOFTWARE)
    assert choose_backend(manifest, device="gpu").backend == WEBGPU
