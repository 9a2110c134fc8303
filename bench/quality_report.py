"""Shows what `fused-opt quality` measured: what a format of states changes, beside what another seed does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fused_opt.bench.quality_recipes import NO_DECAY
from fused_opt.bench.quality_tasks import HIGHER_IS_BETTER, TASKS
from fused_opt.bench.quality_units import SHARED
from fused_opt.bench.sheet import BAD, Cell, Sheet
from fused_opt.bench.speed_plan import AS_TORCH, STATES
from fused_opt.bench.suite import Record

Key = tuple[str, str, str, str]  # task, optimizer, decay, schedule


@dataclass(frozen=True)
class Comparison:
    """A metric of a training, seed by seed: values at the same index began with equal weights and saw equal batches.

    Attributes:
        task, optimizer, schedule, metric: their names.
        decay: the kind and the rate.
        values: format of states -> its value with each seed, a mean over the folds; NaN of what diverged.
    """

    task: str
    optimizer: str
    decay: str
    schedule: str
    metric: str
    values: Mapping[str, Sequence[float]]

    @property
    def formats(self) -> list[str]:
        """Those that are compared with states as in torch."""
        return [state for state in self.values if state != AS_TORCH]

    @property
    def seeds_spread(self) -> float:
        """What another seed changes: the standard deviation with states as torch has them; NaN if there is one seed."""
        return _spread(self.values[AS_TORCH])

    def differences(self, state: str) -> list[float]:
        """What this format changes."""
        return [value - exact for value, exact in zip(self.values[state], self.values[AS_TORCH], strict=True)]

    def change(self, state: str) -> float:
        """The mean of the differences."""
        return _mean(self.differences(state))

    def within(self, state: str) -> bool:
        """Whether the mean difference is at most what another seed changes."""
        return abs(self.change(state)) <= self.seeds_spread

    def outside(self, state: str) -> str:
        """What the format changed by more than another seed does, in words; "" if it did not, or if there is one seed."""
        if self.within(state) or len(self.values[state]) < 2:
            return ""
        change = self.change(state)
        better = (change > 0) == (self.metric in HIGHER_IS_BETTER)
        verdict = "diverged" if not math.isfinite(change) else "better" if better else "worse"
        return f"{self.metric} with {self.optimizer}, {self.decay}, {self.schedule}: {change:+.4f}, {verdict}"


def compare(records: Iterable[Record]) -> list[Comparison]:
    """A comparison for each metric of each training, from what came of its seeds."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        if "skipped" not in record:
            groups.setdefault(_key(record), []).append(record)
    return [
        Comparison(*key, metric, {state: [_number(seed["states"][state]["scores"][metric]) for seed in seeds] for state in _states(seeds)})
        for key, seeds in groups.items()
        for metric in seeds[0]["states"][AS_TORCH]["scores"]
    ]


def sheets(records: Mapping[str, Record]) -> list[Sheet]:
    """A table for each task. `records` are those of the part "quality"."""
    found = []
    measured = [record for record in records.values() if "skipped" not in record]
    for task in dict.fromkeys(record["task"] for record in measured):
        of_task = [record for record in measured if record["task"] == task]
        found.append(_sheet(task, of_task))
    if skipped := [record["skipped"] for record in records.values() if "skipped" in record]:
        found.append(Sheet("Trained models", ["not measured"], [], [[Cell(why)] for why in skipped]))
    return found


def _sheet(task: str, records: Sequence[Record]) -> Sheet:
    comparisons = compare(records)
    formats = list(dict.fromkeys(state for comparison in comparisons for state in comparison.formats))
    columns = ["as torch", "spread", *(column for state in formats for column in (state, "change", "spread", "within"))]
    result = Sheet(f"Trained models: {task}", ["optimizer", "decay", "schedule", "metric"], columns)
    for row, following in zip(comparisons, [*comparisons[1:], None], strict=True):
        cells: list[Cell | str] = [_shown(_mean(row.values[AS_TORCH])), _shown(row.seeds_spread)]
        for state in formats:
            cells += _cells(row, state) if state in row.values else [""] * 4
        result.add(row.optimizer, row.decay, row.schedule, row.metric, *cells, end_section=_last(row, following))
    seeds, steps = ({record[name] for record in records} for name in ("seed", "steps"))
    about = f"{TASKS[task].about}; {len(seeds)} seeds, {', '.join(map(str, sorted(steps)))} steps."
    result.notes = [f"{task}: {note}" for note in (about, *_sizes(records), *_outside(comparisons, formats))]
    result.notes.append(_READING)
    return result


