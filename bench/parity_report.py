"""Shows what `fused-opt parity` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fused_opt.bench.cases import Case
from fused_opt.bench.ulp import BUCKETS, FAR, histogram, max_ulp

# Broken promises shown in words; the table and the JSON file have all of them.
SHOWN = 10


@dataclass(frozen=True)
class Difference:
    """How far tensors are apart: the number of values in each of ulp.BUCKETS, and the largest distance in ULP."""

    counts: Mapping[str, int]
    largest: int

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> Difference:
        """Of two tensors of one shape and one dtype."""
        return cls(histogram(a, b), max_ulp(a, b))

    @classmethod
    def sum(cls, parts: Sequence[Difference]) -> Difference:
        """Of all that `parts` compared."""
        return cls({label: sum(d.counts[label] for d in parts) for label in BUCKETS}, max(d.largest for d in parts))


@dataclass(frozen=True)
class Row:
    """One kind of tensor of one case, all shapes together.

    Attributes:
        optimizer, options, dtype: what stepped.
        isa, threads: what our code says it ran on.
        tensor: "param" or a state's key.
        values: the number of values compared.
        reference: the difference from bench/reference.py, which is promised to be none.
        broken: the first value whose bits are not the reference's, in words, or "" if the promise is kept.
        for_loop: the difference from torch's for-loop, its default on the CPU, of which nothing is promised.
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
    for_loop: Difference

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

    console.print("\nPromised: torch's fused kernels (RMSprop: the for-loop with IEEE square roots)")
    table = _table(verbose, several)
    table.add_column("promise", no_wrap=True)
    for group in groups:
        promise = "[red]BROKEN[/red]" if any(row.broken for row in group) else "kept"
        table.add_row(*_cells(group, [row.reference for row in group], verbose, several), promise)
    console.print(table)

    on = f" on {ran_on[0]}" if several else ""
    console.print(f"\nFor information: ours{on} against torch's default, the for-loop")
    table = _table(verbose, several=False)
    for group in groups:
        if group[0].ran_on == ran_on[0]:
            table.add_row(*_cells(group, [row.for_loop for row in group], verbose, several=False))
    console.print(table, end="\n\n")

    broken = [row for row in rows if row.broken]
    for row in broken[:SHOWN]:
        what = f"{row.tensor} of {row.case} in {row.dtype} on {row.ran_on}"
        console.print(f"BROKEN: {what}: {row.broken}", markup=False)
    if len(broken) > SHOWN:
        console.print(f"... and {len(broken) - SHOWN} more rows are broken; --verbose shows all.")
    verdict = f"the promise is broken in {len(broken)} of {len(rows)} rows" if broken else "every bit is as promised"
    console.print(f"{sum(row.values for row in rows)} values compared: {verdict}.")


def _by_optimizer(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.optimizer, row.dtype, row.ran_on), []).append(row)
    return list(groups.values())


def _table(verbose: bool, several: bool) -> Table:
    """An empty one. What ours ran on has a column if that is `several`, in the summary in place of the cases."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    names = ("case", "dtype", "tensor") if verbose else ("optimizer", "dtype")
    for name in (*names, *(["ran on"] if several else [] if verbose else ["cases"])):
        table.add_column(name, no_wrap=name != "case")
    for name in ("values", *BUCKETS, "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(rows: Sequence[Row], differences: Sequence[Difference], verbose: bool, several: bool) -> list[str]:
    """The `_table`'s for rows alike in what it names."""
    first, total = rows[0], Difference.sum(differences)
    names = [first.case, first.dtype, first.tensor] if verbose else [first.optimizer, first.dtype]
    if several:
        names.append(first.ran_on)
    elif not verbose:
        names.append(str(len({row.case for row in rows})))
    counts = [str(count) if count else "-" for count in total.counts.values()]
    largest = "NaN" if total.largest == FAR else str(total.largest)
    return [*names, str(sum(row.values for row in rows)), *counts, largest]
