"""One row of the speed table: one workload and one optimizer with its options, ours and torch's implementations."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

import fused_opt
from fused_opt.bench import coded_sample, peers
from fused_opt.bench.cases import Case
from fused_opt.bench.coded_sample import CodedErrors
from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED, ExactSample
from fused_opt.bench.layouts import LAYOUTS, Layout
from fused_opt.bench.machine import available_memory, peak_memory
from fused_opt.bench.measure import Effort, Spread, Streaming, interleave, paired_ratios
from fused_opt.bench.speed_plan import AS_TORCH, DTYPES, INT8, STATES, Job
from fused_opt.bench.workloads import Workload
from fused_opt.native import native

OURS = "ours"
CONTIGUOUS = "ours, contiguous"  # timed beside a row of another layout
PLAIN = "ours, as torch"  # timed beside a row of other states
FUSED, FOREACH, FOR_LOOP = "fused", "foreach", "for-loop"
TORCH: dict[str, dict[str, bool]] = {  # constructor arguments
    FUSED: {"fused": True},
    FOR_LOOP: {"foreach": False},
    FOREACH: {"foreach": True},
}

# A quick run does not time all of torch's implementations of a larger model. Foreach and the for-loop allocate temporaries of the
# parameters' size, which the system has to clear page by page: on gpt2 in float32, AdamW fused took 0.16 s a step, the for-loop 1.4 s and
# foreach 2.8 s. They are left out where the fused one is right. Where it is wrong or missing the for-loop is timed, and foreach if the
# for-loop's compared steps took less than PATIENCE seconds: of SGD in bfloat16, a step of either is 0.07 s.
LARGE = 50_000_000
PATIENCE = 0.3

# Traffic below which the streaming limit says nothing, because caches serve a part of it. In bytes a step.
STREAMING_FROM = 64 * 2**20


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        job: what.
        threads: of every implementation.
        step_bytes: read and written by a step that touches parameters, gradients and states once.
        samples: implementation -> seconds a step, by rounds.
        limits: the streaming limit in GB/s, by rounds; empty below `STREAMING_FROM`.
        errors: implementation -> `ExactSample.error` after `COMPARED_STEPS` steps; with 8-bit states `CodedErrors.parameters`.
        left_out: implementations of torch that were not timed.
        peak_bytes: implementation -> by how much the process grew at the most during a step; None where the system does not tell.
        state_bytes: format, a key of `STATES` -> the size of all states; of the job's format and as torch has them.
        coded: implementation of ours -> the errors of its steps with 8-bit states.
        detours: implementation of ours -> `ExactSample.detour` of 8-bit states: what they cost.
        peers: 8-bit optimizers of others.
    """

    job: Job
    threads: int
    step_bytes: int
    samples: dict[str, list[float]]
    limits: list[float]
    errors: dict[str, float]
    left_out: list[str]
    peak_bytes: dict[str, int | None]
    state_bytes: dict[str, int] = field(default_factory=dict)
    coded: dict[str, CodedErrors] = field(default_factory=dict)
    detours: dict[str, float] = field(default_factory=dict)
    peers: list[peers.Beside] = field(default_factory=list)

    @cached_property
    def seconds(self) -> dict[str, Spread]:
        """implementation -> seconds a step."""
        return {name: Spread.of(times) for name, times in self.samples.items()}

    @cached_property
    def speed_ups(self) -> dict[str, Spread]:
        """implementation -> how many times as long as ours it took, in the same round."""
        ours = self.samples[OURS]
        return {name: Spread.of(paired_ratios(times, ours)) for name, times in self.samples.items() if name != OURS}

    @property
    def wrong(self) -> list[str]:
        """Implementations whose error rounding, or the code's bound, does not explain."""
        return [name for name, error in self.errors.items() if error > TOLERATED or (name in self.coded and self.coded[name].states > 1)]

    @property
    def fastest(self) -> str:
        """torch's implementation that we are the least ahead of, of those that are right."""
        right = [name for name in self.speed_ups if name in TORCH and name not in self.wrong]
        return min(right, key=lambda name: self.speed_ups[name].median)

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

    job: Job
    reason: str


@dataclass(frozen=True)
class Tensors:
    """A workload's values, contiguous. Implementations step copies of `params`; `grads` are those of every step."""

    workload: Workload
    params: list[torch.Tensor]
    grads: list[torch.Tensor]

    # Values repeat after this many. A prime: where a gradient is read in another order, equal values do not happen to meet.
    PERIOD = 1_000_003

    @classmethod
    def random(cls, workload: Workload, dtype: str) -> Tensors:
        """The same in every run: normal parameters of usual size; gradients of either sign and of magnitudes 1 to 2.

        Gradients must be as large as that for steps of the default length to be seen in bfloat16, and for their squares to be normal
        numbers in float16.
        """
        generator = torch.Generator().manual_seed(0)
        params = torch.empty(cls.PERIOD).normal_(0, 0.02, generator=generator)
        signs = torch.empty(cls.PERIOD).normal_(generator=generator)
        grads = torch.empty(cls.PERIOD).uniform_(1, 2, generator=generator).copysign(signs)

        def repeated(values: torch.Tensor) -> list[torch.Tensor]:
            values = values.to(DTYPES[dtype])
            sizes = [divmod(math.prod(shape), cls.PERIOD) for shape in workload.shapes]
            flat = [torch.cat([*[values] * times, values[:rest]]) for times, rest in sizes]
            return [tensor.view(shape) for tensor, shape in zip(flat, workload.shapes, strict=True)]

        return cls(workload, repeated(params), repeated(grads))


