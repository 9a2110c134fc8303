"""What `fused-opt bench` measures: which optimizers on which values, in a quick run and in a full one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fused_opt.bench.cases import Case
from fused_opt.bench.workloads import WORKLOADS, Workload

CONFIGURATIONS: dict[str, Case] = {
    "adamw": Case("AdamW"),
    "adam": Case("Adam"),
    "sgd-momentum": Case("SGD", {"momentum": 0.9}),
    "sgd": Case("SGD"),
    "rmsprop": Case("RMSprop"),
    "rmsprop-centered-momentum": Case("RMSprop", {"centered": True, "momentum": 0.9}),
}
AS_TORCH, INT8 = "as-torch", "int8"
STATES: dict[str, dict[str, Any]] = {AS_TORCH: {}, INT8: {"state_dtype": "int8"}}  # constructor arguments of ours
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True)
class Job:
    """A row to measure.

    Attributes:
        workload: the tensors' shapes.
        dtype: theirs, a key of `DTYPES`.
        layout: how they lie in memory, a key of `layouts.LAYOUTS`.
        configuration: a key of `CONFIGURATIONS`.
        state: the format of our states, a key of `STATES`. torch's are always as torch makes them.
    """

    workload: Workload
    dtype: str
    layout: str
    configuration: str
    state: str = AS_TORCH

    @property
    def case(self) -> Case:
        """The optimizer and its options."""
        return CONFIGURATIONS[self.configuration]

    def __str__(self) -> str:
        words = [self.workload.name, self.configuration, self.dtype, self.layout]
        return " ".join([*words, f"{self.state} states"] if self.state != AS_TORCH else words)


def jobs(
    workloads: Iterable[str],
    dtypes: Iterable[str],
    layouts: Iterable[str],
    configurations: Iterable[str],
    states: Iterable[str] = (AS_TORCH,),
) -> list[Job]:
    """Every combination of these names, those on the same values together."""
    return [
        Job(WORKLOADS[workload], dtype, layout, configuration, state)
        for workload, dtype, layout, state, configuration in itertools.product(workloads, dtypes, layouts, states, configurations)
    ]


QUICK_WORKLOADS = [name for name in WORKLOADS if name != "large"]
QUICK_CONFIGURATIONS = ["adamw", "sgd-momentum", "rmsprop"]
SHORT_DTYPES = ["bfloat16", "float16"]

QUICK_JOBS = [
    *jobs(QUICK_WORKLOADS, ["float32"], ["contiguous"], QUICK_CONFIGURATIONS),
    *jobs(["gpt2"], SHORT_DTYPES, ["contiguous"], QUICK_CONFIGURATIONS),
    *jobs(["resnet50"], ["float32"], ["permuted", "other-grad"], ["adamw"]),
    *jobs(["gpt2", "resnet50", "mlp", "tiny"], ["float32"], ["contiguous"], ["adamw"], [INT8]),
    *jobs(["gpt2"], ["bfloat16"], ["contiguous"], ["adamw"], [INT8]),
]
FULL_JOBS = [
    *jobs(WORKLOADS, ["float32"], ["contiguous"], CONFIGURATIONS),
    *jobs(["mlp", "gpt2"], SHORT_DTYPES, ["contiguous"], QUICK_CONFIGURATIONS),
    *jobs(["resnet50", "gpt2"], ["float32"], ["permuted", "other-grad", "gaps"], ["adamw", "sgd-momentum"]),
    *jobs(WORKLOADS, ["float32"], ["contiguous"], QUICK_CONFIGURATIONS, [INT8]),
    *jobs(["mlp", "gpt2"], SHORT_DTYPES, ["contiguous"], QUICK_CONFIGURATIONS, [INT8]),
    *jobs(["resnet50"], ["float32"], ["permuted", "other-grad", "gaps"], ["adamw"], [INT8]),
]
