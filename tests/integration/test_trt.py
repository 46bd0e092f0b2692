"""Real TensorRT-RTX engines of a tiny random model, built without a GPU."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medusa_export.bundle.export import export_bundle
from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.engine.build import build_engines
from medusa_export.engine.design import design_engines
from medusa_export.engine.flavor import TensorRT
from medusa_export.engine.network import Network
from medusa_export.engine.plan import _config, write_plan
from medusa_export.errors import ExportError
from medusa_export.passes.tensorrt.additive_mask import AdditiveMask
from medusa_export.passes.tensorrt.expand_softcap import ExpandSoftcap
from medusa_export.passes.tensorrt.specialize import specialize
from medusa_export.passes.tensorrt.static_capacity import StaticCapacity
from medusa_heads.config import HeadsConfig
from medusa_heads.formats import native
from medusa_heads.modules import MedusaHeads
from medusa_runtime.backends.gpu.devices import Gpus
from medusa_runtime.backends.gpu.driver import GpuFacts
from medusa_runtime.bundle.manifest import HEADS, STEP, Manifest, QuantizationFacts, ValidationFacts, sha256_of
from medusa_runtime.errors import BackendError, BundleError, OptionError

pytest.importorskip("tensorrt_rtx")

LAYERS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 2, 2, 16, 64, 128
NUM_HEADS, TOP_K = 3, 4
MAX_SEQ_LEN = 200  # + 64 tree nodes, rounded up to a multiple of 64
CAPACITY = 320
DTYPES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}
PAIRS = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
QUANTIZED = QuantizationFacts(scheme="int8", activation_bits=16, smoothing=0, source_bundle="", quality={})
GetBundle = Callable[[str], Path]


@pytest.fixture(scope="module")
def get_bundle(tmp_path_factory: pytest.TempPathFactory) -> GetBundle:
    """Exports the tiny model in a precision, once. Tests that change a bundle copy it first."""
    root = tmp_path_factory.mktemp("trt")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=VOCAB, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(root / "model")
    heads = HeadsConfig(base_model="tiny", num_heads=NUM_HEADS, hidden_size=HIDDEN, vocab_size=VOCAB, reads_root=True)
    native.save(MedusaHeads(heads), root / "heads")

    def get(precision: str) -> Path:
        bundle = root / precision
        if not bundle.exists():
            export_bundle(ExportOptions(str(root / "model"), root / "heads", bundle, precision=precision, head_top_k=TOP_K))
        return bundle

    return get


def options(bundle: Path, output: Path, **changes: Any) -> EngineOptions:
    return EngineOptions(bundle, output, **({"max_seq_len": MAX_SEQ_LEN, "max_prefill_tokens": 128} | changes))


def edited(bundle: Path, directory: Path, **changes: Any) -> Path:
    """A copy of a bundle with some of its manifest's fields changed."""
    shutil.copytree(bundle, directory)
    Manifest.load(directory).model_copy(update=changes).save(directory)
    return directory


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_engines_keep_the_contract_with_a_static_capacity(get_bundle: GetBundle, tmp_path: Path, precision: str) -> None:
    source, output = get_bundle(precision), tmp_path / "engine"
    build_engines(options(source, output))

    manifest = Manifest.load(output)
    manifest.require_intact(output)
    assert sorted(path.name for path in output.iterdir()) == sorted([*manifest.files, "manifest.json"])
    assert set(manifest.files) == {"step.plan", "heads.plan", "tokenizer.json", "chat.json"}
    assert manifest.kind == "tensorrt"
    assert manifest.precision == precision
    assert manifest.limits.capacity == CAPACITY
    dtype, cache = DTYPES[precision], ["batch", KV_HEADS, CAPACITY, HEAD_DIM]
    step, heads = manifest.graphs[STEP], manifest.graphs[HEADS]
    assert step.target == heads.target == "tensorrt-rtx"
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in step.inputs} == {
        "input_ids": ("int64", ["batch", "num_tokens"]),
        "position_ids": ("int64", ["batch", "num_tokens"]),
        "tree_mask": ("bool", ["batch", "num_tokens", "num_tokens"]),
        "cache_lengths": ("int64", ["batch"]),
        "logit_rows": ("int64", ["batch", "num_rows"]),
        **{f"past.{pair}": (dtype, cache) for pair in PAIRS},
    }
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in step.outputs} == {
        "greedy_ids": ("int64", ["batch", "num_rows"]),
        "hidden": (dtype, ["batch", "num_rows", HIDDEN]),
        "logits": (dtype, ["batch", "num_rows", VOCAB]),
        "accepted_rows": ("int64", ["batch"]),
        "accepted_ids": ("int64", ["batch"]),
        "accepted_hidden": (dtype, ["batch", HIDDEN]),
        **{f"present.{pair}": (dtype, cache) for pair in PAIRS},
    }
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in heads.outputs} == {
        "head_ids": ("int64", ["batch", NUM_HEADS, TOP_K]),
        "head_log_probs": ("float", ["batch", NUM_HEADS, TOP_K]),
    }


