"""A step's share that runs by Triton kernels: tables are copied to the device, then each bucket of tensors is one launch.

A bucket is what one kernel can serve: tensors on one device, of the same dtypes, states of the same format, the same compile-time options;
in whatever param group. Its tables, with the addresses of the tensors, are copied only if they changed. The step's scalars are copied in
every step or, where something they depend on is on the device (step counters, a learning rate, a gradient scaler), computed there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fused_opt.device_tables import Bucket, DeviceTables, current_device, new_host
from fused_opt.rules import Group, Program, Rule
from fused_opt.stages import counter_of, has_stages, stage_constants

if TYPE_CHECKING:
    from fused_opt import _cpu

_REAL = (torch.float32, torch.float64)


class Share(NamedTuple):
    """What a param group has for the device."""

    group: Group
    batch: _cpu.Batch
    programs: Sequence[Program]  # one for each cohort
    stages: Sequence[Program] = ()  # likewise, or none


class Scaler(NamedTuple):
    """A gradient scaler's tensors, float32, of one element: whether an infinity was found, and what gradients are to be divided by."""

    found_inf: torch.Tensor
    grad_scale: torch.Tensor | None


class GradNorm(NamedTuple):
    """What gradients are clipped to.

    Attributes:
        norm: of all of them, unscaled; float32, one element, on any device.
        limit: max_grad_norm.
        skips: whether the step is left out if the norm is not finite.
    """

    norm: torch.Tensor
    limit: float
    skips: bool


