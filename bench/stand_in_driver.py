"""A driver for Triton that has a GPU's compiler and no GPU: it counts launches and does nothing else.

So everything of a step but the kernels themselves runs on a machine without a GPU, with tensors in the CPU's memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_opt.kernels import launch


class StandInDriver:
    """What triton.runtime asks of a driver.

    Attributes:
        launches: the grid's first dimension of each launch.
    """

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)
        self.launches: list[int] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20, "max_num_regs": 1 << 16, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads of a program at most

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda programs, *rest: self.launches.append(programs)


@functools.cache  # Triton keeps what it compiled, with the driver that it was loaded by
def _of(architecture: int) -> StandInDriver:
    return StandInDriver(architecture)


@contextlib.contextmanager
def stand_in_driver(architecture: int = 90) -> Iterator[StandInDriver]:
    """Within this context Triton believes that there is such a GPU."""
    stand_in = _of(architecture)
    stand_in.launches.clear()
    before = launch.launcher
    driver.set_active(stand_in)
    launch.launcher = launch.TritonLauncher()
    launch.launcher.takes_cpu = True
    try:
        yield stand_in
    finally:
        launch.launcher = before
        driver._active = None  # reset_active() would look for a GPU
