"""The norm of the gradients that kernels on devices take, without waiting for any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fused_opt.device_tables import Bucket, DeviceTables, current_device

if TYPE_CHECKING:
    from fused_opt import _cpu


class DeviceNorm:
    """Kept from one step to the next: the tables of gradients on the devices."""

    def __init__(self, captured: list[Any]) -> None:
        from fused_opt.kernels import launch, variants

        self._launch_module, self._variants = launch, variants
        self._tables = DeviceTables(variants.CHUNK, captured)

    def measure(self, batches: Sequence[_cpu.Batch], largest: bool) -> list[torch.Tensor]:
        """Reduce the gradients as they are, with a gradient scaler's scale, of all tensors of `batches` that go to tables.

        They need not have states yet. The order of additions depends on the tensors' order and sizes only.

        Returns:
            For each device that has any a float64 tensor there, without dimensions: the sum of all squares or, with `largest`, the largest
            magnitude, NaN if one is.
        """
        tables = self._tables.begin()
        for batch in batches:
            tables.add_gradients(batch)
        buckets = self._tables.finish()
        totals = [self._total([bucket for bucket in buckets if bucket.device == device], largest) for device in _devices(buckets)]
        if self._tables.captures:
            self._tables.keep(totals)
        return totals

    def _total(self, buckets: Sequence[Bucket], largest: bool) -> torch.Tensor:
        device = buckets[0].device
        partials = torch.empty(sum(len(bucket.chunks) for bucket in buckets), dtype=torch.float64, device=device)
        total = torch.empty((), dtype=torch.float64, device=device)
        first = 0
        for bucket in buckets:
            variant = self._variants.gradients_variant(bucket.found.formats[1], largest)
            self._launch(variant, device, len(bucket.chunks), (bucket.rows, bucket.chunks, partials[first:]))
            first += len(bucket.chunks)
        self._launch(self._variants.total_variant(largest), device, 1, (partials, total, first))
        return total

    def _launch(self, variant: Any, device: torch.device, programs: int, arguments: tuple[Any, ...]) -> None:
        launcher = self._launch_module.launcher
        with current_device(device):
            launcher.prepare(variant, device, arguments)
            launcher.launch(variant, device, programs, arguments)


def _devices(buckets: Sequence[Bucket]) -> list[torch.device]:
    return list(dict.fromkeys(bucket.device for bucket in buckets))
