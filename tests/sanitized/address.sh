#!/usr/bin/env bash
# Runs the tests of the extension with AddressSanitizer and UndefinedBehaviorSanitizer compiled into it: the first access outside of what
# malloc gave (torch's memory and Python's objects come from there), and the first undefined operation, ends the run with a report. torch
# and Python themselves are not checked. Takes 4 minutes of CPU time.
#
#   address.sh [PYTEST_ARGUMENT...]      exit 0: nothing found; 1: a report, or a test fails; 2: could not be tried
set -euo pipefail

fail() { echo "$0: $*" >&2; exit 2; }

cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" -c 'import torch, pytest, setuptools, pybind11, ninja' || fail "$python lacks a package: pip install torch '.[test]'"
cxx=${CXX:-g++}
command -v "$cxx" >/dev/null || fail "missing command $cxx: install the Debian package g++"
libasan=$("$cxx" -print-file-name=libasan.so)
[ "$libasan" != libasan.so ] || fail "$cxx has no libasan.so: install the Debian package libasan8"
case $("$cxx" --version) in *clang*) fail "$cxx is not gcc, whose libraries are needed: use CXX=g++" ;; esac
# gcc 12's runtime fails now and then where addresses are more random than it knows (vm.mmap_rnd_bits above 28).
fixed_addresses=$(setarch -R true 2>/dev/null && echo "setarch -R") || true
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

CXX=$cxx FUSED_OPT_SANITIZE=address,undefined "$python" setup.py --quiet build --build-lib "$site" || exit 1

# Not: what runs no kernel in this process, reads the optimised build's instructions, or takes minutes for the sake of numbers alone.
left_out='bench|commands|commands_int8|compile|conformance|end_to_end|figures|gpu_check|kernel_costs|memory|optim_db|packaging|passes'
left_out+='|processes|ptx_machine|quality|quality_weights|report|roofline|schedulers|step_in_backward|step_in_backward_bench'
left_out+='|step_in_backward_refusals|triton_interpreter|triton_ptx|triton_stages|vector_code|worker'
if [ $# = 0 ]; then
  mapfile -t files < <(ls tests/test_*.py | grep -vE "test_($left_out)\.py")
  set -- "${files[@]}"
  for name in native.py::test_without_the_extension_the_classes_are_torchs native.py::test_import_costs_little \
    properties.py::test_16_bit_results_are_the_correctly_rounded_ones_or_their_neighbours; do
    set -- "$@" "--deselect=tests/test_$name"
  done
fi

# libstdc++: the runtime looks for its __cxa_throw at start, when Python has not loaded it yet. PYTHONMALLOC: every Python object has
# memory of its own, so that one used too long is found. abort_on_error: Python then names the test. capture=sys: reports are seen.
# detect_leaks: Python and torch leave much behind when a process ends.
PYTHONPATH=$site PYTHONMALLOC=malloc LD_PRELOAD="$libasan $("$cxx" -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:malloc_context_size=5 \
  UBSAN_OPTIONS=abort_on_error=1:print_stacktrace=1 \
  $fixed_addresses "$python" -P -m pytest --quiet -p no:cacheprovider --capture=sys "$@" tests/sanitized/planted_faults.py || exit 1