def measure_row(
    tensors: Tensors, job: Job, effort: Effort, quick: bool, streaming: Callable[[], Streaming], on_round: Callable[[float], None]
) -> Row | Skipped:
    """Measure one row with torch's current number of threads.

    Args:
        tensors: the job's workload and its values.
        job: what to measure.
        effort: how many rounds.
        quick: whether to leave out implementations of a `LARGE` model.
        streaming: gives the streaming kernels; called only if the row needs them.
        on_round: see `interleave`.
    """
    case, layout = job.case, LAYOUTS[job.layout]
    quick = quick and job.workload.elements > LARGE
    our_class, torch_class = getattr(fused_opt, case.optimizer), getattr(torch.optim, case.optimizer)
    exist = [name for name in TORCH if name != FUSED or "fused" in inspect.signature(torch_class).parameters]
    variants = {OURS: (layout, job.state)}
    if job.layout != "contiguous":
        variants[CONTIGUOUS] = (LAYOUTS["contiguous"], job.state)
    if job.state != AS_TORCH:
        variants[PLAIN] = (layout, AS_TORCH)
        if native().module is None:
            return Skipped(job, f"needs the extension, and {native().why}")

    try:
        state_bytes = {state: _state_bytes(case, tensors.params, state) for state in (AS_TORCH, job.state)}
    except ValueError as error:
        return Skipped(job, f"cannot be had: {error}")
    parameter_bytes = DTYPES[job.dtype].itemsize * job.workload.elements
    torchs = min(2, len(exist)) if quick else len(exist)
    copies = len(variants) + torchs + 2  # gradients in the layout; torch's temporaries: a copy at the least
    needed = copies * parameter_bytes + torchs * state_bytes[AS_TORCH] + sum(state_bytes[state] for _, state in variants.values())
    available = available_memory()
    if available is not None and needed > available:
        return Skipped(job, f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")

    exact = ExactSample(case, tensors.params, tensors.grads)
    layout_grads = {each: [each.gradient(grad) for grad in tensors.grads] for each, _ in variants.values()}
    steps: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    coded: dict[str, CodedErrors] = {}
    detours: dict[str, float] = {}

    def prepare(name: str, optimizer_class: Any, options: Mapping[str, Any], layout: Layout) -> float:
        """Make an optimizer and let it take the compared steps. Returns the seconds that these took."""
        params = [torch.nn.Parameter(layout.parameter(p.clone())) for p in tensors.params]
        for param, grad in zip(params, layout_grads[layout], strict=True):
            param.grad = grad
        optimizer = optimizer_class(params, **case.options, **options)
        steps[name] = optimizer.step
        start = time.perf_counter()
        if options == STATES[INT8]:
            coded[name] = coded_sample.follow(case, exact, optimizer, params)
            errors[name], detours[name] = coded[name].parameters, exact.detour(params)
        else:
            for _ in range(COMPARED_STEPS):
                optimizer.step()
            errors[name] = exact.error(params)
        return time.perf_counter() - start

    for name, (its_layout, state) in variants.items():
        prepare(name, our_class, STATES[state], its_layout)
    enough = False
    for name in exist:
        if not (quick and enough):
            seconds = prepare(name, torch_class, TORCH[name], layout)
            enough = errors[name] <= TOLERATED and (name == FUSED or seconds > PATIENCE)

    # Reads the parameter, the gradient and the states; writes the parameter and the states. AdamW in float32: 28 bytes an element, and
    # with 8-bit states 16.
    step_bytes = parameter_bytes * 3 + state_bytes[job.state] * 2
    memory = streaming() if step_bytes >= STREAMING_FROM else None
    samples = interleave({**steps, **(memory.kernels() if memory else {})}, effort, lead_in=memory is None, on_round=on_round)
    peak_bytes = {name: peak_memory(step) for name, step in steps.items()}
    ours, timed = steps[OURS], list(steps)
    steps.clear()  # peers need memory, too
    others = peers.installed() if job.layout == "contiguous" and job.state == INT8 and case == Case("AdamW") else []
    return Row(
        job=job,
        threads=torch.get_num_threads(),
        step_bytes=step_bytes,
        samples={name: samples[name] for name in timed},
        limits=memory.limits(samples) if memory else [],
        errors=errors,
        left_out=[name for name in exist if name not in timed],
        peak_bytes=peak_bytes,
        state_bytes=state_bytes,
        coded=coded,
        detours=detours,
        peers=[peers.steps_beside(peer, tensors.params, tensors.grads, ours, exact.detour, memory is None) for peer in others],
    )


def _state_bytes(case: Case, values: Sequence[torch.Tensor], state: str) -> int:
    """What our states of these parameters take.

    Raises:
        ValueError: they cannot have states of that format.
    """
    optimizer = getattr(fused_opt, case.optimizer)([torch.nn.Parameter(value) for value in values], **case.options, **STATES[state])
    return sum(row.state_bytes for row in fused_opt.explain(optimizer).rows)
