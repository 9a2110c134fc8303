"""The PTX machine itself: its operations against exact arithmetic, Triton's kernels on it against numpy and torch, and planted faults."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx import Kernel, Memory, PtxFaultError, Statistics, UnsupportedPtxError
from ptx.arithmetic import fma_f32
from ptx.handwritten import evaluate, kernel, launch, run
from ptx.mistakes import FAULTS, REFUSALS
from ptx.operation_cases import FLOATS, INTEGERS, Case, hard_to_round, s

pytest.importorskip("triton")
from ptx import sample_kernels
from ptx.compiling import compiled

# One operation at a time


@pytest.mark.parametrize("case", [*INTEGERS, *FLOATS], ids=lambda case: case[0])
def test_operation(case: Case) -> None:
    instruction, domains, expected = case
    bits = {"p": 1, "h": 16, "r": 32, "d": 64}[re.findall(r"%([phrd])0", instruction)[0]]
    rows = list(itertools.product(*domains))
    results = [(*row, actual, int(expected(*row)) % 2**bits) for row, actual in zip(rows, evaluate(instruction, rows), strict=True)]
    wrong = [tuple(map(hex, result)) for result in results if result[-2] != result[-1]]
    assert not wrong, f"{len(wrong)} of {len(rows)} differ, first {wrong[:3]}"


def test_fma_rounds_once() -> None:
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    library.fmaf.restype, library.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    with np.errstate(all="ignore"):
        for a, b, c in hard_to_round(400_000):
            expected = np.frompyfunc(library.fmaf, 3, 1)(a, b, c).astype(np.float32)
            actual = fma_f32(a, b, c)
            assert ((actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))).all()
            assert (actual[np.isnan(expected)].view(np.uint32) == 0x7FFFFFFF).all()


# Kernels as Triton compiles them


@pytest.fixture(params=[80, 90, 100], ids="sm_{}".format)
def architecture(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def bits(x: torch.Tensor) -> list[int]:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).flatten().tolist()


class Axpy:
    """A launch over many tensors of the kernel whose accesses are promised to be aligned."""

    chunk, block, alpha = 2048, 512, -0.3

    def __init__(self, architecture: int) -> None:
        constants = {"CHUNK": self.chunk, "BLOCK": self.block}
        self.kernel = compiled(sample_kernels.axpy, architecture, {"rows": "*i64", "chunks": "*i32", "alpha": "fp32"}, **constants)

    def run(self, xs: list[torch.Tensor], ys: list[torch.Tensor], counts: list[int], writable: bool = True) -> Statistics:
        memory = Memory()
        for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
            memory.add(f"x{k}", x, writable=False)
            memory.add(f"y{k}", y, writable)
        rows = torch.tensor([[x.data_ptr(), y.data_ptr(), count] for x, y, count in zip(xs, ys, counts, strict=True)])
        chunks = torch.tensor([[k, c] for k, count in enumerate(counts) for c in range(-(-count // self.chunk))], dtype=torch.int32)
        arguments = [memory.add("rows", rows, writable=False), memory.add("chunks", chunks, writable=False), self.alpha]
        return self.kernel.run((len(chunks),), arguments, memory)


def test_many_tensors(architecture: int) -> None:
    counts = [0, 1, 511, 512, 2047, 2048, 2049, 30000]
    xs, ys = [[torch.randn(count) for count in counts] for _ in "xy"]
    with np.errstate(all="ignore"):
        expected = [
            torch.from_numpy(fma_f32(x.numpy(), np.array([Axpy.alpha], dtype=np.float32), y.numpy())) for x, y in zip(xs, ys, strict=True)
        ]
    statistics = Axpy(architecture).run(xs, ys, counts)
    assert [bits(y) for y in ys] == [bits(y) for y in expected]
    whole = sum(count // Axpy.block * Axpy.block for count in counts)
    assert statistics.loaded[16] == 2 * statistics.stored[16] == 2 * 4 * whole
    assert statistics.stored[4] == 4 * (sum(counts) - whole)
    fused = statistics.executed["fma.rn.f32"] + 2 * statistics.executed["fma.rn.f32x2"]
    assert sum(counts) <= fused <= sum(counts) + len(counts) * Axpy.block


def test_misaligned_vectors_fault(architecture: int) -> None:
    x, y = torch.zeros(2049), torch.zeros(2048)
    axpy = Axpy(architecture)
    axpy.run([x[:2048]], [y], [2048])
    with pytest.raises(
        PtxFaultError, match=r"ld\.global\.v4\.b32 .*thread 0 of block .* 16 bytes at .*: the address is not a multiple of 16"
    ):
        axpy.run([x[1:]], [y], [2048])


@pytest.mark.parametrize(("count", "behind"), [(2049, 4), (4096, 16)])
def test_accesses_outside_fault(architecture: int, count: int, behind: int) -> None:
    """One element more than there are, in the masked tail; a block more, in the loop. The tensors lie in larger storages."""
    x, y = torch.zeros(4096), torch.zeros(4096)
    with pytest.raises(
        PtxFaultError, match=rf"ld\.global\..*block \(1, 0, 0\) .*outside of every tensor: it ends {behind} bytes behind x0"
    ):
        Axpy(architecture).run([x[:2048]], [y[:2048]], [count])


def test_writes_to_what_is_not_writable_fault(architecture: int) -> None:
    with pytest.raises(PtxFaultError, match=r"st\.global\..*y0 .*is not to be written"):
        Axpy(architecture).run([torch.zeros(8)], [torch.zeros(8)], [8], writable=False)


@pytest.mark.parametrize("warps", [1, 8])
def test_reductions_of_integers(architecture: int, warps: int) -> None:
    n = 3 * 1024 - 100
    x = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32)
    sums, maxima = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    signature = {"x": "*i32", "sums": "*i32", "maxima": "*i32", "n": "i32"}
    launch(compiled(sample_kernels.sum_and_max, architecture, signature, warps, BLOCK=1024), 3, x, sums, maxima, n)
    blocks = [x[first : first + 1024].tolist() for first in range(0, n, 1024)]
    assert sums.tolist() == [(sum(block) + 2**31) % 2**32 - 2**31 for block in blocks]
    assert maxima.tolist() == [max(block) for block in blocks[:2]] + [max(0, *blocks[2])]


@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (64, 16), (2, 2048)])
def test_quantize(architecture: int, rows: int, columns: int) -> None:
    x = torch.randn(3 * rows, columns)
    x[0] = 0  # codes of NaN
    scales, codes = torch.zeros(3 * rows), torch.zeros(3 * rows, columns, dtype=torch.int8)
    signature = {"x": "*fp32", "scales": "*fp32", "codes": "*i8"}
    statistics = launch(compiled(sample_kernels.quantize, architecture, signature, ROWS=rows, COLUMNS=columns), 3, x, scales, codes)
    assert bits(scales) == bits(x.abs().amax(1))
    assert bits(codes[1:]) == bits((x / scales[:, None] * 127).round()[1:].to(torch.int8))
    assert bits(codes[0]) == [-1] * columns  # the last byte of 0x7fffffff
    assert statistics.loaded == {min(16, 4 * rows * columns // 128): x.nbytes}


def test_bytes(architecture: int) -> None:
    x = torch.arange(-128, 128, dtype=torch.int8).repeat(5)[:1100]
    y = torch.zeros(1100, dtype=torch.int8)
    launch(compiled(sample_kernels.bytes_, architecture, {"x": "*i8", "y": "*i8", "n": "i32"}, BLOCK=512), 3, x, y, 1100)
    expected = [math.trunc(((v * v + 128) % 256 - 128) / 3) - math.fmod(v >> 1, 7) for v in x.tolist()]
    assert y.tolist() == [(value + 128) % 256 - 128 for value in expected]


def test_splitmix(architecture: int) -> None:
    n, seed = 1000, 0xDEADBEEFCAFEF00D
    words, floats = torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    signature = {"seed": "*i64", "words": "*i64", "floats": "*fp32", "n": "i64"}
    kernel = compiled(sample_kernels.splitmix, architecture, signature, BLOCK=512)
    launch(kernel, 2, torch.tensor([seed - 2**64]), words, floats, n)
    expected = []
    for k in range(n):
        z = (seed + (k + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ z >> 31)
    assert [word % 2**64 for word in words.tolist()] == expected
    assert floats.tolist() == [float(np.float32(z * z >> 64)) for z in expected]


TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@pytest.mark.parametrize(("source", "result"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("fp16", "fp64")])
def test_conversions(architecture: int, source: str, result: str) -> None:
    a, b = torch.randint(-(2**15), 2**15, (2, 2048), dtype=torch.int16).view(torch.bfloat16).float().to(TORCH[source])
    y = torch.zeros(2048, dtype=TORCH[result])
    kernel = compiled(sample_kernels.multiply_add, architecture, {"a": f"*{source}", "b": f"*{source}", "y": f"*{result}"}, BLOCK=1024)
    statistics = launch(kernel, 2, a, b, y)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(fma_f32(a.float().numpy(), b.float().numpy(), a.float().numpy())).to(y.dtype)
    assert (y.isnan() == expected.isnan()).all()
    assert bits(y.nan_to_num()) == bits(expected.nan_to_num())
    assert statistics.loaded == {16: 2 * a.nbytes}
    assert statistics.stored == {16: y.nbytes}


def test_double_precision_and_loops(architecture: int) -> None:
    x = torch.linspace(-1.1, 1.1, 128, dtype=torch.float64)
    for exponent in (0, 1, 6, 11):
        y = torch.zeros_like(x)
        kernel = compiled(sample_kernels.power, architecture, {"x": "*fp64", "exponent": "*i32", "y": "*fp64"}, BLOCK=128)
        launch(kernel, 1, x, torch.tensor([exponent], dtype=torch.int32), y)
        result, v, k = np.ones(128), x.numpy(), exponent
        while k:
            result, v, k = result * v if k & 1 else result, v * v, k >> 1
        below = [float(Fraction(a) * Fraction(a) + Fraction(b)) for a, b in zip(v.tolist(), result.tolist(), strict=True)]
        assert bits(y) == bits(torch.from_numpy((1 - result) / np.array(below)))


def test_blocks_that_loop_and_return_as_they_please(architecture: int) -> None:
    def steps(v: int) -> int:
        return 0 if v <= 1 else 1 + steps(3 * v + 1 if v % 2 else v // 2)

    n = 6 * 256 - 50
    x = torch.arange(1, n + 1, dtype=torch.int32)
    x[[256, 1024]] = 0
    y = torch.full((n,), -1, dtype=torch.int32)
    launch(compiled(sample_kernels.collatz, architecture, {"x": "*i32", "steps": "*i32", "n": "i32"}, BLOCK=256), 6, x, y, n)
    assert y.tolist() == [-1 if k // 256 in (1, 4) else steps(v) for k, v in enumerate(x.tolist())]


@pytest.mark.parametrize("dtype", ["i8", "fp32"])
def test_exchange_through_shared_memory(architecture: int, dtype: str) -> None:
    element = {"i8": torch.int8, "fp32": torch.int32}[dtype]
    x = torch.randint(-128, 128, (64, 64)).to(element)
    y = torch.zeros_like(x)
    launch(compiled(sample_kernels.transpose, architecture, {"x": f"*{dtype}", "y": f"*{dtype}"}, SIZE=64), 1, x, y)
    assert torch.equal(y, x.T)


def test_scan(architecture: int) -> None:
    x = torch.randint(-(2**20), 2**20, (1024,), dtype=torch.int32)
    y = torch.zeros_like(x)
    launch(compiled(sample_kernels.cumulative_sum, architecture, {"x": "*i32", "y": "*i32"}, BLOCK=512), 2, x, y)
    assert torch.equal(y, x.view(2, 512).cumsum(1, dtype=torch.int32).flatten())


# What Triton does not emit, or only by mistake

WHERE = "ld.param.b64 %d9, [p0]; mad.wide.u32 at, lane, 4, %d9;"


def test_threads_part_and_meet_again() -> None:
    """Odd lanes return at once; the others loop as often as their number says, in the inner loop twice as often, and store on one way."""
    y = torch.full((64,), -1, dtype=torch.int32)
    body = """
        mad.lo.s32 %r1, block, 32, lane;
        ld.param.b64 %d9, [p0];
        mad.wide.u32 at, %r1, 4, %d9;
        and.b32 %r2, lane, 1;
        setp.ne.b32 %p1, %r2, 0;
        @%p1 ret;
        mov.b32 %r3, 0;
        mov.b32 %r4, 0;
        setp.eq.b32 %p2, lane, 0;
        @%p2 bra DONE;
        OUTER:
        mov.b32 %r5, 0;
        INNER:
        add.s32 %r4, %r4, %r3;
        add.s32 %r5, %r5, 1;
        setp.lt.u32 %p3, %r5, 2;
        @%p3 bra INNER;
        add.s32 %r3, %r3, 1;
        setp.lt.u32 %p4, %r3, lane;
        @%p4 bra OUTER;
        bra.uni DONE;
        DONE:
        st.global.b32 [at], %r4;
        bar.sync 0;"""
    statistics = run(body, y, blocks=2)
    assert y.tolist() == [-1 if lane % 2 else lane * (lane - 1) for lane in range(32)] * 2
    assert statistics.executed["add.s32"] == 2 * sum(5 * lane for lane in range(0, 32, 2))
    assert (statistics.executed["st.global.b32"], statistics.executed["ret"]) == (2 * 16, 2 * (32 + 16))
    assert statistics.stored == {4: 2 * 16 * 4}


def test_guarded_instructions() -> None:
    y = torch.zeros(8, dtype=torch.int32)
    body = f"{WHERE} setp.lt.u32 %p1, lane, 8; setp.lt.u32 %p2, lane, 5; @!%p2 mov.b32 lane, -1; @%p1 st.global.b32 [at], lane;"
    statistics = run(body, y)
    assert y.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert statistics.executed["mov.b32"] == 27
    assert statistics.executed["st.global.b32"] == 8


def test_scopes() -> None:
    """As in inline assembly: registers may have the same names in several scopes."""
    y = torch.zeros(32, dtype=torch.int32)
    scope = "{{ .reg .b32 t<2>; {{ .reg .b32 u; shl.b32 u, lane, {}; mov.b32 t1, u; }} add.s32 lane, lane, t1; }}"
    run(f"{WHERE} {scope.format(1)} {scope.format(2)} st.global.b32 [at], lane;", y)
    assert y.tolist() == [15 * lane for lane in range(32)]


@pytest.mark.parametrize(("operation", "expected"), [("add.u32", 3 * 496 + 5), ("max.u32", 2**32 - 2), ("min.s32", -2), ("max.s32", 31)])
def test_atomic_updates(operation: str, expected: int) -> None:
    y = torch.tensor([5 if operation == "add.u32" else -2, 7], dtype=torch.int32)
    update = f"ld.param.b64 %d1, [p0]; atom.global.gpu.acq_rel.{operation} %r1, [%d1], lane;"
    run(update, y, torch.zeros(2**20), blocks=3)  # with other memory between the two tensors
    assert y.tolist() == [s(expected % 2**32, 32), 7]
    with pytest.raises(PtxFaultError, match="%r1 is read before"):
        run(f"{update} st.global.b32 [%d1], %r1;", y)
    with pytest.raises(PtxFaultError, match="ends 4 bytes behind"):
        run(update.replace("[%d1]", "[%d1+8]"), y)


def test_blocks_know_where_they_are() -> None:
    y = torch.zeros(5 * 4 * 3, dtype=torch.int32)
    body = """
        mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y;
        mad.lo.s32 %r5, %r2, %r4, %r1; mad.lo.s32 %r6, %r5, %r3, block; ld.param.b64 %d1, [p0]; mad.wide.u32 at, %r6, 4, %d1;
        shl.b32 %r7, %r2, 16; shl.b32 %r8, %r1, 8; or.b32 %r9, %r7, %r8; or.b32 %r9, %r9, block; st.global.b32 [at], %r9;"""
    memory = Memory()
    kernel(body, parameters=1).run((5, 4, 3), [memory.add("y", y)], memory)
    assert y.tolist() == [z << 16 | y << 8 | x for z in range(3) for y in range(4) for x in range(5)]


@pytest.mark.parametrize(("mode", "by", "bounds"), [("up", 3, 0), ("down", 3, 31), ("bfly", 5, 31), ("idx", 7, 31), ("down", 1, 0x181F)])
def test_shuffles(mode: str, by: int, bounds: int) -> None:
    """Lanes outside of the segment, or of the warp, keep what they have."""
    y = torch.zeros(32, dtype=torch.int32)
    run(f"{WHERE} mul.lo.s32 %r1, lane, 10; shfl.sync.{mode}.b32 %r2, %r1, {by}, {bounds}, -1; st.global.b32 [at], %r2;", y)
    size = 32 - (bounds >> 8)
    last = [lane | size - 1 for lane in range(32)]
    others = [{"up": k - by, "down": k + by, "bfly": k ^ by, "idx": by}[mode] for k in range(32)]
    assert y.tolist() == [10 * (other if last[k] - size < other <= last[k] else k) for k, other in enumerate(others)]


@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_vectors_are_copied_as_they_are(lanes: int) -> None:
    """Signaling NaNs too. Eight words in one access are of sm_100."""
    storage = torch.zeros(2, 32 * lanes + 8, dtype=torch.int32)
    x, y = (storage[k][-storage[k].data_ptr() % 32 // 4 :][: 32 * lanes] for k in range(2))
    x[:] = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FF00000, 1, -2] * 32 * lanes)[: 32 * lanes]
    vector = "{" + ", ".join(f"%r{k}" for k in range(lanes)) + "}"
    copy = f"ld.global.v{lanes}.b32 {vector}, [%d1]; st.global.v{lanes}.b32 [%d2], {vector};"
    addresses = "; ".join(f"ld.param.b64 %d3, [p{k}]; mad.wide.u32 %d{k + 1}, lane, {4 * lanes}, %d3" for k in range(2))
    statistics = run(f"{addresses}; {copy}", x, y)
    assert torch.equal(y, x)
    assert statistics.loaded == statistics.stored == {4 * lanes: x.nbytes}


def test_blocks_share_no_memory() -> None:
    """Each thread has what its neighbour in its block left in shared memory."""
    y = torch.zeros(128, dtype=torch.int32)
    body = """
        mad.lo.s32 %r1, block, 32, lane; shl.b32 %r2, lane, 2; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2; xor.b32 %r5, %r4, 4;
        st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r6, [%r5];
        ld.param.b64 %d1, [p0]; mad.wide.u32 %d2, %r1, 4, %d1; st.global.b32 [%d2], %r6;"""
    run(body, y, shared_bytes=128, blocks=4)
    assert y.tolist() == [k ^ 1 for k in range(128)]


@pytest.mark.parametrize("form", ["x4", "x2.trans", "x1"])
def test_matrices_are_stored_as_they_are_loaded(form: str) -> None:
    count = int(form[1])
    registers = [f"%r{k}" for k in range(count)]
    fill = " ".join(f"mad.lo.s32 {register}, lane, 65541, {1000 * k};" for k, register in enumerate(registers))
    same = " ".join(f"setp.ne.b32 %p1, {register}, %r{k + 4}; selp.b32 %r9, 1, %r9, %p1;" for k, register in enumerate(registers))
    loaded = ", ".join(f"%r{k + 4}" for k in range(count))
    y = torch.full((32,), -1, dtype=torch.int32)
    run(
        f"""{fill} shl.b32 %r8, lane, 4; mov.b32 %r9, global_smem; add.s32 %r8, %r8, %r9; mov.b32 %r9, 0;
        stmatrix.sync.aligned.m8n8.{form}.shared.b16 [%r8], {{{", ".join(registers)}}};
        ldmatrix.sync.aligned.m8n8.{form}.shared.b16 {{{loaded}}}, [%r8]; {same} {WHERE} st.global.b32 [at], %r9;""",
        y,
        shared_bytes=128 * count,
    )
    assert y.tolist() == [0] * 32


@pytest.mark.parametrize(("body", "message"), FAULTS)
def test_faults(body: str, message: str) -> None:
    words = torch.zeros(64, dtype=torch.int32)[16:48]
    run(f"mov.b32 %r9, 0; {WHERE} st.global.b32 [at], lane; bar.sync 0; shfl.sync.idx.b32 %r8, lane, 3, 31, -1;", words)
    with pytest.raises(PtxFaultError, match=message):
        run(f"mov.b32 %r9, 0; {WHERE} {body}", words, shared_bytes=64)


@pytest.mark.parametrize(("body", "message"), REFUSALS)
def test_refusals(body: str, message: str) -> None:
    with pytest.raises(UnsupportedPtxError, match=message):
        kernel(body)


def test_modules_that_are_none() -> None:
    text = ".version 8.7 .target sm_90a .address_size 64 .visible .entry f() .reqntid 32 { ret; }"
    Kernel(text)
    for wrong in ("", text + text, text.replace("32", "33"), text.replace(".reqntid", ".maxntid"), ".const .b8 x;" + text, text[:-1]):
        with pytest.raises(UnsupportedPtxError):
            Kernel(wrong)
    memory = Memory()
    memory.add("any", torch.zeros(1))
    with pytest.raises(PtxFaultError, match="ends without a return"):
        Kernel(text.replace("ret;", "")).run((1,), [], memory)


def test_what_cannot_be_launched() -> None:
    memory, storage = Memory(), torch.zeros(8, 8)
    memory.add("part", storage[2:4])
    with pytest.raises(ValueError, match=r"whole .* overlaps part"):
        memory.add("whole", storage)
    with pytest.raises(ValueError, match="columns is not contiguous"):
        memory.add("columns", storage[4:, :2])
    with pytest.raises(ValueError, match="1 arguments"):
        kernel("", parameters=4).run((1,), [0], memory)
    with pytest.raises(ValueError, match="p0 of type u64"):
        kernel("", parameters=1).run((1,), [2**64], memory)
