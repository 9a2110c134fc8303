"""Packages of others, good and bad, as the benchmark's other processes import them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fused_opt.bench.block_peers import DEQUANTIZE, QUANTIZE
from fused_opt.bench.implementations import Implementation

PLUG_IN = Implementation("planted", "planted_peers", {"AdamW": "planted_peers:Working"})


class Working(torch.optim.AdamW):
    """torch's own."""


class Failing:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler found")


class Dying(torch.optim.AdamW):
    """Is killed in its fifth step."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)


def copying(x: torch.Tensor) -> Mapping[str, Callable[[], object]]:
    return {QUANTIZE: x.clone, DEQUANTIZE: x.clone}


def failing(x: torch.Tensor) -> Mapping[str, Callable[[], object]]:
    raise RuntimeError("no compiler found")
