"""What `fused-opt bench` measures: which optimizers on which values, in a quick run and in a full one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
AS_TORCH, BF16, INT8 = "as-torch", "bfloat16", "int8"
STATES: dict[str, dict[str, Any]] = {  # constructor arguments of ours
    AS_TORCH: {},
    BF16: {"state_dtype": torch.bfloat16},
    INT8: {"state_dtype": "int8"},
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


# What a row compares with: all of torch's own implementations in this process, or one implementation of another process by its name.
TORCH = "torch"


@dataclass(frozen=True)
class Job:
    """A row to measure.

    Attributes:
        workload: the tensors' shapes.
        dtype: theirs, a key of `DTYPES`.
        layout: how they lie in memory, a key of `layouts.LAYOUTS`.
        configuration: a key of `CONFIGURATIONS`.
        state: the format of our states, a key of `STATES`. torch's are always as torch makes them.
        threads: of every implementation; 0 for torch's default.
        isa: the instruction set of our step; "" for the one in use.
        against: `TORCH`, or the name of an implementation.
    """

    workload: Workload
    dtype: str
    layout: str
    configuration: str
    state: str = AS_TORCH
    threads: int = 0
    isa: str = ""
    against: str = TORCH

    @property
    def case(self) -> Case:
        """The optimizer and its options."""
        return CONFIGURATIONS[self.configuration]

    def __str__(self) -> str:
        words = [self.workload.name, self.configuration, self.dtype, self.layout]
        if self.state != AS_TORCH:
            words.append(f"{self.state} states")
        if self.threads:
            words.append("1 thread" if self.threads == 1 else f"{self.threads} threads")
        if self.isa:
            words.append(self.isa)
        if self.against != TORCH:
            words.append(f"against {self.against}")
        return " ".join(words)


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
OTHER_CONFIGURATIONS = [name for name in CONFIGURATIONS if name not in QUICK_CONFIGURATIONS]
SHORT_DTYPES = ["bfloat16", "float16"]

# On 2 cores less than a minute, half of it for gpt2, whose values alone take 1 s to make.
QUICK_JOBS = [
    *jobs(QUICK_WORKLOADS, ["float32"], ["contiguous"], QUICK_CONFIGURATIONS),
    *jobs(["gpt2", "mlp"], ["float32"], ["contiguous"], ["adamw"], [INT8]),
]
FULL_JOBS = [
    *jobs(WORKLOADS, ["float32"], ["contiguous"], QUICK_CONFIGURATIONS),
    *jobs(["rl", "mlp"], ["float32"], ["contiguous"], OTHER_CONFIGURATIONS),
    *jobs(["mlp", "gpt2"], SHORT_DTYPES, ["contiguous"], QUICK_CONFIGURATIONS),
    *jobs(["resnet50"], ["float32"], ["permuted", "other-grad", "gaps"], ["adamw", "sgd-momentum"]),
    *jobs(WORKLOADS, ["float32"], ["contiguous"], ["adamw"], [INT8]),
    *jobs(["resnet50", "gpt2"], ["float32"], ["contiguous"], ["sgd-momentum", "rmsprop"], [INT8]),
    *jobs(["mlp", "gpt2"], ["bfloat16"], ["contiguous"], ["adamw"], [INT8]),
    *jobs(["mlp", "gpt2"], ["float32"], ["contiguous"], ["adamw"], [BF16]),
    *jobs(["resnet50"], ["float32"], ["permuted"], ["adamw"], [INT8]),
    *(replace(job, threads=1) for job in jobs(["mlp", "gpt2"], ["float32"], ["contiguous"], ["adamw"], [AS_TORCH, INT8])),
]
# What implementations in processes of their own are measured on in a full run.
PEER_JOBS = [
    *jobs(["mlp", "gpt2"], ["float32"], ["contiguous"], ["adamw"], [AS_TORCH, INT8]),
    *jobs(["mlp"], ["float32"], ["contiguous"], ["sgd-momentum", "rmsprop"], [AS_TORCH, INT8]),
]
# Seconds of a row on gpt2: 123, 74, 90, nearly all of it compiling. A full run has them on mlp only.
SLOW_TO_COMPILE = ("compiled", "torchao fp8", "torchao 4-bit")