def _cells(row: Comparison, state: str) -> list[Cell | str]:
    verdict: Cell | str = "?" if len(row.values[state]) < 2 else "yes" if row.within(state) else Cell("NO", BAD)
    return [_shown(_mean(row.values[state])), f"{row.change(state):+.4f}", _shown(_spread(row.differences(state))), verdict]


def _last(row: Comparison, following: Comparison | None) -> bool:
    return following is not None and (row.optimizer, row.schedule, row.decay) != (following.optimizer, following.schedule, following.decay)


def _sizes(records: Sequence[Record]) -> list[str]:
    """What the states took, and how much of them had the format."""
    notes = []
    for state in _states(records):
        if state != AS_TORCH:
            sizes = {record["optimizer"]: (record["states"][AS_TORCH]["bytes"], record["states"][state]["bytes"]) for record in records}
            narrow = min(record["states"][state]["narrow"] for record in records)
            listed = ", ".join(f"{name} {size:.2f} instead of {exact:.2f}" for name, (exact, size) in sizes.items())
            notes.append(f"{narrow:.1%} of the states' values are {state}; bytes of states a parameter: {listed}.")
    return notes


def _outside(comparisons: Sequence[Comparison], formats: Sequence[str]) -> list[str]:
    notes = []
    for state in formats:
        found = [words for row in comparisons if state in row.values and (words := row.outside(state))]
        if found:
            count = f"in {len(found)} of {len(comparisons)} lines"
            notes.append(f"{state} states changed by more than another seed does, {count}: {'; '.join(found)}.")
    return notes


_READING = (
    "as torch, bfloat16, int8: formats of states, means over the seeds; spread: the standard deviation over them of what stands before it; "
    "change: from states as in torch, in trainings that begin with equal weights and see the same batches; within: the mean change is at "
    "most what another seed changes, the spread with states as in torch. A few seeds tell that roughly, and of many lines some are outside "
    "by chance: with more seeds those should not be."
)


@dataclass(frozen=True)
class Curve:
    """The training loss of a task with a format of states.

    Attributes:
        steps: the last ones of windows, over which losses were averaged.
        mean, low, high: over the seeds, at each of `steps`: mean, least and largest.
    """

    task: str
    optimizer: str
    schedule: str
    state: str
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def curves(records: Mapping[str, Record]) -> list[Curve]:
    """Of each training with each format; of each task that one first which all tasks have in a run without a selection.

    `records` are those of the part "quality".
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records.values():
        if "skipped" not in record:
            optimizer = record["optimizer"] + (" without decay" if record["decay"] == NO_DECAY else "")
            groups.setdefault((record["task"], optimizer, record["schedule"]), []).append(record)
    found = []
    for key in sorted(groups, key=lambda key: key[1:] != SHARED):
        for state in _states(groups[key]):
            of_seeds = [seed["states"][state]["curve"] for seed in groups[key]]
            points = list(zip(*(map(_number, curve["losses"]) for curve in of_seeds), strict=True))
            mean, low, high = ([of(point) for point in points] for of in (_mean, min, max))
            found.append(Curve(*key, state, of_seeds[0]["steps"], mean, low, high))
    return found


def _key(record: Record) -> Key:
    decay = record["decay"] if record["decay"] == NO_DECAY else f"{record['decay']} {record['weight_decay']:g}"
    return record["task"], record["optimizer"], decay, record["schedule"]


def _states(records: Sequence[Record]) -> list[str]:
    """The formats that all of them have."""
    return [state for state in STATES if all(state in record["states"] for record in records)]


def _number(value: float | None) -> float:
    """JSON has no NaN and no infinity."""
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> float:
    """The standard deviation; NaN of one value, and where one is NaN, on which statistics.stdev fails."""
    mean = _mean(values)
    return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) - 1) if len(values) > 1 else math.nan


def _shown(value: float) -> str:
    return f"{value:.4f}"