def test_the_manifest_tells_what_engines_were_built_for(get_bundle: GetBundle, tmp_path: Path) -> None:
    source = get_bundle("fp16")
    capabilities = ("8.9", "12.0", "8.9")
    manifest = build_engines(
        options(source, tmp_path / "engine", compute_capabilities=capabilities, max_batch_size=4, max_tree_nodes=32)
    )

    engine = manifest.engine
    assert engine is not None
    assert (engine.flavor, engine.tensorrt_version) == ("rtx", TensorRT.load("rtx").version)
    assert engine.compute_capabilities == ["8.9", "12.0"]
    assert engine.aliases == {f"present.{pair}": f"past.{pair}" for pair in PAIRS}
    assert engine.source_bundle == Manifest.load(source).content_digest()
    assert list(engine.profiles) == ["prefill", "verify", "heads"]
    tree_nodes = len(manifest.tree["parents"])
    prefill, verify = engine.profiles["prefill"], engine.profiles["verify"]
    assert prefill["tree_mask"] == {"min": [1, 1, 1], "opt": [4, 128, 128], "max": [4, 128, 128]}
    assert prefill["logit_rows"] == {"min": [1, 1], "opt": [4, 1], "max": [4, 32]}
    assert verify["input_ids"] == {"min": [1, 1], "opt": [4, tree_nodes], "max": [4, 32]}
    assert verify["past.0.key"]["max"] == [4, KV_HEADS, 256, HEAD_DIM]
    assert engine.profiles["heads"] == {
        "hidden": {"min": [1, HIDDEN], "opt": [4, HIDDEN], "max": [4, HIDDEN]},
        "root_ids": {"min": [1], "opt": [4], "max": [4]},
    }
    assert manifest.limits.model_dump() == {
        "max_seq_len": MAX_SEQ_LEN,
        "max_batch_size": 4,
        "max_tree_nodes": 32,
        "max_prefill_tokens": 128,
        "capacity": 256,
    }


def test_prompt_chunks_are_never_longer_than_a_sequence(get_bundle: GetBundle, tmp_path: Path) -> None:
    limits = build_engines(EngineOptions(get_bundle("fp16"), tmp_path / "engine")).limits
    assert (limits.max_seq_len, limits.max_prefill_tokens, limits.capacity) == (256, 256, 320)


