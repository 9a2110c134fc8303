"""Measures the rows of the speed table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pickle import PicklingError

import torch

import fused_opt
from fused_opt.bench import coded_sample, machine, measure
from fused_opt.bench.cases import Case
from fused_opt.bench.coded_sample import CodedErrors
from fused_opt.bench.contestants import Contestant, Elsewhere, Here, Tensors
from fused_opt.bench.exact_sample import TOLERATED, ExactSample
from fused_opt.bench.implementations import Implementation, implementations
from fused_opt.bench.layouts import LAYOUTS, Layout
from fused_opt.bench.measure import Effort, interleave
from fused_opt.bench.speed_plan import AS_TORCH, BF16, DTYPES, INT8, STATES, TORCH, Job
from fused_opt.bench.speed_row import CONTIGUOUS, FUSED, IN_TORCH, OURS, PLAIN, Row, Skipped, from_record
from fused_opt.bench.suite import OnShare, Record, Unit
from fused_opt.bench.worker import TimedOutError, Worker, WorkerError, ready
from fused_opt.native import native

PART = "speed"

# Not all of torch's implementations are timed on a larger model, unless it is selected with --full. Foreach and the for-loop allocate
# temporaries of the parameters' size, which the system has to clear page by page: on gpt2 in float32, AdamW fused took 0.16 s a step, the
# for-loop 1.4 s and foreach 2.8 s. They are left out where the fused one is right. Where it is wrong or missing the for-loop is timed, and
# foreach if the for-loop's compared steps took less than PATIENCE seconds: of SGD in bfloat16, a step of either is 0.07 s.
LARGE = 50_000_000
PATIENCE = 0.3

# Traffic below which the streaming limit says nothing, because caches serve a part of it. In bytes a step.
STREAMING_FROM = 64 * 2**20


# Seconds of untimed steps before those that are timed, where processes take turns.
AWAKE = 0.02


class Shared:
    """What several rows need, made when the first one does: the values of the last workload, and the streaming kernels' arrays.

    Attributes:
        hung: implementation -> why it is not tried again.
    """

    def __init__(self) -> None:
        self.hung: dict[str, str] = {}
        self._key: tuple[str, str] | None = None
        self._tensors: Tensors | None = None
        self.streaming = functools.cache(measure.Streaming)

    def tensors(self, job: Job) -> Tensors:
        """The job's."""
        key = job.workload.name, job.dtype
        if self._tensors is None or key != self._key:
            self._tensors = None  # free the last workload's before making the next one's
            self._key, self._tensors = key, Tensors.random(job.workload, job.dtype)
        return self._tensors


def units(jobs: Sequence[Job], effort: Effort, quick: bool, only: Sequence[str], shared: Shared) -> list[Unit]:
    """A unit for each job.

    Args:
        jobs: those on the same values together.
        effort: how many rounds of each.
        quick: whether to leave out implementations of torch that are slow on a `LARGE` model.
        only: which of torch's implementations to time.
        shared: what they share.
    """

    def unit(job: Job) -> Unit:
        def measure(on_share: OnShare) -> Record:
            return measure_row(job, effort, quick, only, shared, on_share).to_record()

        name = str(job) if job.against != TORCH or set(only) == set(IN_TORCH) else f"{job} against {', '.join(only)}"
        return Unit(PART, name, measure, seconds=2 * effort.budget + 2 + job.workload.elements / 3e7)

    return [unit(job) for job in jobs]


def measure_row(job: Job, effort: Effort, quick: bool, only: Sequence[str], shared: Shared, on_share: OnShare) -> Row | Skipped:
    """Measure one row; for the arguments see `units`."""
    threads = job.threads or torch.get_num_threads()
    with measure.threads(threads), machine.instruction_set(job.isa):
        try:
            if job.against == TORCH:
                return _Measurement(job, shared).against_torch(effort, quick and job.workload.elements > LARGE, only, on_share)
            implementation = implementations()[job.against]
            if reason := implementation.missing or shared.hung.get(job.against, ""):
                return Skipped(job, reason)
            with Worker(threads) as worker:
                worker.call(ready)  # not while ours takes its first steps
                return _Measurement(job, shared).against(implementation, worker, effort, on_share)
        except TimedOutError as error:
            shared.hung[job.against] = f"{error} on {job.workload.name}"
            return Skipped(job, str(error))
        except (_CannotMeasureError, WorkerError, PicklingError) as error:
            return Skipped(job, str(error))


class _CannotMeasureError(Exception):
    """The message says why."""


