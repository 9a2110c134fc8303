# ruff: noqa: N803
# mypy: ignore-errors
"""Kernels whose results are known without them, so that the machine can be tested."""

import triton
import triton.language as tl


@triton.jit
def axpy(rows, chunks, alpha, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """y = alpha * x + y for many tensors at once: a row of `rows` has the addresses of x and y and the number of elements."""
    tensor = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    first = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    row = rows + 3 * tensor
    x = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16) + first
    y = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16) + first
    count = tl.minimum(tl.load(row + 2) - first, CHUNK)
    whole = count // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        r = i + tl.arange(0, BLOCK)
        tl.store(y + r, tl.fma(tl.load(x + r), tl.zeros([BLOCK], tl.float32) + alpha, tl.load(y + r)))
    if whole < count:
        r = whole + tl.arange(0, BLOCK)
        mask = r < count
        tl.store(y + r, tl.fma(tl.load(x + r, mask), tl.zeros([BLOCK], tl.float32) + alpha, tl.load(y + r, mask)), mask)


@triton.jit
def sum_and_max(x, sums, maxima, n, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + r, r < n, 0)
    tl.store(sums + tl.program_id(0), tl.sum(v, 0))
    tl.store(maxima + tl.program_id(0), tl.max(v, 0))


@triton.jit
def quantize(x, scales, codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each row by its largest magnitude, to the nearest of 255 codes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    v = tl.load(x + r)
    scale = tl.max(tl.abs(v), 1)
    tl.store(scales + row, scale)
    code = tl.div_rn(v, tl.broadcast_to(scale[:, None], [ROWS, COLUMNS])) * 127.0 + 12582912.0
    tl.store(codes + r, code.to(tl.int32, bitcast=True).to(tl.int8))


@triton.jit
def bytes_(x, y, n, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + r, r < n, 0)
    tl.store(y + r, v * v // 3 - (v >> 1) % 7, r < n)


@triton.jit
def splitmix(seed, words, floats, n, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(seed).to(tl.uint64) + (r.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    tl.store(words + r, z, r < n)
    tl.store(floats + r, tl.umulhi(z, z).to(tl.float32), r < n)


@triton.jit
def multiply_add(a, b, y, BLOCK: tl.constexpr):
    """In fp32, whatever is loaded and stored."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(a + r).to(tl.float32)
    tl.store(y + r, tl.fma(v, tl.load(b + r).to(tl.float32), v).to(y.dtype.element_ty))


@triton.jit
def power(x, exponent, y, BLOCK: tl.constexpr):
    """In fp64, by squaring."""
    r = tl.arange(0, BLOCK)
    v = tl.load(x + r)
    k = tl.load(exponent)
    result = tl.full([BLOCK], 1.0, tl.float64)
    while k > 0:
        if k & 1 == 1:
            result = result * v
        v = v * v
        k = k >> 1
    tl.store(y + r, (1.0 - result) / tl.fma(v, v, result))


@triton.jit
def collatz(x, steps, n, BLOCK: tl.constexpr):
    """Loops until the last element of a block is 1; a block whose first element is 0 returns early."""
    first = tl.program_id(0) * BLOCK
    if tl.load(x + first) == 0:
        return
    r = first + tl.arange(0, BLOCK)
    v = tl.load(x + r, r < n, 1).to(tl.int64)
    count = tl.zeros([BLOCK], tl.int32)
    while tl.max(v, 0) > 1:
        count += (v > 1).to(tl.int32)
        v = tl.where(v > 1, tl.where(v % 2 == 1, 3 * v + 1, v // 2), v)
    tl.store(steps + r, count, r < n)


@triton.jit
def transpose(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i[:, None] * SIZE + i[None, :], tl.trans(tl.load(x + i[:, None] * SIZE + i[None, :])))


@triton.jit
def cumulative_sum(x, y, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + r, tl.cumsum(tl.load(x + r), 0))
