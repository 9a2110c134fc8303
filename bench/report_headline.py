"""The few figures that a report begins with, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fused_opt.bench import conformance, end_to_end_row, quality_report, quality_units, speed_measure
from fused_opt.bench.conformance_checks import DTYPES, STEPS
from fused_opt.bench.conformance_report import CLOSE_TO, COARSE, EQUAL, IGNORED, Conformance
from fused_opt.bench.measure import Estimate
from fused_opt.bench.pictures import in_words, ratio
from fused_opt.bench.quality_report import Comparison
from fused_opt.bench.speed_plan import AS_TORCH, INT8, TORCH
from fused_opt.bench.speed_row import OURS, PLAIN, Row
from fused_opt.bench.suite import Record, Results

MOST = 5
OVER = "A step's time with torch's fastest right implementation over that with ours, in float32"


@dataclass(frozen=True)
class Claim:
    """A figure with its unit, what it is of, and what one must know to read it."""

    figure: str
    what: str
    details: str


def claims(results: Results) -> list[Claim]:
    """Up to `MOST`, of what was measured."""
    rows = [row for row in speed_measure.rows(results.part(speed_measure.PART)) if isinstance(row, Row)]
    found = [
        _speed_up(rows, "adamw", "AdamW"),
        _speed_up(rows, "rmsprop", "RMSprop"),
        _state_bytes(rows, quality_report.compare(results.part(quality_units.PART).values())),
        _conformance(results.part(conformance.PART)),
        _training(results.part(end_to_end_row.PART)),
        _speed_up(rows, "sgd-momentum", "SGD with momentum"),
    ]
    return [claim for claim in found if claim][:MOST]


def _speed_up(rows: Sequence[Row], configuration: str, what: str) -> Claim | None:
    """In float32, with everything as most people have it."""
    plain = (configuration, "float32", "contiguous", AS_TORCH, 0, "", TORCH)
    ratios = {
        row.job.workload.name: row.speed_ups[row.fastest]
        for row in rows
        if (row.job.configuration, row.job.dtype, row.job.layout, row.job.state, row.job.threads, row.job.isa, row.job.against) == plain
        and row.others
        and OURS not in row.wrong
    }
    if not ratios:
        return None
    least, most = (choose(ratios, key=lambda name: ratios[name].median) for choose in (min, max))
    figure = _times(ratios[least]) if least == most else f"{_times(ratios[least])} to {_times(ratios[most])}"
    of_each = {f"on {name}": f"{ratio(ratios[name].median)} ({_interval(ratios[name])})" for name in (least, most)}
    middle = f"; median of {len(ratios)} workloads: {ratio(statistics.median(each.median for each in ratios.values()))}"
    return Claim(figure, f"speed of {what} over torch", f"{OVER}: {in_words(of_each)}{middle if len(ratios) > 1 else ''}.")


def _state_bytes(rows: Sequence[Row], trained: Sequence[Comparison]) -> Claim | None:
    """On the largest workload: tensors below 4096 values keep float32 states."""
    coded = [row for row in rows if row.job.state == INT8 and row.job.configuration == "adamw" and PLAIN in row.state_bytes]
    if not coded:
        return None
    row = max(coded, key=lambda row: (row.job.workload.elements, row.job.dtype == "float32"))
    exact, speed = row.bytes_a_value(PLAIN), row.speed_ups[PLAIN]
    return Claim(
        f"{row.bytes_a_value(OURS):.2f} bytes",
        f"a parameter for AdamW's 8-bit states, instead of {exact:.2f}",
        f"On {row.job.workload.name}, where a step with them has {_times(speed)} the speed of ours without ({_interval(speed)})."
        f"{_what_they_cost(trained)}",
    )


def _what_they_cost(trained: Sequence[Comparison]) -> str:
    """8-bit states, in the first training."""
    found = next((each for each in trained if INT8 in each.values), None)
    if not found:
        return ""
    return (
        f" They change the held-out {found.metric} of {found.task} with {found.optimizer} by {found.change(INT8):+.4f}; another seed by "
        f"{found.seeds_spread:.4f}."
    )


def _conformance(records: Mapping[str, Record]) -> Claim | None:
    """Of ours with states as in torch, and of all other packages together."""
    measured = [Conformance.from_record(*each) for each in records.items()]
    words = [verdict.word for each in measured if each.name == OURS for verdict in each.verdicts.values()]
    others = [verdict.word for each in measured if each.package not in ("torch", "fused_opt") for verdict in each.verdicts.values()]
    if not words:
        return None
    beside = f" Other packages: {_kept(others)}, with {others.count(IGNORED)} ignored silently." if others else ""
    return Claim(
        _kept(words),
        "options and ways of use in which ours computes what torch does",
        f"In {' and '.join(DTYPES)}, compared with torch's for-loop in float64 after up to {max(STEPS)} steps.{beside}",
    )


def _kept(words: Sequence[str]) -> str:
    return f"{sum(word in (EQUAL, CLOSE_TO, COARSE) for word in words)} of {len(words)}"


def _training(records: Mapping[str, Record]) -> Claim | None:
    """Of the largest model."""
    rows = [row for record in records.values() for row in end_to_end_row.from_record(record) if row.optimizer == end_to_end_row.OURS]
    found = [(row, row.speed_up(end_to_end_row.TORCH), row.speed_up(end_to_end_row.FUSED)) for row in rows if not row.wrong]
    compared = [(row, over, fused) for row, over, fused in found if over]
    if not compared:
        return None
    row, over, fused = max(compared, key=lambda each: each[0].parameters)
    beside = f"; over fused=True: {ratio(fused.median)} ({_interval(fused)})" if fused else ""
    return Claim(
        _times(over),
        "speed of whole training steps with AdamW, over torch's default",
        f"{row.model}, {row.parameters / 1e6:.3g}M parameters, {row.tokens:,} tokens a step: {ratio(over.median)} ({_interval(over)})"
        f"{beside}.",
    )


def _times(estimate: Estimate) -> str:
    return f"{ratio(estimate.median)}\N{MULTIPLICATION SIGN}"


def _interval(estimate: Estimate) -> str:
    return f"95 %: {ratio(estimate.low)} to {ratio(estimate.high)}"
