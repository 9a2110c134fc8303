"""Shows what `fused-opt quality` measured: what a format of states or weights changes, beside what another seed does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fused_opt.bench.quality_recipes import NO_DECAY
from fused_opt.bench.quality_tasks import HIGHER_IS_BETTER, TASKS
from fused_opt.bench.quality_units import SHARED
from fused_opt.bench.quality_weights import WEIGHTS
from fused_opt.bench.sheet import BAD, Cell, Sheet
from fused_opt.bench.speed_plan import AS_TORCH
from fused_opt.bench.suite import Record

Key = tuple[str, str, str, str]  # task, optimizer, decay, schedule

POINTS = 10  # of a loss curve in a table


@dataclass(frozen=True)
class Comparison:
    """A metric of a training, seed by seed: values at the same index began with equal weights and saw equal batches.

    Attributes:
        task, optimizer, schedule, metric: their names; of the schedule also the learning rate, where it is not the recipe's.
        decay: the kind and the rate.
        values: format of states or weights -> its value with each seed, a mean over the folds; NaN of what diverged.
    """

    task: str
    optimizer: str
    decay: str
    schedule: str
    metric: str
    values: Mapping[str, Sequence[float]]

    @property
    def formats(self) -> list[str]:
        """Those that are compared with float32 weights and states as in torch."""
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
    """A table for each task; of formats of weights two. `records` are those of the part "quality"."""
    found = []
    measured = [record for record in records.values() if "skipped" not in record]
    for task in dict.fromkeys(record["task"] for record in measured):
        of_task = [record for record in measured if record["task"] == task]
        of_states = [state for state in _states(of_task) if state != AS_TORCH and not _is_of_weights(state)]
        of_weights = [state for state in _states(of_task) if _is_of_weights(state)]
        if of_states:
            found.append(_sheet(task, of_task, of_states))
        if of_weights:
            found += [_weights_sheet(task, of_task, of_weights), _curves_sheet(task, of_task, [AS_TORCH, *of_weights])]
    if skipped := [record["skipped"] for record in records.values() if "skipped" in record]:
        found.append(Sheet("Trained models", ["not measured"], [], [[Cell(why)] for why in skipped]))
    return found


def _is_of_weights(name: str) -> bool:
    return name.split()[0] in WEIGHTS


def _sheet(task: str, records: Sequence[Record], formats: Sequence[str]) -> Sheet:
    comparisons = compare(records)
    columns = ["as torch", "spread", *(column for state in formats for column in (state, "change", "spread", "within"))]
    result = Sheet(f"Trained models: {task}", ["optimizer", "decay", "schedule", "metric"], columns)
    for row, following in zip(comparisons, [*comparisons[1:], None], strict=True):
        cells: list[Cell | str] = [_shown(_mean(row.values[AS_TORCH])), _shown(row.seeds_spread)]
        for state in formats:
            cells += _cells(row, state)
        result.add(row.optimizer, row.decay, row.schedule, row.metric, *cells, end_section=_last(row, following))
    result.notes = [
        f"{task}: {note}" for note in (_about(task, records), *_sizes(records, formats), *_outside(comparisons, formats, "states"))
    ]
    result.notes.append(_READING)
    return result


def _about(task: str, records: Sequence[Record]) -> str:
    seeds, steps = ({record[name] for record in records} for name in ("seed", "steps"))
    return f"{TASKS[task].about}; {len(seeds)} seeds, {', '.join(map(str, sorted(steps)))} steps."


def _weights_sheet(task: str, records: Sequence[Record], formats: Sequence[str]) -> Sheet:
    """A line for each format, which are many."""
    values = ["mean", "spread", "change", "spread", "within", "moved", "bytes"]
    result = Sheet(f"Trained models: {task}, weights in bfloat16", ["optimizer", "decay", "schedule", "metric", "weights"], values)
    comparisons = compare(records)
    for row in comparisons:
        labels = row.optimizer, row.decay, row.schedule, row.metric
        trained = [record for record in records if _key(record) == (task, *labels[:3])]
        exact = _shown(_mean(row.values[AS_TORCH])), _shown(row.seeds_spread)
        result.add(*labels, "float32", *exact, "", "", "", *_of_weights(trained, AS_TORCH))
        for state in formats:
            mean, *others = _cells(row, state)
            result.add(*labels, state, mean, "", *others, *_of_weights(trained, state), end_section=state == formats[-1])
    result.notes = [f"{task}: {note}" for note in (_about(task, records), *_outside(comparisons, formats, "weights"))]
    result.notes.append(_READING_WEIGHTS)
    return result


def _of_weights(records: Sequence[Record], state: str) -> list[str]:
    """The share of them that still moved, and what a parameter takes."""
    moved, memory = (_mean([record["states"][state][name] for record in records]) for name in ("moved", "memory"))
    return [f"{moved:.1%}", f"{memory:.2f}"]


def _curves_sheet(task: str, records: Sequence[Record], formats: Sequence[str]) -> Sheet:
    of_formats = [curve for curve in curves({str(i): record for i, record in enumerate(records)}) if curve.state in formats]
    steps = of_formats[0].steps
    ends = sorted({round(len(steps) * (i + 1) / POINTS) for i in range(POINTS)} - {0})
    result = Sheet(f"Training loss: {task}", ["optimizer", "schedule", "weights"], [f"to {steps[end - 1]}" for end in ends])
    for curve in of_formats:
        means = [_mean(curve.mean[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        name = "float32" if curve.state == AS_TORCH else curve.state
        result.add(curve.optimizer, curve.schedule, name, *map(_shown, means), end_section=curve.state == formats[-1])
    result.notes = ["to: the loss while training, a mean over the seeds and over the steps since the column before, up to this one."]
    return result


def _cells(row: Comparison, state: str) -> list[Cell | str]:
    verdict: Cell | str = "?" if len(row.values[state]) < 2 else "yes" if row.within(state) else Cell("NO", BAD)
    return [_shown(_mean(row.values[state])), f"{row.change(state):+.4f}", _shown(_spread(row.differences(state))), verdict]


def _last(row: Comparison, following: Comparison | None) -> bool:
    return following is not None and (row.optimizer, row.schedule, row.decay) != (following.optimizer, following.schedule, following.decay)


def _sizes(records: Sequence[Record], formats: Sequence[str]) -> list[str]:
    """What the states took, and how much of them had the format."""
    notes = []
    for state in formats:
        sizes = {record["optimizer"]: (record["states"][AS_TORCH]["bytes"], record["states"][state]["bytes"]) for record in records}
        narrow = min(record["states"][state]["narrow"] for record in records)
        listed = ", ".join(f"{name} {size:.2f} instead of {exact:.2f}" for name, (exact, size) in sizes.items())
        notes.append(f"{narrow:.1%} of the states' values are {state}; bytes of states a parameter: {listed}.")
    return notes


def _outside(comparisons: Sequence[Comparison], formats: Sequence[str], of_what: str) -> list[str]:
    notes = []
    for state in formats:
        found = [words for row in comparisons if (words := row.outside(state))]
        if found:
            count = f"in {len(found)} of {len(comparisons)} lines"
            notes.append(f"{state} {of_what} changed by more than another seed does, {count}: {'; '.join(found)}.")
    return notes


_READING = (
    "as torch, bfloat16, int8: formats of states, means over the seeds; spread: the standard deviation over them of what stands before it; "
    "change: from states as in torch, in trainings that begin with equal weights and see the same batches; within: the mean change is at "
    "most what another seed changes, the spread with states as in torch. A few seeds tell that roughly, and of many lines some are outside "
    "by chance: with more seeds those should not be."
)


_READING_WEIGHTS = (
    "weights: float32, or bfloat16 weights and gradients: rounded to the nearest, rounded stochastically, or with a companion (kahan, "
    "split, master). States are float32 unless others are named. What is computed with the weights is computed in float32. mean: over the "
    "seeds; spread: the standard deviation over them of what stands before it; change: from float32, in trainings that begin with equal "
    "weights but for their rounding and see the same batches; within: the mean change is at most what another seed changes, the spread "
    "with float32; moved: the share of the weights' values, as they are stored, that the last tenth of the steps changed; bytes: of "
    "weights, gradients and states a parameter."
)


@dataclass(frozen=True)
class Curve:
    """The training loss of a task with a format of states or weights.

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
            groups.setdefault((record["task"], optimizer, _schedule(record)), []).append(record)
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
    return record["task"], record["optimizer"], decay, _schedule(record)


def _schedule(record: Record) -> str:
    """With the learning rate, if it is not the recipe's."""
    return f"{record['schedule']} from {record['lr']:g}" if record.get("rate", 1) != 1 else str(record["schedule"])


def _states(records: Sequence[Record]) -> list[str]:
    """The formats that all of them have."""
    return [state for state in records[0]["states"] if all(state in record["states"] for record in records)]


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