@pytest.mark.usefixtures("full_tensorrt")
def test_full_tensorrt_builds_for_the_gpu_it_finds(
    get_bundle: GetBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = get_bundle("fp16")
    with pytest.raises(OptionError, match=r"'8\.6', but TensorRT .* builds only for 8\.9"):
        build_engines(options(bundle, tmp_path / "engine", flavor="tensorrt", compute_capabilities=("8.6",)))
    manifest = build_engines(options(bundle, tmp_path / "engine", flavor="tensorrt"))
    assert manifest.graphs[STEP].target == "tensorrt"
    assert manifest.engine is not None
    assert manifest.engine.compute_capabilities == ["8.9"]
    assert manifest.engine.built_with == {"gpu": "Some GPU", "cuda": "13.0"}

    monkeypatch.setattr("medusa_export.engine.flavor.find_gpus", lambda: Gpus(why_none="there is no driver"))
    with pytest.raises(BackendError, match=r"found none \(there is no driver\); build on the target machine"):
        build_engines(options(bundle, tmp_path / "other", flavor="tensorrt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_len": 257}, "--max-seq-len is 257; it must be 2 to 256"),
        ({"max_seq_len": 1}, "--max-seq-len is 1; it must be 2 to 256"),
        ({"max_batch_size": 0}, "--max-batch-size is 0; it must be 1 or more"),
        ({"max_tree_nodes": 8}, r"--max-tree-nodes is 8; it must be 16 \(the bundle's default tree\) to 1024"),
        ({"max_prefill_tokens": 0}, "--max-prefill-tokens is 0; it must be 1 or more"),
        ({"compute_capabilities": ("9.0",)}, r"--compute-capability is '9\.0', but TensorRT-RTX .* builds only for .*8\.9"),
        ({"compute_capabilities": ("SM89",)}, "--compute-capability is 'SM89'"),
        ({"workspace": 0}, "--workspace is 0; it must be 1 or more"),
        ({"opt_level": 6}, "--opt-level is 6; it must be 0 to 5"),
        (
            {"version_compatible": True},
            "--version-compatible is only for --flavor tensorrt; with TensorRT-RTX, build",
        ),
        (
            {"hardware_compatibility": "ampere-plus"},
            "--hardware-compatibility is only for --flavor .* every GPU with --compute-capability",
        ),
        ({"timing_cache": Path("times")}, "--timing-cache is only for --flavor tensorrt; with TensorRT-RTX, leave it out"),
        ({"strip_weights": True, "weights": "int8"}, "--strip-weights does not work with --weights int8"),
        (
            {"weights": "fp8", "compute_capabilities": ("8.9", "8.6")},
            r"fp8 needs compute capability 8\.9, but you build for 8\.6; use",
        ),
        (
            {"weights": "int4", "compute_capabilities": ("7.5",)},
            r"int4 needs compute capability 8\.0, but you build for 7\.5",
        ),
    ],
)
def test_an_option_out_of_range_is_refused_before_any_work(
    get_bundle: GetBundle, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        build_engines(options(get_bundle("fp16"), tmp_path / "engine", **changes))
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_refused_where_the_gpu_has_none(get_bundle: GetBundle, tmp_path: Path) -> None:
    bundle = edited(get_bundle("fp16"), tmp_path / "bundle", precision="bf16")
    with pytest.raises(OptionError, match=r"the bundle's bf16 needs compute capability 8\.0, but you build for 7\.5"):
        build_engines(options(bundle, tmp_path / "engine", compute_capabilities=("7.5",)))


INSTALL_RTX = "pip install 'medusa-export[rtx,build]'"
INSTALL_FULL = "pip install 'medusa-export[trt,build]' --extra-index-url https://pypi.nvidia.com"


@pytest.mark.parametrize(
    ("flavor", "module", "command"), [("tensorrt", "tensorrt", INSTALL_FULL), ("rtx", "tensorrt_rtx", INSTALL_RTX)]
)
def test_what_a_flavour_lacks_is_told_with_what_installs_it(
    get_bundle: GetBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavor: str, module: str, command: str
) -> None:
    asked = options(get_bundle("fp16"), tmp_path / "engine", flavor=flavor)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=f"^{re.escape(f'{module} is not installed; install it with: {command}')}$"):
        build_engines(asked)
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{module}.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file\\nmore')")
    why = "libraries that it needs are missing (libnvinfer.so.11: cannot open shared object file)"
    message = f"{module} is installed, but {why}; install them with: {command}"
    with pytest.raises(BackendError, match=f"^{re.escape(message)}$"):
        build_engines(asked)
    (tmp_path / f"{module}.py").write_text("import tensorrt_libs_of_no_version")
    with pytest.raises(BackendError, match=r"are missing \(No module named 'tensorrt_libs_of_no_version'\)"):
        build_engines(asked)


def test_only_a_sound_onnx_bundle_is_built(get_bundle: GetBundle, tmp_path: Path) -> None:
    source = get_bundle("fp16")
    failed = ValidationFacts(status="failed", report="validation.json")
    for name, changes, message in (
        ("failed", {"validation": failed}, r"failed its validation \(validation\.json\)"),
        ("quantised", {"quantization": QUANTIZED}, r"is quantised \(int8\); build from the float bundle .*--weights"),
        ("graphs", {"graphs": {}}, "graphs: heads, step is missing"),
    ):
        with pytest.raises(BundleError, match=message):
            build_engines(options(edited(source, tmp_path / name, **changes), tmp_path / "engine"))
    build_engines(options(source, tmp_path / "engines"))
    with pytest.raises(BundleError, match="is an engine bundle already; build from the ONNX bundle"):
        build_engines(options(tmp_path / "engines", tmp_path / "engine"))
    damaged = edited(source, tmp_path / "damaged")
    (damaged / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"weights\.bin has 0 bytes"):
        build_engines(options(damaged, tmp_path / "engine"))
    assert not (tmp_path / "engine").exists()


