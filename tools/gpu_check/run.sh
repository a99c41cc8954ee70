#!/usr/bin/env bash
# bash tools/gpu_check/run.sh OUTDIR [OPTIONS of python -m tools.gpu_check]
# The GPU check with this machine's own python3, or $PYTHON: no make, no virtual environment, nothing is installed.
set -euo pipefail

if [ $# -lt 1 ] || [ "${1:0:1}" = "-" ]; then
    echo "usage: bash tools/gpu_check/run.sh OUTDIR [OPTIONS]" >&2
    exit 64
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m tools.gpu_check --out "$out" "$@"
