"""Times what `fused_opt` does within a step (clip, regularise, mask, average, weights in 16 bits) beside what a user of torch writes.

Both sides take their steps in turn, in this process. Before that, both take a few from the same values, which must lead to the same place.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_opt
from fused_opt.bench import machine, measure
from fused_opt.bench.exact_sample import largest, sample_indices, take
from fused_opt.bench.implementations import implementations
from fused_opt.bench.measure import Effort, interleave, samplers
from fused_opt.bench.passes_plan import (
    ANCHOR_DECAY,
    AVERAGE,
    AVERAGE_DECAY,
    CLIP,
    CLIP_INF,
    CLIP_VALUE,
    FACTORS,
    L1,
    MAX_NORM,
    MAX_VALUE,
    PRUNE,
    PRUNED,
    PULL,
    SHRINK,
    STATES,
    PassJob,
)
from fused_opt.bench.passes_report import TORCH, PassRow
from fused_opt.bench.speed_measure import STREAMING_FROM, Shared
from fused_opt.bench.speed_plan import INT8, Job
from fused_opt.bench.speed_row import OURS
from fused_opt.bench.suite import OnShare, Record, Unit
from fused_opt.native import native

PART = "passes"

# Of a parameter, at the most at a time: values and gradients; twice each again, states, averages and masks; torch's temporaries.
BYTES = 64


def units(jobs: Sequence[PassJob], effort: Effort, shared: Shared) -> list[Unit]:
    """A unit for each job; `effort`: how many rounds of each; `shared`: the values, made once for all jobs in a row that have the same."""

    def unit(job: PassJob) -> Unit:
        def measured(on_share: OnShare) -> Record:
            with measure.threads(job.threads or torch.get_num_threads()):
                return measure_row(job, effort, shared, on_share).to_record()

        return Unit(PART, str(job), measured, seconds=effort.budget + 0.2 + job.workload.elements / 3e7)

    return [unit(job) for job in jobs]


def measure_row(job: PassJob, effort: Effort, shared: Shared, on_share: OnShare) -> PassRow:
    """Compare and time, with torch's current number of threads."""
    if reason := _cannot_measure(job):
        return PassRow(job, skipped=reason)
    tensors = shared.tensors(Job(job.workload, job.row.dtype, "contiguous", job.configuration))
    loops = both(job, tensors.params)
    error = distance(job, loops[OURS], loops[TORCH], tensors.grads)
    for loop in loops.values():
        _set_gradients(loop, tensors.grads, 1.0)
    # What fits into caches is found there by everybody, as in speed_measure.py.
    lead_in = None if 28 * job.workload.elements >= STREAMING_FROM else 0.0
    samples = interleave(samplers({name: loop.step for name, loop in loops.items()}, lead_in), effort, on_round=on_share)
    return PassRow(job, samples, error)


def both(job: PassJob, values: Sequence[torch.Tensor]) -> dict[str, Loop]:
    """Ours and torch's on copies of these weights, torch's in float32."""
    loops: dict[str, Loop] = {
        OURS: Ours(job, [torch.nn.Parameter(value.clone()) for value in values]),
        TORCH: Torchs(job, [torch.nn.Parameter(value.to(torch.float32, copy=True)) for value in values]),
    }
    for loop in loops.values():
        for param in loop.params:
            param.grad = torch.empty_like(param)
    return loops


def _cannot_measure(job: PassJob) -> str:
    if native().module is None and (job.state == INT8 or job.row.dtype != "float32"):
        return f"needs the extension, and {native().why}"
    needed, available = BYTES * job.workload.elements, machine.available_memory()
    if available is not None and needed > available:
        return f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
    return ""


def distance(job: PassJob, ours: Loop, torchs: Loop, grads: Sequence[torch.Tensor]) -> float:
    """How far ours and torch's are apart after `COMPARED_STEPS` steps, as a share of what the job allows; infinity if one is NaN.

    Of a sample of all weights, and of their averages. Allowed are the job's `detour` times the way that torch's went, and its `rounding`
    times the weight's magnitude, which is the largest that it had plus that way.
    """
    indices = sample_indices([*ours.params, *ours.params])
    way = [place(torchs, indices)]
    for factor in FACTORS:
        for loop in (ours, torchs):
            _set_gradients(loop, grads, factor)
            loop.step()
        way.append(place(torchs, indices))
    moved = torch.stack([(after - before).abs() for before, after in itertools.pairwise(way)]).sum(0)
    magnitude = torch.stack(way).abs().amax(0) + moved
    allowed = job.detour * moved + job.rounding * magnitude
    apart = (place(ours, indices) - way[-1]).abs()
    return largest(torch.where(apart == 0, 0.0, apart / allowed))  # of pruned weights nothing is allowed


