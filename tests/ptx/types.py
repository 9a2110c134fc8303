"""What the bits of a register stand for.

A register holds one unsigned integer (a bool, if a predicate) for each thread, or only one if all threads have the same: an array of shape
(threads,) or (1,), never changed once it is written, so that two registers may share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STORAGE: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.bool_),
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.uint32),
    64: np.dtype(np.uint64),
}


@dataclass(frozen=True)
class Type:
    name: str
    bits: int
    dtype: np.dtype[Any]  # of one lane
    lanes: int = 1

    @property
    def is_integer(self) -> bool:
        return self.name[0] in "bus" and not self.name.startswith("bf")

    def of_bits(self, bits: Array) -> Array:
        """Bits of this type's width as its values, of shape (threads, lanes) if it has several."""
        values = bits.view(self.dtype)
        return values if self.lanes == 1 else values.reshape(-1, self.lanes)

    def to_bits(self, values: Array, bits: int) -> Array:
        """Values as the contents of a register, which may be wider than an integer: then by its sign, if it has one."""
        if bits != self.bits:
            return values.astype(STORAGE[bits])
        return np.ascontiguousarray(values).reshape(-1).view(STORAGE[bits])

    def constant(self, value: int) -> Array:
        """From the bits of a literal, or an integer of either sign."""
        if self.bits == 1:
            return np.array([value != 0])
        return self.of_bits(np.array([value & ((1 << self.bits) - 1)], dtype=STORAGE[self.bits]))


def _types() -> dict[str, Type]:
    kinds = [(kind, numpy_kind, bits) for kind, numpy_kind in zip("busf", "uuif", strict=True) for bits in (8, 16, 32, 64)]
    types = [
        *(
            Type(f"{kind}{bits}", bits, np.dtype(f"{numpy_kind}{bits // 8}"))
            for kind, numpy_kind, bits in kinds
            if (kind, bits) != ("f", 8)
        ),
        Type("pred", 1, np.dtype(np.bool_)),
        Type("bf16", 16, np.dtype(np.uint16)),
        Type("f32x2", 64, np.dtype(np.float32), 2),
        Type("f16x2", 32, np.dtype(np.float16), 2),
        Type("bf16x2", 32, np.dtype(np.uint16), 2),
    ]
    return {type_.name: type_ for type_ in types}


TYPES = _types()