def test_an_existing_output_is_kept_unless_forced(get_bundle: GetBundle, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    output.mkdir()
    (output / "manifest.json").write_text('{"kind": "tensorrt", "schema_version": 1, "files": {}}')
    with pytest.raises(OptionError, match="exists"):
        build_engines(options(get_bundle("fp16"), output))
    broken = edited(get_bundle("fp16"), tmp_path / "bundle")
    model = ir.load(broken / "step.onnx")
    model.graph.outputs[0].name = "other_ids"
    ir.save(model, broken / "step.onnx")
    manifest = Manifest.load(broken)
    manifest.files["step.onnx"].size = (broken / "step.onnx").stat().st_size
    manifest.files["step.onnx"].sha256 = sha256_of(broken / "step.onnx")
    manifest.save(broken)
    with pytest.raises(ExportError, match=r"the step engine's output greedy_ids is missing, .* int64 \[-1, -1\]"):
        build_engines(options(broken, output, force=True))
    assert [path.name for path in output.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_specialised_graph_computes_what_the_portable_one_does(
    get_bundle: GetBundle, tmp_path: Path, precision: str
) -> None:
    import onnxruntime as ort

    capacity = 64
    bundle = shutil.copytree(get_bundle(precision), tmp_path / "bundle")
    portable = ir.load(bundle / "step.onnx")
    specialised = ir.load(bundle / "step.onnx")
    specialize(specialised, precision, capacity)  # type: ignore[arg-type]
    for node in specialised.graph:
        node.attributes.pop("TRT_decomposable", None)  # ONNX Runtime does not know it
    feeds = step_feeds(np.float16 if precision == "fp16" else np.float32, capacity)
    results = []
    for name, model in (("portable", portable), ("specialised", specialised)):
        ir.save(model, bundle / f"{name}.onnx")
        session = ort.InferenceSession(bundle / f"{name}.onnx", providers=["CPUExecutionProvider"])
        results.append(session.run(None, feeds))
    for want, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, want, atol=2e-3 if precision == "fp16" else 1e-6)
    assert not any("capacity" in map(str, value.shape or ()) for value in specialised.graph.inputs)
    assert not any("capacity" in map(str, value.shape or ()) for node in specialised.graph for value in node.outputs)


def step_feeds(dtype: type, capacity: int) -> dict[str, np.ndarray]:
    """Two sequences with 20 and 7 cached tokens, and a tree of five nodes: 0 -> 1 -> 3, 0 -> 2 -> 4."""
    random = np.random.default_rng(0)
    mask = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], bool)
    lengths = np.array([20, 7])
    shape = (2, KV_HEADS, capacity, HEAD_DIM)
    return {
        "input_ids": random.integers(0, VOCAB, (2, 5)),
        "position_ids": lengths[:, None] + np.array([0, 1, 1, 2, 2]),
        "tree_mask": np.stack([mask, mask]),
        "cache_lengths": lengths,
        "logit_rows": np.array([[0, 3, 4], [0, 1, 2]]),
        **{f"past.{pair}": random.normal(size=shape).astype(dtype) for pair in PAIRS},
    }


def test_each_mask_is_made_additive_once() -> None:
    full, sliding = (value(name, ir.DataType.BOOL, (1, 1, 4, 8)) for name in ("full", "sliding"))
    query, key = value("query", ir.DataType.FLOAT16, (1, 2, 4, 16)), value("key", ir.DataType.FLOAT16, (1, 2, 8, 16))
    nodes = [ir.node("Attention", [query, key, key, mask]) for mask in (full, sliding, full)]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([query, key, full, sliding], outputs, nodes=nodes, opset_imports={"": 24})

    assert AdditiveMask()(ir.Model(graph, ir_version=10)).modified
    assert [node.op_type for node in graph] == ["Where", "Attention", "Where", "Attention", "Attention"]
    masks = [node.inputs[3] for node in nodes]
    assert masks[0] is masks[2]
    assert [mask.producer().inputs[0] for mask in masks] == [full, sliding, full]  # type: ignore[union-attr]
    assert {mask.dtype for mask in masks if mask is not None} == {ir.DataType.FLOAT16}
    assert not AdditiveMask()(ir.Model(graph, ir_version=10)).modified


