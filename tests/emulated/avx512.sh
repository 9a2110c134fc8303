#!/bin/bash
# Compares the bits of the AVX2 and AVX-512 kernels with each other and with the scalar ones, on a machine that need not have AVX-512: boots
# a Linux kernel whose only program is isa_bits.cpp on an emulated Skylake-X (Bochs). Takes about 4 minutes of one core.
#
#   avx512.sh CHECKOUT WORK_FOLDER [KERNEL_IMAGE]      exit 0: identical bits; 1: some differ; 2: could not be tried
#
# KERNEL_IMAGE is a Debian kernel (default: the newest /boot/vmlinuz-*); one that is not installed will do:
#   apt-get download linux-image-6.1.0-NN-cloud-amd64 && dpkg -x linux-image-*.deb . # boot/vmlinuz-*
set -euo pipefail

fail() { echo "$0: $*" >&2; exit 2; }
broken() { echo "$0: $*" >&2; exit 1; }
flags() { sed -n "s/^$1://p" "$csrc/kernels/flags.txt"; }
need() { [ -e "$1" ] || fail "missing $1: install the Debian package $2"; }
need_command() { command -v "$1" >/dev/null || fail "missing command $1: install the Debian package $2"; }

[ $# = 2 ] || [ $# = 3 ] || fail "usage: $0 CHECKOUT WORK_FOLDER [KERNEL_IMAGE]"
here=$(realpath "$(dirname "$0")")
csrc=$(realpath "$1")/csrc
[ -e "$csrc/kernels/table.cpp" ] || fail "no csrc/kernels/table.cpp under $1"
kernel=${3:-$(printf '%s\n' /boot/vmlinuz-* | sort -V | tail -1)}
[ -e "$kernel" ] || fail "no kernel image $kernel: install the Debian package linux-image-cloud-amd64, or name an image"
kernel=$(realpath "$kernel")
need_command g++ g++
need_command objdump binutils
need_command cpio cpio
need_command xorriso xorriso
need_command bochs bochs
isolinux=/usr/lib/ISOLINUX/isolinux.bin ldlinux=/usr/lib/syslinux/modules/bios/ldlinux.c32
bios=/usr/share/bochs/BIOS-bochs-latest vgabios=/usr/share/vgabios/vgabios.bin
need $isolinux isolinux
need $ldlinux syslinux-common
need $bios bochsbios
need $vgabios vgabios
compgen -G '/usr/lib/*/bochs/plugins/libbx_term_gui.so' >/dev/null || fail "install the Debian package bochs-term"
mkdir -p "$2"
cd "$2"

# The kernels as the extension compiles them, and proof of what they are.
compile() {
  local isa=$1
  shift
  g++ -std=c++17 -O3 -fPIC -fvisibility=hidden $(flags all) $(flags "$isa") -DFUSED_OPT_ISA="$isa" "$@" \
    -c "$csrc/kernels/table.cpp" -o "$isa.o"
  objdump -d "$isa.o" | awk -v isa="$isa" '
    /^[0-9a-f]+ <.*update/ { kernel = $2; ++kernels }
    /%ymm/ { ymm[kernel] }
    /%zmm/ { zmm[kernel] }
    END { printf "%s.o: %d kernels, %d use ymm, %d use zmm registers\n", isa, kernels, length(ymm), length(zmm)
          exit isa == "avx512" && (kernels == 0 || length(zmm) < kernels) }' || broken "not every $isa kernel is AVX-512"
}
compile scalar
compile avx2
compile avx512 ${AVX512_EXTRA_FLAGS:-}
g++ -std=c++17 -O2 -Wall -Wextra -static -I"$csrc" "$here"/{isa,stage}_bits.cpp scalar.o avx2.o avx512.o -o isa_bits

if grep -qw avx512f /proc/cpuinfo; then
  echo "this machine has AVX-512: natively,"
  ./isa_bits scalar avx2 avx512 | tail -1
else
  status=0
  (./isa_bits avx512; exit $?) >/dev/null 2>&1 || status=$?
  [ $status = 132 ] || broken "the AVX-512 kernels should be illegal instructions here, but ended with status $status"
  echo "this machine has no AVX-512: natively its kernels are illegal instructions (SIGILL), as they should be"
fi

./isa_bits scalar >native.txt

# A CD with the kernel and, as its initial file system, two static programs.
cat >init.c <<'END'
#include <stdio.h>
#include <sys/klog.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void) {
  int status = 0;
  klogctl(6, 0, 0);  // no more messages of the kernel, which could come in the middle of a line
  if (fork() == 0) {
    execl("/isa_bits", "isa_bits", "avx2", "avx512", (char*)0);
    _exit(127);
  }
  wait(&status);
  printf("isa_bits ended: exit %d, signal %d\n", WEXITSTATUS(status), WTERMSIG(status));
  fflush(stdout);
  sleep(1);
  return reboot(RB_POWER_OFF);
}
END
gcc -O2 -static init.c -o init
rm -rf iso
mkdir iso
printf '%s\n' init isa_bits | cpio --quiet -o -H newc | gzip >iso/initrd.gz
cp "$kernel" iso/vmlinuz
cp $isolinux $ldlinux iso
# Bochs 2.7 reports a wrong size for the compacted XSAVE area, at which Linux would do without XSAVE and so without AVX
# ("XSAVE consistency problem"): the kernel is told not to use that format.
cat >iso/isolinux.cfg <<'END'
DEFAULT isa_bits
LABEL isa_bits
KERNEL /vmlinuz
INITRD /initrd.gz
APPEND console=ttyS0 rdinit=/init clearcpuid=xsavec,xsaves mitigations=off nokaslr
END
xorriso -as mkisofs -quiet -o cd.iso -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table \
  iso 2>xorriso.log

