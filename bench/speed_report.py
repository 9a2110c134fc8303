"""Tables of what `fused-opt bench` measured of steps and of blockwise quantization, and how to read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fused_opt.bench.block_peers import DEQUANTIZE, QUANTIZE
from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED
from fused_opt.bench.measure import Estimate, Spread
from fused_opt.bench.sheet import BAD, STRONG, Cell, Sheet
from fused_opt.bench.speed_blocks import INTO, Blocks
from fused_opt.bench.speed_plan import AS_TORCH, TORCH
from fused_opt.bench.speed_row import CONTIGUOUS, IN_TORCH, OURS, PLAIN, Row, Skipped


def sheets(rows: Sequence[Row | Skipped]) -> list[Sheet]:
    """Of steps: a table for each dtype, layout and format of states, with one line for each row in the order of measuring; then others."""
    groups: dict[tuple[str, str, str], list[Row | Skipped]] = {}
    against = []
    for row in rows:
        if row.job.against == TORCH:
            groups.setdefault((row.job.dtype, row.job.layout, row.job.state), []).append(row)
        else:
            against.append(row)
    found = [_against_torch(*key, group) for key, group in groups.items()]
    if against:
        found.append(_against_others(against))
    if measured := [row for row in rows if isinstance(row, Row)]:
        found.append(_memory(measured))
    return found


def block_sheets(measured: Sequence[Blocks]) -> list[Sheet]:
    """Of blockwise quantization."""
    found = [_blocks_sheet(blocks) for blocks in measured]
    return found + [_block_peers_sheet(blocks) for blocks in measured if any(row.peers for row in blocks.rows)]


def package_sheet(packages: Mapping[str, str]) -> Sheet:
    """Which other packages were there. `packages` is from `implementations.packages`."""
    result = Sheet("Other packages", ["package", "version, or why it is not measured"], [])
    for name, found in packages.items():
        result.add(name, found)
    return result


def _against_torch(dtype: str, layout: str, state: str, rows: Sequence[Row | Skipped]) -> Sheet:
    others = [*IN_TORCH, *([CONTIGUOUS] if layout != "contiguous" else []), *([PLAIN] if state != AS_TORCH else [])]
    title = f"{dtype}, {layout}" if state == AS_TORCH else f"{dtype}, {layout}, our states {state}"
    coded = ["codes"] if state != AS_TORCH else []
    values = ["ours ms", "torch ms", "speed-up", "interval", *others, "GB/s", "of limit", "error", *coded]
    result = Sheet(title, [*_job_columns(rows), "optimizer"], values)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is not None and following.job.workload is not row.job.workload
        cells = _torch_cells(row, others) if isinstance(row, Row) else [Cell("skipped", BAD)]
        result.add(*_job_cells(row, rows), row.job.configuration, *cells, end_section=last)
    measured = [row for row in rows if isinstance(row, Row)]
    result.notes = [*_skipped_notes(rows), *(note for row in measured for note in wrong_notes(row)), *_reading_notes(measured)]
    return result


def _job_columns(rows: Sequence[Row | Skipped]) -> list[str]:
    """Beside the optimizer's: what differs between the rows, or is worth its place anyway."""
    own = ["threads"] if any(row.job.threads for row in rows) else []
    return ["workload", *own, *(["isa"] if any(row.job.isa for row in rows) else [])]


def _job_cells(row: Row | Skipped, rows: Sequence[Row | Skipped]) -> list[str]:
    cells = {"workload": row.job.workload.name, "threads": str(row.job.threads or "-"), "isa": row.job.isa or "-"}
    return [cells[name] for name in _job_columns(rows)]


