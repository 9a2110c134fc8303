#!/usr/bin/env bash
# Runs the test suite on one wheel under a given version of torch, in an environment of its own.
#
#   with_torch.sh TORCH_VERSION WHEEL [PYTEST_ARGUMENT...]
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 TORCH_VERSION WHEEL [PYTEST_ARGUMENT...]" >&2; exit 2; }
version=$1 wheel=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet "torch==$version" "$wheel[test]"
# Old versions of torch bring versions of Triton that are too old for the kernels: its tests are left out, by name.
"$environment/bin/pytest" --ignore-glob 'tests/test_triton_*' --ignore-glob 'tests/test_*_costs.py' --ignore tests/test_ptx_machine.py \
  --ignore tests/test_gpu_check.py --ignore tests/test_roofline.py "$@"
