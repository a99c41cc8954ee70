#!/usr/bin/env bash
# Builds the virtual environment: install.sh FOLDER EXTRAS DEVICE, as in `install.sh .venv test,bench cpu`; EXTRAS may be empty.
#
# Finds Python 3.11 to 3.14 itself (PYTHON=... overrides), installs exactly what constraints.txt pins, and shows one line of
# progress. Whole pip output: FOLDER/install.log.
set -euo pipefail

venv=$1 extras=$2 device=$3
log=$venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

say() { printf 'epd: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

is_usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.14 python3.11 /usr/bin/python3}; do
        if is_usable "$name" && "$name" -c 'import ensurepip, venv' 2>/dev/null; then echo "$name"; return; fi
    done
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.14 python3.11}; do
        is_usable "$name" || continue
        if "$name" -m pip --version >/dev/null 2>&1; then echo "$name"; return; fi
        name=python$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        die "$name cannot make virtual environments here. Install its module once, then run this again: sudo apt-get install $name-venv"
    done
    die "Python 3.11 to 3.14 is needed. Install one, then run this again: sudo apt-get install python3 python3-venv" \
        "(Debian 12, Ubuntu 24.04 and later); PYTHON=/path/to/python names another."
}

make_venv() {
    local python=$1
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
    else
        "$python" -m venv --without-pip "$venv"
        "$python" -m pip --quiet --python "$venv/bin/python" install pip
    fi
}

# Runs pip; shows what it is at on one line that rewrites itself (on a terminal) or not at all (in a log).
pip() {
    local status=0
    "$venv/bin/python" -m pip --no-color install "$@" 2>&1 | tee -a "$log" | show_progress || status=$?
    return "$status"
}

show_progress() {
    if [ -t 2 ]; then
        awk '/^ *(Collecting|Downloading|Building|Installing|Using cached|Processing)/ {
                 printf "\r\033[K      %.100s", $0 > "/dev/stderr"; fflush("/dev/stderr") }
             END { printf "\r\033[K" > "/dev/stderr" }'
    else
        cat >/dev/null
    fi
}

# The CPU build of torch is not on PyPI, where a plain "torch" brings gigabytes of CUDA along: take it from where pip is configured
# to look, else from PyTorch's own index, else what there is. TORCH_INDEX names an index (a mirror, a CUDA flavour) instead.
install_torch() {
    local pin build
    pin=$(grep -E '^torch==' constraints.txt)
    build=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
    if [ "${device%%:*}" = cuda ] && [ "$build" != "${build%+cpu}" ]; then
        "$venv/bin/python" -m pip --quiet uninstall --yes torch >>"$log" 2>&1  # to pip it is the version that is asked for
    fi
    if [ -n "${TORCH_INDEX:-}" ]; then
        pip --index-url "$TORCH_INDEX" --extra-index-url "${PIP_INDEX_URL:-https://pypi.org/simple}" -c constraints.txt "$pin"
    elif [ "${device%%:*}" = cuda ]; then
        pip -c constraints.txt "$pin"
    else
        [ "${build%%+*}" = "${pin#torch==}" ] && return  # a CUDA build serves a CPU as well
        pip -c constraints.txt "$pin+cpu" \
            || pip --retries 1 --timeout 20 --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt "$pin+cpu" \
            || { say "the CPU build of $pin cannot be had here: taking the plain one, which is large"; pip -c constraints.txt "$pin"; }
    fi
}

is_usable "$venv/bin/python" || rm -rf "$venv"
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "[1/3] virtual environment $venv with $("$python" --version)"
    make_venv "$python"
fi
: >"$log"
trap 'status=$?; [ $status = 0 ] || { tail -n 15 "$log" >&2; say "installation failed; all of pip'\''s output is in $log"; }' EXIT
say "[2/3] torch (the first time this fetches about $([ "${device%%:*}" = cuda ] && echo 3 GB || echo 200 MB))"
install_torch
say "[3/3] the other packages"
pip -c constraints.txt setuptools
pip -c constraints.txt --no-build-isolation -e ".${extras:+[$extras]}"
