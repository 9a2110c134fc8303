"""Launches a step's kernels on the machine, in place of Triton's driver."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_opt.kernels.variants import Variant
from ptx.machine import Kernel
from ptx.memory import Memory
from ptx.threads import Statistics


@functools.cache
def kernel_of(variant: Variant, architecture: int) -> Kernel:
    """Compiled for a GPU of that architecture, such as 90."""
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs)
    result = compile_kernel(source, target=GPUTarget("cuda", architecture, 32), options=variant.options())
    return Kernel(result.asm["ptx"], result.metadata.shared)


class PtxLauncher:
    """As fused_opt.kernels.launch.TritonLauncher. What kernels may touch are their arguments and the tensors that `declare` was given.

    Attributes:
        statistics: of the newest launch.
        launched: number of launches.
    """

    takes_cpu = True

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.statistics = Statistics()
        self.launched = 0
        self._declared: list[tuple[str, torch.Tensor, bool]] = []

    def declare(self, name: str, tensors: Iterable[torch.Tensor], writable: bool = True) -> None:
        """Let kernels read these and, if `writable`, write them."""
        self._declared += [(f"{name} {i}", tensor, writable) for i, tensor in enumerate(tensors)]

    def prepare(self, variant: Variant, device: torch.device, arguments: Sequence[Any]) -> None:
        kernel_of(variant, self.architecture)

    def launch(self, variant: Variant, device: torch.device, programs: int, arguments: Sequence[Any]) -> None:
        self.launched += 1
        memory = Memory()
        values: list[float] = []
        for (name, kind), argument in zip(variant.arguments.items(), arguments, strict=True):
            if isinstance(argument, torch.Tensor):
                values.append(memory.add(name, argument))
            elif kind != "constexpr":
                values.append(argument)
        for name, tensor, writable in self._declared:
            memory.add(name, tensor.detach(), writable)
        self.statistics = kernel_of(variant, self.architecture).run((programs,), values, memory)
