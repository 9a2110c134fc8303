"""Loads and stores: of registers, and of 8x8 matrices of 16-bit values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ptx.errors import PtxFaultError
from ptx.memory import RefusedError, Space
from ptx.operands import Reader, Step, Writer, reader, writer
from ptx.parser import Address, Instruction, Operand, Register, Symbol, Vector
from ptx.threads import WARP, Threads
from ptx.types import TYPES, Array, Type

# Which caches are to keep the data changes nothing here.
_ACCESS = re.compile(
    r"(ld|st)\.(global|shared)(?:::cta)?(?:\.(?:ca|cg|cs|cv|wb|wt))?(?:\.L1::(?:evict_\w+|no_allocate))?(?P<policy>\.L2::cache_hint)?"
    r"(?:\.v(?P<lanes>[248]))?\.(?P<type>[busf]\d+)"
)
# Those of integers whose result does not depend on the order of threads.
_ATOMIC = re.compile(r"(?:atom|red)\.global(?:\.(?:cta|gpu|sys))?(?:\.(?:relaxed|acquire|release|acq_rel))?\.(\w+)\.([bus](?:32|64))")
_COMBINATIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_PARAMETER = re.compile(r"ld\.param\.([busf]\d+)")
_MATRICES = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
_ROW = 16  # bytes of a matrix's row


def decode_access(instruction: Instruction, parameters: dict[str, str]) -> Step | None:
    """None if it is none."""
    if match := _ACCESS.fullmatch(instruction.opcode):
        if len(instruction.operands) != (3 if match["policy"] else 2):
            raise instruction.refuse("operands")
        access = _load if match[1] == "ld" else _store
        return access(instruction, match[2] == "shared", int(match["lanes"] or 1), TYPES[match["type"]])
    if (match := _ATOMIC.fullmatch(instruction.opcode)) and match[1] in _COMBINATIONS:
        return _update(instruction, _COMBINATIONS[match[1]], TYPES[match[2]])
    if match := _PARAMETER.fullmatch(instruction.opcode):
        return _load_parameter(instruction, TYPES[match[1]], parameters)
    if match := _MATRICES.fullmatch(instruction.opcode):
        access_matrices = _load_matrices if match[1] == "ld" else _store_matrices
        return access_matrices(instruction, int(match[2]), bool(match[3]))
    return None


def _load(instruction: Instruction, shared: bool, lanes: int, type_: Type) -> Step:
    result, address = instruction.operands[:2]
    writers: list[Writer] = [writer(instruction, item, type_) for item in _items(instruction, result, lanes)]
    base = _address_reader(instruction, address, shared)
    width = lanes * type_.bits // 8

    def execute(threads: Threads) -> None:
        numbers, addresses = threads.active_numbers, base(threads)
        same = addresses.size == 1 and not shared  # in shared memory each block has its own
        if same:
            numbers = numbers[:1]
        with _blaming(instruction, threads, numbers, addresses, width) as chosen:
            rows = _space(threads, shared).load(chosen, threads.block[numbers], width)
        values = rows.view(type_.dtype)
        for k, write in enumerate(writers):
            write(threads, values[:, k] if same else threads.spread(values[:, k]))
        if not shared:
            threads.statistics.loaded[width] += threads.active * width

    return execute


def _store(instruction: Instruction, shared: bool, lanes: int, type_: Type) -> Step:
    address, source = instruction.operands[:2]
    readers: list[Reader] = [reader(instruction, item, type_) for item in _items(instruction, source, lanes)]
    base = _address_reader(instruction, address, shared)
    width = lanes * type_.bits // 8

    def execute(threads: Threads) -> None:
        numbers = threads.active_numbers
        values = np.empty((numbers.size, lanes), dtype=type_.dtype)
        for k, read in enumerate(readers):
            values[:, k] = _of(numbers, threads, read(threads))
        with _blaming(instruction, threads, numbers, base(threads), width) as chosen:
            _space(threads, shared).store(chosen, threads.block[numbers], values.view(np.uint8))
        if not shared:
            threads.statistics.stored[width] += numbers.size * width

    return execute


def _update(instruction: Instruction, combine: np.ufunc, type_: Type) -> Step:
    """What was there before is for nobody to read, since it depends on the order of threads: its register is as if never written."""
    *results, address, source = instruction.operands
    before = [operand.name for operand in results if isinstance(operand, Register)]
    if not len(before) == len(results) == instruction.opcode.startswith("atom"):
        raise instruction.refuse("operands")
    base, read, width = _address_reader(instruction, address, shared=False), reader(instruction, source, type_), type_.bits // 8

    def execute(threads: Threads) -> None:
        numbers = threads.active_numbers
        with _blaming(instruction, threads, numbers, base(threads), width) as chosen:
            threads.global_memory.update(chosen, threads.block[numbers], combine, _of(numbers, threads, read(threads)))
        for name in before:
            threads.registers.pop(name, None)
        threads.statistics.loaded[width] += numbers.size * width
        threads.statistics.stored[width] += numbers.size * width

    return execute


def _load_parameter(instruction: Instruction, type_: Type, parameters: dict[str, str]) -> Step:
    result, address = instruction.operands
    if not (isinstance(address, Address) and isinstance(address.base, Symbol) and address.offset == 0):
        raise instruction.refuse("address")
    name = address.base.name
    if name not in parameters or TYPES[parameters[name]].bits != type_.bits:
        raise instruction.refuse(f"the parameters are {parameters}")
    write = writer(instruction, result, type_)
    return lambda threads: write(threads, type_.of_bits(threads.registers[name]))


def _load_matrices(instruction: Instruction, count: int, transposed: bool) -> Step:
    result, address = instruction.operands
    writers = [writer(instruction, item, TYPES["b32"]) for item in _items(instruction, result, count)]
    base = _address_reader(instruction, address, shared=True)

    def execute(threads: Threads) -> None:
        numbers, rows_of = _row_numbers(instruction, threads, count)
        with _blaming(instruction, threads, rows_of, base(threads), _ROW) as chosen:
            rows = threads.shared_memory.load(chosen, threads.block[rows_of], _ROW)
        matrices = _transposed(rows, count) if transposed else rows
        values = matrices.reshape(-1, count, WARP, 4).view(np.uint32)  # a thread has two neighbours of a row
        for k, write in enumerate(writers):
            write(threads, threads.spread(values[:, k].reshape(numbers.size)))

    return execute


def _store_matrices(instruction: Instruction, count: int, transposed: bool) -> Step:
    address, source = instruction.operands
    readers = [reader(instruction, item, TYPES["b32"]) for item in _items(instruction, source, count)]
    base = _address_reader(instruction, address, shared=True)

    def execute(threads: Threads) -> None:
        numbers, rows_of = _row_numbers(instruction, threads, count)
        values = np.stack([_of(numbers, threads, read(threads)).reshape(-1, WARP) for read in readers], axis=1)
        matrices = values.view(np.uint8).reshape(-1, _ROW)
        rows = _transposed(matrices, count) if transposed else matrices
        with _blaming(instruction, threads, rows_of, base(threads), _ROW) as chosen:
            threads.shared_memory.store(chosen, threads.block[rows_of], rows)

    return execute


def _row_numbers(instruction: Instruction, threads: Threads, count: int) -> tuple[Array, Array]:
    """The threads, and those of them that have the addresses of rows: the first eight of a warp those of the first matrix, and so on."""
    threads.in_whole_warps(instruction.text)
    numbers = threads.active_numbers
    return numbers, numbers.reshape(-1, WARP)[:, : 8 * count].reshape(-1)


def _transposed(rows: Array, count: int) -> Array:
    return np.ascontiguousarray(rows.view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)).view(np.uint8).reshape(-1, _ROW)


def _items(instruction: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
    items: tuple[Operand, ...] = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise instruction.refuse(f"{len(items)} registers instead of {count}")
    return items


def _address_reader(instruction: Instruction, operand: Operand, shared: bool) -> Reader:
    if not isinstance(operand, Address):
        raise instruction.refuse(f"{operand} as an address")
    narrow = shared and not (isinstance(operand.base, Register) and operand.base.bits == 64)
    base, offset = reader(instruction, operand.base, TYPES["s32" if narrow else "s64"]), operand.offset
    return lambda threads: base(threads).astype(np.int64) + offset


def _space(threads: Threads, shared: bool) -> Space:
    return threads.shared_memory if shared else threads.global_memory


def _of(numbers: Array, threads: Threads, values: Array) -> Array:
    if values.size == numbers.size == threads.count:
        return values
    return np.broadcast_to(values, threads.count)[numbers]


@contextmanager
def _blaming(instruction: Instruction, threads: Threads, numbers: Array, addresses: Array, width: int) -> Iterator[Array]:
    """The addresses of the threads with these numbers. A refusal becomes a fault of one of them."""
    chosen = _of(numbers, threads, addresses)
    try:
        yield chosen
    except RefusedError as refused:
        who, where = threads.describe(int(numbers[refused.access])), int(chosen[refused.access]) % 2**64
        raise PtxFaultError(f"{instruction.text}: {who} accesses {width} bytes at {where:#x}: {refused}") from None
