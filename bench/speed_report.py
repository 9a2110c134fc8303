"""Shows what `fused-opt bench` measured: as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED
from fused_opt.bench.measure import Spread
from fused_opt.bench.peers import Beside
from fused_opt.bench.speed_blocks import DEQUANTIZE, INTO, QUANTIZE, Blocks, BlocksRow
from fused_opt.bench.speed_plan import AS_TORCH
from fused_opt.bench.speed_row import CONTIGUOUS, OURS, PLAIN, TORCH, Row, Skipped

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


def tables(rows: Sequence[Row | Skipped], blocks: Blocks) -> Group:
    """A table for each dtype, layout and format of states, with one line for each row in the order of measuring; then the others."""
    groups: dict[tuple[str, str, str], list[Row | Skipped]] = {}
    for row in rows:
        groups.setdefault((row.job.dtype, row.job.layout, row.job.state), []).append(row)
    found = [_table(*key, group) for key, group in groups.items()]
    if blocks.rows:
        found.append(_blocks_table(blocks.rows))
    if peers := _peers(rows, blocks):
        found.append(_peers_table(peers))
    return Group(*found)


def _empty_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    result = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    for name in left:
        result.add_column(name, no_wrap=True)
    for name in right:
        result.add_column(name, justify="right", no_wrap=True)
    return result


def _table(dtype: str, layout: str, state: str, rows: Sequence[Row | Skipped]) -> Table:
    others = [*TORCH, *([CONTIGUOUS] if layout != "contiguous" else []), *([PLAIN] if state != AS_TORCH else [])]
    title = f"{dtype}, {layout}" if state == AS_TORCH else f"{dtype}, {layout}, our states {state}"
    coded = ["codes", "state bytes"] if state != AS_TORCH else []
    measured = ["ours ms", "torch ms", "speed-up", *others, "GB/s", "of limit", "error", *coded, "MB"]
    result = _empty_table(title, ["workload", "optimizer"], measured)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = _cells(row, others) if isinstance(row, Row) else ["skipped"]
        last = following is not None and following.job.workload is not row.job.workload
        result.add_row(row.job.workload.name, row.job.configuration, *cells, end_section=last)
    return result


def _blocks_table(rows: Sequence[BlocksRow]) -> Table:
    """Of each function a line: with a new result, and into one that is there."""
    found = {row.function: row for row in rows}
    columns = ["values", "new: ms", "GB/s", "of limit", "out=: ms", "GB/s", "of limit"]
    result = _empty_table("float32 to 8-bit codes in blocks of 256, and back", ["function"], columns)
    for name in (QUANTIZE, DEQUANTIZE):
        cells = [
            cell
            for row in (found[name], found[name + INTO])
            for cell in (_milliseconds(Spread.of(row.seconds).median), f"{row.gb_per_s.median:.1f}", f"{row.share.median:.0%}")
        ]
        result.add_row(f"{name}_blockwise", f"{found[name].elements:,}", *cells)
    return result


def _peers_table(peers: Sequence[tuple[str, Beside]]) -> Table:
    result = _empty_table("8-bit code of other packages", ["what", "package"], ["ms", "ours is faster by", "codes"])
    for what, peer in peers:
        if peer.failure:
            result.add_row(what, peer.peer, "failed")
        else:
            detour = "-" if peer.detour is None else f"{peer.detour:.1%}"
            result.add_row(what, peer.peer, _milliseconds(peer.seconds.median), f"{peer.ratio.median:.1f}", detour)
    return result


def _peers(rows: Sequence[Row | Skipped], blocks: Blocks) -> list[tuple[str, Beside]]:
    """Those of all rows, each with what it was measured on."""
    steps = [(str(row.job), peer) for row in rows if isinstance(row, Row) for peer in row.peers]
    return steps + [(f"{row.function}_blockwise", peer) for row in blocks.rows for peer in row.peers]


def notes(rows: Sequence[Row | Skipped], blocks: Blocks, other_load: float | None) -> str:
    """How to read the tables, their exceptions first. `other_load` is from `machine.OtherLoad`."""
    measured = [row for row in rows if isinstance(row, Row)]
    lines = _exceptions(rows, blocks, other_load)
    if lines:
        lines.append("")
    if any(row.wrong for row in measured):
        lines.append(f"!: wrong, with an error above {TOLERATED:.0f}, more than rounding explains; does not count as torch's fastest")
    left_out = dict.fromkeys(row.job.workload.name for row in measured if row.left_out)
    if left_out:
        lines.append(f"...: not timed in a quick run of {', '.join(left_out)}; --full times everything")
    if measured:
        lines.append(
            "speed-up: torch's time over ours, median of the rounds; for its fastest implementation that is right (torch ms) and each"
        )
    for name, what in (
        (CONTIGUOUS, "on contiguous tensors over that on these"),
        (PLAIN, "with states as torch has them over that with these"),
    ):
        if any(name in row.samples for row in measured):
            lines.append(f"{name}: the time of our step {what}, in the same rounds")
    if blocks.rows:
        lines.append("new: the result is in new memory, which the system has to clear; out=: it is written over an earlier one")
    limits = [limit for rounds in [row.limits for row in measured] + [row.limits for row in blocks.rows[:1]] for limit in rounds]
    if limits:
        lines.append(
            "of limit: our GB/s over the machine's streaming limit in the same round, which was "
            f"{Spread.of(limits).median:.1f} GB/s (median; {min(limits):.1f} to {max(limits):.1f})"
        )
    if measured:
        lines.append(
            f"error: a parameter's largest one after {COMPARED_STEPS} steps, against torch's for-loop in float64, ours / torch's fastest;\n"
            "in units of the dtype's eps times the parameter's magnitude. `fused-opt parity` compares bits with what is promised"
        )
    if any(row.coded for row in measured):
        lines.append(
            "With 8-bit states: of any one step, against one in float64 from the states that the codes stand for; new codes must be as "
            "close as documented.\n"
            f"codes: what they cost: a parameter's largest distance from a run without them after {COMPARED_STEPS} steps, in percent of "
            "its way\nstate bytes: of a parameter's value in all states, with scales, ours / as torch"
        )
    if measured:
        lines.append("MB: by how much the process's memory grew during a step, ours / torch's fastest")
    return "\n".join(lines)


def _exceptions(rows: Sequence[Row | Skipped], blocks: Blocks, other_load: float | None) -> list[str]:
    """What was not measured, or is wrong."""
    lines = []
    if other_load is not None and other_load > TOLERATED_LOAD:
        lines.append(
            f"Do not trust these times: other programs took {other_load:.0%} of the CPU meanwhile, "
            "and threads that wait for each other suffer from that out of proportion. Run it again on an idle machine."
        )
    lines += [f"{row.job} was skipped: it {row.reason}" for row in rows if isinstance(row, Skipped)]
    if blocks.skipped:
        lines.append(f"quantize_blockwise was skipped: it {blocks.skipped}")
    lines += [f"{what} of {peer.peer} failed: {peer.failure}" for what, peer in _peers(rows, blocks) if peer.failure]
    for row in (row for row in rows if isinstance(row, Row)):
        for name in row.wrong:
            who = f"torch, {name}" if name in TORCH else name.replace(OURS, "fused_opt")
            states = f", states {row.coded[name].states:.3g} times as far off as their code allows" if name in row.coded else ""
            lines.append(f"{who} is WRONG: {row.job}: error {_error(row.errors[name])}{states}")
    if not all(row.right for row in blocks.rows):
        lines.append("fused_opt is WRONG: what dequantize_blockwise makes of quantize_blockwise's codes is farther off than documented")
    return lines


def to_json(
    machine: Machine, settings: Mapping[str, Any], rows: Sequence[Row | Skipped], blocks: Blocks, other_load: float | None
) -> dict[str, Any]:
    """Everything that was measured. Times are in seconds, sizes in bytes, throughput in 1e9 bytes a second; an infinite error is null."""
    return {
        "machine": dict(machine),
        "settings": dict(settings),
        "other_load": other_load,
        "rows": [_row_json(row) for row in rows],
        "blocks": {"skipped": blocks.skipped, "rows": [_blocks_json(row) for row in blocks.rows]},
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
        *([f"{row.detours[OURS]:.1%}", _state_bytes(row)] if OURS in row.coded else []),
        f"{_megabytes(row.peak_bytes[OURS])} / {_megabytes(row.peak_bytes[fastest])}",
    ]


def _state_bytes(row: Row) -> str:
    return " / ".join(f"{row.state_bytes[state] / row.job.workload.elements:.2f}" for state in (row.job.state, AS_TORCH))


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
        "state": job.state,
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
        "errors": _finite(row.errors),
        "wrong": row.wrong,
        "compared_steps": COMPARED_STEPS,
        "left_out": row.left_out,
        "peak_bytes": row.peak_bytes,
        "state_bytes": row.state_bytes,
        "coded_errors": {name: _finite(asdict(errors)) for name, errors in row.coded.items()},
        "detours": _finite(row.detours),
        "peers": [_beside_json(peer) for peer in row.peers],
    }


def _blocks_json(row: BlocksRow) -> dict[str, Any]:
    return {
        **{field.name: getattr(row, field.name) for field in fields(row)},
        "gb_per_s": asdict(row.gb_per_s),
        "share_of_limit": asdict(row.share),
        "peers": [_beside_json(peer) for peer in row.peers],
    }


def _beside_json(peer: Beside) -> dict[str, Any]:
    measured = {} if peer.failure else {"ours_is_faster_by": asdict(peer.ratio)}
    return {"peer": peer.peer, "samples": peer.samples, **_finite({"detour": peer.detour}), "failure": peer.failure, **measured}


def _finite(errors: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: error if error is not None and math.isfinite(error) else None for name, error in errors.items()}