def _torch_cells(row: Row, others: Sequence[str]) -> list[Cell | str]:
    def speed_up(name: str) -> Cell | str:
        if name not in row.speed_ups:
            return "..." if name in row.left_out else "-"
        ratio = f"{row.speed_ups[name].median:.2f}"
        return Cell(f"! {ratio}", BAD) if name in row.wrong else ratio

    fastest, share = row.fastest if row.others else "", row.share()
    error = " / ".join(_error(row.errors[name]) for name in (OURS, fastest) if name)
    ratio = row.speed_ups.get(fastest)
    return [
        milliseconds(row.seconds[OURS].median),
        f"{fastest} {milliseconds(row.seconds[fastest].median)}" if fastest else "-",
        Cell(f"{ratio.median:.2f}", STRONG) if ratio else "-",
        interval(ratio) if ratio else "-",
        *map(speed_up, others),
        f"{row.gb_per_s():.1f}",
        f"{share.median:.0%}" if share else "-",
        Cell(error, BAD) if OURS in row.wrong else error,
        *([f"{row.detours[OURS]:.1%}"] if row.job.state != AS_TORCH else []),
    ]


def _against_others(rows: Sequence[Row | Skipped]) -> Sheet:
    result = Sheet(
        "Implementations in processes of their own, each beside ours with states of the nearest format",
        [*_job_columns(rows), "dtype", "optimizer", "implementation"],
        ["ms", "ours ms", "speed-up", "interval", "state bytes", "ours", "off by", "ours"],
    )
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        job = row.job
        last = following is not None and following.job.workload is not job.workload
        cells: list[Cell | str] = [Cell("not measured", BAD)]
        if isinstance(row, Row):
            name = job.against
            ratio = row.speed_ups[name]
            cells = [
                milliseconds(row.seconds[name].median),
                milliseconds(row.seconds[OURS].median),
                Cell(f"{ratio.median:.2f}", STRONG),
                interval(ratio),
                f"{row.bytes_a_value(name):.2f}",
                f"{row.bytes_a_value(OURS):.2f}",
                _off_by(row, name),
                _off_by(row, OURS),
            ]
        result.add(*_job_cells(row, rows), job.dtype, job.configuration, job.against, *cells, end_section=last)
    result.notes = [
        *_skipped_notes(rows),
        "speed-up: its time over ours, the median of the rounds. state bytes: of a parameter's value in all states. off by: a parameter's "
        f"largest distance from torch's for-loop in float64 after {COMPARED_STEPS} steps, as a share of its way. !: more than rounding or "
        "codes explain: another formula.",
    ]
    return result


def _off_by(row: Row, name: str) -> Cell | str:
    share = f"{row.detours[name]:.2g}"
    return Cell(f"! {share}", BAD) if name in row.wrong else share


def _memory(rows: Sequence[Row]) -> Sheet:
    """First steps, and memory: one line for each contestant of a row."""
    result = Sheet(
        "First step, and memory",
        [*_job_columns(rows), "dtype", "optimizer", "implementation"],
        ["first step ms", "steady ms", "state bytes", "temporaries MB"],
    )
    for row in rows:
        names = list(row.samples)
        for name in names:
            result.add(
                *_job_cells(row, rows),
                row.job.dtype,
                row.job.configuration,
                f"{OURS}, {row.job.state}" if name == OURS and row.job.state != AS_TORCH else name,
                milliseconds(row.first_seconds[name]),
                milliseconds(row.seconds[name].median),
                f"{row.bytes_a_value(name):.2f}",
                _megabytes(row.peak_bytes[name]),
                end_section=name == names[-1],
            )
    result.notes = [
        "first step: it makes the states, and compiles if it does. state bytes: of a parameter's value in all states. "
        "temporaries: by how much the process's memory grew during a later step."
    ]
    return result


def _blocks_sheet(blocks: Blocks) -> Sheet:
    """Of each function a line: with a new result, and into one that is there."""
    found = {row.function: row for row in blocks.rows}
    columns = ["values", "new: ms", "GB/s", "of limit", "out=: ms", "GB/s", "of limit"]
    result = Sheet("float32 to 8-bit codes in blocks of 256, and back", ["function"], columns)
    if blocks.skipped:
        result.notes = [f"quantize_blockwise was skipped: it {blocks.skipped}"]
        return result
    for name in (QUANTIZE, DEQUANTIZE):
        cells = [
            cell
            for row in (found[name], found[name + INTO])
            for cell in (milliseconds(Spread.of(row.seconds).median), f"{row.gb_per_s.median:.1f}", f"{row.share.median:.0%}")
        ]
        result.add(f"{name}_blockwise", f"{found[name].elements:,}", *cells)
    result.notes = ["new: the result is in new memory, which the system has to clear; out=: it is written over an earlier one."]
    if not all(row.right for row in blocks.rows):
        result.notes.append(
            "fused_opt is WRONG: what dequantize_blockwise makes of quantize_blockwise's codes is farther off than documented"
        )
    return result


