"""One row of the speed table as data: one workload and one optimizer with its options, ours and others'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from fused_opt.bench.coded_sample import CodedErrors
from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED
from fused_opt.bench.measure import Estimate, Spread, paired_ratios
from fused_opt.bench.speed_plan import AS_TORCH, BF16, INT8, Job
from fused_opt.bench.suite import Record
from fused_opt.bench.workloads import WORKLOADS

OURS = "ours"
CONTIGUOUS = "ours, contiguous"  # timed beside a row of another layout
PLAIN = "ours, as torch"  # timed beside a row of other states
FUSED, FOREACH, FOR_LOOP = "fused", "foreach", "for-loop"
# The largest detours of others. In float32 scalars in float32 cost 1e-5 of the way, a step too few a third. 4 bits cost up to a half.
TOLERATED_DETOURS = {AS_TORCH: 0.001, BF16: 0.1, INT8: 0.6}
IN_TORCH = (FUSED, FOR_LOOP, FOREACH)  # names of implementations


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        job: what.
        samples: contestant -> seconds a step, by rounds. Contestants are `OURS`, its variants above, and implementations by name.
        limits: the streaming limit in GB/s, by rounds; empty where caches serve a part of the traffic.
        errors: contestant -> `ExactSample.error` after `COMPARED_STEPS` steps; with 8-bit states of ours `CodedErrors.parameters`. Only of
            ours and torch's, which compute scalars in float64: in float32 rounding explains more.
        left_out: implementations of torch that were not timed.
        first_seconds: contestant -> of its first step, which creates the states, and compiles if it does.
        peak_bytes: contestant -> by how much its process grew at the most during a step; None where the system does not tell.
        state_bytes: contestant -> the size of all states.
        step_bytes: contestant -> read and written by a step that touches parameters, gradients and states once.
        coded: contestant of ours -> the errors of its steps with 8-bit states.
        detours: contestant -> `ExactSample.detour`, of implementations in processes of their own and ours beside them, and of states of
            less precision than the parameters': what they cost.
        ran: the instruction set of our step, or "torch" if it was torch's.
    """

    job: Job
    samples: dict[str, list[float]]
    limits: list[float]
    errors: dict[str, float]
    left_out: list[str]
    first_seconds: dict[str, float]
    peak_bytes: dict[str, int | None]
    state_bytes: dict[str, int]
    step_bytes: dict[str, int]
    coded: dict[str, CodedErrors] = field(default_factory=dict)
    detours: dict[str, float] = field(default_factory=dict)
    ran: str = ""

    @cached_property
    def seconds(self) -> dict[str, Spread]:
        """Contestant -> seconds a step."""
        return {name: Spread.of(times) for name, times in self.samples.items()}

    @cached_property
    def speed_ups(self) -> dict[str, Estimate]:
        """Contestant -> how many times as long as ours it took, in the same round."""
        ours = self.samples[OURS]
        return {name: Estimate.of(paired_ratios(times, ours)) for name, times in self.samples.items() if name != OURS}

    @property
    def wrong(self) -> list[str]:
        """Contestants whose error rounding, or the code's bound, does not explain; of others, those that went another way."""
        found = [name for name, error in self.errors.items() if error > TOLERATED or (name in self.coded and self.coded[name].states > 1)]
        limit = TOLERATED_DETOURS[self.job.state]
        return found + [name for name, detour in self.detours.items() if name not in self.errors and detour > limit]

    @property
    def others(self) -> list[str]:
        """Contestants that are not ours."""
        return [name for name in self.samples if name not in (OURS, CONTIGUOUS, PLAIN)]

    @property
    def fastest(self) -> str:
        """The other contestant that we are the least ahead of, of those that are right; of all, if none is."""
        right = [name for name in self.others if name not in self.wrong]
        return min(right or self.others, key=lambda name: self.speed_ups[name].median)

    def gb_per_s(self, name: str = OURS) -> float:
        """1e9 bytes a second that a contestant's step moves, if it touches everything once."""
        return self.step_bytes[name] / self.seconds[name].median / 1e9

    def share(self, name: str = OURS) -> Spread | None:
        """A contestant's throughput as a share of the streaming limit in the same round."""
        if not self.limits:
            return None
        pairs = zip(self.samples[name], self.limits, strict=True)
        return Spread.of([self.step_bytes[name] / seconds / 1e9 / limit for seconds, limit in pairs])

    def bytes_a_value(self, name: str) -> float:
        """Of a contestant's states, by the number of parameters."""
        return self.state_bytes[name] / self.job.workload.elements

    def to_record(self) -> Record:
        """Times are in seconds, sizes in bytes, throughput in 1e9 bytes a second. What follows from the rest is told, too."""
        record = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__ and name != "job"}
        share = self.share()
        derived = {
            "seconds": {name: asdict(spread) for name, spread in self.seconds.items()},
            "speed_up": {name: asdict(ratio) for name, ratio in self.speed_ups.items()},
            "wrong": self.wrong,
            "fastest": self.fastest if self.others else None,
            "gb_per_s": self.gb_per_s(),
            "share_of_limit": asdict(share) if share else None,
            "compared_steps": COMPARED_STEPS,
        }
        return {**_job_record(self.job), **record, "coded": {name: asdict(errors) for name, errors in self.coded.items()}, **derived}

    @classmethod
    def from_record(cls, record: Record) -> Row:
        """What `to_record` made."""
        values: dict[str, Any] = {name: record[name] for name in cls.__dataclass_fields__ if name != "job"}
        coded = {name: CodedErrors(**_finite(errors)) for name, errors in values.pop("coded").items()}
        finite: dict[str, Any] = {name: _finite(values.pop(name)) for name in ("errors", "detours")}
        return cls(job=_job(record), coded=coded, **finite, **values)


@dataclass(frozen=True)
class Skipped:
    """A row that was not measured, and why."""

    job: Job
    reason: str

    def to_record(self) -> Record:
        return {**_job_record(self.job), "skipped": self.reason}


def from_record(record: Record) -> Row | Skipped:
    """What either's `to_record` made."""
    return Skipped(_job(record), record["skipped"]) if "skipped" in record else Row.from_record(record)


def _job_record(job: Job) -> Record:
    return {
        **asdict(job),
        "workload": job.workload.name,
        "tensors": job.workload.tensors,
        "elements": job.workload.elements,
        "optimizer": job.case.optimizer,
        "options": dict(job.case.options),
    }


def _job(record: Mapping[str, Any]) -> Job:
    names = {name: record[name] for name in Job.__dataclass_fields__}
    return Job(**{**names, "workload": WORKLOADS[record["workload"]]})


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """JSON has no infinity, and None stands for it."""
    return {name: math.inf if value is None else value for name, value in values.items()}
