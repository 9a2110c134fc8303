"""Memory whose every access is checked: the tensors that a test declares, and what the threads of a block share.

Both are an array of bytes, so that the same text loads and stores. Kernels are given the tensors' own addresses, since tables in memory
hold such addresses as well: global memory is one array over all tensors and what lies between them, of which only the tensors are touched.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptx.types import Array

# By the bytes of one access: an item that numpy copies as it is. 32 bytes on sm_100.
_ITEMS: dict[int, np.dtype[Any]] = {np.dtype(name).itemsize: np.dtype(name) for name in ("u1", "u2", "u4", "u8", "c16", "V32")}
_WIDEST = max(_ITEMS)
_NEVER_WRITTEN = 0xDB  # a number that nobody expects


class RefusedError(Exception):
    """Access number `access` of many is not allowed. The machine knows which thread's it is."""

    def __init__(self, access: int, why: str) -> None:
        super().__init__(why)
        self.access = access


class Space:
    """What is loaded and stored is one row of bytes for each address: as many as the access is wide."""

    def __init__(self, data: Array) -> None:
        self._items = {bytes_: data[: data.size // bytes_ * bytes_].view(dtype) for bytes_, dtype in _ITEMS.items()}

    def load(self, addresses: Array, blocks: Array, width: int) -> Array:
        items: Array = self._items[width].take(self._indices(addresses, blocks, width, write=False))
        return items.view(np.uint8).reshape(-1, width)

    def store(self, addresses: Array, blocks: Array, data: Array) -> None:
        width = data.shape[1]
        self._items[width][self._indices(addresses, blocks, width, write=True)] = data.reshape(-1).view(_ITEMS[width])

    def update(self, addresses: Array, blocks: Array, combine: np.ufunc, values: Array) -> None:
        """What is there becomes `combine` of it and each of the values for it, in any order."""
        items = self._items[values.itemsize].view(values.dtype)
        indices, which = np.unique(self._indices(addresses, blocks, values.itemsize, write=True), return_inverse=True)
        updated = items.take(indices)  # combine.at(items, ...) may copy all of the array, what belongs to nobody too
        combine.at(updated, which, values)
        items[indices] = updated

    def _indices(self, addresses: Array, blocks: Array, width: int, write: bool) -> Array:
        addresses = addresses.astype(np.int64)
        misaligned = np.flatnonzero(addresses & (width - 1))
        if misaligned.size:
            raise RefusedError(int(misaligned[0]), f"the address is not a multiple of {width}")
        indices: Array = self._offsets(addresses, blocks, width, write) // width
        return indices

    def _offsets(self, addresses: Array, blocks: Array, width: int, write: bool) -> Array:
        raise NotImplementedError


class SharedMemory(Space):
    def __init__(self, blocks: int, bytes_: int) -> None:
        self._bytes = bytes_
        self._stride = -(-bytes_ // _WIDEST) * _WIDEST
        super().__init__(np.full(blocks * self._stride, _NEVER_WRITTEN, dtype=np.uint8))

    def _offsets(self, addresses: Array, blocks: Array, width: int, write: bool) -> Array:
        outside = np.flatnonzero((addresses < 0) | (addresses + width > self._bytes))
        if outside.size:
            raise RefusedError(int(outside[0]), f"outside of the {self._bytes} bytes of shared memory")
        offsets: Array = addresses + blocks * self._stride
        return offsets


@dataclass(frozen=True)
class _Region:
    name: str
    begin: int
    end: int
    writable: bool
    tensor: torch.Tensor  # so that it lives

    def __str__(self) -> str:
        return f"{self.name} ({self.begin:#x} to {self.end:#x})"


class Memory:
    """The tensors that a kernel may access, under the names that faults call them by."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []

    def add(self, name: str, tensor: torch.Tensor, writable: bool = True) -> int:
        """The tensor's address."""
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: declare what it is a view of")
        region = _Region(name, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, writable, tensor)
        for other in self._regions:
            if region.begin < other.end and other.begin < region.end:
                raise ValueError(f"{region} overlaps {other}")
        if tensor.nbytes:
            self._regions.append(region)
        return region.begin

    def space(self) -> Space:
        if not self._regions:
            raise ValueError("no tensor is declared")
        return _GlobalMemory(sorted(self._regions, key=lambda region: region.begin))


class _GlobalMemory(Space):
    def __init__(self, regions: list[_Region]) -> None:
        self._regions = regions
        self._begins = np.array([region.begin for region in regions], dtype=np.int64)
        self._ends = np.array([region.end for region in regions], dtype=np.int64)
        self._writable = np.array([region.writable for region in regions])
        self._origin = regions[0].begin // _WIDEST * _WIDEST  # aligned, or numpy copies all of the array to take from it
        bytes_ = regions[-1].end + _WIDEST - self._origin
        super().__init__(np.ctypeslib.as_array((ctypes.c_uint8 * bytes_).from_address(self._origin)))

    def _offsets(self, addresses: Array, blocks: Array, width: int, write: bool) -> Array:
        found = np.searchsorted(self._begins, addresses, side="right") - 1  # -1, the last, for what is before the first
        refused = (addresses < self._begins[found]) | (addresses + width > self._ends[found])
        if write:
            refused |= ~self._writable[found]
        if refused.any():
            first = int(np.flatnonzero(refused)[0])
            raise RefusedError(first, self._why(int(addresses[first]), width))
        return addresses - self._origin

    def _why(self, address: int, width: int) -> str:
        nearest = min(self._regions, key=lambda region: max(region.begin - address, address + width - region.end, 0))
        if address < nearest.begin:
            return f"outside of every tensor: it begins {nearest.begin - address} bytes before {nearest}"
        if address + width > nearest.end:
            return f"outside of every tensor: it ends {address + width - nearest.end} bytes behind {nearest}"
        return f"{nearest} is not to be written"
