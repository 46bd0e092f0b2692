"""GPU backends on stand-ins for the driver, TensorRT and ONNX Runtime's CUDA provider: all but the GPU itself.

The stand-ins (tests/support/stand_in_*.py) execute the same graphs on the CPU, keep the libraries' rules, and record what is
asked of them. What a GPU computes, and how fast, is for tests/gpu.
"""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.command_options.export_options import ExportOptions
from medusa_runtime import DynamicTree, MedusaLM, open_backend
from medusa_runtime.backends.gpu import ort_cuda
from medusa_runtime.backends.gpu.backend import WIDTHS, GpuBackend
from medusa_runtime.backends.gpu.devices import preload_libraries
from medusa_runtime.backends.gpu.driver import Gpu
from medusa_runtime.backends.gpu.step import Shape, StepBuffers, Work
from medusa_runtime.bundle.manifest import STEP, Manifest
from medusa_runtime.drafting.measuring import measure_grid
from medusa_runtime.drafting.rounds import Rounds
from medusa_runtime.errors import BackendError, BundleError, CapacityError, ClosedError, MissingExtraError
from tests.support.engines import stand_in_engine
from tests.support.models import save_random_heads
from tests.support.stand_in_cuda import MEMORY, CUresult, StandInDriver
from tests.support.stand_in_ort_cuda import CPU, StandInOrt
from tests.support.stand_in_tensorrt import Context, RuntimeCache, StandInTensorRT
from tests.support.zoo import save_zoo_model

MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
PROMPTS = ["the quick brown fox", "a small model", "many words at once many words at once many words", "lazy"]
LIMITS = {"max_batch_size": 4, "max_tree_nodes": 32, "max_prefill_tokens": 16, "max_seq_len": 160}
MakeBundle = Callable[..., Path]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> StandInDriver:
    driver = StandInDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    return driver


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, driver: StandInDriver) -> StandInTensorRT:
    api = StandInTensorRT(driver)
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, api)
    return api


@pytest.fixture
def onnxruntime(monkeypatch: pytest.MonkeyPatch, driver: StandInDriver) -> StandInOrt:
    api = StandInOrt(driver)
    monkeypatch.setattr(ort_cuda, "ort", api)
    return api


@pytest.fixture(scope="module")
def bundle(make_bundle: MakeBundle) -> Path:
    return make_bundle(head_top_k=8)


