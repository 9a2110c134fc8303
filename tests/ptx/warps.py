"""Exchanges between the threads of a warp, and barriers. All threads of a warp must take part."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce

import numpy as np

from ptx import arithmetic
from ptx.errors import PtxFaultError
from ptx.operands import Step, reader, writer
from ptx.parser import Immediate, Instruction, Operand
from ptx.threads import WARP, Threads
from ptx.types import TYPES, Array, Type

_SHUFFLE = re.compile(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
_REDUCTIONS: dict[str, tuple[str, Callable[[Array, Array], Array]]] = {
    **{
        f"{name}.{t}": (t, combine) for t in ("s32", "u32") for name, combine in (("add", np.add), ("min", np.minimum), ("max", np.maximum))
    },
    "and.b32": ("b32", np.bitwise_and),
    "or.b32": ("b32", np.bitwise_or),
    "xor.b32": ("b32", np.bitwise_xor),
    "min.f32": ("f32", arithmetic.minimum),
    "max.f32": ("f32", arithmetic.maximum),
    "min.NaN.f32": ("f32", arithmetic.minimum_or_nan),
    "max.NaN.f32": ("f32", arithmetic.maximum_or_nan),
}


def decode_exchange(instruction: Instruction) -> Step | None:
    """None if it is none."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "bar.sync" and operands == (Immediate(0, None),):
        return lambda threads: threads.at_barrier(instruction.text)
    if opcode == "bar.warp.sync" and len(operands) == 1:
        return _together(instruction, operands[0])
    if match := _SHUFFLE.fullmatch(opcode):
        return _shuffle(instruction, match[1])
    if opcode.startswith("redux.sync.") and (reduction := _REDUCTIONS.get(opcode.removeprefix("redux.sync."))):
        return _reduce(instruction, TYPES[reduction[0]], reduction[1])
    return None


def _together(instruction: Instruction, operand: Operand) -> Step:
    members = reader(instruction, operand, TYPES["u32"])

    def check(threads: Threads) -> None:
        others = members(threads) != 0xFFFFFFFF
        if (others if threads.mask is None else others & threads.mask).any():
            raise PtxFaultError(f"{instruction.text}: not for a whole warp")
        threads.in_whole_warps(instruction.text)

    return check


def _shuffle(instruction: Instruction, mode: str) -> Step:
    result, source, distance, bounds, members = instruction.operands
    u32 = TYPES["u32"]
    check, write = _together(instruction, members), writer(instruction, result, u32)
    read, read_distance, read_bounds = (reader(instruction, operand, u32) for operand in (source, distance, bounds))

    def execute(threads: Threads) -> None:
        check(threads)
        by, clamp, segment = read_distance(threads) & 31, read_bounds(threads) & 31, read_bounds(threads) >> 8 & 31
        lane = threads.special["%laneid"].astype(np.int64)
        first, last = lane & segment, (lane & segment) | (clamp & ~segment)
        if mode == "up":
            other = lane - by
            inside = other >= last
        else:
            other = {"down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode]
            inside = other <= last
        values = np.broadcast_to(read(threads), threads.count)
        write(threads, values[threads.numbers - lane + np.where(inside, other, lane)])

    return execute


def _reduce(instruction: Instruction, type_: Type, combine: Callable[[Array, Array], Array]) -> Step:
    result, source, members = instruction.operands
    check, read, write = _together(instruction, members), reader(instruction, source, type_), writer(instruction, result, type_)

    def execute(threads: Threads) -> None:
        check(threads)
        warps = np.broadcast_to(read(threads), threads.count).reshape(-1, WARP)
        write(threads, np.repeat(reduce(combine, warps.T), WARP))

    return execute
