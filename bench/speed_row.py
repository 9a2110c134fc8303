"""One row of the speed table: one workload and one optimizer with its options, ours and torch's implementations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import fused_opt
from fused_opt.bench.cases import Case
from fused_opt.bench.machine import available_memory, peak_memory
from fused_opt.bench.measure import Effort, Spread, Streaming, interleave, paired_ratios
from fused_opt.bench.ulp import max_ulp
from fused_opt.bench.workloads import Workload

CONFIGURATIONS: dict[str, Case] = {
    "adamw": Case("AdamW"),
    "adam": Case("Adam"),
    "sgd-momentum": Case("SGD", {"momentum": 0.9}),
    "sgd": Case("SGD"),
    "rmsprop": Case("RMSprop"),
    "rmsprop-centered-momentum": Case("RMSprop", {"centered": True, "momentum": 0.9}),
}

OURS = "ours"
TORCH: dict[str, dict[str, bool]] = {  # constructor arguments, from the usually fastest to the slowest
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}

# Steps that every implementation has taken when parameters are compared.
COMPARED_STEPS = 3

# Traffic below which the streaming limit says nothing, because caches serve a part of it. In bytes a step.
STREAMING_FROM = 64 * 2**20

ITEM_SIZE = 4  # fp32, in which everything here is measured


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        workload, configuration: what.
        threads: of every implementation.
        step_bytes: read and written by a step that touches parameters, gradients and states once.
        samples: implementation -> seconds a step, by rounds.
        limits: the streaming limit in GB/s, by rounds; empty below `STREAMING_FROM`.
        max_ulp: the largest distance of a parameter of ours after `COMPARED_STEPS` steps.
        compared_with: torch's implementation that `max_ulp` refers to.
        left_out: implementations of torch that were not timed.
        peak_bytes: implementation -> by how much the process grew at the most during a step; None where the system does not tell.
    """

    workload: Workload
    configuration: str
    threads: int
    step_bytes: int
    samples: dict[str, list[float]]
    limits: list[float]
    max_ulp: int
    compared_with: str
    left_out: list[str]
    peak_bytes: dict[str, int | None]

    @cached_property
    def seconds(self) -> dict[str, Spread]:
        """implementation -> seconds a step."""
        return {name: Spread.of(times) for name, times in self.samples.items()}

    @cached_property
    def speed_ups(self) -> dict[str, Spread]:
        """torch's implementation -> how many times as long as ours it took, in the same round."""
        ours = self.samples[OURS]
        return {name: Spread.of(paired_ratios(times, ours)) for name, times in self.samples.items() if name != OURS}

    @property
    def fastest(self) -> str:
        """torch's implementation that we are the least ahead of."""
        return min(self.speed_ups, key=lambda name: self.speed_ups[name].median)

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes a second that our step moves."""
        return self.step_bytes / self.seconds[OURS].median / 1e9

    @cached_property
    def share(self) -> Spread | None:
        """Our throughput as a share of the streaming limit in the same round."""
        if not self.limits:
            return None
        pairs = zip(self.samples[OURS], self.limits, strict=True)
        return Spread.of([self.step_bytes / seconds / 1e9 / limit for seconds, limit in pairs])


@dataclass(frozen=True)
class Skipped:
    """A row that was not measured, and why."""

    workload: Workload
    configuration: str
    reason: str


@dataclass(frozen=True)
class Tensors:
    """A workload's values. Implementations step copies of `params`, and share `grads`, which no step writes."""

    workload: Workload
    params: list[torch.Tensor]
    grads: list[torch.Tensor]

    @classmethod
    def random(cls, workload: Workload) -> Tensors:
        """Normal fp32 values of usual size, the same in every run."""
        generator = torch.Generator().manual_seed(0)

        def normal(deviation: float) -> list[torch.Tensor]:
            return [torch.empty(shape).normal_(0, deviation, generator=generator) for shape in workload.shapes]

        return cls(workload, normal(0.02), normal(0.01))


def measure_row(
    tensors: Tensors,
    configuration: str,
    effort: Effort,
    leave_out: frozenset[str],
    streaming: Callable[[], Streaming],
    on_round: Callable[[float], None],
) -> Row | Skipped:
    """Measure one row with torch's current number of threads.

    Args:
        tensors: the workload and its values.
        configuration: a key of `CONFIGURATIONS`.
        effort: how many rounds.
        leave_out: keys of `TORCH` not to time. The fastest of those that exist is always timed.
        streaming: gives the streaming kernels; called only if the row needs them.
        on_round: see `interleave`.
    """
    workload, case = tensors.workload, CONFIGURATIONS[configuration]
    exist = [name for name in TORCH if name != "fused" or "fused" in inspect.signature(_torch_class(case)).parameters]
    reference = "fused" if "fused" in exist else "for-loop"
    timed = [name for name in exist if name == reference or name not in leave_out]

    states = _count_states(case)
    parameter_bytes = ITEM_SIZE * workload.elements
    needed = parameter_bytes * (1 + len(timed)) * (1 + states) + parameter_bytes  # torch's temporaries: a copy at the least
    available = available_memory()
    if available is not None and needed > available:
        return Skipped(workload, configuration, f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")

    params = {name: _copies(tensors) for name in [OURS, *timed]}
    optimizers = {name: _torch_class(case)(params[name], **case.options, **TORCH[name]) for name in timed}
    optimizers = {OURS: getattr(fused_opt, case.optimizer)(params[OURS], **case.options), **optimizers}
    steps: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    for step in steps.values():
        for _ in range(COMPARED_STEPS):
            step()
    distance = max(max_ulp(p, q) for p, q in zip(params[OURS], params[reference], strict=True))

    # Reads the parameter, the gradient and the states; writes the parameter and the states. AdamW: 28 bytes an element.
    step_bytes = parameter_bytes * (3 + 2 * states)
    memory = streaming() if step_bytes >= STREAMING_FROM else None
    samples = interleave({**steps, **(memory.kernels() if memory else {})}, effort, lead_in=memory is None, on_round=on_round)
    return Row(
        workload=workload,
        configuration=configuration,
        threads=torch.get_num_threads(),
        step_bytes=step_bytes,
        samples={name: samples[name] for name in steps},
        limits=memory.limits(samples) if memory else [],
        max_ulp=distance,
        compared_with=reference,
        left_out=[name for name in exist if name not in timed],
        peak_bytes={name: peak_memory(step) for name, step in steps.items()},
    )


def _torch_class(case: Case) -> Any:
    return getattr(torch.optim, case.optimizer)


def _count_states(case: Case) -> int:
    """How many tensors of a parameter's size the optimizer keeps for it."""
    optimizer = getattr(fused_opt, case.optimizer)([torch.nn.Parameter(torch.zeros(1))], **case.options)
    return len(optimizer._rule.slots(optimizer.param_groups[0]))


def _copies(tensors: Tensors) -> list[torch.nn.Parameter]:
    copies = [torch.nn.Parameter(p.clone()) for p in tensors.params]
    for copy, grad in zip(copies, tensors.grads, strict=True):
        copy.grad = grad
    return copies