@pytest.fixture(scope="module")
def engine(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Engine bundles by flavour, each once. Tests that change one make their own."""
    root, made = tmp_path_factory.mktemp("engines"), {}

    def get(flavor: str = "rtx", *, accepts: bool = True) -> Path:
        key = f"{flavor}-{accepts}"
        if key not in made:
            made[key] = stand_in_engine(bundle, root / key, flavor, accepts=accepts, **LIMITS)
        return made[key]

    return get


def answers(path: Path, backend: str = "auto", **settings: object) -> list[list[int]]:
    """Token ids: several prompts at once, of which some end sooner; then sampled ones, plain ones, and one alone."""
    tree = DynamicTree(12)
    with MedusaLM.from_bundle(path, backend, tree=tree, costs=None, max_batch_size=3, **settings) as lm:
        together = lm.generate_batch(PROMPTS, max_new_tokens=24, ignore_eos=True)
        handles = [lm.submit(prompt, max_new_tokens=6 + 7 * number) for number, prompt in enumerate(PROMPTS)]
        others = [handle.result() for handle in handles]
        others += [lm.generate(PROMPTS[2], max_new_tokens=12, temperature=0.9, seed=3, ignore_eos=True)]
        others += [lm.generate(PROMPTS[0], max_new_tokens=12, medusa=False), lm.generate(PROMPTS[1] * 4, max_new_tokens=12)]
        return [result.choices[0].token_ids for result in (*together, *others)]


@pytest.fixture(scope="module")
def on_the_cpu(bundle: Path) -> list[list[int]]:
    return answers(bundle, "ort-cpu")


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("flavor", ["rtx", "tensorrt"])
def test_engines_give_the_tokens_of_the_cpu(
    engine: Callable[..., Path], on_the_cpu: list[list[int]], flavor: str, *, accepts: bool, cuda_graphs: bool
) -> None:
    assert answers(engine(flavor, accepts=accepts), cuda_graphs=cuda_graphs) == on_the_cpu


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_onnx_runtime_with_cuda_gives_the_tokens_of_the_cpu(
    bundle: Path, on_the_cpu: list[list[int]], onnxruntime: StandInOrt, *, cuda_graphs: bool
) -> None:
    assert answers(bundle, "ort-cuda", cuda_graphs=cuda_graphs) == on_the_cpu
    assert onnxruntime.settings[0] == {
        "device_id": "0", "user_compute_stream": "77", "use_tf32": "0", "enable_cuda_graph": str(int(cuda_graphs)),
    }  # fmt: skip
    captured = set(onnxruntime.graph_ids) - {"-1"}
    assert bool(captured) == cuda_graphs


@pytest.mark.usefixtures("tensorrt", "onnxruntime")
def test_caches_of_unequal_tensors(tmp_path: Path) -> None:
    """Convolutions and attention in turns: the tensors of two layers differ in heads and width."""
    model, bundle = save_zoo_model(tmp_path / "model", "lfm2"), tmp_path / "bundle"
    export_bundle(ExportOptions(str(model), save_random_heads(model, tmp_path / "heads"), bundle, head_top_k=8))
    stand_in_engine(bundle, tmp_path / "engine", "rtx", accepts=True, **LIMITS)
    wanted = answers(bundle, "ort-cpu")
    assert answers(tmp_path / "engine") == wanted
    assert answers(bundle, "ort-cuda") == wanted


@pytest.mark.usefixtures("tensorrt", "onnxruntime")
def test_heads_that_do_not_read_the_root(make_model: MakeBundle, make_heads: MakeBundle, tmp_path: Path) -> None:
    bundle, engine = tmp_path / "bundle", tmp_path / "engine"
    export_bundle(ExportOptions(str(make_model()), make_heads(reads_root=False), bundle, head_top_k=8))
    stand_in_engine(bundle, engine, "tensorrt", accepts=True, **LIMITS)
    wanted = answers(bundle, "ort-cpu")
    assert answers(engine) == wanted
    assert answers(bundle, "ort-cuda") == wanted
    backend = opened(engine)
    backend.step(*chain(8), propose_ahead=True)
    first = backend.propose(np.array([0]), np.array([5]))
    assert backend.propose(np.array([0]), np.array([6])) is first  # which root it was does not matter


def test_half_precision_on_onnx_runtime_with_cuda(make_bundle: MakeBundle, onnxruntime: StandInOrt) -> None:
    bundle = make_bundle(head_top_k=8, precision="fp16")
    assert answers(bundle, "ort-cuda") == answers(bundle, "ort-cpu")


def chain(width: int, length: int = 0) -> tuple[np.ndarray, ...]:
    """A step's inputs: a chain of so many tokens after so many cached ones, all rows evaluated."""
    tokens = np.random.default_rng(width).integers(5, 300, (1, width))
    mask = np.tri(width, dtype=np.bool_)[None]
    return tokens, length + np.arange(width)[None], mask, np.array([length]), np.arange(width)[None]


def opened(path: Path, backend: str = "auto", **settings: object) -> GpuBackend:
    """A backend with one slot."""
    found = open_backend(path, Manifest.load(path), backend, **settings)
    assert isinstance(found, GpuBackend)
    found.resize(1, 160)
    return found


def on_cpu(bundle: Path) -> object:
    found = open_backend(bundle, Manifest.load(bundle), "ort-cpu")
    found.resize(1, 160)
    return found


@pytest.mark.parametrize("captured", [True, False])
def test_a_decoding_step_is_one_copy_up_one_down_and_one_wait(
    engine: Callable[..., Path], tensorrt: StandInTensorRT, *, captured: bool
) -> None:
    backend, driver = opened(engine("tensorrt"), cuda_graphs=captured), tensorrt.driver
    for _ in range(3):
        driver.take_calls()
        output = backend.step(*chain(8), propose_ahead=True)
        backend.propose(np.array([0]), output.greedy_ids[:, 0])  # of random tokens the root alone is accepted
        calls = driver.take_calls()
    copies = ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"]
    assert calls == ["cuCtxSetCurrent", *(["cuGraphLaunch"] if captured else copies), "cuStreamSynchronize"]


def test_other_rows_or_roots_than_the_gpu_accepted_are_asked_for_again(
    engine: Callable[..., Path], bundle: Path, tensorrt: StandInTensorRT
) -> None:
    backend, cpu = opened(engine()), on_cpu(bundle)
    for one in (backend, cpu):
        decided = int(one.step(*chain(8), propose_ahead=True).greedy_ids[0, 0])
    tensorrt.driver.take_calls()
    told = set()
    for row, root in ((5, decided), (0, decided), (0, decided + 1)):
        asked = np.array([row]), np.array([root])
        found, wanted = backend.propose(*asked), cpu.propose(*asked)
        np.testing.assert_array_equal(found.token_ids, wanted.token_ids)
        np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)
        told.add(found.log_probs.tobytes())
    assert tensorrt.driver.take_calls().count("cuStreamSynchronize") == 2
    assert len(told) == 3


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("width", [1, 3, 5, 11, 32])
def test_logits_come_back_of_the_rows_asked_for(engine: Callable[..., Path], bundle: Path, width: int) -> None:
    backend, cpu = opened(engine()), on_cpu(bundle)
    for one in (backend, cpu):
        one.step(*chain(7))
    found, wanted = (one.step(*chain(width, 7), with_logits=True) for one in (backend, cpu))
    assert found.greedy_ids.shape == (1, width)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-3)
    assert backend.step(*chain(width, 7)).logits is None


