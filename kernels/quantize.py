"""Kernels for tensors in 8-bit codes by themselves. They know no code: `ENCODE`, `DECODE` and so on are those of kernels/codecs.py.

Blocks longer than MAX_PIECE elements are taken in pieces, each with random numbers of its own, as csrc/quantize.cpp has it. A program takes
ROWS pieces; a piece is a row of a tile.
"""

import triton
import triton.language as tl

from fused_opt.kernels import codecs

MAX_PIECE = tl.constexpr(4096)


@triton.jit
def pieces(count, block_size, parts, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Of this program: the number of each piece and of its block, its elements' positions in the tensor, and which of these exist."""
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    block = number // parts
    first_in_block = (number - block * parts) * MAX_PIECE
    columns = tl.arange(0, SIZE)[None, :]
    at = block * block_size + first_in_block + columns
    return number, block, columns, at, (first_in_block + columns < block_size) & (at < count)


# Specialized for no values of run-time arguments, as Triton does on its own: a variant is compiled once, and its name says all.


@triton.jit(do_not_specialize=["values", "scales", "count", "block_size", "parts"])
def largest_magnitudes(values, scales, count: tl.int64, block_size: tl.int64, parts: tl.int64, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Raise `scales`, as bits, to the largest magnitude of each block."""
    _, block, _, at, mask = pieces(count, block_size, parts, ROWS, SIZE)
    bits = codecs.bits_of(tl.load(values + at, mask, 0.0).to(tl.float32)) & 0x7FFFFFFF
    tl.atomic_max(scales + block, tl.max(bits, 1, keep_dims=True), block * block_size < count)


@triton.jit(do_not_specialize=["values", "codes", "scales", "seeds", "table", "count", "block_size", "parts"])
def quantize(
    values, codes, scales, seeds, table, count: tl.int64, block_size: tl.int64, parts: tl.int64,
    SIGNED: tl.constexpr, INVERSE: tl.constexpr, ENCODE: tl.constexpr, MEASURED: tl.constexpr, SEED_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Set codes and, unless they are MEASURED, scales. `seeds`: uint64, or None to round to the nearest. `table`: of a code that has one.

    With EXACT a block is a row, and addresses are multiples of 16 bytes: then full tiles are accessed without masks.
    """
    if EXACT:
        whole = (tl.program_id(0).to(tl.int64) + 1) * (ROWS * SIZE) <= count
        if whole:
            quantize_tile(values, codes, scales, seeds, table, count, block_size, parts,
                          SIGNED, INVERSE, ENCODE, MEASURED, SEED_STRIDE, ROWS, SIZE, False)  # fmt: skip
        else:
            quantize_tile(values, codes, scales, seeds, table, count, block_size, parts,
                          SIGNED, INVERSE, ENCODE, MEASURED, SEED_STRIDE, ROWS, SIZE, True)  # fmt: skip
    else:
        quantize_tile(values, codes, scales, seeds, table, count, block_size, parts,
                      SIGNED, INVERSE, ENCODE, MEASURED, SEED_STRIDE, ROWS, SIZE, True)  # fmt: skip


@triton.jit
def quantize_tile(
    values, codes, scales, seeds, table, count, block_size, parts,
    SIGNED: tl.constexpr, INVERSE: tl.constexpr, ENCODE: tl.constexpr, MEASURED: tl.constexpr, SEED_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if MASKED:
        number, block, columns, at, mask = pieces(count, block_size, parts, ROWS, SIZE)
        row_mask = block * block_size < count
        x = tl.load(values + at, mask, 0.0).to(tl.float32)
    else:
        first = tl.program_id(0).to(tl.int64) * (ROWS * SIZE)
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, SIZE)[None, :]
        number = tl.program_id(0).to(tl.int64) * ROWS + rows
        block = number
        at = rows * SIZE + columns
        values = tl.multiple_of(values + first, 16)  # the hint must stand on what an operation made
        codes = tl.multiple_of(codes + first, 16)
        mask = None
        row_mask = None
        x = tl.load(values + at).to(tl.float32)
    if not SIGNED:
        x = x + 0.0  # no -0, which looks like a number beyond infinity
    if MEASURED:
        scale = tl.load(scales + block, row_mask, 0.0) if MASKED else tl.load(scales + block)
    else:
        scale = codecs.scale_of(x, SIGNED, mask)
        tl.store(scales + block, scale, row_mask)
    if seeds is None:
        offsets = codecs.NEAREST
    else:
        of_block = block * SEED_STRIDE
        seed = tl.load(seeds + of_block, row_mask, 0) if MASKED else tl.load(seeds + of_block)
        offsets = codecs.stochastic_offsets(seed.to(tl.uint64, bitcast=True), number, columns.to(tl.uint32))
    offsets = (tl.zeros((ROWS, SIZE), tl.uint32) + offsets).to(tl.uint32)
    if INVERSE is None:
        made = codecs.table_encode(x, scale, offsets, table)
    else:
        made = ENCODE(x, INVERSE(scale, SIGNED), offsets, SIGNED)
    tl.store(codes + at, made, mask)


@triton.jit(do_not_specialize=["values", "codes", "scales", "table", "count", "block_size", "parts"])
def dequantize(
    values, codes, scales, table, count: tl.int64, block_size: tl.int64, parts: tl.int64,
    SIGNED: tl.constexpr, UNIT: tl.constexpr, DECODE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Set values. Arguments as of `quantize`."""
    if EXACT:
        whole = (tl.program_id(0).to(tl.int64) + 1) * (ROWS * SIZE) <= count
        if whole:
            dequantize_tile(values, codes, scales, table, count, block_size, parts, SIGNED, UNIT, DECODE, ROWS, SIZE, False)
        else:
            dequantize_tile(values, codes, scales, table, count, block_size, parts, SIGNED, UNIT, DECODE, ROWS, SIZE, True)
    else:
        dequantize_tile(values, codes, scales, table, count, block_size, parts, SIGNED, UNIT, DECODE, ROWS, SIZE, True)


@triton.jit
def dequantize_tile(
    values, codes, scales, table, count, block_size, parts,
    SIGNED: tl.constexpr, UNIT: tl.constexpr, DECODE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if MASKED:
        _, block, _, at, mask = pieces(count, block_size, parts, ROWS, SIZE)
        scale = tl.load(scales + block, block * block_size < count, 0.0)
        stored = tl.load(codes + at, mask, 0)
    else:
        first = tl.program_id(0).to(tl.int64) * (ROWS * SIZE)
        rows = tl.arange(0, ROWS)[:, None]
        at = rows * SIZE + tl.arange(0, SIZE)[None, :]
        values = tl.multiple_of(values + first, 16)  # the hint must stand on what an operation made
        codes = tl.multiple_of(codes + first, 16)
        mask = None
        scale = tl.load(scales + tl.program_id(0).to(tl.int64) * ROWS + rows)
        stored = tl.load(codes + at)
    if UNIT is None:
        x = tl.load(table + stored.to(tl.int32)) * scale
    else:
        x = DECODE(stored, UNIT(scale, SIGNED), SIGNED)
    tl.store(values + at, x.to(values.dtype.element_ty), mask)