@dataclass
class _Measurement:
    job: Job
    shared: Shared
    contestants: dict[str, Contestant] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    coded: dict[str, CodedErrors] = field(default_factory=dict)
    detours: dict[str, float] = field(default_factory=dict)
    first_seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job = self.job
        self.layout, self.tensors = LAYOUTS[job.layout], self.shared.tensors(job)
        variants = {OURS: (self.layout, job.state)}
        if job.against == TORCH and job.layout != "contiguous":
            variants[CONTIGUOUS] = (LAYOUTS["contiguous"], job.state)
        if job.against == TORCH and job.state != AS_TORCH:
            variants[PLAIN] = (self.layout, AS_TORCH)
        if job.state == INT8 and native().module is None:
            raise _CannotMeasureError(f"needs the extension, and {native().why}")
        self.exact = ExactSample(job.case, self.tensors.params, self.tensors.grads)
        self._require_memory([state for _, state in variants.values()])
        self._grads = {each: [each.gradient(grad) for grad in self.tensors.grads] for each, _ in variants.values()}
        for name, (layout, state) in variants.items():
            self._enter_ours(name, layout, state)

    def against_torch(self, effort: Effort, quick: bool, only: Sequence[str], on_share: OnShare) -> Row:
        exist = [name for name in IN_TORCH if name in only and implementations()[name].offers(self.job.case)]
        enough = False
        for name in exist:
            if not (quick and enough):
                seconds = self._enter(name, Here(self._maker(name), self.tensors.params, self._grads[self.layout], self.layout))
                enough = self.errors[name] <= TOLERATED and (name == FUSED or seconds > PATIENCE)
        return self._row(exist, effort, on_share)

    def against(self, implementation: Implementation, worker: Worker, effort: Effort, on_share: OnShare) -> Row:
        self._enter(implementation.name, Elsewhere(worker, implementation, self.job))
        return self._row([], effort, on_share)

    def _maker(self, name: str) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: implementations()[name].make(self.job.case, params)

    def _enter(self, name: str, contestant: Contestant) -> float:
        """Let it take the compared steps. Returns the seconds that these took."""
        seconds, values = contestant.compared_steps()
        if name in IN_TORCH:
            self.errors[name] = self.exact.error_of(values)
        else:
            self.detours[name] = self.exact.detour_of(values)
        self.contestants[name], self.first_seconds[name] = contestant, seconds[0]
        return sum(seconds)

    def _enter_ours(self, name: str, layout: Layout, state: str) -> None:
        case = self.job.case
        contestant = Here(lambda params: _ours(case, params, state), self.tensors.params, self._grads[layout], layout)
        if state == INT8:
            self.coded[name] = coded_sample.follow(case, self.exact, contestant.optimizer, contestant.params, contestant.step)
            self.errors[name] = self.coded[name].parameters
        else:
            contestant.compared_steps()
            values = self.exact.take(contestant.params)
            self.errors[name] = self.exact.error_of(values, torch.finfo(torch.bfloat16).eps if state == BF16 else 0.0)
        if state != AS_TORCH or self.job.against != TORCH:
            self.detours[name] = self.exact.detour(contestant.params)
        self.contestants[name], self.first_seconds[name] = contestant, contestant.seconds[0]

    def _require_memory(self, states: Sequence[str]) -> None:
        """For ours in these formats, and for the others, of whom as many are there as there may be."""
        try:
            own = {state: _planned_bytes(self.job.case, self.tensors.params, state) for state in {AS_TORCH, *states}}
        except ValueError as error:
            raise _CannotMeasureError(f"cannot be had: {error}") from error
        others = len(IN_TORCH) if self.job.against == TORCH else 1
        if others > 1 and self.job.workload.elements > LARGE:
            others = 2
        # Gradients in the layout; temporaries of others: a copy at the least; the other process's own gradients.
        copies = len(states) + others + (2 if self.job.against == TORCH else 3)
        needed = copies * self._parameter_bytes + others * own[AS_TORCH] + sum(own[state] for state in states)
        available = machine.available_memory()
        if available is not None and needed > available:
            raise _CannotMeasureError(f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")

    @property
    def _parameter_bytes(self) -> int:
        return DTYPES[self.job.dtype].itemsize * self.job.workload.elements

    def _row(self, exist: Sequence[str], effort: Effort, on_share: OnShare) -> Row:
        state_bytes = {name: contestant.state_bytes() for name, contestant in self.contestants.items()}
        # Reads the parameter, the gradient and the states; writes the parameter and the states. AdamW in float32: 28 bytes an element, and
        # with 8-bit states 16.
        step_bytes = {name: self._parameter_bytes * 3 + size * 2 for name, size in state_bytes.items()}
        memory = self.shared.streaming() if step_bytes[OURS] >= STREAMING_FROM else None
        # A process of its own was asleep, and so are its threads and those of ours meanwhile: 39 instead of 5 times our time, on rl.
        lead_in = None if memory else 0.0 if self.job.against == TORCH else AWAKE
        sampled = {name: functools.partial(contestant.sample, lead_in=lead_in) for name, contestant in self.contestants.items()}
        streams = measure.samplers(memory.kernels()) if memory else {}
        samples = interleave({**sampled, **streams}, effort, on_round=on_share)
        ours = self.contestants[OURS]
        assert isinstance(ours, Here)
        ran = ours.optimizer._last_ran
        return Row(
            job=self.job,
            samples={name: samples[name] for name in sampled},
            limits=memory.limits(samples) if memory else [],
            errors=self.errors,
            left_out=[name for name in exist if name not in sampled],
            first_seconds=self.first_seconds,
            peak_bytes={name: contestant.peak_bytes() for name, contestant in self.contestants.items()},
            state_bytes=state_bytes,
            step_bytes=step_bytes,
            coded=self.coded,
            detours=self.detours,
            ran=ran.isa if ran else "torch",
        )


def _ours(case: Case, params: Sequence[torch.Tensor], state: str) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(fused_opt, case.optimizer)(params, **case.options, **STATES[state])
    return optimizer


def _planned_bytes(case: Case, values: Sequence[torch.Tensor], state: str) -> int:
    """What our states of these parameters take.

    Raises:
        ValueError: they cannot have states of that format.
    """
    optimizer = _ours(case, [torch.nn.Parameter(value) for value in values], state)
    return sum(row.state_bytes for row in fused_opt.explain(optimizer).rows)


def rows(records: Mapping[str, Record]) -> list[Row | Skipped]:
    """What was measured, in the order of measuring."""
    return [from_record(record) for record in records.values()]
