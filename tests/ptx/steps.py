"""From an instruction to a step: a function that executes it for the threads of a mask."""

from __future__ import annotations

import re

import numpy as np

from ptx.accesses import decode_access
from ptx.operands import Step, guard, reader, writer
from ptx.operations import OPERATIONS, THREE_OPERANDS, Operation
from ptx.parser import Instruction, Vector
from ptx.threads import Threads
from ptx.types import TYPES, Array, Type
from ptx.warps import decode_exchange

_CACHE_POLICY = re.compile(r"createpolicy\.fractional\.L2::evict_\w+\.b64")
_COMPARISON_OF_TWO = re.compile(r"(setp\.\w+\.b?f16)x2")
_NOT_EXACT = re.compile(r"\.(?:approx|full|ftz)\b")


def decode(instruction: Instruction, parameters: dict[str, str]) -> Step:
    """Any instruction but branches and returns."""
    step = _decode_computation(instruction) or decode_access(instruction, parameters) or decode_exchange(instruction)
    if step is None:
        match = _NOT_EXACT.search(instruction.opcode)
        raise instruction.refuse(f"the bits of a result with {match[0]} are not IEEE's" if match else "no instruction of this machine")
    return _guarded(step, instruction) if instruction.guard else step


def _guarded(step: Step, instruction: Instruction) -> Step:
    """Executed, and counted, where the guard is true."""
    predicate, opcode = guard(instruction), instruction.opcode
    assert predicate is not None

    def execute(threads: Threads) -> None:
        outer = threads.mask
        chosen = np.broadcast_to(predicate(threads), threads.count)
        threads.mask = chosen if outer is None else chosen & outer
        if active := threads.active:
            if active == threads.count:
                threads.mask = None
            threads.statistics.executed[opcode] += active
            step(threads)
        threads.mask = outer

    return execute


def _decode_computation(instruction: Instruction) -> Step | None:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode.startswith("mov.") and any(isinstance(operand, Vector) for operand in operands):
        return _regroup(instruction, TYPES[opcode.removeprefix("mov.")])
    if _CACHE_POLICY.fullmatch(opcode):
        write = writer(instruction, operands[0], TYPES["b64"])
        return lambda threads: write(threads, np.zeros(1, dtype=np.uint64))
    if (match := _COMPARISON_OF_TWO.fullmatch(opcode)) and match[1] in OPERATIONS:
        return _compare_two(instruction, OPERATIONS[match[1]])
    operation = THREE_OPERANDS.get(opcode) if len(operands) == 4 else None
    operation = operation or OPERATIONS.get(opcode)
    return _compute(instruction, operation) if operation else None


def _compute(instruction: Instruction, operation: Operation) -> Step:
    result, *sources = instruction.operands
    if len(sources) != len(operation.operands):
        raise instruction.refuse(f"{len(sources)} operands instead of {len(operation.operands)}")
    readers = [reader(instruction, source, type_) for source, type_ in zip(sources, operation.operands, strict=True)]
    write, compute = writer(instruction, result, operation.result), operation.compute
    return lambda threads: write(threads, compute(*[read(threads) for read in readers]))


def _compare_two(instruction: Instruction, operation: Operation) -> Step:
    """The halves of registers, each with a predicate of its own: the first is that of the lowest bits."""
    result, *sources = instruction.operands
    if not isinstance(result, Vector) or len(result.items) != 2 or len(sources) != 2:
        raise instruction.refuse("operands")
    pair = TYPES[f"{operation.operands[0].name}x2"]
    readers = [reader(instruction, source, pair) for source in sources]
    writers = [writer(instruction, item, operation.result) for item in result.items]

    def execute(threads: Threads) -> None:
        values = [read(threads) for read in readers]
        for k, write in enumerate(writers):
            write(threads, operation.compute(*[value[:, k] for value in values]))

    return execute


def _regroup(instruction: Instruction, whole: Type) -> Step:
    """mov of one register into several, or of several into one: the first has the lowest bits."""
    result, source = instruction.operands
    if isinstance(source, Vector):
        part = _part(instruction, source, whole)
        readers, write = [reader(instruction, item, part) for item in source.items], writer(instruction, result, whole)

        def join(threads: Threads) -> None:
            parts: Array = np.stack(np.broadcast_arrays(*[read(threads) for read in readers]), axis=-1)
            write(threads, parts.reshape(-1).view(whole.dtype))

        return join
    assert isinstance(result, Vector)
    part = _part(instruction, result, whole)
    read, writers = reader(instruction, source, whole), [writer(instruction, item, part) for item in result.items]

    def split(threads: Threads) -> None:
        parts = read(threads).view(part.dtype).reshape(-1, len(writers))
        for k, write in enumerate(writers):
            write(threads, parts[:, k])

    return split


def _part(instruction: Instruction, vector: Vector, whole: Type) -> Type:
    name = f"b{whole.bits // len(vector.items)}"
    if whole.name[0] != "b" or name not in TYPES:
        raise instruction.refuse("operands")
    return TYPES[name]
