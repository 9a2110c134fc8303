"""Where an instruction's values come from, and where its result goes."""

from __future__ import annotations

from collections.abc import Callable

from ptx.parser import SHARED, Immediate, Instruction, Not, Operand, Register, Sink, Symbol
from ptx.threads import Threads
from ptx.types import STORAGE, TYPES, Array, Type

Step = Callable[[Threads], None]
Reader = Callable[[Threads], Array]  # of shape (threads,), or (1,) if all have the same
Writer = Callable[[Threads, Array], None]


def reader(instruction: Instruction, operand: Operand, type_: Type) -> Reader:
    """Of a wider register, in conversions and stores of integers, the lower bits."""
    if isinstance(operand, Not):
        predicate = reader(instruction, operand.register, type_)
        return lambda threads: ~predicate(threads)
    if isinstance(operand, Register):
        return _register_reader(instruction, operand, type_)
    if isinstance(operand, Immediate) and operand.bits in (None, type_.bits):
        constant = type_.constant(operand.value)
        return lambda threads: constant
    if operand == Symbol(SHARED) and type_.bits >= 32:
        return reader(instruction, Immediate(0, None), type_)
    if isinstance(operand, Symbol) and operand.name in Threads.SPECIAL and type_.bits == 32:
        name = operand.name
        return lambda threads: type_.of_bits(threads.special[name])
    raise instruction.refuse(f"{operand} as {type_.name}")


def _register_reader(instruction: Instruction, register: Register, type_: Type) -> Reader:
    name = register.name
    if register.bits == type_.bits:
        if type_.dtype == STORAGE[type_.bits] and type_.lanes == 1:
            return lambda threads: threads.registers[name]
        return lambda threads: type_.of_bits(threads.registers[name])
    if register.bits > type_.bits > 1 and type_.is_integer and instruction.opcode.startswith(("cvt.", "st.")):
        return lambda threads: type_.of_bits(threads.registers[name].astype(STORAGE[type_.bits]))
    raise instruction.refuse(f"{name} has {register.bits} bits")


def writer(instruction: Instruction, operand: Operand, type_: Type) -> Writer:
    """Into a wider register, in conversions and loads of integers, with what the type's sign says above."""
    if isinstance(operand, Sink):
        return lambda threads, values: None
    if not isinstance(operand, Register):
        raise instruction.refuse(f"{operand} as a result")
    name, bits = operand.name, operand.bits
    if bits != type_.bits and not (bits > type_.bits > 1 and type_.is_integer and instruction.opcode.startswith(("cvt.", "ld."))):
        raise instruction.refuse(f"{name} has {bits} bits")
    return lambda threads, values: threads.write(name, bits, type_.to_bits(values, bits))


def guard(instruction: Instruction) -> Reader | None:
    return None if instruction.guard is None else reader(instruction, instruction.guard, TYPES["pred"])
