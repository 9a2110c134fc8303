"""The step kernel: the one loop of all rules, dtypes, formats of states and stages. It knows no arithmetic.

A launch serves any number of tensors. `tensors` has a row of addresses for each of them, and `chunks` a pair of numbers for
each program: the row of its tensor and which chunk of it. `scalars` has rows of the step's scalars: `s` are the rule's, `t` those of
stages, whose `operands` are mask, anchor, average and companion, and whose random numbers are made of `seed` and of the position `first`.
"""

import triton
import triton.language as tl

from fused_opt import stages as specs
from fused_opt.kernels import codecs, stages
from fused_opt.kernels.rules import gradient

# Columns of `tensors`, int64 words, as Bucket in csrc/tables.h has them.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE = tl.constexpr(2)  # and two more
SCALES = tl.constexpr(5)  # and two more
COUNT = tl.constexpr(8)  # elements
ALIGNED = tl.constexpr(9)  # whether all addresses are multiples of 16 bytes
SCALARS = tl.constexpr(10)  # row of `scalars`
STAGE_OPERANDS = tl.constexpr(14)  # and three more
NUMBER = tl.constexpr(18)  # of the parameter in its group
COLUMNS = tl.constexpr(19)  # the others: see kernels/scalars.py

# Columns of `scalars` after those of the rule.
RUN = tl.constexpr(9)  # 0 where the step is to be left out
GRAD_SCALE = tl.constexpr(10)
STAGE_SCALARS = tl.constexpr(11)  # and eight more
N_STAGE_SCALARS = tl.constexpr(specs.SCALARS)
SCALAR_COLUMNS = tl.constexpr(20)


