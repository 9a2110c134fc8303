"""Launches kernels: by Triton on a GPU, or by its interpreter where TRITON_INTERPRET=1 was set before triton was imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from fused_opt.kernels.variants import Variant


class TritonLauncher:
    """Compiles each variant once for each device, at the first `prepare`, and then launches what was compiled.

    `kernel[grid](...)` would look the variant up in every launch, which takes three times as long as the launch itself.

    Attributes:
        takes_cpu: whether tensors in the CPU's memory can be given to kernels.
    """

    def __init__(self) -> None:
        self.takes_cpu = bool(triton.knobs.runtime.interpret)
        self._compiled: dict[tuple[Variant, torch.device], Any] = {}

    def prepare(self, variant: Variant, device: torch.device, arguments: Sequence[Any]) -> None:
        """Compile `variant` for the current device, `device`, and arguments such as these."""
        if (variant, device) not in self._compiled:
            kernel = variant.kernel.warmup(*arguments, grid=(1,), **variant.constants, **variant.options(self._warp_size()))
            if kernel is not None:
                kernel._init_handles()  # now: loading it can fail, too
            self._compiled[variant, device] = kernel

    def _warp_size(self) -> int:
        return 32 if self.takes_cpu else int(triton.runtime.driver.active.get_current_target().warp_size)

    def launch(self, variant: Variant, device: torch.device, programs: int, arguments: Sequence[Any]) -> None:
        """Run as many programs of a prepared variant, on the current device's current stream."""
        compiled = self._compiled[variant, device]
        if compiled is None:  # the interpreter compiles nothing
            variant.kernel[(programs,)](*arguments, **variant.constants)
        else:
            compiled[(programs, 1, 1)](*arguments, *variant.constants.values())


# What steps use; tests put others here.
launcher: Any = TritonLauncher()
