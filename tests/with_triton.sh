#!/usr/bin/env bash
# Runs the tests of the Triton backend under another Triton: with_triton.sh VERSION. PYTHON: the environment whose other packages are used,
# by default the checkout's .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: with_triton.sh VERSION}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
PYTHON=${PYTHON:-.venv/bin/python}
"$PYTHON" -m pip install --quiet --no-deps --target "$folder" "triton==$version"
export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
found=$("$PYTHON" -c 'import triton; print(triton.__version__)')
[ "$found" = "$version" ] || { echo "Triton $found is imported, not $version" >&2; exit 1; }
tests=(tests/test_triton_launches.py tests/test_triton_ptx.py tests/test_ptx_machine.py tests/test_kernel_costs.py)
case $version in
  3.[678].*) ;; # whose interpreters round tl.fma twice, and loops in them fail with numpy 2.4
  *) tests+=(tests/test_triton_interpreter.py) ;;
esac
"$(dirname "$PYTHON")/pytest" "${tests[@]}"
