"""A step's share that runs by Triton kernels: tables are copied to the device, then each bucket of tensors is one launch.

A bucket is what one kernel can serve: tensors on one device, of the same dtypes, states of the same format, the same compile-time options;
in whatever param group. Its tables, with the addresses of the tensors, are copied only if they changed. The step's scalars are copied in
every step or, where something they depend on is on the device (step counters, a learning rate, a gradient scaler), computed there.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fused_opt.native import native
from fused_opt.rules import Group, Program, Rule
from fused_opt.stages import StageProgram

if TYPE_CHECKING:
    from fused_opt import _cpu

_CPU, _TYPES = 1, {1: "cpu", 2: "cuda", 10: "cuda"}  # DLPack's numbers; ROCm's devices are called cuda in torch

_REAL = (torch.float32, torch.float64)


class Share(NamedTuple):
    """What a param group has for the device."""

    group: Group
    batch: _cpu.Batch
    programs: Sequence[Program]  # one for each cohort
    stages: Sequence[StageProgram] = ()  # likewise, or none


class Scaler(NamedTuple):
    """A gradient scaler's tensors, float32, of one element: whether an infinity was found, and what gradients are to be divided by."""

    found_inf: torch.Tensor
    grad_scale: torch.Tensor | None


class Ran(NamedTuple):
    """What a step launched, and how many tables it copied: for tests and reports."""

    step_launches: int
    scalar_launches: int
    uploads: int


@dataclass(slots=True)
class _Bucket:
    """What one launch serves."""

    device: torch.device
    step: Any  # kernels.variants.Variant
    rows: torch.Tensor
    chunks: torch.Tensor


class _Found(NamedTuple):
    """A bucket, as Tables.finish describes it."""

    device: tuple[int, int]  # DLPack's type, index
    flags: int
    formats: tuple[str, ...]  # of parameter, gradient and states
    block_size: int
    rows: int
    chunks: int
    rows_changed: bool
    chunks_changed: bool


@dataclass(slots=True)
class _Launch:
    variant: Any
    device: torch.device
    programs: int
    arguments: tuple[Any, ...]


def computes_scalars(group: Group, batch: _cpu.Batch) -> bool:
    """Whether the scalars of a group have to be computed on the device."""
    lr = group["lr"]
    return (
        bool(group.get("capturable"))
        or (isinstance(lr, torch.Tensor) and lr.device.type != "cpu")
        or any(step < 0 for step, _ in batch.cohorts)
    )


