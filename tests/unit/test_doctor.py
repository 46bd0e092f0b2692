"""`medusa-export doctor`: its report on machines of every kind. It needs only the base install."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from medusa_export.cli import main
from medusa_export.doctor import machine_facts as looking
from medusa_export.doctor.doctor_report import as_json, show, warnings
from medusa_export.doctor.machine_facts import CUDA_LIBRARY, CUDA_PROVIDER, PACKAGES, Facts, FlavorFacts, find_facts
from medusa_export.doctor.verdicts import BINDINGS, EXPORT, Verdict, verdicts
from medusa_export.packages import import_problem
from medusa_runtime.backends.gpu.devices import Gpus
from medusa_runtime.backends.gpu.driver import GpuFacts
from medusa_runtime.backends.webgpu.adapters import Adapter
from medusa_runtime.backends.webgpu.vulkan import VulkanDevice, device_of

RTX_CAPABILITIES = ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]
ADA = GpuFacts(0, "A GPU", "8.9", 24 * 10**9)
HOPPER = GpuFacts(0, "H GPU", "9.0", 80 * 10**9)
NO_DRIVER = "there is no NVIDIA driver on this machine"
NO_GPU = Gpus(why_none=f"{NO_DRIVER} (libcuda.so was not found)", is_absent=True)
WITHOUT = FlavorFacts(why_not="tensorrt is not installed")
EVERYTHING = dict.fromkeys(PACKAGES, "1.0") | {"onnxruntime": None}


def facts(gpu: GpuFacts | None = ADA, **changed: Any) -> Facts:
    """The facts of a machine with everything, except the given changes."""
    gpus = NO_GPU if gpu is None else Gpus([gpu], "13.0")
    whole = Facts(
        python="CPython 3.12",
        system="Linux",
        packages=EVERYTHING,
        missing={},
        providers=[CUDA_PROVIDER, "CPUExecutionProvider"],
        gpus=gpus,
        flavors={
            "rtx": FlavorFacts("1.7", RTX_CAPABILITIES),
            "tensorrt": FlavorFacts("11.0", [gpu.compute_capability] if gpu else []),
        },
        adapters=[] if gpu is None else [Adapter(0, gpu.name, is_software=False, device=None)],
    )
    return dataclasses.replace(whole, **changed)


def told(found: Facts) -> dict[str, Verdict]:
    return {f"{verdict.action} {verdict.what}": verdict for verdict in verdicts(found)}


def working(found: Facts) -> set[str]:
    return {name for name, verdict in told(found).items() if verdict.works}


def test_a_machine_with_everything_can_do_everything() -> None:
    everything = ["export onnx", "build trt", "build rtx", "run ort-cpu", "run ort-cuda", "run ort-webgpu"]
    everything += ["run trt", "run trt-rtx"]
    assert list(told(facts())) == everything
    assert working(facts()) == set(everything)
    assert all(verdict.mend is None for verdict in verdicts(facts()))


def test_without_a_gpu_engines_are_built_by_tensorrt_rtx_alone_and_none_runs() -> None:
    found = told(facts(None))
    assert working(facts(None)) == {"export onnx", "build rtx", "run ort-cpu"}
    for name in ("build trt", "run ort-cuda", "run trt", "run trt-rtx"):
        assert found[name].why.endswith(NO_DRIVER)
        assert found[name].mend is None  # no command installs a GPU


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_named_with_what_it_does() -> None:
    found = told(facts(HOPPER))
    assert working(facts(HOPPER)) == {
        "export onnx",
        "build trt",
        "build rtx",
        "run ort-cpu",
        "run ort-cuda",
        "run ort-webgpu",
        "run trt",
    }
    assert "TensorRT-RTX does not build for H GPU (9.0), only for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in found["build rtx"].why
    assert found["run trt-rtx"].why.endswith("use ort-cuda or full TensorRT")


def test_an_old_driver_does_not_run_engines() -> None:
    found = told(facts(gpus=Gpus([ADA], "12.8")))
    assert not found["run trt"].works
    assert found["run trt-rtx"].why == "TensorRT-RTX 1.7 needs CUDA 13, but the driver supports 12.8; update the driver"
    assert found["run ort-cuda"].works


def test_an_onnx_runtime_for_the_cpu_is_replaced_not_joined() -> None:
    packages = EVERYTHING | {"onnxruntime": "1.31", "onnxruntime-gpu": None}
    found = told(facts(providers=["CPUExecutionProvider"], packages=packages))
    assert found["run ort-cpu"].works
    assert found["run ort-cuda"].why == "ONNX Runtime 1.31 is only for the CPU"
    assert found["run ort-cuda"].mend == "pip uninstall --yes onnxruntime && pip install 'medusa-export[gpu]'"
    assert warnings(facts(packages=EVERYTHING | {"onnxruntime": "1.31"}))[0].startswith(
        "onnxruntime and onnxruntime-gpu are both"
    )
    assert warnings(facts()) == []


def test_nothing_for_nvidias_gpus_is_advised_where_there_is_none() -> None:
    """The install for CPUs on a machine without a GPU: only what this machine can do is advised."""
    packages = EVERYTHING | {"onnxruntime": "1.31", "onnxruntime-gpu": None}
    missing = {name: f"{name} is not installed" for name in (*EXPORT, BINDINGS)}
    without = dict.fromkeys(("rtx", "tensorrt"), FlavorFacts(why_not="its package is not installed"))
    found = facts(None, providers=["CPUExecutionProvider"], packages=packages, missing=missing, flavors=without)
    assert told(found)["run ort-cuda"].why.endswith(NO_DRIVER)
    assert {name for name, verdict in told(found).items() if verdict.mend} == {"export onnx", "build rtx"}
    [both] = warnings(facts(None, packages=EVERYTHING | {"onnxruntime": "1.31"}))
    assert both.endswith("pip install 'medusa-export[cpu]'")


def test_a_cuda_provider_without_its_libraries_runs_nothing() -> None:
    found = told(facts(why_no_cuda="libcublasLt.so.13: cannot open shared object file"))["run ort-cuda"]
    assert not found.works
    assert found.why == "ONNX Runtime's CUDA provider does not load: libcublasLt.so.13: cannot open shared object file"
    assert found.mend == "pip install 'medusa-export[gpu]'"
    assert as_json(facts(why_no_cuda="a reason"), [])["why_no_cuda_provider"] == "a reason"


def install_onnxruntime_gpu(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
    """An ONNX Runtime with a CUDA provider in a directory. Returns where the provider's library is to be."""
    module: Any = ModuleType("onnxruntime")
    module.__file__ = str(directory / "__init__.py")
    module.get_available_providers = lambda: [CUDA_PROVIDER, "CPUExecutionProvider"]
    exec("def preload_dlls(): print('Failed to load libcudnn.so.9')", module.__dict__)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    library = directory / CUDA_LIBRARY
    library.parent.mkdir()
    return library


