"""Shows what `fused-opt bench` measured: as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED
from fused_opt.bench.measure import Spread
from fused_opt.bench.speed_row import CONTIGUOUS, OURS, TORCH, Row, Skipped

Machine = Mapping[str, str | int]

# Share of the CPU that other programs may take. An idle desktop takes 1 to 3 %; with one of 2 cores taken by another
# program (50 %), a step of torch's that starts a thread team for each tensor took up to 100 times as long.
TOLERATED_LOAD = 0.1


def header(machine: Machine, threads: int) -> str:
    """Two lines: what was measured, and where."""
    return (
        f"fused-opt {machine['fused_opt']} on {machine['isa']} ({machine['why']}), "
        f"torch {machine['torch']}, Python {machine['python']}\n"
        f"{machine['cpu']}, cores: {machine['cores']}, threads: {threads}"
    )


def tables(rows: Sequence[Row | Skipped]) -> Group:
    """A table for each dtype and layout, with one line for each row in the order of measuring."""
    groups: dict[tuple[str, str], list[Row | Skipped]] = {}
    for row in rows:
        groups.setdefault((row.job.dtype, row.job.layout), []).append(row)
    return Group(*(_table(dtype, layout, group) for (dtype, layout), group in groups.items()))


def _table(dtype: str, layout: str, rows: Sequence[Row | Skipped]) -> Table:
    others = [*TORCH] if layout == "contiguous" else [*TORCH, CONTIGUOUS]
    result = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=f"{dtype}, {layout}", title_justify="left")
    for name in ("workload", "optimizer"):
        result.add_column(name, no_wrap=True)
    for name in ("ours ms", "torch ms", "speed-up", *others, "GB/s", "of limit", "error", "MB"):
        result.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = _cells(row, others) if isinstance(row, Row) else ["skipped"]
        last = following is not None and following.job.workload is not row.job.workload
        result.add_row(row.job.workload.name, row.job.configuration, *cells, end_section=last)
    return result


def notes(rows: Sequence[Row | Skipped], other_load: float | None) -> str:
    """How to read the table, its exceptions first. `other_load` is from `machine.OtherLoad`."""
    lines = []
    if other_load is not None and other_load > TOLERATED_LOAD:
        lines.append(
            f"Do not trust these times: other programs took {other_load:.0%} of the CPU meanwhile, "
            "and threads that wait for each other suffer from that out of proportion. Run it again on an idle machine."
        )
    lines += [f"{row.job} was skipped: it {row.reason}" for row in rows if isinstance(row, Skipped)]
    measured = [row for row in rows if isinstance(row, Row)]
    lines += [
        f"{'fused_opt' if name == OURS else f'torch, {name}'} is WRONG: {row.job}: error {_error(row.errors[name])}"
        for row in measured
        for name in row.wrong
    ]
    if lines:
        lines.append("")
    if any(row.wrong for row in measured):
        lines.append(f"!: wrong, with an error above {TOLERATED:.0f}, more than rounding explains; does not count as torch's fastest")
    left_out = dict.fromkeys(row.job.workload.name for row in measured if row.left_out)
    if left_out:
        lines.append(f"...: not timed in a quick run of {', '.join(left_out)}; --full times everything")
    lines.append("speed-up: torch's time over ours, median of the rounds; for its fastest implementation that is right (torch ms) and each")
    if any(CONTIGUOUS in row.samples for row in measured):
        lines.append(f"{CONTIGUOUS}: the time of our step on contiguous tensors over that on these, in the same rounds")
    limits = [limit for row in measured for limit in row.limits]
    if limits:
        lines.append(
            "of limit: our GB/s over the machine's streaming limit in the same round, which was "
            f"{Spread.of(limits).median:.1f} GB/s (median; {min(limits):.1f} to {max(limits):.1f})"
        )
    lines.append(
        f"error: a parameter's largest one after {COMPARED_STEPS} steps, against torch's for-loop in float64, ours / torch's fastest;\n"
        "in units of the dtype's eps times the parameter's magnitude. `fused-opt parity` compares bits with what is promised"
    )
    lines.append("MB: by how much the process's memory grew during a step, ours / torch's fastest")
    return "\n".join(lines)


def to_json(machine: Machine, settings: Mapping[str, Any], rows: Sequence[Row | Skipped], other_load: float | None) -> dict[str, Any]:
    """Everything that was measured. Times are in seconds, sizes in bytes, throughput in 1e9 bytes a second; an infinite error is null."""
    return {
        "machine": dict(machine),
        "settings": dict(settings),
        "other_load": other_load,
        "rows": [_row_json(row) for row in rows],
    }


def _cells(row: Row, others: Sequence[str]) -> list[str]:
    def speed_up(name: str) -> str:
        if name not in row.speed_ups:
            return "..." if name in row.left_out else "-"
        ratio = f"{row.speed_ups[name].median:.2f}"
        return f"[red]! {ratio}[/red]" if name in row.wrong else ratio

    fastest = row.fastest
    error = f"{_error(row.errors[OURS])} / {_error(row.errors[fastest])}"
    return [
        _milliseconds(row.seconds[OURS].median),
        f"{fastest} {_milliseconds(row.seconds[fastest].median)}",
        f"[bold]{row.speed_ups[fastest].median:.2f}[/bold]",
        *map(speed_up, others),
        f"{row.gb_per_s:.1f}",
        f"{row.share.median:.0%}" if row.share else "-",
        f"[red]{error}[/red]" if OURS in row.wrong else error,
        f"{_megabytes(row.peak_bytes[OURS])} / {_megabytes(row.peak_bytes[fastest])}",
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{3 if seconds < 0.01 else 1}f}"


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.0f}"


def _error(error: float) -> str:
    return f"{error:.1f}" if error < 1000 else f"{error:.0e}"


def _row_json(row: Row | Skipped) -> dict[str, Any]:
    job = row.job
    what = {
        "workload": job.workload.name,
        "tensors": job.workload.tensors,
        "elements": job.workload.elements,
        "dtype": job.dtype,
        "layout": job.layout,
        "configuration": job.configuration,
        "optimizer": job.case.optimizer,
        "options": dict(job.case.options),
    }
    if isinstance(row, Skipped):
        return {**what, "skipped": row.reason}
    return {
        **what,
        "threads": row.threads,
        "step_bytes": row.step_bytes,
        "seconds": {name: asdict(spread) for name, spread in row.seconds.items()},
        "samples": row.samples,
        "speed_up": {name: asdict(spread) for name, spread in row.speed_ups.items()},
        "fastest": row.fastest,
        "gb_per_s": row.gb_per_s,
        "streaming_limits": row.limits,
        "share_of_limit": asdict(row.share) if row.share else None,
        "errors": {name: error if math.isfinite(error) else None for name, error in row.errors.items()},
        "wrong": row.wrong,
        "compared_steps": COMPARED_STEPS,
        "left_out": row.left_out,
        "peak_bytes": row.peak_bytes,
    }
