"""`fused-opt bench`: times a step against torch's implementations of the same optimizer with the same options."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fused_opt.arguments import CannotRunError, one_of, whole_number, writable_file
from fused_opt.bench import machine, measure, roofline, speed_report
from fused_opt.bench.layouts import LAYOUTS
from fused_opt.bench.speed_blocks import Blocks, measure_blocks
from fused_opt.bench.speed_plan import (
    AS_TORCH,
    CONFIGURATIONS,
    DTYPES,
    FULL_JOBS,
    QUICK_CONFIGURATIONS,
    QUICK_JOBS,
    QUICK_WORKLOADS,
    STATES,
    Job,
    jobs,
)
from fused_opt.bench.speed_row import OURS, Row, Skipped, Tensors, measure_row
from fused_opt.bench.workloads import WORKLOADS

HELP = "time steps against torch's fused, foreach and for-loop implementations"

QUICK = measure.Effort(budget=0.8, least=5, most=60)
FULL = measure.Effort(budget=10.0, least=10, most=300)

# Not a workload of optimizers, but chosen like one: rows for quantize_blockwise and dequantize_blockwise.
BLOCKS = "blocks"

# Width of text where there is no terminal, and of tables where the terminal is narrower: lines that wrap are better than columns cut off.
WIDTH, TABLE_WIDTH = 140, 170


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "workloads",
        nargs="*",
        type=one_of("workload", [*WORKLOADS, BLOCKS]),
        metavar="workload",
        help=f"{', '.join(WORKLOADS)} (default: all but large); {BLOCKS}: quantize_blockwise and dequantize_blockwise of 64M values",
    )
    selections: list[tuple[str, str, Collection[str], str, str]] = [
        ("--optimizer", "optimizer", CONFIGURATIONS, "NAME", ", ".join(QUICK_CONFIGURATIONS)),
        ("--dtype", "dtype", DTYPES, "DTYPE", "float32"),
        ("--layout", "layout", LAYOUTS, "LAYOUT", "contiguous"),
        ("--state", "format of states", STATES, "FORMAT", AS_TORCH),
    ]
    for option, kind, names, metavar, default in selections:
        text = f"any of {', '.join(names)} (default: {default})"
        parser.add_argument(option, nargs="+", action="extend", type=one_of(kind, names), metavar=metavar, help=text)
    parser.add_argument("--full", action="store_true", help="everything, with more rounds (30 to 50 minutes)")
    parser.add_argument("--threads", type=whole_number(1, 1024), metavar="N", help="threads for every implementation (default: torch's)")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured, or predicted, to FILE")
    roofline.add_arguments(parser)
    parser.epilog = (
        "Without a selection some rows in 16 bits, in other layouts, with 8-bit states (int8) and those of blocks come after those in "
        "float32. Layouts: permuted: matrices "
        "transposed, convolutions' weights channels_last; other-grad: contiguous parameters with such gradients; gaps: parameters are "
        "slices of larger tensors."
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and show what has been measured, also when interrupted.

    Returns:
        The exit status: 0; 1 if a result of ours is wrong; 130 if interrupted.

    Raises:
        CannotRunError: options that exclude each other, or a prediction that is not possible here.
    """
    if args.model:
        if _selected(args) or args.full or args.threads:
            raise CannotRunError("--model predicts for all kernels; leave out what selects or times: workloads, options, --full, --threads")
        return roofline.run(args)
    if args.bandwidth:
        raise CannotRunError("--bandwidth is for predictions; give --model, too")
    to_do, with_blocks = _jobs(args), BLOCKS in args.workloads or not _selected(args)
    threads = args.threads or torch.get_num_threads()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    described = machine.describe()
    console.print(speed_report.header(described, threads), markup=False)

    rows: list[Row | Skipped] = []
    blocks = Blocks()
    streaming = functools.cache(measure.Streaming)  # its arrays are made once, and only if a row needs them
    interrupted = False
    load = machine.OtherLoad()
    try:
        with measure.threads(threads), _Bar(console, len(to_do) + with_blocks) as bar:
            for row in _rows(to_do, args.full, streaming, bar):
                rows.append(row)
            if with_blocks:
                bar.next(BLOCKS)
                blocks = measure_blocks(FULL if args.full else QUICK, streaming, bar.show)
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"Interrupted after {len(rows)} of {len(to_do)} rows.")
    other_load = load.share()
    Console(width=max(console.width, TABLE_WIDTH)).print(speed_report.tables(rows, blocks))
    console.print(speed_report.notes(rows, blocks, other_load), markup=False)
    if args.json:
        settings = {"full": args.full, "threads": threads, "interrupted": interrupted}
        args.json.write_text(json.dumps(speed_report.to_json(described, settings, rows, blocks, other_load), indent=1) + "\n")
    if interrupted:
        return 130
    wrong = any(OURS in row.wrong for row in rows if isinstance(row, Row))
    return int(wrong or not all(row.right for row in blocks.rows))


def _selected(args: argparse.Namespace) -> bool:
    return bool(args.workloads or args.optimizer or args.dtype or args.layout or args.state)


def _jobs(args: argparse.Namespace) -> list[Job]:
    """Every combination of what is asked for; if nothing is, the quick run's or the full run's rows."""
    if not _selected(args):
        return FULL_JOBS if args.full else QUICK_JOBS
    workloads = args.workloads or (WORKLOADS if args.full else QUICK_WORKLOADS)
    workloads = [name for name in workloads if name != BLOCKS]
    configurations = args.optimizer or (CONFIGURATIONS if args.full else QUICK_CONFIGURATIONS)
    selection = workloads, args.dtype or ["float32"], args.layout or ["contiguous"], configurations, args.state or [AS_TORCH]
    return jobs(*map(dict.fromkeys, selection))


def _rows(to_do: Sequence[Job], full: bool, streaming: Callable[[], measure.Streaming], bar: _Bar) -> Iterator[Row | Skipped]:
    for (workload, dtype), group in itertools.groupby(to_do, key=lambda job: (job.workload, job.dtype)):
        bar.next(f"{workload.name}: values")
        tensors = None  # free the last workload's before making the next one's
        tensors = Tensors.random(workload, dtype)
        for job in group:
            bar.next(str(job))
            yield measure_row(tensors, job, FULL if full else QUICK, not full, streaming, bar.show)
            bar.rows += 1


class _Bar:
    """A progress bar over rows, on a terminal only.

    It is drawn between samples, ten times a second at the most. The thread that usually draws would take time from what
    is measured.
    """

    def __init__(self, console: Console, total: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
        )
        hidden = not console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=hidden)
        self._task = self._progress.add_task("", total=total)
        self._drawn = 0.0
        self.name, self.rows = "", 0

    def next(self, name: str) -> None:
        """Draw that `name` begins."""
        self.name = name
        self.show(0)

    def show(self, share: float) -> None:
        """Draw that `rows` rows and `share` of the one called `name` are done."""
        if share == 0 or time.monotonic() > self._drawn + 0.1:
            self._progress.update(self._task, completed=self.rows + share, description=self.name, refresh=True)
            self._drawn = time.monotonic()

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
