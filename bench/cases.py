"""The case table: every optimizer with the options that change what its step does. Tests, `fused-opt parity` and the benchmark read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = (torch.float32, torch.float64)
SHORT_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """An optimizer (its class name, ours and torch's) and constructor options beside torch's defaults."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.optimizer}({options})"


_ADAM_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5},
    {"betas": (0.3, 0.5)},  # lerp's other formula, for weights of one half and more
    {"betas": (0.0, 0.0)},
    {"weight_decay": 0.1},
    {"weight_decay": 0.0},
    {"amsgrad": True},
    {"maximize": True},
    {"eps": 0.0},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
)

_RMSPROP_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.02, "alpha": 0.9, "eps": 1e-5},
    {"alpha": 0.3, "centered": True},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"centered": True},
    {"maximize": True},
    {"centered": True, "momentum": 0.9},
    {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
)

_SGD_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
)

CASES: tuple[Case, ...] = tuple(
    Case(optimizer, options)
    for optimizer, all_options in (
        ("Adam", _ADAM_OPTIONS),
        ("AdamW", _ADAM_OPTIONS),
        ("RMSprop", _RMSPROP_OPTIONS),
        ("SGD", _SGD_OPTIONS),
    )
    for options in all_options
)
