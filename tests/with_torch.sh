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
"$environment/bin/pytest" "$@"