def test_the_cuda_provider_is_loaded_where_there_is_a_gpu_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = install_onnxruntime_gpu(monkeypatch, tmp_path)
    monkeypatch.setattr(looking, "find_gpus", lambda: NO_GPU)
    assert find_facts().why_no_cuda is None
    monkeypatch.setattr(looking, "find_gpus", lambda: Gpus([ADA], "13.0"))
    assert "libonnxruntime_providers_cuda.so: cannot open shared object file" in str(find_facts().why_no_cuda)
    library.write_text("no library")
    assert "libonnxruntime_providers_cuda.so: file too short" in str(find_facts().why_no_cuda)
    library.unlink()
    library.symlink_to(importlib.import_module("_ctypes").__file__)  # a library that loads
    assert find_facts().why_no_cuda is None
    told = capsys.readouterr()
    assert (told.out, "Failed to load libcudnn.so.9" in told.err) == ("", True)


@pytest.mark.parametrize(
    ("missing", "name", "mend"),
    [
        ("torch", "export onnx", "pip install 'medusa-export[export]'"),
        ("onnx_ir", "build rtx", "pip install 'medusa-export[rtx,build]'"),
        ("onnx_ir", "build trt", "pip install 'medusa-export[trt,build]' --extra-index-url https://pypi.nvidia.com"),
        ("onnxruntime", "run ort-cpu", "pip install 'medusa-export[cpu]'"),
        ("onnxruntime", "run ort-cuda", "pip install 'medusa-export[gpu]'"),
        ("cuda.bindings.driver", "run ort-cuda", "pip install 'medusa-export[gpu]'"),
        ("cuda.bindings.driver", "run trt-rtx", "pip install 'medusa-export[rtx]'"),
    ],
)
def test_what_is_missing_is_named_with_what_installs_it(missing: str, name: str, mend: str) -> None:
    verdict = told(facts(missing={missing: f"{missing} is not installed"}))[name]
    assert (verdict.works, verdict.mend) == (False, mend)
    assert verdict.why == f"{missing} is not installed"


def test_a_flavour_that_is_not_installed() -> None:
    found = told(facts(None, flavors=facts().flavors | {"tensorrt": WITHOUT}))
    for name in ("build trt", "run trt"):
        assert (found[name].why, found[name].mend) == (f"tensorrt is not installed; {NO_DRIVER}", None)
    found = told(facts(flavors=facts().flavors | {"tensorrt": WITHOUT}))
    for name, extras in (("build trt", "trt,build"), ("run trt", "trt")):
        assert found[name].why == "tensorrt is not installed"
        assert found[name].mend == f"pip install 'medusa-export[{extras}]' --extra-index-url https://pypi.nvidia.com"