@triton.jit
def update_tile(
    param, grad, states, scales, operands, first, count, s, t, seed, grad_scale,
    ACCUMULATE: tl.constexpr, MOVE: tl.constexpr, L2: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr,
    STAGES: tl.constexpr, OPERAND_TYPES: tl.constexpr,
    UNSCALE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CODED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """ROWS x SIZE elements from the addresses on, of which the first is number `first` and `count` exist; with codes a row is a block."""
    STATES: tl.constexpr = len(states)
    block = first // SIZE  # number of the first row, with codes
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    at = rows * SIZE + columns
    mask = at < count if MASKED else None
    p = tl.load(param + at, mask, 0.0).to(tl.float32) if MASKED else tl.load(param + at).to(tl.float32)
    g = tl.load(grad + at, mask, 0.0).to(tl.float32) if MASKED else tl.load(grad + at).to(tl.float32)
    row_mask = rows * SIZE < count if MASKED else None
    old = ()
    for k in tl.static_range(STATES):
        stored = tl.load(states[k] + at, mask, 0) if MASKED else tl.load(states[k] + at)
        if CODED:
            scale = tl.load(scales[k] + rows, row_mask, 0.0) if MASKED else tl.load(scales[k] + rows)
            old = old + (codecs.mulaw_decode(stored, codecs.mulaw_unit(scale, KINDS[k][0]), KINDS[k][0]),)
        else:
            old = old + (stored.to(tl.float32),)
    if UNSCALE:
        unscaled = tl.div_rn(g, grad_scale)
        tl.store(grad + at, unscaled.to(grad.dtype.element_ty), mask)
    if STAGES:
        # Whether averages are loaded and stored. It is made of equal whole numbers, so that accesses are as wide as without a mask.
        averages = tl.zeros((ROWS, SIZE), tl.int32) + tl.where(t[stages.AVERAGE_WEIGHT] != 0.0, 1, 0) != 0
        found = ()
        for k in tl.static_range(len(OPERAND_TYPES)):
            if OPERAND_TYPES[k] is None:
                found = found + (p,)
            elif k == stages.AVERAGE_AT:
                found = found + (tl.load(operands[k] + at, mask & averages if MASKED else averages, 0.0),)
            else:
                found = found + (tl.load(operands[k] + at, mask, 0) if MASKED else tl.load(operands[k] + at),)
        p, g = stages.before(p, g, found, t, STAGES, param.dtype.element_ty)
        if CODED and MASKED:
            p = tl.where(mask, p, 0.0)  # it makes the seed, with what does not exist as zero
    g = gradient(p, g, s, L2)
    new_p, new = MOVE(p, g, ACCUMULATE(g, old, s, FLAGS), s, FLAGS)
    if STAGES:
        new_p, average, companion = stages.after(new_p, found, t, seed, first, STAGES, param.dtype.element_ty, ROWS, SIZE)
        if stages.AVERAGE & STAGES:
            to = operands[stages.AVERAGE_AT]
            tl.store(to + at, average.to(to.dtype.element_ty), mask & averages if MASKED else averages)
        if stages.WITH_COMPANION & STAGES:
            to = operands[stages.COMPANION_AT]
            tl.store(to + at, companion.to(to.dtype.element_ty), mask)
    tl.store(param + at, new_p.to(param.dtype.element_ty), mask)
    if CODED:
        # The seed of the rounding: see `update_block` in csrc/kernels/blocks.h.
        scale_sum = tl.zeros((ROWS, 1), tl.uint32)
        new_scales = ()
        for k in tl.static_range(STATES):
            scale = codecs.scale_of(new[k], KINDS[k][0], mask)
            tl.store(scales[k] + rows, scale, row_mask)
            new_scales = new_scales + (scale,)
            if not KINDS[k][2]:
                scale_sum += codecs.bits_of(scale)
        param_sum = tl.sum(tl.minimum(codecs.bits_of(p) & 0x7FFFFFFF, codecs.INFINITY), 1, keep_dims=True)
        seed_of_codes = (scale_sum.to(tl.uint64) << 32) | param_sum.to(tl.uint64)
        random = codecs.stochastic_offsets(seed_of_codes, block + rows, columns.to(tl.uint32))
        for k in tl.static_range(STATES):
            offsets = random if KINDS[k][1] else codecs.NEAREST
            inverse = codecs.mulaw_inverse(new_scales[k], KINDS[k][0])
            tl.store(states[k] + at, codecs.mulaw_encode(new[k], inverse, offsets, KINDS[k][0]), mask)
    else:
        for k in tl.static_range(STATES):
            tl.store(states[k] + at, new[k].to(states[k].dtype.element_ty), mask)


@triton.jit
def address(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The hint must stand on the pointer: on the integer it is lost, and accesses are of single elements."""
    return tl.multiple_of(tl.load(row + COLUMN).to(tl.pointer_type(TYPE)), ALIGNMENT)


@triton.jit
def update_chunk(
    row, first, begin, end, s, t, seed, grad_scale,
    ACCUMULATE: tl.constexpr, MOVE: tl.constexpr, L2: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE_TYPES: tl.constexpr, STAGES: tl.constexpr, OPERAND_TYPES: tl.constexpr,
    UNSCALE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CODED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The elements from `begin` to `end` of the chunk whose first one is `first`, a tile at a time."""
    STATES: tl.constexpr = len(STATE_TYPES)
    ALIGNMENT: tl.constexpr = 1 if MASKED else 16
    param = address(row, PARAM, PARAM_TYPE, ALIGNMENT) + first
    grad = address(row, GRAD, GRAD_TYPE, ALIGNMENT) + first
    states = ()
    scales = ()
    for k in tl.static_range(STATES):
        states = states + (address(row, STATE + k, STATE_TYPES[k], ALIGNMENT) + first,)
        if CODED:
            scales = scales + (address(row, SCALES + k, tl.float32, 4) + first // SIZE,)
    operands = ()
    for k in tl.static_range(len(OPERAND_TYPES)):
        if OPERAND_TYPES[k] is None:
            operands = operands + (param,)
        else:
            operands = operands + (address(row, STAGE_OPERANDS + k, OPERAND_TYPES[k], ALIGNMENT) + first,)
    for i in range(begin, end, ROWS * SIZE):
        at = ()
        scales_at = ()
        operands_at = ()
        for k in tl.static_range(STATES):
            at = at + (states[k] + i,)
            if CODED:
                scales_at = scales_at + (scales[k] + i // SIZE,)
        for k in tl.static_range(len(OPERAND_TYPES)):
            operands_at = operands_at + (operands[k] + i,)
        update_tile(
            param + i, grad + i, at, scales_at, operands_at, first + i, end - i, s, t, seed, grad_scale,
            ACCUMULATE, MOVE, L2, FLAGS, KINDS, STAGES, OPERAND_TYPES, UNSCALE, ROWS, SIZE, CODED, MASKED,
        )  # fmt: skip


@triton.jit
def step(
    tensors, chunks, scalars,
    ACCUMULATE: tl.constexpr, MOVE: tl.constexpr, L2: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, N_SCALARS: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE_TYPES: tl.constexpr, STAGES: tl.constexpr, OPERAND_TYPES: tl.constexpr,
    UNSCALE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """One chunk of a tensor: whole tiles of an aligned one by 16-byte accesses, all else an element at a time."""
    program = tl.program_id(0)
    row = tensors + tl.load(chunks + 2 * program).to(tl.int64) * COLUMNS
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(row + COUNT) - first, CHUNK).to(tl.int32)
    own = scalars + tl.load(row + SCALARS) * SCALAR_COLUMNS
    count = tl.where(tl.load(own + RUN) == 0.0, 0, count)
    s = ()
    for k in tl.static_range(N_SCALARS):
        s = s + (tl.load(own + k),)
    grad_scale = tl.load(own + GRAD_SCALE)
    t = ()
    seed = 0
    if STAGES:
        for k in tl.static_range(N_STAGE_SCALARS):
            t = t + (tl.load(own + STAGE_SCALARS + k),)
    if stages.STOCHASTIC & STAGES:
        seed = stages.seed_of(t, tl.load(row + NUMBER))
    TILE: tl.constexpr = ROWS * SIZE
    whole = tl.where(tl.load(row + ALIGNED) != 0, count // TILE * TILE, 0)
    update_chunk(
        row, first, 0, whole, s, t, seed, grad_scale, ACCUMULATE, MOVE, L2, FLAGS, KINDS,
        PARAM_TYPE, GRAD_TYPE, STATE_TYPES, STAGES, OPERAND_TYPES, UNSCALE, ROWS, SIZE, CODED, False,
    )  # fmt: skip
    # An element a thread: with whole tiles the tail, not the main loop, would set the number of registers (70 instead of 48).
    TAIL_SIZE: tl.constexpr = SIZE if CODED else 256
    TAIL_ROWS: tl.constexpr = 256 // TAIL_SIZE if TAIL_SIZE < 256 else 1
    update_chunk(
        row, first, whole, count, s, t, seed, grad_scale, ACCUMULATE, MOVE, L2, FLAGS, KINDS,
        PARAM_TYPE, GRAD_TYPE, STATE_TYPES, STAGES, OPERAND_TYPES, UNSCALE, TAIL_ROWS, TAIL_SIZE, CODED, True,
    )  # fmt: skip
