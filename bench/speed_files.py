"""Steps as lines of numbers, for spreadsheets and plots: one for each contestant of each row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fused_opt.bench import speed_measure
from fused_opt.bench.speed_row import OURS, Row, Skipped
from fused_opt.bench.suite import Results

# What each column means; times in seconds, sizes in bytes, throughput in 1e9 bytes a second.
COLUMNS = (
    "workload",
    "tensors",
    "elements",
    "optimizer",
    "dtype",
    "layout",
    "our_state",
    "threads",
    "isa",
    "contestant",
    "rounds",
    "seconds",  # a step, median; then the quartiles
    "seconds_q1",
    "seconds_q3",
    "first_seconds",
    "speed_up",  # the contestant's time over ours in the same round, median; then the limits of its 95 % confidence interval
    "speed_up_low",
    "speed_up_high",
    "error",
    "detour",
    "wrong",
    "state_bytes",
    "step_bytes",
    "gb_per_s",
    "share_of_limit",
    "peak_bytes",
    "skipped",  # why there is nothing else
)


def write_csv(results: Results, path: Path) -> None:
    """All rows of steps. Where nothing is known, a field is empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in speed_measure.rows(results.part(speed_measure.PART)):
            writer.writerows(_lines(row, results))


def _lines(row: Row | Skipped, results: Results) -> Iterator[dict[str, Any]]:
    job = row.job
    what = {
        "workload": job.workload.name,
        "tensors": job.workload.tensors,
        "elements": job.workload.elements,
        "optimizer": job.configuration,
        "dtype": job.dtype,
        "layout": job.layout,
        "our_state": job.state,
        "threads": job.threads or results.settings["threads"],
        "isa": job.isa or results.machine["isa"],
    }
    if isinstance(row, Skipped):
        yield {**what, "contestant": job.against, "skipped": row.reason}
        return
    for name, seconds in row.seconds.items():
        ratio, share = row.speed_ups.get(name), row.share(name)
        yield {
            **what,
            "contestant": name,
            "rounds": len(row.samples[name]),
            "seconds": seconds.median,
            "seconds_q1": seconds.low,
            "seconds_q3": seconds.high,
            "first_seconds": row.first_seconds[name],
            "speed_up": 1.0 if name == OURS else ratio and ratio.median,
            "speed_up_low": ratio and ratio.low,
            "speed_up_high": ratio and ratio.high,
            "error": row.errors.get(name),
            "detour": row.detours.get(name),
            "wrong": name in row.wrong,
            "state_bytes": row.state_bytes[name],
            "step_bytes": row.step_bytes[name],
            "gb_per_s": row.gb_per_s(name),
            "share_of_limit": share and share.median,
            "peak_bytes": row.peak_bytes[name],
        }