def _block_peers_sheet(blocks: Blocks) -> Sheet:
    result = Sheet("Blockwise quantization of other packages", ["function", "package"], ["ms", "speed-up", "interval"])
    for row in blocks.rows:
        for peer in row.peers:
            if peer.failure:
                result.add(f"{row.function}_blockwise", peer.peer, Cell("failed", BAD))
                result.notes.append(f"{row.function}_blockwise of {peer.peer} failed: {peer.failure}")
            else:
                cells = (milliseconds(Spread.of(peer.seconds).median), f"{peer.ratio.median:.1f}", interval(peer.ratio))
                result.add(f"{row.function}_blockwise", peer.peer, *cells)
    return result


def _skipped_notes(rows: Iterable[Row | Skipped]) -> list[str]:
    return [f"{row.job} was skipped: {row.reason}" for row in rows if isinstance(row, Skipped)]


def wrong_notes(row: Row) -> list[str]:
    """A sentence for each contestant that is wrong."""
    lines = []
    for name in row.wrong:
        who = f"torch, {name}" if name in IN_TORCH else name.replace(OURS, "fused_opt")
        states = f", states {row.coded[name].states:.3g} times as far off as their code allows" if name in row.coded else ""
        lines.append(f"{who} is WRONG: {row.job}: error {_error(row.errors[name])}{states}")
    return lines


def _reading_notes(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    notes = [
        "speed-up: torch's time over ours, median of the rounds with its interval (95 % confidence with 6 rounds or more; of fewer, least "
        "to largest); for its fastest implementation that is right (torch ms), and for each."
    ]
    if any(row.wrong for row in rows):
        notes.append(f"!: wrong, with an error above {TOLERATED:.0f}, more than rounding explains; does not count as torch's fastest.")
    if left_out := dict.fromkeys(row.job.workload.name for row in rows if row.left_out):
        notes.append(f"...: not timed on {', '.join(left_out)}, for they are slow; --full with a workload times everything.")
    for name, what in (
        (CONTIGUOUS, "on contiguous tensors over that on these"),
        (PLAIN, "with states as torch has them over that with these"),
    ):
        if any(name in row.samples for row in rows):
            notes.append(f"{name}: the time of our step {what}, in the same rounds.")
    if limits := [limit for row in rows for limit in row.limits]:
        notes.append(
            "of limit: our GB/s over the machine's streaming limit in the same round, which was "
            f"{Spread.of(limits).median:.1f} GB/s (median; {min(limits):.1f} to {max(limits):.1f})."
        )
    notes.append(
        f"error: a parameter's largest one after {COMPARED_STEPS} steps, against torch's for-loop in float64, ours / torch's fastest; in "
        "units of the dtype's eps times the parameter's magnitude. `fused-opt parity` compares bits with what is promised."
    )
    if any(row.coded for row in rows):
        notes.append(
            "With 8-bit states: of any one step, against one in float64 from the states that the codes stand for; new codes must be as "
            f"close as documented. codes: what they cost: a parameter's largest distance from a run without them after {COMPARED_STEPS} "
            "steps, in percent of its way."
        )
    return notes


def milliseconds(seconds: float) -> str:
    """With three digits after the point below 10 ms, and one above."""
    return f"{1e3 * seconds:.{3 if seconds < 0.01 else 1}f}"


def interval(estimate: Estimate) -> str:
    """Its limits."""
    return f"{estimate.low:.2f} to {estimate.high:.2f}"


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.0f}"


def _error(error: float) -> str:
    return f"{error:.1f}" if error < 1000 else f"{error:.0e}"
