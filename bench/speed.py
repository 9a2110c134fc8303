"""`fused-opt bench`: times a step against torch's implementations of the same optimizer with the same options."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Collection, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fused_opt.arguments import whole_number, writable_file
from fused_opt.bench import machine, measure, speed_report
from fused_opt.bench.speed_row import CONFIGURATIONS, Row, Skipped, Tensors, measure_row
from fused_opt.bench.workloads import WORKLOADS, Workload

HELP = "time steps against torch's fused, foreach and for-loop implementations"

QUICK = measure.Effort(budget=1.0, least=5, most=60)
FULL = measure.Effort(budget=10.0, least=10, most=300)
QUICK_WORKLOADS = [name for name in WORKLOADS if name != "large"]
QUICK_CONFIGURATIONS = ["adamw", "sgd-momentum", "rmsprop"]

# For larger models a quick run times only the fused implementation (RMSprop: the for-loop). The others allocate
# temporaries of the parameters' size, which the system has to clear page by page: on gpt2, AdamW fused took 0.16 s a
# step, the for-loop 1.4 s and foreach 2.8 s.
QUICK_LEAVES_OUT_FROM = 50_000_000
QUICK_LEAVES_OUT = frozenset({"foreach", "for-loop"})

# The table's width where the terminal is narrower, or is none: lines that wrap are better than columns cut off.
WIDTH = 140


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "workloads",
        nargs="*",
        type=_one_of("workload", WORKLOADS),
        metavar="workload",
        help=f"{', '.join(WORKLOADS)} (default: all but large)",
    )
    parser.add_argument(
        "--optimizer",
        nargs="+",
        action="extend",
        type=_one_of("optimizer", CONFIGURATIONS),
        metavar="NAME",
        help=f"{', '.join(CONFIGURATIONS)} (default: {', '.join(QUICK_CONFIGURATIONS)})",
    )
    parser.add_argument("--full", action="store_true", help="everything, with more rounds (10 to 20 minutes)")
    parser.add_argument("--threads", type=whole_number(1, 1024), metavar="N", help="threads for every implementation (default: torch's)")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured to FILE")


def run(args: argparse.Namespace) -> int:
    """Measure, and show what has been measured, also when interrupted.

    Returns:
        The exit status: 0, or 130 if interrupted.
    """
    workloads = [WORKLOADS[name] for name in args.workloads or (WORKLOADS if args.full else QUICK_WORKLOADS)]
    configurations = args.optimizer or list(CONFIGURATIONS if args.full else QUICK_CONFIGURATIONS)
    threads = args.threads or torch.get_num_threads()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    described = machine.describe()
    console.print(speed_report.header(described, threads), markup=False)

    rows: list[Row | Skipped] = []
    status = 0
    load = machine.OtherLoad()
    try:
        with measure.threads(threads):
            for row in _rows(workloads, configurations, args.full, console):
                rows.append(row)
    except KeyboardInterrupt:
        status = 130
        console.print(f"Interrupted after {len(rows)} of {len(workloads) * len(configurations)} rows.")
    other_load = load.share()
    Console(width=max(console.width, WIDTH)).print(speed_report.table(rows))
    console.print(speed_report.notes(rows, other_load), markup=False)
    if args.json:
        settings = {"full": args.full, "threads": threads, "interrupted": status != 0}
        args.json.write_text(json.dumps(speed_report.to_json(described, settings, rows, other_load), indent=1) + "\n")
    return status


def _rows(workloads: list[Workload], configurations: list[str], full: bool, console: Console) -> Iterator[Row | Skipped]:
    streaming = functools.cache(measure.Streaming)  # its arrays are made once, and only if a row needs them
    with _Bar(console, len(workloads) * len(configurations)) as bar:
        for workload in workloads:
            bar.name = f"{workload.name}: values"
            bar.show(0)
            tensors = None  # free the last workload's before making the next one's
            tensors = Tensors.random(workload)
            leave_out = QUICK_LEAVES_OUT if not full and workload.elements > QUICK_LEAVES_OUT_FROM else frozenset[str]()
            for configuration in configurations:
                bar.name = f"{workload.name} {configuration}"
                bar.show(0)
                yield measure_row(tensors, configuration, FULL if full else QUICK, leave_out, streaming, bar.show)
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


def _one_of(kind: str, names: Collection[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}; use any of {', '.join(names)}")
        return name

    return check
