#!/usr/bin/env bash
# Builds the threads of the extension and its kernels with ThreadSanitizer, and runs threads.cpp, whose callers step at the same time: no
# race may be reported, the bits must be those of one thread, and planted races must be reported.
#
# With clang and its OpenMP, because ThreadSanitizer sees how that one's threads wait for each other (through Archer, which comes with it);
# GNU's tells nobody, and every step would be reported.
#
# Takes a minute of CPU time.
#
#   thread.sh      exit 0: nothing found; 1: a race or a differing bit; 2: could not be tried
set -euo pipefail

fail() { echo "$0: $*" >&2; exit 2; }
broken() { echo "$0: $*" >&2; exit 1; }

[ $# = 0 ] || fail "usage: $0"
here=$(realpath "$(dirname "$0")")
csrc=$(realpath "$here/../../csrc")
clang=${CLANG:-$(compgen -c clang++ | grep -xE 'clang\+\+(-[0-9]+)?' | sort -V | tail -1 || true)}
need() { command -v "$1" >/dev/null || fail "missing command $1: install the Debian package $2"; }
need "${clang:-clang++}" "clang (and libclang-rt-dev, libomp-dev)"
need "${CXX:-g++}" g++
archer=$(dirname "$(realpath "$(command -v "$clang")")")/../lib/libarcher.so
[ -e "$archer" ] || fail "missing libarcher.so: install the Debian package libomp-dev, or that of your $clang"
[ -e "$("$clang" -print-resource-dir)/lib/linux/libclang_rt.tsan-$(uname -m).a" ] ||
  fail "missing ThreadSanitizer: install the Debian package libclang-rt-dev, or that of your $clang"
python=${PYTHON:-python3}
include=-I$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')  # of headers only
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir openmp forked

common="-std=c++17 -O1 -g -fsanitize=thread -Wall -Wextra -Wno-unknown-pragmas"  # it knows no GCC ivdep
flags() { sed -n "s/^$1://p" "$csrc/kernels/flags.txt"; }
case $(uname -m) in x86_64) isas="scalar avx2 avx512" ;; *) isas=scalar ;; esac
{
  for isa in $isas; do echo "$csrc/kernels/table.cpp -o $isa.o $(flags all) $(flags $isa) -DFUSED_OPT_ISA=$isa"; done
  for source in task tensor_info walk; do echo "$csrc/$source.cpp -o $source.o"; done
  echo "$here/threads.cpp -o threads.o -I$csrc"
  echo "$csrc/parallel.cpp -o openmp/parallel.o -fopenmp"
  echo "$csrc/parallel.cpp -o forked/parallel.o"  # without OpenMP it does what it does in a forked child, where races are not looked for
} | xargs -P "$(nproc)" -d '\n' -I{} sh -c "$clang $common $include -c {}" || broken "does not compile"
# Constants only. Clang before 18 cannot ask the CPU for all that it asks for.
"${CXX:-g++}" -std=c++17 -O1 -c "$csrc/isa.cpp" -o isa.o || broken "does not compile"

# Races inside OpenMP's own code, which is not instrumented, are none of ours.
export OMP_TOOL_LIBRARIES=$archer ARCHER_OPTIONS=verbose=1 TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1"
# Clang 14's runtime does not start where addresses are more random than it knows (vm.mmap_rnd_bits above 28).
fixed_addresses=$(setarch -R true 2>/dev/null && echo "setarch -R") || true

for kind in openmp forked; do
  "$clang" -fopenmp -fsanitize=thread ./*.o $kind/parallel.o -o $kind/threads || broken "does not link"
  for fault in shared twice; do
    # ThreadSanitizer remembers the last four accesses to a word only, so that on a busy machine it can miss one.
    attempts=10
    while $fixed_addresses $kind/threads $fault >log.txt 2>&1; do
      attempts=$((attempts - 1))
      [ $attempts -gt 0 ] || broken "$kind: the planted race '$fault' was not reported"
    done
    grep -q 'SUMMARY: ThreadSanitizer: data race .* fused_opt::scalar::' log.txt ||
      { cat log.txt >&2; broken "$kind: the planted race '$fault' ended otherwise"; }
  done
  case $kind in openmp) kernels=all ;; forked) kernels=plain ;; esac
  $fixed_addresses $kind/threads $kernels >log.txt 2>&1 || { cat log.txt >&2; exit 1; }
  [ $kind = forked ] || grep -q '^Archer detected OpenMP' log.txt || fail "Archer was not loaded: is $archer that of $clang?"
  echo "$kind: both planted races were reported, and no other"
  grep callers log.txt
done
