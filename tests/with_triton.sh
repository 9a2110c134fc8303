#!/usr/bin/env bash
# Runs the tests of the Triton backend under another Triton: with_triton.sh VERSION. Needs the checkout's .venv, whose packages it copies.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?with_triton.sh VERSION}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
PYTHON=${PYTHON:-.venv/bin/python}
"$PYTHON" -m pip install --quiet --no-deps --target "$folder" "triton==$version"
export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
found=$("$PYTHON" -c 'import triton; print(triton.__version__)')
[ "$found" = "$version" ] || { echo "Triton $found is imported, not $version" >&2; exit 1; }
exec "$PYTHON" -m pytest tests/test_triton_launches.py tests/test_triton_ptx.py tests/test_triton_interpreter.py tests/test_ptx_machine.py \
  tests/test_kernel_costs.py
