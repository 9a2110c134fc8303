"""Shows what `fused-opt bench` measured: as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fused_opt.bench.measure import Spread
from fused_opt.bench.speed_row import COMPARED_STEPS, CONFIGURATIONS, OURS, TORCH, Row, Skipped
from fused_opt.bench.ulp import FAR

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


def table(rows: Sequence[Row | Skipped]) -> Table:
    """One line for each row, in the order of measuring."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("workload", "optimizer"):
        result.add_column(name, no_wrap=True)
    for name in ("ours ms", "torch ms", "speed-up", *TORCH, "GB/s", "of limit", "ULP", "MB"):
        result.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = _cells(row) if isinstance(row, Row) else ["skipped"]
        last = following is not None and following.workload is not row.workload
        result.add_row(row.workload.name, row.configuration, *cells, end_section=last)
    return result


def notes(rows: Sequence[Row | Skipped], other_load: float | None) -> str:
    """How to read the table, its exceptions first. `other_load` is from `machine.OtherLoad`."""
    lines = []
    if other_load is not None and other_load > TOLERATED_LOAD:
        lines.append(
            f"Do not trust these times: other programs took {other_load:.0%} of the CPU meanwhile, "
            "and threads that wait for each other suffer from that out of proportion. Run it again on an idle machine."
        )
    lines += [f"{r.workload.name} {r.configuration} was skipped: it {r.reason}" for r in rows if isinstance(r, Skipped)]
    measured = [row for row in rows if isinstance(row, Row)]
    left_out = dict.fromkeys(row.workload.name for row in measured if row.left_out)
    if left_out:
        lines.append(f"...: not timed in a quick run of {', '.join(left_out)}; --full times everything")
    lines.append("speed-up: torch's time over ours, median of the rounds; for its fastest implementation (torch ms) and each")
    limits = [limit for row in measured for limit in row.limits]
    if limits:
        lines.append(
            "of limit: our GB/s over the machine's streaming limit in the same round, which was "
            f"{Spread.of(limits).median:.1f} GB/s (median; {min(limits):.1f} to {max(limits):.1f})"
        )
    lines.append(
        f"ULP: largest difference of a parameter after {COMPARED_STEPS} steps from torch's fused step (RMSprop: from its for-loop).\n"
        "A few are expected: torch computes elements that fill no vector in double precision, and rounds some of RMSprop's\n"
        "square roots otherwise; `fused-opt parity` compares with what is promised"
    )
    lines.append("MB: by how much the process's memory grew during a step, ours / torch's fastest")
    return "\n".join(lines)


def to_json(machine: Machine, settings: Mapping[str, Any], rows: Sequence[Row | Skipped], other_load: float | None) -> dict[str, Any]:
    """Everything that was measured. Times are in seconds, sizes in bytes, throughput in 1e9 bytes a second."""
    return {
        "machine": dict(machine),
        "settings": dict(settings),
        "other_load": other_load,
        "rows": [_row_json(row) for row in rows],
    }


def _cells(row: Row) -> list[str]:
    def speed_up(name: str) -> str:
        return f"{row.speed_ups[name].median:.2f}" if name in row.speed_ups else "..." if name in row.left_out else "-"

    fastest = row.fastest
    return [
        _milliseconds(row.seconds[OURS].median),
        f"{fastest} {_milliseconds(row.seconds[fastest].median)}",
        f"[bold]{row.speed_ups[fastest].median:.2f}[/bold]",
        *map(speed_up, TORCH),
        f"{row.gb_per_s:.1f}",
        f"{row.share.median:.0%}" if row.share else "-",
        "NaN" if row.max_ulp == FAR else str(row.max_ulp),
        f"{_megabytes(row.peak_bytes[OURS])} / {_megabytes(row.peak_bytes[fastest])}",
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{3 if seconds < 0.01 else 1}f}"


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.0f}"


def _row_json(row: Row | Skipped) -> dict[str, Any]:
    case = CONFIGURATIONS[row.configuration]
    what = {
        "workload": row.workload.name,
        "tensors": row.workload.tensors,
        "elements": row.workload.elements,
        "configuration": row.configuration,
        "optimizer": case.optimizer,
        "options": dict(case.options),
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
        "max_ulp": row.max_ulp,
        "compared_with": row.compared_with,
        "compared_steps": COMPARED_STEPS,
        "left_out": row.left_out,
        "peak_bytes": row.peak_bytes,
    }