def test_a_softcap_is_spelled_out_in_the_order_of_the_operator() -> None:
    import onnxruntime as ort

    def attention() -> ir.Model:
        query = value("query", ir.DataType.FLOAT, (2, 6, 4, 16))
        key, values = (value(name, ir.DataType.FLOAT, (2, 3, 8, 16)) for name in ("key", "value"))
        mask = value("mask", ir.DataType.FLOAT, (2, 1, 4, 8))
        node = ir.node("Attention", [query, key, values, mask], {"softcap": 5.0, "scale": 0.3})
        output = node.outputs[0]
        output.name, output.type, output.shape = "attended", ir.TensorType(ir.DataType.FLOAT), query.shape
        graph = ir.Graph([query, key, values, mask], [output], nodes=[node], opset_imports={"": 24}, name="attention")
        return ir.Model(graph, ir_version=10)

    random = np.random.default_rng(0)
    shapes = {"query": (2, 6, 4, 16), "key": (2, 3, 8, 16), "value": (2, 3, 8, 16)}
    feeds = {name: random.normal(size=shape, scale=3).astype(np.float32) for name, shape in shapes.items()}
    feeds["mask"] = np.where(random.random((2, 1, 4, 8)) < 0.5, 0, -1e30).astype(np.float32)
    feeds["mask"][..., 0] = 0
    whole, expanded = attention(), attention()
    assert ExpandSoftcap()(expanded).modified
    assert "Attention" not in {node.op_type for node in expanded.graph}
    want, found = (
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for model in (whole, expanded)
    )
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert not ExpandSoftcap()(expanded).modified


