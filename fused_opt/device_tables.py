"""The tables that kernels on devices read, where they read them: copied only if they changed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fused_opt.native import native

if TYPE_CHECKING:
    from fused_opt import _cpu

_CPU, _TYPES = 1, {1: "cpu", 2: "cuda", 10: "cuda"}  # DLPack's numbers; ROCm's devices are called cuda in torch


class Found(NamedTuple):
    """A bucket, as Tables.finish describes it."""

    device: tuple[int, int]  # DLPack's type, index
    flags: int
    formats: tuple[str, ...]  # of parameter, gradient and states
    block_size: int
    stages: int
    stage_formats: tuple[str, ...]  # of mask, anchor, average and companion; of those that are not there anything
    rows: int
    chunks: int
    rows_changed: bool
    chunks_changed: bool


@dataclass(slots=True)
class Bucket:
    """What one launch serves."""

    found: Found
    device: torch.device
    rows: torch.Tensor
    chunks: torch.Tensor


class DeviceTables:
    """Kept from one step to the next. Use: `begin`, add batches to what it returned, `finish`; `keep` what else a graph refers to.

    Attributes:
        uploads: tables that were copied since `begin`.
    """

    def __init__(self, chunk: int, captured: list[Any]) -> None:
        self._chunk = chunk
        self._captured = captured  # what graphs refer to: they do not keep it alive
        self._streams: list[int] = []
        self._tables: _cpu.Tables = native().module.Tables(chunk)
        self._buckets: list[Bucket] = []
        self._constants: dict[torch.device, tuple[bytes, torch.Tensor]] = {}
        self.uploads = 0

    def begin(self) -> _cpu.Tables:
        """The new tables."""
        if self._streams != self._current_streams():
            self._forget()
        self.uploads = 0
        self._tables.begin()
        return self._tables

    def finish(self) -> list[Bucket]:
        """Copy what has changed."""
        known, self._buckets = self._buckets, []  # if this fails, the next step copies everything
        self._buckets = [self._bucket(i, Found(*each), known) for i, each in enumerate(self._tables.finish())]
        self._streams = self._current_streams()
        return self._buckets

    def constants(self, content: bytes, columns: int, device: torch.device) -> torch.Tensor:
        """A table of float64 numbers on a device; one for each device."""
        known = self._constants.get(device)
        if known is not None and known[0] == content:
            return known[1]
        host = new_host((len(content) // 8 // columns, columns), torch.float64, device)
        host.copy_(torch.frombuffer(bytearray(content), dtype=torch.float64).view_as(host))
        table = self.upload(host, device)
        self._constants[device] = content, table
        return table

    def upload(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A copy on the device of what `new_host` made."""
        self.uploads += 1
        if device.type == "cpu":
            return host
        if capturing(device):
            self._captured.append(host)
        with current_device(device):
            return host.to(device, non_blocking=True)

    @property
    def captures(self) -> bool:
        """Whether the buckets' devices are captured into a graph."""
        return any(capturing(bucket.device) for bucket in self._buckets)

    def keep(self, *objects: Any) -> None:
        """With a graph that is being captured: what was copied now is not there before it is replayed, and must stay as long as it."""
        self._captured.append((self._buckets, self._constants, *objects))
        self._forget()

    def _current_streams(self) -> list[int]:
        """Of the buckets' GPUs. Tables are used on the stream that copied them: freed, their memory is given to others on that stream."""
        return [torch.cuda.current_stream(bucket.device).cuda_stream for bucket in self._buckets if bucket.device.type != "cpu"]

    def _forget(self) -> None:
        """Copy everything in the next step."""
        self._tables, self._buckets, self._constants = native().module.Tables(self._chunk), [], {}

    def _bucket(self, i: int, found: Found, before: list[Bucket]) -> Bucket:
        kind, index = found.device
        device = torch.device(_TYPES[kind]) if kind == _CPU else torch.device(_TYPES[kind], index)
        known = before[i] if i < len(before) else None
        if known is not None and not found.rows_changed:
            rows = known.rows
        else:
            host = new_host((found.rows, native().module.table_columns), torch.int64, device)
            self._tables.copy_rows(i, host.data_ptr())
            rows = self.upload(host, device)
        if known is not None and not found.chunks_changed:
            chunks = known.chunks
        else:
            host = new_host((found.chunks, 2), torch.int32, device)
            self._tables.copy_chunks(i, host.data_ptr())
            chunks = self.upload(host, device)
        return Bucket(found, device, rows, chunks)


def new_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory from which a device copies without making the host wait.

    Not pinned during a capture, which allows no such allocation; the copy is made when the graph is replayed.
    """
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type != "cpu" and not capturing(device))


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream is captured into a graph."""
    if device.type == "cpu":
        return False
    with current_device(device):
        return torch.cuda.is_current_stream_capturing()


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one; nothing for the CPU."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)
