#!/bin/sh
# Everything that needs a GPU, on a bare Linux machine with an NVIDIA GPU and Python 3.11 or later, into one JSON:
#
#   scripts/gpu_check.sh                        install what it needs from the network, into a virtual environment
#   scripts/gpu_check.sh --wheels DIR           the same without network, from wheels (docs/gpu.md says how to fetch them)
#   scripts/gpu_check.sh --system               install nothing: use the packages that this Python has, PYTHONPATH included
#
# Further options: --python PYTHON, --venv DIR, and those of scripts/gpu_check.py (--output JSON, --bundle DIR, --model DIR …).
# Exit code 0: all passed; 1: there is no GPU, or something failed; 2: wrong usage.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=python3 venv=$root/build/gpu-venv wheels='' system=''

usage() {
    echo "Error: $1" >&2
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

left=$#
while [ "$left" -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
        --system) system=yes && shift && left=$((left - 1)) && continue ;;
        --wheels | --python | --venv | --output | --bundle | --model | --heads | --prompts | --max-new-tokens | --limit | --tests | --timeout) ;;
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
# Before gigabytes are installed: the driver's own answer, by its library alone.
"$python" - <<'PYTHON' || exit 1
import ctypes, sys
count = ctypes.c_int()
try:
    driver = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit("Error: there is no NVIDIA driver on this machine (no libcuda.so.1), so there is no GPU to check")
if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))) or not count.value:
    sys.exit(f"Error: the NVIDIA driver finds no GPU here (CUDA error {code}), so there is none to check")
PYTHON

if [ -n "$system" ]; then
    PYTHONPATH="$root/exporter:$root/runtime:$root/heads${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
else
    [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
    python=$venv/bin/python
    from=''
    [ -z "$wheels" ] || from="--no-index --find-links $(cd "$wheels" && pwd)"
    # shellcheck disable=SC2086 # $from is several words
    "$python" -m pip install --quiet -c "$root/constraints.txt" $from "${root}[gpu,rtx,export]" pytest
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet -c "$root/constraints.txt" $from "${root}[webgpu]" ||
        echo "WebGPU's plugin cannot be installed here; what needs it is left out" >&2
    full=$from
    [ -n "$wheels" ] || full='--extra-index-url https://pypi.nvidia.com'
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet -c "$root/constraints.txt" $full "${root}[trt]" ||
        echo "full TensorRT cannot be installed here; what needs it is left out" >&2
fi
cd "$root"
exec "$python" scripts/gpu_check.py "$@"
