"""Steps of optimizers whose kernels run on the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fused_opt import plan
from fused_opt.kernels import launch
from ptx.launching import PtxLauncher
from ptx.threads import Statistics


class StepLauncher(PtxLauncher):
    """Kernels may touch the tensors of the optimizer that steps, each to its end, and their gradients for reading only.

    Attributes:
        optimizer: the one that steps, or None.
        all_statistics: of every launch.
    """

    def __init__(self, architecture: int) -> None:
        super().__init__(architecture)
        self.optimizer: torch.optim.Optimizer | None = None
        self.all_statistics: list[Statistics] = []

    def launch(self, *args: Any) -> None:
        self._declared.clear()
        if self.optimizer is not None:
            groups = self.optimizer.param_groups
            params = [param for group in groups for param in group["params"]]
            self.declare("parameter", params)
            self.declare("gradient", [param.grad for param in params], writable=self.optimizer.__dict__.get("grad_scale") is not None)
            self.declare("lr", [group["lr"] for group in groups if isinstance(group["lr"], torch.Tensor)], False)
            for param in params:
                for name, state in self.optimizer.state.get(param, {}).items():
                    self.declare(name, [state], writable=name not in ("mask", "anchor"))
        super().launch(*args)
        self.all_statistics.append(self.statistics)


OnGpu = Callable[[int], StepLauncher]


@contextlib.contextmanager
def gpu(architecture: int) -> Iterator[StepLauncher]:
    """Within this context Triton's kernels are compiled for an architecture, such as 90, and run here."""
    launcher, run = StepLauncher(architecture), plan.Plan.run

    def run_declared(self: plan.Plan) -> None:
        launcher.optimizer = self.optimizer
        run(self)

    with mock.patch.object(launch, "launcher", launcher), mock.patch.object(plan.Plan, "run", run_declared):
        yield launcher
