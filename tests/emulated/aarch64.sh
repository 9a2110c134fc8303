#!/bin/bash
# Compiles every source of the extension for Linux on aarch64, and runs its kernels under an emulator (QEMU) on the data of isa_bits.cpp:
# their bits must be those of the x86-64 build on this machine. Takes about 20 seconds.
#
#   aarch64.sh WORK_FOLDER      exit 0: compiles, identical bits; 1: some bits differ; 2: could not be tried
set -euo pipefail

fail() { echo "$0: $*" >&2; exit 2; }
broken() { echo "$0: $*" >&2; exit 1; }
need_command() { command -v "$1" >/dev/null || fail "missing command $1: install the Debian package $2"; }

[ $# = 1 ] || fail "usage: $0 WORK_FOLDER"
here=$(realpath "$(dirname "$0")")
csrc=$(realpath "$here/../../csrc")
need_command g++ g++
need_command aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need_command qemu-aarch64 qemu-user
python=${PYTHON:-python3}
includes=$("$python" -c 'import pybind11, sysconfig; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include"))') ||
  fail "missing pybind11 for $python: pip install pybind11"
mkdir -p "$1"
cd "$1"

common="-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
flags() { sed -n "s/^$1://p" "$csrc/kernels/flags.txt"; }
kernel() { echo "$common $(flags all) $(flags "$1") -DFUSED_OPT_ISA=$1"; }
for source in "$csrc"/*.cpp; do
  # Python's own headers are this machine's, whose word size and byte order are aarch64's too.
  aarch64-linux-gnu-g++ $common -fopenmp $includes -c "$source" -o "$(basename "$source" .cpp).aarch64.o"
done
aarch64-linux-gnu-g++ $(kernel scalar) -c "$csrc/kernels/table.cpp" -o table.aarch64.o
[ "$(aarch64-linux-gnu-objdump -d table.aarch64.o | grep -cE 'fmla.*\.4s|fsqrt.*\.4s')" -gt 20 ] || broken "the aarch64 kernels are not vector code"
aarch64-linux-gnu-g++ -std=c++17 -O2 -static -I"$csrc" "$here"/{isa,stage}_bits.cpp table.aarch64.o -o isa_bits.aarch64

case $(uname -m) in x86_64) ;; *) fail "this machine's own bits are taken from an x86-64 build" ;; esac
for isa in scalar avx2 avx512; do g++ $(kernel $isa) -c "$csrc/kernels/table.cpp" -o table.$isa.o; done
g++ -std=c++17 -O2 -static -I"$csrc" "$here"/{isa,stage}_bits.cpp table.scalar.o table.avx2.o table.avx512.o -o isa_bits
./isa_bits scalar >native.txt
qemu-aarch64 ./isa_bits.aarch64 scalar >emulated.txt || exit 1
grep ' compared, ' emulated.txt
cmp <(grep -oE 'hash [0-9a-f]{16}' native.txt) <(grep -oE 'hash [0-9a-f]{16}' emulated.txt) || exit 1
echo "aarch64 compiles, and all $(grep -c hash emulated.txt) hashes are those of x86-64"