class DeviceStep:
    """Kept from one step to the next: the tables on the devices. Use: `prepare`, which writes no parameter or state, then `run`."""

    def __init__(self, captured: list[Any]) -> None:
        from fused_opt.kernels import launch, scalars, step, variants

        self._launch_module, self._variants = launch, variants
        self._scalar_columns, self._run_column, self._grad_scale_column = step.SCALAR_COLUMNS.value, step.RUN.value, step.GRAD_SCALE.value
        self._constant_columns = scalars.CONSTANT_COLUMNS.value
        self._tables = native().module.Tables(variants.CHUNK)
        self._buckets: list[_Bucket] = []
        self._streams: list[int] = []
        self._constants: dict[torch.device, tuple[bytes, torch.Tensor]] = {}
        self._captured = captured  # what graphs refer to: they do not keep it alive
        self._rates: list[torch.Tensor] = []  # learning rates that had to be copied
        self._uploads = 0
        self._launches: list[_Launch] = []
        self.ran = Ran(0, 0, 0)

    def prepare(self, rule: Rule, shares: Sequence[Share], on_device: bool, scaler: Scaler | None, unscales: bool) -> None:
        """Compile what is new and copy what has changed.

        Args:
            rule: of all of them.
            shares: the groups.
            on_device: compute scalars on the device; otherwise they are in the shares' programs.
            scaler: only if `on_device`.
            unscales: whether gradients are divided by the scaler's scale where they lie.
        """
        if self._streams != self._current_streams():
            self._forget()
        self._uploads = 0
        self._tables.begin()
        row = 0
        for share in shares:
            self._tables.add(share.batch, [flags for flags, _ in share.programs], row, on_device)
            row += len(share.programs)
        found = self._tables.finish()
        unscales = unscales and scaler is not None and scaler.grad_scale is not None
        self._buckets = [self._bucket(rule, i, _Found(*each), unscales) for i, each in enumerate(found)]
        capturing = any(_capturing(bucket.device) for bucket in self._buckets)
        if capturing and rule.counter and any(step >= 0 for share in shares for step, _ in share.batch.cohorts):
            raise RuntimeError(
                "a CUDA graph is captured of a step whose step counters are in the host's memory, which no replay would count; make the "
                "optimizer with capturable=True, or move state['step'] to the parameters' device before the capture"
            )
        self._launches = []
        self._rates = []
        shared: dict[torch.device, torch.Tensor] = {}  # scalars or constants
        for bucket in self._buckets:
            device = bucket.device
            if device not in shared:
                shared[device] = self._upload_constants(rule, shares, device) if on_device else self._upload_scalars(shares, device)
            if on_device:
                self._prepare_on_device(rule, bucket, shared[device], scaler)
            else:
                self._add(bucket, bucket.step, len(bucket.chunks), (bucket.rows, bucket.chunks, shared[device]))
        self._streams = self._current_streams()
        if capturing:  # what was copied here is not there before the graph is replayed, and must stay as long as the graph
            self._captured.append((self._buckets, shared, self._launches, self._rates))
            self._forget()

    def _current_streams(self) -> list[int]:
        """Of the buckets' GPUs. Tables are used on the stream that copied them: freed, their memory is given to others on that stream."""
        return [torch.cuda.current_stream(bucket.device).cuda_stream for bucket in self._buckets if bucket.device.type != "cpu"]

    def _forget(self) -> None:
        """Copy everything in the next step."""
        self._tables, self._buckets, self._constants = native().module.Tables(self._variants.CHUNK), [], {}

    def run(self) -> None:
        """Launch what was prepared."""
        launcher = self._launch_module.launcher
        for launch in self._launches:
            with current_device(launch.device):
                launcher.launch(launch.variant, launch.device, launch.programs, launch.arguments)
        scalar_launches = sum(launch.variant.counts_steps for launch in self._launches)
        self.ran = Ran(len(self._launches) - scalar_launches, scalar_launches, self._uploads)
        self._launches = []

    def _bucket(self, rule: Rule, i: int, found: _Found, unscales: bool) -> _Bucket:
        kind, index = found.device
        device = torch.device(_TYPES[kind]) if kind == _CPU else torch.device(_TYPES[kind], index)
        param, grad, *states = found.formats
        variant = self._variants.step_variant(rule.name, found.flags, param, grad, tuple(states), found.block_size, unscales)
        known = self._buckets[i] if i < len(self._buckets) else None
        if known is not None and not found.rows_changed:
            rows = known.rows
        else:
            host = _new_host((found.rows, native().module.table_columns), torch.int64, device)
            self._tables.copy_rows(i, host.data_ptr())
            rows = self._upload(host, device)
        if known is not None and not found.chunks_changed:
            chunks = known.chunks
        else:
            host = _new_host((found.chunks, 2), torch.int32, device)
            self._tables.copy_chunks(i, host.data_ptr())
            chunks = self._upload(host, device)
        return _Bucket(device, variant, rows, chunks)

    def _prepare_on_device(self, rule: Rule, bucket: _Bucket, constants: torch.Tensor, scaler: Scaler | None) -> None:
        scalars = torch.empty(len(bucket.rows), self._scalar_columns, dtype=torch.float32, device=bucket.device)
        found_inf = grad_scale = None
        if scaler is not None:
            found_inf = scaler.found_inf.to(bucket.device, torch.float32, non_blocking=True)
            scale = torch.ones((), device=bucket.device) if scaler.grad_scale is None else scaler.grad_scale
            grad_scale = scale.to(bucket.device, torch.float32, non_blocking=True)
        variant = self._variants.scalars_variant(rule.name, scaler is not None)
        self._add(bucket, variant, len(bucket.rows), (bucket.rows, constants, scalars, found_inf, grad_scale))
        self._add(bucket, bucket.step, len(bucket.chunks), (bucket.rows, bucket.chunks, scalars))

    def _add(self, bucket: _Bucket, variant: Any, programs: int, arguments: tuple[Any, ...]) -> None:
        if programs:
            with current_device(bucket.device):
                self._launch_module.launcher.prepare(variant, bucket.device, arguments)
            self._launches.append(_Launch(variant, bucket.device, programs, arguments))

    def _upload_scalars(self, shares: Sequence[Share], device: torch.device) -> torch.Tensor:
        rows = []
        for share in shares:
            for _, scalars in share.programs:
                row = [*scalars, *(0.0,) * (self._scalar_columns - len(scalars))]
                row[self._run_column] = row[self._grad_scale_column] = 1.0
                rows.append(row)
        values = torch.tensor(rows, dtype=torch.float32, device="cpu")  # rounds to the nearest
        if device.type == "cpu":
            return self._upload(values, device)
        return self._upload(_new_host((len(rows), self._scalar_columns), torch.float32, device).copy_(values), device)

    def _upload_constants(self, rule: Rule, shares: Sequence[Share], device: torch.device) -> torch.Tensor:
        """A row for each cohort, as kernels/scalars.py reads it."""
        content = b"".join(self._constants_row(rule, share, step, device) for share in shares for step, _ in share.batch.cohorts)
        known = self._constants.get(device)
        if known is not None and known[0] == content:
            return known[1]
        host = _new_host((len(content) // 8 // self._constant_columns, self._constant_columns), torch.float64, device)
        host.copy_(torch.frombuffer(bytearray(content), dtype=torch.float64).view_as(host))
        table = self._upload(host, device)
        self._constants[device] = content, table
        return table

    def _constants_row(self, rule: Rule, share: Share, steps: float, device: torch.device) -> bytes:
        lr, value, address, is_double = share.group["lr"], 0.0, 0, 0
        if isinstance(lr, torch.Tensor) and lr.device.type != "cpu" and (lr.device != device or lr.dtype not in _REAL):
            lr = lr.to(device, torch.float64, non_blocking=True)
            self._rates.append(lr)
        if isinstance(lr, torch.Tensor) and lr.device == device and lr.dtype in _REAL:
            address, is_double = lr.data_ptr(), int(lr.dtype == torch.float64)
        else:
            value = float(lr)
        numbers = (float(is_double), steps + 1, *rule.constants(share.group))
        padding = (0.0,) * (self._constant_columns - 2 - len(numbers))
        return struct.pack(f"dq{self._constant_columns - 2}d", value, address, *numbers, *padding)

    def _upload(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        self._uploads += 1
        if device.type == "cpu":
            return host
        if _capturing(device):
            self._captured.append(host)
        with current_device(device):
            return host.to(device, non_blocking=True)


def _new_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory from which a device copies without making the host wait.

    Not pinned during a capture, which allows no such allocation; the copy is made when the graph is replayed.
    """
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type != "cpu" and not _capturing(device))


def _capturing(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    with current_device(device):
        return torch.cuda.is_current_stream_capturing()


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)