def place(loop: Loop, indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """What is compared of a loop's values, in float64."""
    values = loop.values()
    return take(values, indices[: len(values)])


@torch.no_grad()
def _set_gradients(loop: Loop, grads: Sequence[torch.Tensor], factor: float) -> None:
    """The factor is a power of two, so that it is exact."""
    for own, grad in zip(gradients(loop), grads, strict=True):
        own.copy_(grad).mul_(factor)


def gradients(loop: Loop) -> list[torch.Tensor]:
    """Of all its weights."""
    return [param.grad for param in loop.params if param.grad is not None]


class Loop(Protocol):
    """Somebody who steps.

    Attributes:
        params: the weights, with gradients.
    """

    params: list[torch.nn.Parameter]

    def step(self) -> object:
        """All that there is to do once the gradients are there."""

    def values(self) -> list[torch.Tensor]:
        """What is compared: weights, then their averages, if there are any."""


class Torchs:
    """torch's step with what is called around it.

    Attributes:
        optimizer: torch's.
        weights: its parameters.
        averages: of the weights, if somebody averages.
    """

    def __init__(self, job: PassJob, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.weights: list[torch.Tensor] = list(params)
        self.averages: list[torch.Tensor] = []
        self.optimizer = implementations()[job.step].make(job.case, params)
        before, after = ([AROUND[name](self) for name in names] for names in job.row.torchs)
        self._calls: list[Callable[[], object]] = [*before, self.optimizer.step, *after]

    def step(self) -> None:
        """See `Loop`."""
        for call in self._calls:
            call()

    def values(self) -> list[torch.Tensor]:
        """See `Loop`."""
        return [*self.weights, *self.averages]


def _pulling(loop: Torchs) -> Callable[[], object]:
    anchors, weights = _anchors(loop.params), loop.weights

    @torch.no_grad()
    def pull() -> None:
        torch._foreach_add_(gradients(loop), torch._foreach_sub(weights, anchors), alpha=ANCHOR_DECAY)

    return pull


def _shrinking(loop: Torchs) -> Callable[[], object]:
    threshold = loop.optimizer.param_groups[0]["lr"] * L1

    @torch.no_grad()
    def shrink() -> None:
        for param in loop.params:
            param.copy_(torch.nn.functional.softshrink(param, threshold))

    return shrink


def _pruning(loop: Torchs) -> Callable[[], object]:
    masks = [mask.to(param.dtype) for param, mask in _masks(loop.params).items()]  # as torch.nn.utils.prune has them
    weights = loop.weights

    @torch.no_grad()
    def prune() -> None:
        torch._foreach_mul_(weights, masks)

    prune()
    return prune


def _averaging(loop: Torchs) -> Callable[[], object]:
    model = torch.nn.ParameterList(loop.params)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))  # type: ignore[no-untyped-call]
    loop.averages = list(averaged.module.parameters())
    return functools.partial(averaged.update_parameters, model)


def _calling(function: Callable[..., object], *args: Any) -> Callable[[Torchs], Callable[[], object]]:
    return lambda loop: functools.partial(function, loop.params, *args)


# What torch's users write around a step: given the loop, what is called in each step. As few passes over memory as torch can.
AROUND: dict[str, Callable[[Torchs], Callable[[], object]]] = {
    CLIP: _calling(torch.nn.utils.clip_grad_norm_, MAX_NORM),
    CLIP_INF: _calling(torch.nn.utils.clip_grad_norm_, MAX_NORM, math.inf),
    CLIP_VALUE: _calling(torch.nn.utils.clip_grad_value_, MAX_VALUE),
    PULL: _pulling,
    SHRINK: _shrinking,
    PRUNE: _pruning,
    AVERAGE: _averaging,
}


def _anchors(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Far from the first weights, so that there is a pull from the first step on."""
    return [param.detach().neg() for param in params]


def _masks(params: Iterable[torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """Without the smaller half of the weights: `magnitude_masks` finds it exactly, which takes a minute for gpt2."""
    return {param: param.detach().abs() > PRUNED for param in params}


class Ours:
    """Our step, which does it all.

    Attributes:
        optimizer: ours.
    """

    def __init__(self, job: PassJob, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        options = {name: value for name, value in job.row.options.items() if name != "masks"}
        self.optimizer = getattr(fused_opt, job.case.optimizer)(params, **job.case.options, **options, **STATES[job.state])
        if "anchor_decay" in options:
            self.optimizer.set_anchors(dict(zip(params, _anchors(params), strict=True)))
        if "masks" in job.row.options:
            self.optimizer.set_masks(_masks(params))
        self.step: Callable[[], object] = self.optimizer.step

    def values(self) -> list[torch.Tensor]:
        """See `Loop`."""
        states = [self.optimizer.state[param] for param in self.params]
        averages = [state["average"] for state in states if "average" in state]
        return [*self.optimizer.float32_weights().values(), *averages]