def value(name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def refused(name: str, nodes: list[ir.Node], inputs: list[ir.Value], directory: Path) -> str:
    graph = ir.Graph(inputs, [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 24, "odd": 1})
    with pytest.raises(ExportError) as error:
        Network.parse(TensorRT.load("rtx"), name, ir.Model(graph, ir_version=10), directory)
    return str(error.value)


@pytest.mark.parametrize(
    ("operator", "domain", "told"),
    [
        ("Det", "", r"Det node 'n': TensorRT has no such operator"),
        ("Odd", "odd", r"Odd node 'n': Plugin not found, .* \(the operator is neither TensorRT's nor standard ONNX\)"),
        ("Add", "", r"Add node 'n': n: .* must have same input types\. .* \(TensorRT does not support this type here\)"),
    ],
)
def test_a_node_that_tensorrt_refuses_is_told_in_one_line(tmp_path: Path, operator: str, domain: str, told: str) -> None:
    x, half = value("x", ir.DataType.FLOAT, (4, 4)), value("half", ir.DataType.FLOAT16, (4, 4))
    node = ir.node(operator, [x, half] if operator == "Add" else [x], name="n", domain=domain)
    message = refused("odd", [node], [x, half], tmp_path)
    assert re.fullmatch(f"TensorRT-RTX refuses the odd graph: {told}", message)
    assert "/_src/" not in message


def test_all_nodes_that_tensorrt_refuses_are_told(tmp_path: Path) -> None:
    x = value("x", ir.DataType.FLOAT, (4, 4))
    lines = refused("odd", [ir.node("Det", [x], name=f"n{index}") for index in range(12)], [x], tmp_path).splitlines()
    assert lines[0] == "TensorRT-RTX refuses the odd graph:"
    assert lines[1:11] == [f"  Det node 'n{index}': TensorRT has no such operator" for index in range(10)]
    assert lines[11:] == ["  … and 2 more"]


def test_what_tensorrt_cannot_compile_is_told_in_one_line(get_bundle: GetBundle, tmp_path: Path) -> None:
    bundle = get_bundle("fp32")
    model = ir.load(bundle / "step.onnx")
    StaticCapacity(CAPACITY)(model)  # and no DecomposableAttention
    network = Network.parse(TensorRT.load("rtx"), STEP, model, bundle)
    asked = options(bundle, tmp_path / "engine")
    profiles = design_engines(asked).profiles[STEP]
    with pytest.raises(ExportError, match=r"cannot build the step engine: .*not supported by a dedicated kernel") as failed:
        write_plan(network, tmp_path / "step.plan", {"verify": profiles["verify"]}, ["8.9"], asked)
    assert "\n" not in str(failed.value)
    assert "/_src/" not in str(failed.value)
    with pytest.raises(ExportError, match=r"no tactics .* workspace limit.* \(raise --workspace or leave it out\)"):
        build_engines(options(get_bundle("fp16"), tmp_path / "engine", workspace=1))
    assert not (tmp_path / "engine").exists()


def test_a_full_disk_is_told(get_bundle: GetBundle, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    bundle = get_bundle("fp16")
    network = Network.parse(TensorRT.load("rtx"), HEADS, ir.load(bundle / "heads.onnx"), bundle)
    hidden, root_ids = (dict.fromkeys(("min", "opt", "max"), shape) for shape in ([1, HIDDEN], [1]))
    with pytest.raises(ExportError, match="/dev/full cannot be written: No space left on device"):
        write_plan(network, full, {HEADS: {"hidden": hidden, "root_ids": root_ids}}, ["8.9"], options(bundle, tmp_path))


@pytest.fixture
def full_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """RTX in the place of full TensorRT, and a GPU that it builds for."""
    rtx = TensorRT.load("rtx").api
    stand_in = ModuleType("tensorrt")
    stand_in.__dict__.update({name: value for name, value in vars(rtx).items() if name != "ComputeCapability"})
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    gpus = Gpus([GpuFacts(0, "Some GPU", "8.9", 1 << 34)], "13.0")
    monkeypatch.setattr("medusa_export.engine.flavor.find_gpus", lambda: gpus)


@pytest.mark.usefixtures("full_tensorrt")
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX:DeprecationWarning")
def test_a_timing_cache_is_read_and_written(get_bundle: GetBundle, tmp_path: Path) -> None:
    cache, bundle = tmp_path / "times", get_bundle("fp16")
    build_engines(options(bundle, tmp_path / "engine", flavor="tensorrt", timing_cache=cache))
    assert cache.stat().st_size
    build_engines(options(bundle, tmp_path / "again", flavor="tensorrt", timing_cache=cache))
    with pytest.raises(OptionError, match=r"--timing-cache is .*times, but its directory does not exist"):
        build_engines(options(bundle, tmp_path / "third", flavor="tensorrt", timing_cache=tmp_path / "nowhere" / "times"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "engine", "times"]


@pytest.mark.usefixtures("full_tensorrt")
def test_full_tensorrt_gets_what_makes_engines_compatible(
    get_bundle: GetBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RTX takes these flags, but for the level, of which it says so, and it has no lean runtime to put into plans."""

    def without_lean_runtime(tensorrt: TensorRT, *rest: Any) -> Any:
        config, flags = _config(tensorrt, *rest), tensorrt.api.BuilderFlag
        assert config.get_flag(flags.VERSION_COMPATIBLE)
        assert not config.get_flag(flags.EXCLUDE_LEAN_RUNTIME)
        config.set_flag(flags.EXCLUDE_LEAN_RUNTIME)
        return config

    monkeypatch.setattr("medusa_export.engine.plan._config", without_lean_runtime)
    asked = options(
        get_bundle("fp16"), tmp_path / "engine", flavor="tensorrt", hardware_compatibility="ampere-plus",
        version_compatible=True, opt_level=0, workspace=4000, verbose=True,
    )  # fmt: skip
    engine = build_engines(asked).engine
    assert engine is not None
    assert (engine.hardware_compatibility, engine.version_compatible, engine.lean_runtime) == ("ampere-plus", True, True)
    assert engine.built_with == {"gpu": "Some GPU", "cuda": "13.0", "opt_level": "0", "workspace": "4000 MB"}
    log = capsys.readouterr().err
    assert "warning: setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX" in log
    assert "verbose: Parsing node: " in log


def test_products_in_float32_are_not_rounded_to_tf32(tmp_path: Path) -> None:
    tensorrt = TensorRT.load("rtx")
    builder = tensorrt.api.Builder(tensorrt.api.Logger(tensorrt.api.Logger.ERROR))
    tf32 = tensorrt.api.BuilderFlag.TF32
    assert builder.create_builder_config().get_flag(tf32)  # what it would be
    assert not _config(tensorrt, builder, ["8.9"], EngineOptions(tmp_path, tmp_path)).get_flag(tf32)