def test_a_base_install_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any extras, everything is reported as missing, with the command that installs it."""
    base = {"numpy", "medusa-export"}
    version = importlib.metadata.version

    def only_base(name: str) -> str:
        if name not in base:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    for name in (*EXPORT, BINDINGS, "onnxruntime", "medusa_runtime.backends.ort_library", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.metadata, "version", only_base)
    monkeypatch.setattr(looking, "find_gpus", lambda: Gpus(why_none="cuda-bindings is not installed"))
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {name for name, version in found["packages"].items() if version} == base
    assert [verdict["works"] for verdict in found["verdicts"]] == [False] * 8
    assert all(verdict["mend"].startswith("pip install 'medusa-export[") for verdict in found["verdicts"])
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "to export onnx: pip install 'medusa-export[export]'" in shown.stdout
    assert "GPUs: 0; cuda-bindings is not installed" in shown.stdout


def test_a_package_whose_libraries_are_not_there_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "half_there.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_problem("half_there") == "half_there does not load: libnvinfer.so.11: cannot open shared object file"
    assert import_problem("not.there") == "not.there is not installed"
    (tmp_path / "needs_another.py").write_text("import another_one")
    assert import_problem("needs_another") == "needs_another does not load: No module named 'another_one'"
    assert import_problem("json") is None


def test_full_tensorrt_is_found_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("tensorrt")
    module.__version__, module.__spec__ = "11.1", SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("medusa_export.engine.flavor.find_gpus", lambda: NO_GPU)
    found = find_facts()
    assert found.flavors["tensorrt"] == FlavorFacts("11.1", [])
    assert told(dataclasses.replace(found, gpus=NO_GPU))["build trt"].why.startswith(
        "TensorRT 11.1 builds for the GPU of the machine"
    )


def test_the_extras_it_names_are_there_and_the_two_onnx_runtimes_never_meet() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cpu", "gpu", "cuda", "trt", "rtx", "build", "export"} <= extras.keys()
    of_the_cpu = {name for name, needs in extras.items() if any(re.match(r"onnxruntime\b(?!-)", need) for need in needs)}
    assert of_the_cpu == {"cpu"}
    assert any(need.startswith("onnxruntime-gpu[cuda,cudnn]>=") for need in extras["gpu"])  # nothing else brings CUDA
    for name in ("gpu", "trt", "rtx", "build", "export"):
        assert not any("cpu" in need for need in extras[name] if need.startswith("medusa-export["))
    for name in ("trt", "rtx", "gpu"):
        assert "medusa-export[cuda]" in extras[name]
        assert not any(need.startswith("onnx>") for need in extras[name])  # a deployed runtime builds nothing


def test_it_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from medusa_export.cli import main\n"
        "try: main(['doctor'])\n"
        "finally: print('\\n', {'torch', 'transformers', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" set()\n")


def test_json_says_all_that_is_shown() -> None:
    found = as_json(facts(HOPPER), verdicts(facts(HOPPER)))
    assert json.loads(json.dumps(found)) == found
    assert found["gpus"] == [{"index": 0, "name": "H GPU", "compute_capability": "9.0", "memory": 80 * 10**9}]
    assert found["tensorrt"]["rtx"]["compute_capabilities"] == RTX_CAPABILITIES


def test_a_gpu_of_webgpu_is_told_with_its_limits() -> None:
    hardware = SimpleNamespace(vendor_id=0x8086, device_id=0x56A0)
    adapter = Adapter(0, "Arc GPU", is_software=False, device=SimpleNamespace(device=hardware))
    other, arc = (
        VulkanDevice(name, 0x8086, number, False, 16 << 30, 4 << 30) for name, number in (("UHD", 1), ("Arc", 0x56A0))
    )
    console = Console(record=True, width=200)
    show(facts(adapters=[adapter], vulkan=[other, arc]), [], console)
    assert "gpu:0: Arc GPU (WebGPU), Arc: 17.2 GB of memory, tensors of up to 4.3 GB" in console.export_text()
    [told_of] = as_json(facts(adapters=[adapter], vulkan=[other, arc]), [])["webgpu_adapters"]
    assert told_of["vulkan"]["largest_buffer"] == 4 << 30
    show(facts(adapters=[adapter]), [], console)
    assert "gpu:0: Arc GPU (WebGPU), whose limits are not told here" in console.export_text()
    in_software = dataclasses.replace(adapter, is_software=True)
    assert device_of(in_software, [arc, dataclasses.replace(other, is_software=True)]) == dataclasses.replace(
        other, is_software=True
    )
