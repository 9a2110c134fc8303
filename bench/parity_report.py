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
        return f"{self.isa}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def header(machine: Mapping[str, str | int], steps: int) -> str:
    """What is compared, and where."""
    return (
        f"fused-opt {machine['fused_opt']} against torch {machine['torch']}, Python {machine['python']}, "
        f"on {machine['cpu']}: {steps} steps"
    )


def show(console: Console, rows: Sequence[Row], verbose: bool) -> None:
    """Print one table of what is promised and one of what is not, and in words what is broken."""
    promised = _table(
        "Against the reference: torch's fused kernels (RMSprop: the for-loop with IEEE square roots)", verbose
    )
    promised.add_column("promise")
    default = _table(
        "Against torch's default, the for-loop, whose square root is not IEEE's: nothing promised", verbose
    )
    default.add_column("farthest")
    for group in [[row] for row in rows] if verbose else _by_optimizer(rows):
        promised.add_row(
            *_cells(group, [row.reference for row in group], verbose),
            "[red]BROKEN[/red]" if any(row.broken for row in group) else "kept",
        )
        farthest = max(group, key=lambda row: row.for_loop.largest)
        where = f"{farthest.tensor} of {farthest.case}" if farthest.for_loop.largest else ""
        default.add_row(*_cells(group, [row.for_loop for row in group], verbose), where)
    console.print(promised)
    console.print(default)

    broken = [row for row in rows if row.broken]
    for row in broken[:SHOWN]:
        what = f"{row.tensor} of {row.case} in {row.dtype} on {row.ran_on}"
        console.print(f"BROKEN: {what}: {row.broken}", markup=False)
    if len(broken) > SHOWN:
        console.print(f"... and {len(broken) - SHOWN} more; --verbose shows all")
    values = sum(row.values for row in rows)
    verdict = (
        f"the promise is broken in {len(broken)} of {len(rows)} rows" if broken else "every bit is the reference's"
    )
    console.print(f"{values} values compared: {verdict}.")


def _table(title: str, verbose: bool) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("case", "dtype", "ran on", "tensor") if verbose else ("optimizer", "dtype", "ran on", "cases"):
        table.add_column(name, no_wrap=name != "case")
    for name in ("values", *(f"{label} ULP" for label in BUCKETS), "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _by_optimizer(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.optimizer, row.dtype, row.ran_on), []).append(row)
    return list(groups.values())


def _cells(rows: Sequence[Row], differences: Sequence[Difference], verbose: bool) -> list[str]:
    first, total = rows[0], Difference.sum(differences)
    what = (
        [first.case, first.dtype, first.ran_on, first.tensor]
        if verbose
        else [first.optimizer, first.dtype, first.ran_on, str(len({row.case for row in rows}))]
    )
    counts = [str(count) if count else "-" for count in total.counts.values()]
    return [*what, str(sum(row.values for row in rows)), *counts, "NaN" if total.largest == FAR else str(total.largest)]