class Ran(NamedTuple):
    """What a step launched, and how many tables it copied: for tests and reports."""

    step_launches: int
    scalar_launches: int
    uploads: int


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
        self._stage_scalars, self._stage_constants = step.STAGE_SCALARS.value, scalars.STAGE_CONSTANTS.value
        self._constant_columns = scalars.CONSTANT_COLUMNS.value
        self._tables = DeviceTables(variants.CHUNK, captured)
        self._rates: list[torch.Tensor] = []  # learning rates that had to be copied
        self._launches: list[_Launch] = []
        self.ran = Ran(0, 0, 0)

    def prepare(
        self,
        rule: Rule,
        shares: Sequence[Share],
        on_device: bool,
        scaler: Scaler | None,
        unscales: bool,
        clip: GradNorm | None = None,
        numbers: Sequence[int] = (),
    ) -> None:
        """Compile what is new and copy what has changed.

        Args:
            rule: of all of them.
            shares: the groups.
            on_device: compute scalars on the device; otherwise they are in the shares' programs and stages.
            scaler: only if `on_device`.
            unscales: whether gradients are divided by the scaler's scale where they lie.
            clip: only if `on_device`.
            numbers: of the shares' groups, of which seeds are made; without, their places in the list.
        """
        tables = self._tables.begin()
        row = 0
        for share in shares:
            flags, stages = [flags for flags, _ in share.programs], [flags for flags, _ in share.stages]
            tables.add(share.batch, flags, row, on_device, stages)
            row += len(share.programs)
        buckets = self._tables.finish()
        on_host = [share for share in shares if any(step >= 0 for step, _ in share.batch.cohorts)]
        if self._tables.captures and any(counter_of(rule, share.group) for share in on_host):
            raise RuntimeError(
                "a CUDA graph is captured of a step whose step counters are in the host's memory, which no replay would count; make the "
                "optimizer with capturable=True, or move state['step'] to the parameters' device before the capture"
            )
        unscales = unscales and scaler is not None and scaler.grad_scale is not None
        self._launches = []
        self._rates = []
        shared: dict[torch.device, torch.Tensor] = {}  # scalars or constants
        for bucket in buckets:
            device = bucket.device
            if device not in shared:
                shared[device] = (
                    self._upload_constants(rule, shares, numbers, device) if on_device else self._upload_scalars(shares, device)
                )
            scalars = self._prepare_scalars(rule, bucket, shared[device], scaler, clip) if on_device else shared[device]
            self._add(bucket, self._variant(rule, bucket, unscales), len(bucket.chunks), (bucket.rows, bucket.chunks, scalars))
        if self._tables.captures:
            self._tables.keep(shared, self._launches, self._rates)

    def run(self) -> None:
        """Launch what was prepared."""
        launcher = self._launch_module.launcher
        for launch in self._launches:
            with current_device(launch.device):
                launcher.launch(launch.variant, launch.device, launch.programs, launch.arguments)
        scalar_launches = sum(launch.variant.counts_steps for launch in self._launches)
        self.ran = Ran(len(self._launches) - scalar_launches, scalar_launches, self._tables.uploads)
        self._launches = []

    def _variant(self, rule: Rule, bucket: Bucket, unscales: bool) -> Any:
        found = bucket.found
        param, grad, *states = found.formats
        operands = found.stage_formats if found.stages else ()
        return self._variants.step_variant(
            rule.name, found.flags, param, grad, tuple(states), found.block_size, unscales, found.stages, operands
        )

    def _prepare_scalars(
        self, rule: Rule, bucket: Bucket, constants: torch.Tensor, scaler: Scaler | None, clip: GradNorm | None
    ) -> torch.Tensor:
        """Where they will be."""
        device = bucket.device
        scalars = torch.empty(len(bucket.rows), self._scalar_columns, dtype=torch.float32, device=device)
        found_inf = grad_scale = norm = limit = None
        if scaler is not None:
            found_inf = scaler.found_inf.to(device, torch.float32, non_blocking=True)
            scale = torch.ones((), device=device) if scaler.grad_scale is None else scaler.grad_scale
            grad_scale = scale.to(device, torch.float32, non_blocking=True)
        if clip is not None:
            norm, limit = clip.norm.to(device, torch.float32, non_blocking=True), clip.limit
        skips = clip is not None and clip.skips
        variant = self._variants.scalars_variant(rule.name, scaler is not None, bucket.found.stages, clip is not None, skips)
        self._add(bucket, variant, len(bucket.rows), (bucket.rows, constants, scalars, found_inf, grad_scale, norm, limit))
        return scalars

    def _add(self, bucket: Bucket, variant: Any, programs: int, arguments: tuple[Any, ...]) -> None:
        if programs:
            with current_device(bucket.device):
                self._launch_module.launcher.prepare(variant, bucket.device, arguments)
            self._launches.append(_Launch(variant, bucket.device, programs, arguments))

    def _upload_scalars(self, shares: Sequence[Share], device: torch.device) -> torch.Tensor:
        rows = []
        for share in shares:
            for i, (_, scalars) in enumerate(share.programs):
                row = [*scalars, *(0.0,) * (self._scalar_columns - len(scalars))]
                row[self._run_column] = row[self._grad_scale_column] = 1.0
                if share.stages:
                    of_stages = share.stages[i][1]
                    row[self._stage_scalars : self._stage_scalars + len(of_stages)] = of_stages
                rows.append(row)
        values = torch.tensor(rows, dtype=torch.float32, device="cpu")  # rounds to the nearest
        if device.type == "cpu":
            return self._tables.upload(values, device)
        return self._tables.upload(new_host((len(rows), self._scalar_columns), torch.float32, device).copy_(values), device)

    def _upload_constants(self, rule: Rule, shares: Sequence[Share], numbers: Sequence[int], device: torch.device) -> torch.Tensor:
        """A row for each cohort, as kernels/scalars.py reads it."""
        numbers = numbers or range(len(shares))
        rows = [
            self._constants_row(rule, share, step, device, number)
            for share, number in zip(shares, numbers, strict=True)
            for step, _ in share.batch.cohorts
        ]
        return self._tables.constants(b"".join(rows), self._constant_columns, device)

    def _constants_row(self, rule: Rule, share: Share, steps: float, device: torch.device, number: int) -> bytes:
        lr, value, address, is_double = share.group["lr"], 0.0, 0, 0
        if isinstance(lr, torch.Tensor) and lr.device.type != "cpu" and (lr.device != device or lr.dtype not in _REAL):
            lr = lr.to(device, torch.float64, non_blocking=True)
            self._rates.append(lr)
        if isinstance(lr, torch.Tensor) and lr.device == device and lr.dtype in _REAL:
            address, is_double = lr.data_ptr(), int(lr.dtype == torch.float64)
        else:
            value = float(lr)
        numbers = [float(is_double), steps + 1, *rule.constants(share.group)]
        if has_stages(share.group):
            numbers += (0.0,) * (self._stage_constants - 2 - len(numbers))
            numbers += stage_constants(share.group, number)
        numbers += (0.0,) * (self._constant_columns - 2 - len(numbers))
        return struct.pack(f"dq{len(numbers)}d", value, address, *numbers)
