"""Kernels with one mistake each, and what the machine says of it."""

from __future__ import annotations

Mistakes = list[tuple[str, str]]

# Threads 0 to 31 have the addresses of 32 words in `at`, the first of them in %d9 too. Shared memory has 64 bytes.
FAULTS: Mistakes = [
    ("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d9+4];", r"thread 0 of block \(0, 0, 0\) accesses 16 bytes .*not a multiple of 16"),
    ("ld.global.b64 wide, [at];", r"thread 1 .* 8 bytes .*not a multiple of 8"),
    ("ld.global.b32 %r0, [at+4];", r"thread 31 .* 4 bytes .*outside of every tensor: it ends 4 bytes behind tensor 0"),
    ("ld.global.b16 %h0, [%d9+-2];", r"2 bytes .*outside of every tensor: it begins 2 bytes before tensor 0"),
    ("st.global.b8 [%d9+128], %r9;", r"1 bytes .*outside of every tensor: it ends 1 bytes behind tensor 0"),
    ("mov.b64 at, 0; ld.global.b32 %r0, [at];", r"4 bytes at 0x0: outside of every tensor"),
    ("mov.b64 at, -16; ld.global.b32 %r0, [at];", r"4 bytes at 0xfffffffffffffff0: outside of every tensor"),
    ("ld.shared.b32 %r0, [global_smem+64];", r"outside of the 64 bytes of shared memory"),
    ("mov.b32 %r1, -4; st.shared.b32 [%r1], lane;", r"outside of the 64 bytes of shared memory"),
    ("ld.shared.v2.b32 {%r0, %r1}, [global_smem+4];", r"not a multiple of 8"),
    ("add.s32 %r0, %r1, lane;", r"%r1 is read before it is written"),
    ("setp.lt.u32 %p1, lane, 7; @%p1 bar.sync 0;", r"bar.sync 0;: reached by some threads of a block only"),
    ("setp.lt.u32 %p1, lane, 7; @%p1 bra ON; bar.sync 0; ON:", r"bar.sync 0;: reached by some threads of a block only"),
    ("setp.lt.u32 %p1, lane, 7; @%p1 ret; shfl.sync.bfly.b32 %r0, lane, 1, 31, -1;", r"shfl.*by some threads of a warp only"),
    ("shfl.sync.bfly.b32 %r0, lane, 1, 31, 0xFFFF;", r"not for a whole warp"),
]

REFUSALS: Mistakes = [
    ("ex2.approx.f32 %r0, lane;", r"\.approx"),
    ("div.full.f32 %r0, lane, lane;", r"\.full"),
    ("cvt.rmi.ftz.f32.f32 %r0, lane;", r"\.ftz"),
    ("mul.f32 %r0, lane, lane;", "no instruction"),  # may be contracted
    ("add.rz.f32 %r0, lane, lane;", "no instruction"),
    ("red.global.gpu.relaxed.add.f32 [at], lane;", "no instruction"),  # its rounding depends on the order
    ("fma.rn.bf16 %h0, %h1, %h1, %h1;", "no instruction"),
    ("ld.volatile.global.b32 %r0, [at];", "no instruction"),
    ("shfl.sync.bfly.b32 %r0|%p1, lane, 1, 31, -1;", "operand"),
    ("add.s32 %r0, lane;", "1 operands instead of 2"),
    ("add.s32 %r0, lane, wide;", "wide has 64 bits"),
    ("add.s32 %d0, lane, lane;", "%d0 has 64 bits"),
    ("ld.global.b32 %h0, [at];", "%h0 has 16 bits"),
    ("ld.global.v2.b32 {%r0, %r1, %r2}, [at];", "3 registers instead of 2"),
    ("mov.b32 %r0, 0d0000000000000000;", "as b32"),
    ("mov.u32 %r0, %clock;", "%clock"),
    ("add.s32 %r0, lane, %unknown;", "%unknown"),
    ("bra NOWHERE;", "no target"),
    (".local .b32 x;", "not an instruction"),
    ("@lane bra HERE; HERE:", "no predicate"),
]
