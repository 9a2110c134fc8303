"""Runs a kernel over a grid of blocks.

Threads run together, many blocks at a time, as elements of numpy arrays: an instruction is executed for all threads that are at it. Where
they part, those at the lowest address run first, so that the others are met again after loops and branches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptx.errors import PtxFaultError, UnsupportedPtxError
from ptx.memory import Memory
from ptx.operands import Reader, Step, guard
from ptx.parser import Instruction, Program, Symbol, parse
from ptx.steps import decode
from ptx.threads import WARP, Statistics, Threads
from ptx.types import TYPES, Array

_BATCH = 32768  # threads at a time: 5 to 8 M elements of AdamW a second; a quarter less with half as many, a tenth with twice

_BRANCHES = ("bra", "bra.uni")
_EXITS = ("ret", "exit")


@dataclass(frozen=True)
class _BasicBlock:
    steps: list[Step]
    counts: Counter[str]  # of its instructions that all threads execute
    condition: Reader | None  # of the branch or return at its end
    target: int | None  # of that; None: the threads exit
    next: int


class Kernel:
    def __init__(self, ptx: str, shared_bytes: int = 0) -> None:
        """`shared_bytes` of shared memory for each block: Triton's `metadata.shared`."""
        self.program: Program = parse(ptx)
        self.shared_bytes = shared_bytes
        if self.program.threads % WARP:
            raise UnsupportedPtxError(f"{self.program.threads} threads in a block")
        self._blocks = _basic_blocks(self.program)

    def run(self, grid: Sequence[int], arguments: Sequence[float], memory: Memory) -> Statistics:
        """`arguments`: one for each parameter. The last two that Triton adds, its scratch memory, may be left out."""
        statistics = Statistics()
        x, y, z = (*grid, 1, 1, 1)[:3]
        blocks_at_once = max(1, _BATCH // self.program.threads)
        parameters, space = self._bind(arguments), memory.space()
        with np.errstate(all="ignore"):
            for first in range(0, x * y * z, blocks_at_once):
                blocks = range(first, min(first + blocks_at_once, x * y * z))
                threads = Threads(blocks, (x, y, z), self.program.threads, self.shared_bytes, space, statistics)
                threads.registers.update(parameters)
                self._execute(threads)
        return statistics

    def _bind(self, arguments: Sequence[float]) -> dict[str, Array]:
        types = self.program.parameters
        if len(arguments) == len(types) - 2:
            arguments = [*arguments, 0, 0]
        if len(arguments) != len(types):
            raise ValueError(f"{len(arguments)} arguments for the parameters {types}")
        return {name: _bits_of(argument, name, type_) for (name, type_), argument in zip(types.items(), arguments, strict=True)}

    def _execute(self, threads: Threads) -> None:
        waiting: dict[int, Array | None] = {0: None}  # which threads are before a basic block
        while waiting:
            at = min(waiting)
            threads.mask = waiting.pop(at)
            if at not in self._blocks:
                raise PtxFaultError("the kernel ends without a return")
            block, active = self._blocks[at], threads.active
            for opcode, count in block.counts.items():
                threads.statistics.executed[opcode] += count * active
            for step in block.steps:
                step(threads)
            for where, mask in _leave(block, threads):
                if where is None:
                    threads.exit(mask)
                else:
                    other = waiting.get(where)
                    joined = mask if other is None or mask is None else mask | other
                    waiting[where] = None if joined is None or joined.all() else joined


def _leave(block: _BasicBlock, threads: Threads) -> list[tuple[int | None, Array | None]]:
    """Where the threads go on, and which of them."""
    everyone = threads.mask
    if block.condition is None:
        return [(block.target, everyone)]
    condition = block.condition(threads)
    if condition.size == 1:
        return [(block.target if condition[0] else block.next, everyone)]
    taken, others = (condition, ~condition) if everyone is None else (condition & everyone, ~condition & everyone)
    return [(where, mask) for where, mask in ((block.target, taken), (block.next, others)) if mask.any()]


def _bits_of(argument: float, name: str, type_name: str) -> Array:
    type_ = TYPES[type_name]
    if type_.is_integer:
        if not (isinstance(argument, int) and -(1 << (type_.bits - 1)) <= argument < 1 << type_.bits):
            raise ValueError(f"argument {argument} for {name} of type {type_name}")
        return type_.to_bits(type_.constant(argument), type_.bits)
    return type_.to_bits(np.array([argument], dtype=type_.dtype), type_.bits)


def _basic_blocks(program: Program) -> dict[int, _BasicBlock]:
    """By the number of their first instruction."""
    instructions = program.instructions
    targets = {number: _target(last, program) for number, last in enumerate(instructions) if last.opcode in _BRANCHES + _EXITS}
    after = {number + 1 for number in targets}
    firsts = sorted(({0} | after | {target for target in targets.values() if target is not None}) - {len(instructions)})
    blocks = {}
    for first, next_ in zip(firsts, [*firsts, len(instructions)][1:], strict=True):
        body, end = (instructions[first : next_ - 1], instructions[next_ - 1]) if next_ in after else (instructions[first:next_], None)
        blocks[first] = _BasicBlock(
            steps=[decode(instruction, program.parameters) for instruction in body],
            counts=Counter(each.opcode for each in instructions[first:next_] if each.guard is None or each is end),
            condition=guard(end) if end else None,
            target=targets[next_ - 1] if end else next_,
            next=next_,
        )
    return blocks


def _target(instruction: Instruction, program: Program) -> int | None:
    """Of a branch; None of a return."""
    match instruction.operands:
        case () if instruction.opcode in _EXITS:
            return None
        case (Symbol(name),) if name in program.labels and not (instruction.opcode == "bra.uni" and instruction.guard):
            return program.labels[name]
    raise instruction.refuse("no target")