def test_everything_is_allocated_before_the_first_request(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    with MedusaLM.from_bundle(engine("tensorrt"), max_batch_size=4, costs=None) as lm:
        lm.generate_batch(PROMPTS, max_new_tokens=8)
        used = tensorrt.driver.used()
        tensorrt.driver.take_calls()
        for number in range(40):
            lm.generate(PROMPTS[number % 4] * (1 + number % 3), max_new_tokens=1 + number % 9)
        assert not {"cuMemAlloc", "cuMemHostAlloc"} & set(tensorrt.driver.take_calls())
        backend = lm.engine.backend
        assert isinstance(backend, GpuBackend)
        spare = 2 * 4 * 2 * 64 * 16 * 4  # through which slots are exchanged
        assert sum(backend.memory().values()) == used - spare + 2000
        assert backend.memory()["weights"] == 2000  # which the engines hold, not we


def test_a_step_beyond_the_capacity_is_refused_before_it_is_queued(
    engine: Callable[..., Path], tensorrt: StandInTensorRT
) -> None:
    backend = opened(engine())
    assert backend.capacity == Manifest.load(engine()).limits.capacity == 192
    tensorrt.driver.take_calls()
    with pytest.raises(CapacityError, match=r"^the step needs 193 cache entries a slot, the cache has 192$"):
        backend.step(*chain(9, 184))
    with pytest.raises(CapacityError, match=r"^the step needs the slots 1 to 1, the cache has 1$"):
        backend.step(*chain(1), first_slot=1)
    with pytest.raises(CapacityError, match=r"built for 192 cache entries a sequence, 193 are needed; rebuild it with a la"):
        backend.resize(1, 193)
    assert tensorrt.driver.take_calls() == []
    backend.step(*chain(8, 184))


@pytest.mark.usefixtures("tensorrt")
def test_a_step_beyond_the_profiles_is_refused_with_limit_and_value(engine: Callable[..., Path]) -> None:
    backend = opened(engine())
    with pytest.raises(CapacityError, match=r"^the step has 33 tokens, the engine takes 32; rebuild it with --max-prefill-t"):
        backend.step(*chain(33))
    ids, positions, mask, lengths, rows = chain(1)
    five = [np.repeat(array, 5, axis=0) for array in (ids, positions, mask, lengths, rows)]
    backend.resize(5, 160)
    with pytest.raises(CapacityError, match=r"^the step has 5 sequences, the engine takes 4; rebuild it with --max-batch-s"):
        backend.step(*five)


def test_prompts_and_trees_have_profiles_and_contexts_of_their_own(
    engine: Callable[..., Path], tensorrt: StandInTensorRT
) -> None:
    backend = opened(engine("rtx"))
    ids, positions, mask, lengths, _ = chain(14)
    backend.step(ids, positions, mask, lengths, np.array([[13]]))
    backend.step(*chain(5, 14))
    backend.propose(np.array([0]), np.array([5]))
    prefill, verify, heads = tensorrt.contexts
    assert [context.profile for context in (prefill, verify, heads)] == [0, 1, 0]
    assert prefill.shapes["input_ids"] == (1, 14)
    assert verify.shapes["input_ids"] == (1, 8)  # padded
    assert len({context.scratch for context in (prefill, verify, heads)}) == 1
    assert [context.graph_strategy for context in (prefill, verify, heads)] == ["off", "whole", "whole"]


def test_a_context_is_bound_again_only_where_something_changed(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    backend = opened(engine("rtx"))
    backend.step(*chain(8))
    [verify] = tensorrt.contexts
    bound = verify.num_bindings
    backend.step(*chain(8, 8))
    assert (verify.num_bindings, verify.num_runs) == (bound, 2)
    backend.step(*chain(12, 16))
    assert bound < verify.num_bindings < 2 * bound  # the cache's tensors stay


def test_the_heads_find_their_inputs_in_one_place(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    backend, bound = opened(engine("rtx")), []
    for root in range(4):
        backend.step(*chain(8), propose_ahead=True)
        backend.propose(np.array([5]), np.array([root]))  # another row than the GPU's own
        bound.append(tensorrt.contexts[1].num_bindings)
    assert len(set(bound)) == 1


def test_each_captured_shape_has_a_context_of_its_own(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    backend = opened(engine("tensorrt"))
    for width in (4, 8, 4, 8, 7, 3, 4):
        backend.step(*chain(width))
    assert len(tensorrt.contexts) == 2  # 7 is padded to 8, and 3 to 4
    assert [context.num_runs for context in tensorrt.contexts] == [2, 2]  # once, once to capture, then launched
    assert tensorrt.driver.calls.count("cuGraphInstantiate") == 2
    assert tensorrt.driver.calls.count("cuGraphLaunch") == 5


@pytest.mark.usefixtures("tensorrt")
def test_the_first_steps_of_a_shape_say_nothing_of_its_cost(engine: Callable[..., Path]) -> None:
    backend = opened(engine("tensorrt"))
    assert [backend.step(*chain(width)).is_warm for width in (4, 4, 4, 8, 3)] == [False, False, True, False, True]


def test_costs_are_measured_on_warm_steps(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    """Nor is anything prepared twice, though the cache is filled again and again."""
    backend = opened(engine("tensorrt"))
    timed: list[bool] = []
    step = backend.step

    def noted(*inputs: object, **options: object) -> object:
        timed.append((output := step(*inputs, **options)).is_warm)
        return output

    backend.step = noted
    widths = (1, 4, 8)
    found = measure_grid(backend, (1, 2), widths, (96, 160), rounds=Rounds(3))
    assert np.shape(found.step_seconds) == (2, 2, 3)
    assert len(found.head_seconds) == 2
    shapes = 2 * len(widths)
    steps = sum(timed)
    assert steps >= 2 * shapes * 3  # of each point in each round at least one
    verifying = [context for context in tensorrt.contexts if context.profile == 1]
    assert len(verifying) <= shapes


def test_a_cache_of_the_same_size_stays_where_it_is(
    engine: Callable[..., Path], bundle: Path, tensorrt: StandInTensorRT
) -> None:
    backend, cpu = opened(engine("tensorrt")), on_cpu(bundle)
    for one in (backend, cpu):
        for _ in range(2):
            one.step(*chain(8))
        one.resize(1, 160, [5])
    tensorrt.driver.take_calls()
    found, wanted = (one.step(*chain(8, 5)) for one in (backend, cpu))
    assert found.is_warm
    np.testing.assert_array_equal(found.greedy_ids, wanted.greedy_ids)
    assert "cuGraphLaunch" in tensorrt.driver.take_calls()
    backend.resize(1, 160)
    backend.gpu.synchronize()
    assert not tensorrt.driver.room(tensorrt.contexts[0].addresses["past.0.key"], 2 * 192 * 16 * 4, on_device=True).any()


def test_graphs_stay_when_somebody_wants_logits(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    backend = opened(engine("tensorrt"))
    for _ in range(2):
        backend.step(*chain(8))
    for width in (1, 4, 12, 32):
        backend.step(*chain(width), with_logits=True)
    tensorrt.driver.take_calls()
    assert backend.step(*chain(8)).is_warm
    assert tensorrt.driver.take_calls().count("cuGraphLaunch") == 1


def test_what_cannot_be_captured_runs_without(
    engine: Callable[..., Path], tensorrt: StandInTensorRT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = Context.execute_async_v3

    def refuse(context: Context, stream: int) -> bool:
        if context.engine.api.driver.capturing is not None:
            context.engine.tell(1, "not permitted when the stream is capturing")
            return False
        return execute(context, stream)

    monkeypatch.setattr(Context, "execute_async_v3", refuse)
    backend = opened(engine("tensorrt"))
    outputs = [backend.step(*chain(width)).greedy_ids.tolist() for width in (4, 4, 4, 8, 8)]
    assert outputs[0] == outputs[1] == outputs[2]
    told = capsys.readouterr().err
    assert (
        told.count("steps are not captured as CUDA graphs, which makes them slower: TensorRT cannot run the step engine") == 1
    )
    assert "cuGraphLaunch" not in tensorrt.driver.calls


def test_an_earlier_complaint_is_not_told_as_the_cause(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    backend = opened(engine())
    backend.step(*chain(4))
    [verify] = tensorrt.contexts
    verify.engine.tell(1, "something harmless")
    verify.engine.profiles[1]["input_ids"]["max"] = [4, 8]
    with pytest.raises(BackendError, match=r"input_ids of shape \[1, 12\] in the profile verify: input_ids is out of bounds$"):
        backend.step(*chain(12))


def test_without_cuda_graphs_nothing_is_captured(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    for flavor in MODULES:
        backend = opened(engine(flavor), cuda_graphs=False)
        for _ in range(3):
            backend.step(*chain(4))
    assert "cuStreamBeginCapture" not in tensorrt.driver.calls
    assert {context.graph_strategy for context in tensorrt.contexts} == {None, "off"}


@pytest.mark.usefixtures("tensorrt")
def test_padding_stays_within_the_cache(engine: Callable[..., Path], bundle: Path) -> None:
    backend, cpu = opened(engine()), on_cpu(bundle)
    for one in (backend, cpu):
        one.resize(1, 192)
        for start in range(0, 180, 10):
            one.step(*chain(10, start))
    found, wanted = (one.step(*chain(11, 180), with_logits=True) for one in (backend, cpu))  # 12 would fit, 16 would not
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-3)
    found, wanted = (one.step(*chain(7, 185), with_logits=True) for one in (backend, cpu))
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-3)


def test_what_padding_left_is_cleared_too(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    backend = opened(engine())
    backend.step(*chain(9))  # padded to 12
    backend.clear(0, 0, 9)
    backend.gpu.synchronize()
    held = tensorrt.contexts[0].addresses["past.0.key"]
    assert not tensorrt.driver.room(held, 12 * 16 * 4, on_device=True).any()


@pytest.mark.usefixtures("tensorrt")
def test_works_that_were_not_used_for_long_are_dropped(
    engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tensorrt: StandInTensorRT
) -> None:
    monkeypatch.setattr("medusa_runtime.backends.gpu.backend.MAX_WORKS", 2)
    backend = opened(engine("tensorrt"))
    for width in (1, 2, 4, 1, 4):
        backend.step(*chain(width))
    assert len(tensorrt.contexts) == 4  # that of width 1 was made twice, that of width 4 was kept
    assert WIDTHS[:3] == (1, 2, 4)


@pytest.mark.parametrize("problem", ["alias", "shape"])
@pytest.mark.usefixtures("tensorrt")
def test_an_engine_that_is_not_what_its_manifest_says_is_refused(bundle: Path, tmp_path: Path, problem: str) -> None:
    path = stand_in_engine(bundle, tmp_path / "engine", **LIMITS)
    plan = path / "step.plan"
    data = plan.read_bytes()
    if problem == "alias":
        plan.write_bytes(data.replace(b'"present.1.key": "past.1.key"', b'"present.1.key": "past.0.key"', 1))
        line = r"writes present.1.key into past.0.key, the manifest says past.1.key; build the engine again$"
    else:
        manifest = Manifest.load(path)
        step = manifest.graphs[STEP]
        other = [
            tensor.model_copy(update={"shape": ["batch", 9]}) if tensor.name == "input_ids" else tensor
            for tensor in step.inputs
        ]
        graphs = manifest.graphs | {STEP: step.model_copy(update={"inputs": other})}
        manifest.model_copy(update={"graphs": graphs}).save(path)
        line = r"has the tensor input_ids as \[-1, -1\], the manifest says \[-1, 9\]; build the engine again$"
    with pytest.raises(BackendError, match=line):
        open_backend(path, Manifest.load(path))


@pytest.mark.usefixtures("tensorrt")
def test_a_damaged_plan_is_one_line(bundle: Path, tmp_path: Path) -> None:
    path = stand_in_engine(bundle, tmp_path / "engine", **LIMITS)
    plan = path / "heads.plan"
    plan.write_bytes(b"x" * plan.stat().st_size)
    with pytest.raises(BackendError, match=r"^TensorRT-RTX cannot load .*heads.plan: the plan is damaged$"):
        open_backend(path, Manifest.load(path))
    with pytest.raises(BundleError, match=r"heads.plan has sha256 "):
        MedusaLM.from_bundle(path)


@pytest.mark.parametrize("flavor", list(MODULES))
@pytest.mark.usefixtures("driver")
def test_without_tensorrt_it_says_what_to_install(
    engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, flavor: str
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[flavor], None)
    extra = "rtx" if flavor == "rtx" else "trt"
    with pytest.raises(MissingExtraError, match=rf"^{MODULES[flavor]} is not installed; .*medusa-export\[{extra}\]"):
        MedusaLM.from_bundle(engine(flavor))


@pytest.mark.usefixtures("driver")
def test_engines_of_another_version_or_gpu_are_refused(
    engine: Callable[..., Path], tensorrt: StandInTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt.driver.major, tensorrt.driver.minor = 9, 0
    with pytest.raises(BackendError, match=r"8\.9.*9\.0"):
        MedusaLM.from_bundle(engine())
    tensorrt.driver.major, tensorrt.driver.minor = 8, 9
    monkeypatch.setattr(StandInTensorRT, "__version__", "1.9.0.1")
    with pytest.raises(BackendError, match=r"1\.7\.1\.116.*1\.9\.0\.1"):
        MedusaLM.from_bundle(engine())


def test_what_tensorrt_rtx_compiled_is_kept_beside_the_engine(
    bundle: Path,
    tmp_path: Path,
    tensorrt: StandInTensorRT,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = stand_in_engine(bundle, tmp_path / "engine", **LIMITS)
    for _ in range(2):
        with MedusaLM.from_bundle(path) as lm:
            lm.generate("lazy", max_new_tokens=2)
    kept = path / "runtime-cache.sm89.bin"
    assert kept.read_bytes() == b"compiled"
    assert tensorrt.cached == [b"compiled"]
    with ThreadPoolExecutor(1) as pool:  # opened by one thread, saved by another
        backend = pool.submit(opened, path).result()
    tensorrt.driver.take_calls()
    backend.save()
    assert tensorrt.driver.take_calls() == ["cuCtxSetCurrent"]
    monkeypatch.setattr(RuntimeCache, "serialize", lambda _: None)
    backend.save()
    assert "TensorRT-RTX does not give out what it compiled: the next start compiles again" in capsys.readouterr().err
    kept.write_bytes(b"of another driver")
    opened(path)
    assert "runtime-cache.sm89.bin is of another version or GPU: the engine is compiled again" in capsys.readouterr().err


NUMBERS = np.array([0])
CALLS: list[Callable[[GpuBackend], object]] = [
    lambda backend: backend.step(*chain(8)),
    lambda backend: backend.propose(NUMBERS, NUMBERS),
    lambda backend: backend.resize(1, 64),
    lambda backend: backend.commit(0, 0, NUMBERS),
    lambda backend: backend.copy(0, 0, 1),
    lambda backend: backend.swap(0, 0, 1),
    lambda backend: backend.clear(0, 0, 1),
    lambda backend: backend.save(),
]


@pytest.mark.parametrize("kind", ["rtx", "tensorrt", "ort-cuda"])
def test_a_closed_backend_has_freed_everything(
    engine: Callable[..., Path], bundle: Path, tensorrt: StandInTensorRT, onnxruntime: StandInOrt, kind: str
) -> None:
    backend = opened(bundle, kind) if kind == "ort-cuda" else opened(engine(kind))
    for _ in range(3):  # the second one is captured
        backend.step(*chain(8), propose_ahead=True)
        backend.propose(np.array([5]), np.array([3]))
    backend.step(*chain(8), with_logits=True)
    executor = backend._executor
    made = [weakref.ref(one) for one in (*tensorrt.engines, *tensorrt.contexts, *getattr(executor, "_sessions", {}).values())]
    assert len(made) >= 2
    tensorrt.engines.clear()
    tensorrt.contexts.clear()
    driver = tensorrt.driver
    assert driver.used() > 0
    with ThreadPoolExecutor(1) as pool:  # opened by one thread, closed by another
        pool.submit(backend.close).result()
    assert (driver.device, driver.pinned) == ({}, {})
    assert [one for one in made if one() is not None] == []
    assert (backend.num_slots, backend.capacity, sum(backend.memory().values())) == (0, 0, 0)
    driver.take_calls()
    backend.close()
    for call in CALLS:
        with pytest.raises(ClosedError, match="this backend is closed; open the bundle again"):
            call(backend)
    assert driver.take_calls() == []


def test_a_gpu_that_has_failed_can_be_closed(
    engine: Callable[..., Path], tensorrt: StandInTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(engine("rtx"))
    monkeypatch.setattr(StandInDriver, "_streamsynchronize", lambda *_: (CUresult.CUDA_ERROR_INVALID_VALUE, None))
    with pytest.raises(BackendError, match="the GPU's driver failed: cuStreamSynchronize"):
        backend.step(*chain(8))
    backend.close()
    with pytest.raises(ClosedError):
        backend.step(*chain(8))


def test_too_little_memory_is_told_when_the_bundle_is_opened(engine: Callable[..., Path], tensorrt: StandInTensorRT) -> None:
    tensorrt.driver.memory = 700_000
    with pytest.raises(
        CapacityError, match=r"^a cache of 4 times 192 entries needs 786\.4 KB of GPU memory, \d+\.\d KB are free"
    ):
        MedusaLM.from_bundle(engine(), max_batch_size=4)


def test_a_step_without_memory_leaves_no_step_that_points_at_freed_buffers(bundle: Path, onnxruntime: StandInOrt) -> None:
    driver, backend, cpu = onnxruntime.driver, opened(bundle, "ort-cuda"), on_cpu(bundle)
    backend.resize(1, 400)
    wanted = cpu.step(*chain(8)).greedy_ids
    for _ in range(2):  # from now on the shape is prepared
        np.testing.assert_array_equal(backend.step(*chain(8)).greedy_ids, wanted)
    for room in range(0, 40_000, 1000):  # the memory ends after one buffer or another has moved
        driver.memory = driver.used() + room
        with suppress(CapacityError):
            backend.step(*chain(200), with_logits=True)
        driver.memory = MEMORY
        np.testing.assert_array_equal(backend.step(*chain(8)).greedy_ids, wanted)


def test_freed_memory_leaves_the_threads_own_context_current(driver: StandInDriver) -> None:
    gpu = Gpu()
    memory = gpu.allocate(100, "a test")
    driver._ctxsetcurrent("somebody else's")
    assert not driver.is_current
    del memory  # a finalizer may run anywhere
    assert driver.used() == 0
    assert not driver.is_current


def test_what_onnx_runtime_prints_goes_to_stderr_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("onnxruntime")
    program = "def preload_dlls():\n    print('no libcudnn.so.9')\n    meanwhile()"
    module.meanwhile = lambda: print("an answer")  # another thread's
    exec(program, module.__dict__)
    preload_libraries(module)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("an answer\n", "no libcudnn.so.9\n")
    assert not hasattr(module, "print")


def test_code_that_engines_bring_runs_only_if_it_is_allowed(
    engine: Callable[..., Path], tensorrt: StandInTensorRT, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(engine("tensorrt"), tmp_path / "engines"))
    manifest = Manifest.load(path)
    assert manifest.engine is not None
    manifest.engine.version_compatible = manifest.engine.lean_runtime = True
    manifest.save(path)
    with pytest.raises(BundleError, match=r"bring code that would run in this process .*--allow-engine-code\)$"):
        MedusaLM.from_bundle(path)
    assert tensorrt.engines == []
    with MedusaLM.from_bundle(path, allow_engine_code=True) as lm:
        assert lm.generate(PROMPTS[0], max_new_tokens=3).token_ids


def test_an_onnx_runtime_for_the_cpu_alone_says_what_to_install(
    bundle: Path, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cuda, "ort", StandInOrt(driver, (CPU,)))
    with pytest.raises(BackendError, match=r"for the CPU alone; replace it with: pip uninstall onnxruntime && pip install"):
        open_backend(bundle, Manifest.load(bundle), "ort-cuda")
    monkeypatch.setattr(ort_cuda, "ort", StandInOrt(driver, loads=False))
    with pytest.raises(BackendError, match=r"cannot use Stand-in GPU: its CUDA provider does not load"):
        open_backend(bundle, Manifest.load(bundle), "ort-cuda")


@pytest.mark.usefixtures("driver")
def test_bfloat16_logits_are_widened(bundle: Path) -> None:
    manifest = Manifest.load(bundle).model_copy(update={"precision": "bf16"})
    buffers = StepBuffers(Gpu(), manifest, accepts=False)
    buffers.reserve(1, 4, 4, with_logits=True)
    layout = buffers._logits_layout(1, 4)
    numbers = np.array([1.0, -2.5, 0.15625, 3e38], np.float32)
    buffers._logits.host(layout.places["logits"])[0, :, 0] = numbers.view(np.uint32) >> 16
    work = Work(Shape(0, 1, 4, 4, with_logits=True, propose_ahead=False), [], layout, layout, layout)
    np.testing.assert_allclose(buffers.logits(work, 4)[0, :, 0], numbers, rtol=1e-2)


def test_the_cache_of_an_onnx_bundle_grows_and_keeps_what_it_holds(bundle: Path, onnxruntime: StandInOrt) -> None:
    backend, cpu = opened(bundle, "ort-cuda"), on_cpu(bundle)
    backend.resize(1, 20)
    assert backend.capacity == 64
    for one in (backend, cpu):
        one.step(*chain(12))
    backend.resize(2, 100, [12])
    assert (backend.num_slots, backend.capacity) == (2, 128)
    found, wanted = (one.step(*chain(6, 12), with_logits=True) for one in (backend, cpu))
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-3)
    assert onnxruntime.driver.queue == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"engine": None}, r"kind is tensorrt, and there is no engine"),
        ({"limits": {"capacity": None}}, r"limits: capacity is missing"),
        ({"limits": {"capacity": -5}}, r"limits.capacity: Input should be greater than 0"),
        ({"engine": {"profiles": {}}}, r"engine.profiles: heads is missing"),
        ({"engine": {"aliases": {}}}, r"engine.aliases: present.0.key is missing"),
    ],
)
def test_an_edited_manifest_is_refused_with_what_it_lacks(
    engine: Callable[..., Path], tmp_path: Path, change: dict[str, object], line: str
) -> None:
    facts = json.loads((engine() / "manifest.json").read_text())
    for name, value in change.items():
        facts[name] = facts[name] | value if isinstance(value, dict) else value
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(BundleError, match=rf"{line}; (copy the engines|export the bundle) again"):
        Manifest.load(tmp_path)
