"""How far two runs agree: whoever reads one run's ratios must know how much of them is the machine's noise."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fused_opt.bench import speed_measure
from fused_opt.bench.measure import Estimate
from fused_opt.bench.sheet import BAD, Cell, Sheet
from fused_opt.bench.speed_report import interval
from fused_opt.bench.speed_row import Row
from fused_opt.bench.suite import Record, Results, Unit

PART = "stability"
RUNS = ("first", "second")  # quick runs of a full run, one after the other

# By how much a ratio may differ between two runs on an idle machine.
TOLERATED = 0.15


@dataclass(frozen=True)
class Change:
    """A speed-up over another contestant in two runs.

    Attributes:
        row: the row's name.
        other: the contestant.
        before, after: the speed-ups.
    """

    row: str
    other: str
    before: Estimate
    after: Estimate

    @property
    def ratio(self) -> float:
        """The later speed-up by the earlier one."""
        return self.after.median / self.before.median

    @property
    def far(self) -> bool:
        """Whether they differ by more than `TOLERATED`."""
        return max(self.ratio, 1 / self.ratio) > 1 + TOLERATED

    @property
    def slower(self) -> bool:
        """Whether the later one is lower by more than that, and its confidence interval lies below the earlier one's."""
        return self.ratio < 1 / (1 + TOLERATED) and self.after.high < self.before.low

    def cells(self) -> list[Cell | str]:
        """Of a table."""
        ratio = f"{self.ratio:.2f}"
        shown = Cell(ratio, BAD) if self.far else ratio
        medians = f"{self.before.median:.2f}", f"{self.after.median:.2f}"
        return [self.row, self.other, medians[0], interval(self.before), medians[1], interval(self.after), shown]


@dataclass(frozen=True)
class Comparison:
    """Of the rows that both runs have."""

    changes: list[Change]

    @classmethod
    def of(cls, earlier: Results, later: Results) -> Comparison:
        """Two runs."""
        return cls.of_records(earlier.part(speed_measure.PART), later.part(speed_measure.PART))

    @classmethod
    def of_records(cls, earlier: Mapping[str, Record], later: Mapping[str, Record]) -> Comparison:
        """The records of units with the same names."""
        rows = [dict(zip(records, speed_measure.rows(records), strict=True)) for records in (earlier, later)]
        pairs = [(name, before, rows[1].get(name)) for name, before in rows[0].items()]
        return cls(
            [
                Change(name, other, before.speed_ups[other], after.speed_ups[other])
                for name, before, after in pairs
                if isinstance(before, Row) and isinstance(after, Row)
                for other in before.others
                if other in after.samples and other not in before.wrong
            ]
        )

    @property
    def slower(self) -> list[Change]:
        """What got slower beyond doubt."""
        return [change for change in self.changes if change.slower]

    def sheet(self, title: str = "Speed-ups of two runs") -> Sheet:
        """A line for each row, the largest difference first."""
        result = Sheet(title, ["row", "over"], ["before", "interval", "after", "interval", "after / before"])
        for change in sorted(self.changes, key=lambda change: -max(change.ratio, 1 / change.ratio)):
            result.add(*change.cells())
        result.notes = self.notes()
        return result

    def notes(self) -> list[str]:
        """What it comes to."""
        if not self.changes:
            return ["The runs have no rows in common that both measured."]
        distances = [max(change.ratio, 1 / change.ratio) - 1 for change in self.changes]
        far = sum(change.far for change in self.changes)
        verdict = f"{far} of {len(distances)} differ by more than {TOLERATED:.0%}" if far else f"all agree within {TOLERATED:.0%}"
        notes = [
            f"Of the speed-ups over other right implementations in both runs, {verdict}; "
            f"the median difference is {statistics.median(distances):.1%}, the largest {max(distances):.1%}."
        ]
        if self.slower:
            names = "; ".join(dict.fromkeys(change.row for change in self.slower))
            notes.append(f"Slower than before, beyond both confidence intervals: {names}.")
        return notes


def units(quick: Sequence[Unit]) -> list[Unit]:
    """The units of a quick run, twice."""
    return [dataclasses.replace(unit, part=PART, name=f"{run} {unit.name}") for run in RUNS for unit in quick]


def sheets(records: Mapping[str, Record]) -> list[Sheet]:
    """Of the two quick runs; none if there are not two."""
    first, second = (
        {name.removeprefix(f"{run} "): record for name, record in records.items() if name.startswith(f"{run} ")} for run in RUNS
    )
    return [Comparison.of_records(first, second).sheet("Two quick runs, one after the other")] if first and second else []