cat >bochsrc <<END
display_library: term
cpu: model=corei7_skylake_x, ips=50000000
memory: guest=256, host=256
romimage: file=$bios
vgaromimage: file=$vgabios
ata0-master: type=cdrom, path=cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
log: bochs.log
panic: action=fatal
END
printf '%s\n' c quit >debugger.rc  # Debian's Bochs starts in its debugger
rm -f serial.txt cd.iso.lock
echo "booting $(basename "$kernel") in Bochs; progress is in $PWD/serial.txt"
# Bochs ends with an error also after a proper power-off, so only what came over the serial line counts. It needs no
# terminal, and must not have one (it may be stopped for touching it); it does not heed SIGTERM.
TERM=vt100 timeout --foreground -s KILL 1200 nice -n 10 bochs -q -f bochsrc -rc debugger.rc \
  </dev/null >screen.txt 2>&1 || true
tr -d '\r' <serial.txt >emulated.txt
grep -E 'smpboot: CPU0|Enabled xstate|^CPU has|differ|^isa_bits ended' emulated.txt || true
grep -q '^CPU has.* dq: yes; running: avx2 avx512$' emulated.txt || fail "no start with AVX-512: see serial.txt"
grep -q '^isa_bits ended: exit [01], signal 0$' emulated.txt || broken "the kernels did not end properly: see serial.txt"
# Bochs 2.7 rounds ties up in VCVTPS2PH (0x38801000 becomes 0x0401), where a processor rounds them to even. Both emulated kernels use it, so
# they can be compared with each other, but not with this machine's; nor the codec, which does without it where values are not packed.
grep -q ' compared, ' emulated.txt || exit 1
! grep -E ' of [0-9]+ differ ' emulated.txt | grep -vE '  0 of [0-9]+ differ |^codec of float32 +float16 ' || exit 1
hashes() { grep -v ' float16 ' "$1" | grep -oE 'hash [0-9a-f]{16}'; }
cmp <(hashes native.txt) <(hashes emulated.txt) || exit 1
echo "all $(hashes native.txt | wc -l) hashes, those of float16 excepted, are those that this machine's own arithmetic gives"
