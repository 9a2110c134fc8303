"""Tables and figures of what the part "passes" of `fused-opt bench` measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

from fused_opt.bench import memory_table
from fused_opt.bench.exact_sample import COMPARED_STEPS
from fused_opt.bench.measure import Estimate, Spread, paired_ratios
from fused_opt.bench.passes_plan import FULL_WORKLOADS, NORM_DETOUR, STATE_DETOURS, PassJob
from fused_opt.bench.sheet import BAD, STRONG, Cell, Sheet
from fused_opt.bench.speed_plan import AS_TORCH, INT8
from fused_opt.bench.speed_report import interval, milliseconds
from fused_opt.bench.speed_row import OURS
from fused_opt.bench.suite import Record
from fused_opt.bench.workloads import WORKLOADS

TORCH = "torch"


@dataclass(frozen=True)
class PassRow:
    """What was measured.

    Attributes:
        job: what.
        samples: `OURS` and `TORCH` -> seconds a step, with all that is done around it, by rounds.
        error: how far the two were apart, as a share of what the job allows: see `passes.distance`.
        skipped: why nothing was measured, or "".
    """

    job: PassJob
    samples: dict[str, list[float]] = field(default_factory=dict)
    error: float = 0.0
    skipped: str = ""

    @property
    def wrong(self) -> bool:
        """Whether the two went different ways."""
        return not self.error <= 1

    @cached_property
    def speed_up(self) -> Estimate:
        """How many times as long as ours torch's took, in the same round."""
        return Estimate.of(paired_ratios(self.samples[TORCH], self.samples[OURS]))

    def to_record(self) -> Record:
        """Times are in seconds. What follows from the rest is told, too."""
        derived = {} if self.skipped else {"speed_up": asdict(self.speed_up), "wrong": self.wrong}
        about = {**asdict(self.job), "workload": self.job.workload.name, "elements": self.job.workload.elements}
        return {**about, "torchs": self.job.row.in_words(self.job.step), **_measured(vars(self)), **derived}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PassRow:
        """What `to_record` made."""
        names = {name: record[name] for name in PassJob.__dataclass_fields__}
        measured = _measured(record)
        error = float("inf") if measured["error"] is None else measured["error"]  # JSON has no infinity
        return cls(PassJob(**{**names, "workload": WORKLOADS[record["workload"]]}), **{**measured, "error": error})


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("samples", "error", "skipped")}


def rows(records: Mapping[str, Record]) -> list[PassRow]:
    """What was timed, in the order of measuring."""
    return [PassRow.from_record(record) for name, record in records.items() if not name.startswith(memory_table.UNIT)]


def held(records: Mapping[str, Record]) -> list[memory_table.Held]:
    """The bytes of a parameter; nothing if they were not measured."""
    return [each for name, record in records.items() if name.startswith(memory_table.UNIT) for each in memory_table.from_record(record)]


def sheets(records: Mapping[str, Record]) -> list[Sheet]:
    """A table of steps for each dtype of weights; then of bytes."""
    found: dict[str, list[PassRow]] = {}
    for row in rows(records):
        found.setdefault(row.job.row.dtype, []).append(row)
    return [*(_sheet(dtype, of_dtype) for dtype, of_dtype in found.items()), *memory_table.sheets(held(records))]


_TITLES = {
    "float32": "One pass over memory: a step with all that is done around it, beside torch's",
    "bfloat16": "Weights and gradients in bfloat16, beside torch's step with both in float32",
}


def _sheet(dtype: str, measured: Sequence[PassRow]) -> Sheet:
    with_threads = any(row.job.threads for row in measured)
    with_states = any(row.job.state != AS_TORCH for row in measured)
    labels = ["workload", *(["threads"] if with_threads else []), "optimizer", "pass", *(["states"] if with_states else [])]
    result = Sheet(_TITLES[dtype], [*labels, "torch's way"], ["ours ms", "torch ms", "speed-up", "interval", "apart"])
    for row, following in zip(measured, [*measured[1:], None], strict=True):
        job = row.job
        about = [
            job.workload.name,
            *([str(job.threads or "-")] if with_threads else []),
            job.configuration,
            job.what,
            *([job.state] if with_states else []),
            job.row.in_words(job.step),
        ]
        last = following is not None and following.job.workload is not job.workload
        result.add(*about, *([Cell("skipped", BAD)] if row.skipped else _cells(row)), end_section=last)
    result.notes = [
        *(f"{row.job} was skipped: {row.skipped}" for row in measured if row.skipped),
        *(f"fused_opt is WRONG, or torch is: {row.job}: {row.error:.3g} times as far apart as allowed" for row in measured if row.wrong),
        "speed-up: the time that torch takes for a step and what is named beside it, over that of our step, which does it all: the median "
        "of the rounds with its 95 % confidence interval.",
        f"apart: how far the weights, and their averages, are from torch's after {COMPARED_STEPS} steps, as a share of what rounding in "
        f"float32 explains; where the norm of all gradients counts, which torch adds up in float32, of another {NORM_DETOUR:.1%} of their "
        f"way; with states in 16 bits of {STATE_DETOURS[AS_TORCH]:.0%} and in 8 bits of {STATE_DETOURS[INT8]:.0%} of it; rounded "
        "stochastically also of one unit in the last place a step.",
    ]
    return result


def _cells(row: PassRow) -> list[Cell | str]:
    return [
        milliseconds(Spread.of(row.samples[OURS]).median),
        milliseconds(Spread.of(row.samples[TORCH]).median),
        Cell(f"{row.speed_up.median:.2f}", STRONG),
        interval(row.speed_up),
        Cell(f"{row.error:.2g}", BAD if row.wrong else ""),
    ]


def figures(records: Mapping[str, Record]) -> dict[str, memory_table.Figure]:
    """For the README, each by its name.

    `pass-NAME` is the speed-up of a pass with AdamW on gpt2 with its interval, `pass-NAME-FORMAT` that with states of a format;
    `passes` is a table of all. `bytes` is a table for AdamW, `bytes-MODE-FORMAT` the bytes of a parameter with bfloat16 weights of a mode
    and states of a format, `released-bytes-MODE-FORMAT` those with steps inside of backward.
    """
    measured = [row for row in rows(records) if not row.skipped and not row.job.threads and row.job.workload.name in FULL_WORKLOADS]
    found: dict[str, memory_table.Figure] = {}
    for row in measured:
        if (row.job.workload.name, row.job.configuration) == ("gpt2", "adamw"):
            found[f"pass-{_name(row.job, '-')}"] = partial(_ratio, row)
    if measured:
        found["passes"] = partial(_table, measured)
    return {**found, **memory_table.figures(held(records))}


def _name(job: PassJob, between: str) -> str:
    return job.what if job.state == AS_TORCH else f"{job.what}{between}{job.state}"


def _ratio(row: PassRow) -> str:
    return f"{row.speed_up.median:.2f} ({interval(row.speed_up)}){' (wrong)' if row.wrong else ''}"


def _table(measured: Iterable[PassRow]) -> list[list[str]]:
    """A line for each pass with each optimizer, a column for each workload."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in measured:
        key = row.job.case.optimizer, _name(row.job, ", states "), row.job.row.in_words(row.job.step)
        lines.setdefault(key, {})[row.job.workload.name] = _ratio(row)
    header = ["optimizer", "pass", "torch's way", *(f"`{name}`" for name in FULL_WORKLOADS)]
    return [header, *([*key, *(cells.get(name, "") for name in FULL_WORKLOADS)] for key, cells in lines.items())]
