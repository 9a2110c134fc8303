"""Optimizers that do something else than torch's, each in its own way."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import torch


class Moody(torch.optim.AdamW):
    """Is killed if there is much decay, does not know amsgrad, fails if it is to maximize."""

    def __init__(self, params: Any, lr: Any, betas: Any, eps: float, weight_decay: float, maximize: bool = False) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, foreach=False)

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        if group["weight_decay"] == 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
        if group["maximize"]:
            raise KeyError("maximum")
        return super().step(closure)


class Deaf(torch.optim.SGD):
    """Hears nothing of nesterov, nor of a learning rate that changes; writes into the gradients of those that have decay."""

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float, nesterov: bool = False, dampening: float = 0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, dampening=dampening, foreach=False)
        self._lr = lr

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = self._lr
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if group["weight_decay"]:
                    param.grad.zero_()


class Other(torch.optim.RMSprop):
    """Has another formula, and no momentum."""

    def __init__(self, params: Any, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float = 0) -> None:
        super().__init__(params, lr=lr, alpha=math.sqrt(alpha), eps=eps, weight_decay=weight_decay)
