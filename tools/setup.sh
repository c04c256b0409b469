#!/bin/sh
# Build the virtual environment: setup.sh PYTHON VENV [TORCH_INDEX]. Called by the Makefile.
set -eu
python=$1 venv=$2 index=${3:-}
cpu_wheels=https://download.pytorch.org/whl/cpu

fail() { echo "vaelab set-up: $1" >&2; exit 1; }

command -v "$python" >/dev/null 2>&1 || fail "no $python found: install Python 3.11 or newer, or name one: make PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old, 3.11 or newer is needed: make PYTHON=python3.12"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python lacks the venv module: on Debian and Ubuntu, apt install $(basename "$python")-venv"

if [ ! -x "$venv/bin/python" ]; then
    echo "== creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

torch=$(grep '^torch==' requirements.txt)
if ! pip show torch 2>/dev/null | grep -q "^Version: ${torch#torch==}"; then
    # On Linux a plain install brings gigabytes of CUDA; without an NVIDIA GPU the CPU build is what is wanted.
    if [ -z "$index" ] && [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidia0 ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        if "$venv/bin/python" -c "import urllib.request as r; r.urlopen('$cpu_wheels/torch/', timeout=10)" 2>/dev/null; then
            index=$cpu_wheels
        else
            echo "== $cpu_wheels does not answer: taking torch from where pip finds it"
        fi
    fi
    if [ -n "$index" ]; then
        echo "== installing $torch from $index"
        pip install --quiet --index-url "$index" "$torch"
    else
        echo "== installing $torch"
        pip install --quiet "$torch"
    fi
fi

echo "== installing the pinned requirements and vaelab itself (editable)"
pip install --quiet -r requirements-dev.txt
touch "$venv/.ready"
