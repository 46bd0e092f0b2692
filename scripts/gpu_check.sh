#!/bin/sh
# Everything that needs a GPU, on a bare machine with a GPU and Python 3.11 or later, into one JSON. With an NVIDIA GPU: CUDA,
# TensorRT and WebGPU; with another GPU that has a driver for Vulkan or Metal: WebGPU. It takes ten minutes after the installation.
#
#   scripts/gpu_check.sh                        install what it needs from the network, into a virtual environment
#   scripts/gpu_check.sh --wheels DIR           the same without network, from wheels (docs/gpu.md says how to fetch them)
#   scripts/gpu_check.sh --system               install nothing: use the packages that this Python has, PYTHONPATH included
#
# Further options: --python PYTHON, --venv DIR, and those of scripts/gpu_check.py (--minutes N, --output JSON, --bundle DIR …).
# Exit code 0: all passed; 1: there is no GPU, or something failed; 2: wrong usage; 4: all passed that had time to run.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=python3 venv='' wheels='' system=''

usage() {
    echo "Error: $1" >&2
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

left=$#
while [ "$left" -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 0 ;;
        --system) system=yes && shift && left=$((left - 1)) && continue ;;
        --dry-run) shift && left=$((left - 1)) && set -- "$@" --dry-run && continue ;;
        --wheels | --python | --venv | --minutes | --output | --work | --bundle | --model | --heads | --prompts | --limit) ;;
        --max-new-tokens | --validation-prompts | --scheme | --tests | --part | --timeout) ;;
        *) usage "there is no option $1" ;;
    esac
    [ "$left" -ge 2 ] || usage "$1 needs a value"
    case $1 in
        --wheels) wheels=$2 ;;
        --python) python=$2 ;;
        --venv) venv=$2 ;;
        *) set -- "$@" "$1" "$2" ;; # for gpu_check.py, behind what is still to be read
    esac
    shift 2
    left=$((left - 2))
done
[ -z "$wheels" ] || [ -z "$system" ] || usage "--wheels and --system exclude each other"
[ -z "$wheels" ] || [ -d "$wheels" ] || usage "--wheels $wheels: there is no such directory"
command -v "$python" >/dev/null || usage "--python $python: there is no such program"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Error: $("$python" --version) is too old; Python 3.11 or later is needed, give it with --python" >&2
    exit 1
}
# Before gigabytes are installed: the drivers' own answers, by their libraries alone.
kind=$("$python" - <<'PYTHON'
import ctypes, sys
from ctypes import byref


def why_no_cuda():
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver on this machine (no libcuda.so.1)"
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(byref(count))) or not count.value:
        return f"the NVIDIA driver finds no GPU here (CUDA error {code})"


def why_no_vulkan():
    count, instance = ctypes.c_uint32(), ctypes.c_void_p()
    create_info = (ctypes.c_uint64 * 8)(1)  # VkInstanceCreateInfo, all zeros but its type
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return "there is no Vulkan on it (no libvulkan.so.1)"
    if vulkan.vkCreateInstance(create_info, None, byref(instance)):
        return "Vulkan finds no driver"
    if vulkan.vkEnumeratePhysicalDevices(instance, byref(count), None) or not count.value:
        return "Vulkan finds no GPU"


if not (no_cuda := why_no_cuda()):
    print("nvidia")
elif sys.platform == "darwin" or not (no_vulkan := why_no_vulkan()):  # a Mac has Metal
    print("webgpu")
else:
    sys.exit(f"Error: {no_cuda}, and {no_vulkan}, so there is no GPU to check")
PYTHON
) || exit 1

if [ -n "$system" ]; then
    PYTHONPATH="$root/exporter:$root/runtime:$root/heads${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
    cd "$root"
    exec "$python" scripts/gpu_check.py "$@"
fi
from='' cpu='' full='--extra-index-url https://pypi.nvidia.com'
[ "$(uname)" = Darwin ] || cpu='--extra-index-url https://download.pytorch.org/whl/cpu' # the usual PyTorch brings gigabytes of CUDA
if [ -n "$wheels" ]; then
    from="--no-index --find-links $(cd "$wheels" && pwd)"
    cpu=$from full=$from
fi
[ -n "$venv" ] || venv=$root/build/$kind-venv
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
venv=$(cd "$venv" && pwd)
python=$venv/bin/python
cd "$root"

# Installs packages: the first argument is pip's options, several words in one.
install() {
    options=$1
    shift
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet -c constraints.txt $options "$@"
}

# Installs packages, or says what is left out without them. TensorRT and CUDA are not made for every system that has a GPU.
install_or_say() {
    what=$1
    shift
    install "$@" || echo "$what cannot be installed here; what needs it is left out" >&2
}

# onnxruntime and onnxruntime-gpu are one module in two builds, so an environment gets one of the extras cpu and gpu, never both.
if [ "$kind" = nvidia ]; then
    install "$from" '.[export]' pytest
    if ! install "$from" '.[gpu]'; then
        echo "ONNX Runtime for CUDA cannot be installed here; what needs it is left out, and the build for CPUs is installed" >&2
        install "$from" '.[cpu]'
    fi
    install_or_say "WebGPU's plugin" "$from" '.[webgpu]'
    install_or_say TensorRT-RTX "$from" '.[rtx]'
    install_or_say "full TensorRT" "$full" '.[trt]'
else
    install "$from" '.[cpu,webgpu]'
    "$python" scripts/gpu_check.py "$@" --dry-run >/dev/null # ends here if WebGPU does not take the GPU
    install "$cpu" '.[export]' pytest
fi
exec "$python" scripts/gpu_check.py "$@"
