"""Shows what `fused-opt parity` found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from fused_opt.bench.cases import Case
from fused_opt.bench.exactness import Exactness
from fused_opt.bench.ulp import BUCKETS, FAR, Difference

# Broken promises shown in words; the table and the JSON file have all of them.
SHOWN = 10


@dataclass(frozen=True)
class Row:
    """One kind of tensor of one case, all shapes together.

    Attributes:
        optimizer, options, dtype: what stepped.
        isa, threads: what our code says it ran on.
        tensor: "param" or a state's key.
        values: the number of values compared.
        reference: the difference from bench/reference.py, or bench/plain_loop.py, which is promised to be none.
        broken: the first value whose bits are not the reference's, in words, or "" if the promise is kept.
        for_loop: the difference from torch's for-loop, its default on the CPU, of which nothing is promised; None of what torch lacks.
        exactness: of the last step, in 16 bits; None in others, of step counters and with stages.
        staged: whether there is more to a step than its rule (see bench/stage_cases.py).
    """

    optimizer: str
    options: Mapping[str, Any]
    dtype: str
    isa: str
    threads: int
    tensor: str
    values: int
    reference: Difference
    broken: str
    for_loop: Difference | None
    exactness: Exactness | None
    staged: bool = False

    @property
    def inexact(self) -> str:
        """What is promised of the exactness and not kept, in words, or ""."""
        return self.exactness.broken if self.exactness else ""

    @property
    def case(self) -> str:
        """The optimizer with its options."""
        return str(Case(self.optimizer, dict(self.options)))

    @property
    def ran_on(self) -> str:
        """Instruction set and threads."""
        return f"{self.isa} x {self.threads}"


def header(machine: Mapping[str, str | int], steps: int) -> str:
    """What is compared, and where."""
    return f"fused-opt {machine['fused_opt']} against torch {machine['torch']}, Python {machine['python']}, {machine['cpu']}; {steps} steps"


def show(console: Console, rows: Sequence[Row], verbose: bool) -> None:
    """Print what is promised, then what is not, and what is broken in words. Without `verbose` it fits 80 columns."""
    groups = [[row] for row in rows] if verbose else _by_optimizer(rows)
    ran_on = list(dict.fromkeys(row.ran_on for row in rows))
    several = len(ran_on) > 1
    console.print(f"Ours ran on {', '.join(ran_on)} (instruction set x threads).")
    console.print("Values are counted by their distance in ULP.")

    console.print("\nPromised: torch's fused kernels (RMSprop: the for-loop with IEEE square roots); 16 bits: these in fp32, rounded")
    if any(row.staged for row in rows):
        console.print("and, + stages: clipping, regularisation, averages and weights beside a step, by torch's operations one by one")
    table = _table(verbose, several)
    table.add_column("promise", no_wrap=True)
    for group in groups:
        cells = _cells(group, [row.reference for row in group], verbose, several)
        table.add_row(*cells, _promise(row.broken for row in group))
    console.print(table)

    exact_groups = [[row for row in group if row.exactness] for group in groups]
    if any(exact_groups):
        _show_exactness(console, list(filter(None, exact_groups)), verbose, several)

    on = f" on {ran_on[0]}" if several else ""
    table = _table(verbose, several=False)
    for group in groups:
        for_loop = [row.for_loop for row in group if row.for_loop]
        if for_loop and group[0].ran_on == ran_on[0]:
            table.add_row(*_cells(group, for_loop, verbose, several=False))
    if table.row_count:
        console.print(f"\nFor information: ours{on} against torch's default, the for-loop")
        console.print(table)
    console.print()

    broken = [(row, fault) for row in rows for fault in (row.broken, row.inexact) if fault]
    for row, fault in broken[:SHOWN]:
        what = f"{row.tensor} of {row.case} in {row.dtype} on {row.ran_on}"
        console.print(f"BROKEN: {what}: {fault}", markup=False)
    if len(broken) > SHOWN:
        console.print(f"... and {len(broken) - SHOWN} more promises are broken; --verbose shows all.")
    verdict = f"the promise is broken in {len(broken)} of {len(rows)} rows" if broken else "every bit is as promised"
    console.print(f"{sum(row.values for row in rows)} values compared: {verdict}.")


def _show_exactness(console: Console, groups: Sequence[list[Row]], verbose: bool, several: bool) -> None:
    """Print what is promised of 16-bit results. Each row must have an exactness."""
    console.print("\nPromised in 16 bits: within 1 ULP of the correctly rounded float64 result, after one step from the same numbers, and")
    console.print("never farther from the exact one than torch's for-loop. mean: distance from the exact one in ULP, ours / torch's")
    table = _table(verbose, several, fp32_cannot_tell=True)
    for name in ("mean", "promise"):
        table.add_column(name, no_wrap=True, justify="right")
    for group in groups:
        found = [row.exactness for row in group if row.exactness]
        cells = _cells(group, [each.difference for each in found], verbose, several)
        ours, torchs = (sum(getattr(each, name) for each in found) / len(found) for name in ("ours", "torchs"))
        uncertain = sum(each.uncertain for each in found)
        table.add_row(*cells, str(uncertain or "-"), f"{ours:.4f} / {torchs:.4f}", _promise(each.broken for each in found))
    console.print(table)


def _promise(broken: Iterable[str]) -> str:
    return "[red]BROKEN[/red]" if any(broken) else "kept"


def _by_optimizer(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str, str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.optimizer, row.dtype, row.ran_on, row.staged), []).append(row)
    return list(groups.values())


def _table(verbose: bool, several: bool, fp32_cannot_tell: bool = False) -> Table:
    """An empty one. What ours ran on has a column if that is `several`, in the summary in place of the cases."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    names = ("case", "dtype", "tensor") if verbose else ("optimizer", "dtype")
    for name in (*names, *(["ran on"] if several else [] if verbose else ["cases"])):
        table.add_column(name, no_wrap=name != "case")
    for name in ("values", *BUCKETS, "largest", *(["unclear"] if fp32_cannot_tell else [])):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(rows: Sequence[Row], differences: Sequence[Difference], verbose: bool, several: bool) -> list[str]:
    """The `_table`'s for rows alike in what it names."""
    first, total = rows[0], Difference.sum(differences)
    names = [first.case, first.dtype, first.tensor] if verbose else [first.optimizer + " + stages" * first.staged, first.dtype]
    if several:
        names.append(first.ran_on)
    elif not verbose:
        names.append(str(len({row.case for row in rows})))
    counts = [str(count) if count else "-" for count in total.counts.values()]
    largest = "NaN" if total.largest == FAR else str(total.largest)
    return [*names, str(sum(row.values for row in rows)), *counts, largest]
