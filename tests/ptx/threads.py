"""The state of the threads that run together: whole blocks of a grid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ptx.errors import PtxFaultError
from ptx.memory import SharedMemory, Space
from ptx.types import STORAGE, Array

WARP = 32
_NEVER_WRITTEN = 0xDBDBDBDBDBDBDBDB


@dataclass
class Statistics:
    """Of all threads together."""

    executed: Counter[str] = field(default_factory=Counter)  # by opcode with its modifiers; where its guard is true, or a branch or return
    loaded: Counter[int] = field(default_factory=Counter)  # bytes from global memory, by the bytes of one thread's access
    stored: Counter[int] = field(default_factory=Counter)


class _Registers(dict[str, Array]):
    def __missing__(self, name: str) -> Array:
        raise PtxFaultError(f"register {name} is read before it is written")


class Threads:
    """`mask` chooses the threads that execute what is executed next; None: all."""

    SPECIAL = frozenset({"%laneid", "%warpid", *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz")})

    def __init__(
        self,
        blocks: range,
        grid: tuple[int, int, int],
        threads_per_block: int,
        shared_bytes: int,
        global_memory: Space,
        statistics: Statistics,
    ) -> None:
        self.count = len(blocks) * threads_per_block
        self.mask: Array | None = None
        self.registers = _Registers()
        self.global_memory = global_memory
        self.shared_memory = SharedMemory(len(blocks), shared_bytes)
        self.statistics = statistics
        self.numbers = np.arange(self.count)
        self.block = self.numbers // threads_per_block  # in this batch
        self._per_block = threads_per_block
        self._exited = np.zeros(self.count, dtype=np.bool_)
        number = self.block + blocks.start
        axes = {"x": number % grid[0], "y": number // grid[0] % grid[1], "z": number // grid[0] // grid[1]}
        of_block = self.numbers % threads_per_block
        self.special: dict[str, Array] = {
            name: values.astype(np.uint32)
            for name, values in {
                "%tid.x": of_block,
                "%laneid": of_block % WARP,
                "%warpid": of_block // WARP,
                "%ntid.x": np.array([threads_per_block]),
                **{f"%tid.{axis}": np.array([0]) for axis in "yz"},
                **{f"%ntid.{axis}": np.array([1]) for axis in "yz"},
                **{f"%ctaid.{axis}": values if len(blocks) > 1 else values[:1] for axis, values in axes.items()},
                **{f"%nctaid.{axis}": np.array([size]) for axis, size in zip("xyz", grid, strict=True)},
            }.items()
        }

    @property
    def active(self) -> int:
        return self.count if self.mask is None else int(np.count_nonzero(self.mask))

    @property
    def active_numbers(self) -> Array:
        return self.numbers if self.mask is None else np.flatnonzero(self.mask)

    def write(self, name: str, bits: int, values: Array) -> None:
        """`values` stays unchanged from now on."""
        if self.mask is not None:
            before = self.registers.get(name)
            if before is None:
                before = np.array([_NEVER_WRITTEN], dtype=np.uint64).astype(STORAGE[bits])
            values = np.where(self.mask, values, before)
        self.registers[name] = values

    def spread(self, values: Array) -> Array:
        """Of the active threads, as those of all."""
        if self.mask is None:
            return values
        everyone = np.zeros(self.count, dtype=values.dtype)
        everyone[self.mask] = values
        return everyone

    def exit(self, mask: Array | None) -> None:
        self._exited |= True if mask is None else mask

    def at_barrier(self, text: str) -> None:
        """A barrier waits for all threads of a block but those that have exited: here they must come together, not one after the other."""
        if self.mask is not None:
            here = self.mask.reshape(-1, self._per_block)
            absent = ~here & ~self._exited.reshape(-1, self._per_block)
            if (here.any(axis=1) & absent.any(axis=1)).any():
                raise PtxFaultError(f"{text}: reached by some threads of a block only")

    def in_whole_warps(self, text: str) -> None:
        if self.mask is not None:
            warps = self.mask.reshape(-1, WARP)
            if (warps.any(axis=1) & ~warps.all(axis=1)).any():
                raise PtxFaultError(f"{text}: reached by some threads of a warp only")

    def describe(self, number: int) -> str:
        block = [int(np.broadcast_to(self.special[f"%ctaid.{axis}"], self.count)[number]) for axis in "xyz"]
        return f"thread {int(self.special['%tid.x'][number])} of block {tuple(block)}"
