"""`fused-opt bench`: the suite. Measures, keeps what was measured, and shows it in the terminal, as files and as a page."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Collection
from typing import Any

import torch
from rich.console import Console

from fused_opt.arguments import CannotRunError, list_of_numbers, one_of, readable_file, writable_file, writable_folder
from fused_opt.bench import (
    conformance,
    conformance_report,
    end_to_end,
    end_to_end_row,
    machine,
    measure,
    memory_table,
    passes,
    passes_plan,
    passes_report,
    quality_report,
    quality_units,
    report,
    roofline,
    speed_blocks,
    speed_files,
    speed_measure,
    speed_plan,
    speed_report,
    stability,
    suite,
)
from fused_opt.bench.implementations import Implementation, implementations, packages
from fused_opt.bench.layouts import LAYOUTS
from fused_opt.bench.passes_plan import PassJob
from fused_opt.bench.sheet import Sheet, to_rich
from fused_opt.bench.speed_plan import AS_TORCH, CONFIGURATIONS, DTYPES, STATES, Job
from fused_opt.bench.speed_row import IN_TORCH, OURS, Row
from fused_opt.bench.suite import Results, Unit
from fused_opt.bench.workloads import WORKLOADS
from fused_opt.native import native

HELP = "measure steps, training, memory and conformance against torch's implementations and other packages"

QUICK = measure.Effort(budget=0.5, least=6, most=60)
FULL = measure.Effort(budget=2.0, least=6, most=200)
PEERS = measure.Effort(budget=1.5, least=6, most=60)  # a step of others takes up to 2.4 s

# Not a workload of optimizers, but chosen like one: rows for quantize_blockwise and dequantize_blockwise.
BLOCKS = "blocks"
PARTS = (
    speed_measure.PART,
    speed_blocks.PART,
    passes.PART,
    conformance.PART,
    end_to_end_row.PART,
    quality_units.PART,
    stability.PART,
)

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
        ("--optimizer", "optimizer", CONFIGURATIONS, "NAME", ", ".join(speed_plan.QUICK_CONFIGURATIONS)),
        ("--dtype", "dtype", DTYPES, "DTYPE", "float32"),
        ("--layout", "layout", LAYOUTS, "LAYOUT", "contiguous"),
        ("--state", "format of states", STATES, "FORMAT", AS_TORCH),
        ("--implementation", "implementation", implementations(), "NAME", "torch's; with a selection also what is installed"),
        ("--part", "part", PARTS, "PART", f"{speed_measure.PART}, and without a selection three rows of {passes.PART}; with --full all"),
    ]
    for option, kind, names, metavar, default in selections:
        text = f"any of {', '.join(names)} (default: {default})"
        parser.add_argument(option, nargs="+", action="extend", type=one_of(kind, names), metavar=metavar, help=text)
    parser.add_argument("--full", action="store_true", help="everything, with more rounds (about half an hour)")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "N"}
    parser.add_argument("--threads", type=list_of_numbers(1, 1024), help="numbers of threads for everybody (default: torch's)", **several)
    several["metavar"] = "NAME"
    parser.add_argument("--isa", help="instruction sets of our steps, or all that this CPU has (default: the one in use)", **several)
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured, or predicted, to FILE")
    parser.add_argument("--csv", type=writable_file, metavar="FILE", help="write a line for each contestant of each row to FILE")
    parser.add_argument("--report", type=writable_folder, metavar="DIR", help="write a page and its pictures to DIR, with results.json")
    parser.add_argument("--resume", action="store_true", help="measure only what is not in the file of --json (or --report) yet")
    parser.add_argument("--from", dest="source", type=readable_file, metavar="FILE", help="measure nothing, show what FILE has")
    parser.add_argument("--compare", type=readable_file, metavar="FILE", help="say how far the ratios are from those in FILE")
    roofline.add_arguments(parser)
    parser.epilog = (
        "Without a selection: float32, and two rows with 8-bit states (int8). Layouts: permuted: matrices "
        "transposed, convolutions' weights channels_last; other-grad: contiguous parameters with such gradients; gaps: parameters are "
        "slices of larger tensors."
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and show what has been measured, also when interrupted.

    Returns:
        The exit status: 0; 1 if a result of ours is wrong, or slower than in the file of --compare, or a unit failed; 130 if interrupted.

    Raises:
        CannotRunError: options that exclude each other, or something that is not possible here.
    """
    if args.model:
        others = ("part", "full", "threads", "csv", "report", "resume", "source", "compare")
        if _selected(args) or any(getattr(args, name) for name in others):
            raise CannotRunError(
                "--model predicts for all kernels, to the terminal and --json; leave out what selects, times or shows more"
            )
        return roofline.run(args)
    if args.bandwidth:
        raise CannotRunError("--bandwidth is for predictions; give --model, too")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    if args.source and (_selected(args) or args.full or args.threads or args.part or args.json or args.resume):
        raise CannotRunError("--from measures nothing; leave out what selects or measures; it goes with --csv, --report and --compare")
    earlier = Results.read(args.compare) if args.compare else None
    complete = True
    if args.source:
        results = Results.read(args.source)
        console.print(_header(results), markup=False)
    else:
        results = _new_results(args)
        units = _units(args)
        console.print(_header(results), markup=False)
        complete = suite.run(units, results, console)
    try:
        sheets = sheets_by_part(results)
        comparison = stability.Comparison.of(earlier, results) if earlier else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if not (args.source or args.compare or args.resume):
            raise
        raise CannotRunError(f"a file was written by another version of fused-opt, or by another command: {error!r}") from error
    if comparison:
        sheets.setdefault(stability.PART, []).append(comparison.sheet(f"Speed-ups, and those in {args.compare}"))
    shown = [sheet for of_part in sheets.values() for sheet in of_part]
    Console(width=max(console.width, TABLE_WIDTH)).print(to_rich(shown))
    if warning := results.load_warning:
        console.print(warning, markup=False)
    if args.csv:
        speed_files.write_csv(results, args.csv)
    if args.report:
        report.write(results, sheets, args.report)
        console.print(f"Report: {args.report / report.PAGE}", markup=False, soft_wrap=True)
    if not complete:
        return 130
    return int(_wrong(results) or bool(results.failures) or bool(comparison and comparison.slower))


def sheets_by_part(results: Results) -> dict[str, list[Sheet]]:
    """The tables of each part that was measured."""
    rows = speed_measure.rows(results.part(speed_measure.PART))
    found = {
        speed_measure.PART: speed_report.sheets(rows),
        speed_blocks.PART: speed_report.block_sheets(speed_blocks.from_records(results.part(speed_blocks.PART))),
        passes.PART: passes_report.sheets(results.part(passes.PART)),
        end_to_end_row.PART: end_to_end_row.sheets(results.part(end_to_end_row.PART)),
        quality_units.PART: quality_report.sheets(results.part(quality_units.PART)),
        conformance.PART: conformance_report.sheets(results.part(conformance.PART)),
        stability.PART: stability.sheets(results.part(stability.PART)),
        "packages": [speed_report.package_sheet(results.machine["packages"])],
    }
    return {part: sheets for part, sheets in found.items() if sheets}


def _header(results: Results) -> str:
    """Two lines: what was measured, and where."""
    about = results.machine
    return (
        f"fused-opt {about['fused_opt']} on {about['isa']} ({about['why']}), torch {about['torch']}, Python {about['python']}\n"
        f"{about['cpu']}, cores: {about['cores']}, threads: {results.settings['threads']}"
    )


def _new_results(args: argparse.Namespace) -> Results:
    path = args.json or (args.report / report.RESULTS if args.report else None)
    results = Results({**machine.describe(), "packages": packages()}, {"full": args.full, "threads": torch.get_num_threads()}, path=path)
    if args.resume:
        if path is None:
            raise CannotRunError("--resume needs the file to go on with; give --json FILE or --report DIR, too")
        if path.exists():
            results.resume(path)
    return results


def _others() -> list[str]:
    return [name for name, each in implementations().items() if each.package != "fused_opt"]


def _selected(args: argparse.Namespace) -> bool:
    names = ("workloads", "optimizer", "dtype", "layout", "state", "implementation", "isa")
    return any(getattr(args, name) for name in names)


def _units(args: argparse.Namespace) -> list[Unit]:
    """What to measure, in order."""
    shared = speed_measure.Shared()
    whole = args.full and not _selected(args)
    parts = args.part or (PARTS if whole else PARTS[:2] if BLOCKS in args.workloads else PARTS[:1])
    brief = not (args.part or args.full or _selected(args))
    effort = FULL if args.full else QUICK
    in_torch = [name for name in IN_TORCH if name in (args.implementation or IN_TORCH)]
    units: list[Unit] = []
    if speed_measure.PART in parts:
        against_torch, against_others = _jobs(args)
        quick = not (args.full and _selected(args))
        units += speed_measure.units(against_torch if in_torch else [], effort, quick, in_torch, shared)
        units += speed_measure.units(against_others, PEERS, quick, (), shared)
    if speed_blocks.PART in parts:
        with_peers = args.full or BLOCKS in args.workloads
        units += [unit for count in _threads(args) for unit in speed_blocks.units(effort, shared.streaming, with_peers, count)]
    if passes.PART in parts or brief:
        units += passes.units(_pass_jobs(args, brief), effort, shared)
        units += [] if brief else memory_table.units(passes.PART, args.full)
    if end_to_end_row.PART in parts:
        units += [unit for count in _threads(args) for unit in end_to_end.units(count or torch.get_num_threads(), args.full)]
    if conformance.PART in parts:
        units += conformance.units(args.implementation)
    if quality_units.PART in parts:
        units += quality_units.units()
    if stability.PART in parts:
        units += stability.units(speed_measure.units(speed_plan.QUICK_JOBS, QUICK, True, IN_TORCH, shared))
    return units


def _jobs(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """Rows against torch's implementations, and against others: every combination of what is asked for; if nothing is, the quick run's or
    the full run's rows."""
    if _selected(args):
        workloads = args.workloads or (WORKLOADS if args.full else speed_plan.QUICK_WORKLOADS)
        workloads = [name for name in workloads if name != BLOCKS]
        configurations = args.optimizer or (CONFIGURATIONS if args.full else speed_plan.QUICK_CONFIGURATIONS)
        selection = workloads, args.dtype or ["float32"], args.layout or ["contiguous"], configurations, args.state or [AS_TORCH]
        chosen = speed_plan.jobs(*map(dict.fromkeys, selection))
        others, offered = chosen, args.implementation or _installed()
    else:
        chosen = speed_plan.FULL_JOBS if args.full else speed_plan.QUICK_JOBS
        others, offered = speed_plan.PEER_JOBS if args.full else [], _others()
    rivals = [name for name in _others() if name not in IN_TORCH]  # ours may be named, too: for its conformance
    everybody = [implementations()[name] for name in dict.fromkeys(offered) if name in rivals]
    if args.implementation and not args.state:  # those that are named are measured with the states that they have
        others = [dataclasses.replace(job, state=state) for job in others for state in {each.state: None for each in everybody}]
    against = [dataclasses.replace(job, against=each.name) for job in others for each in everybody if _comparable(job, each)]
    if not _selected(args):
        against = [job for job in against if job.workload.name == "mlp" or job.against not in speed_plan.SLOW_TO_COMPILE]
    return _everywhere(chosen, args), _everywhere(against, args)


def _pass_jobs(args: argparse.Namespace, brief: bool) -> list[PassJob]:
    """Of what is asked for all, on the full run's workloads if none is; or the few of the quick run."""
    workloads = [name for name in args.workloads if name != BLOCKS]
    default = passes_plan.FULL_WORKLOADS if args.full else passes_plan.QUICK_WORKLOADS
    jobs = passes_plan.QUICK_JOBS if brief else passes_plan.every_job(workloads or default)
    return passes_plan.selected(jobs, args.optimizer, args.dtype, args.state, _threads(args))


def _threads(args: argparse.Namespace) -> list[int]:
    """Those that are asked for; 0 for torch's default."""
    return list(dict.fromkeys(itertools.chain.from_iterable(args.threads or [[0]])))


def _installed() -> list[str]:
    """Packages' implementations that can be used; torch.compile's, which may take minutes to compile, is only timed if asked for."""
    return [name for name in _others() if not implementations()[name].missing and not implementations()[name].compiled]


def _comparable(job: Job, implementation: Implementation) -> bool:
    return job.layout == "contiguous" and job.state == implementation.state and implementation.offers(job.case)


def _everywhere(jobs: list[Job], args: argparse.Namespace) -> list[Job]:
    """With every number of threads and on every instruction set that is asked for."""
    module = native().module
    usable = [name for name, supported in module.isas() if supported] if module else []
    isas = list(dict.fromkeys(name for isa in args.isa or [""] for name in (usable if isa == "all" else [isa])))
    if unusable := [isa for isa in isas if isa and isa not in usable]:
        raise CannotRunError(f"--isa {unusable[0]}: this CPU or this build does not have it; use any of {', '.join(usable)}, or all")
    threads = _threads(args)
    everywhere = (dataclasses.replace(job, threads=count or job.threads, isa=isa) for job in jobs for count in threads for isa in isas)
    return list(dict.fromkeys(everywhere))


def _wrong(results: Results) -> bool:
    """Whether a result of ours is."""
    rows = speed_measure.rows(results.part(speed_measure.PART))
    blocks = speed_blocks.from_records(results.part(speed_blocks.PART))
    trained = [row for record in results.part(end_to_end_row.PART).values() for row in end_to_end_row.from_record(record)]
    checked = [conformance_report.Conformance.from_record(*each) for each in results.part(conformance.PART).items()]
    return (
        any(isinstance(row, Row) and OURS in row.wrong for row in rows)
        or not all(row.right for each in blocks for row in each.rows)
        or any(row.wrong for row in passes_report.rows(results.part(passes.PART)))
        or any(row.wrong for row in trained if row.optimizer in (end_to_end_row.OURS, end_to_end_row.OURS_8BIT))
        or any(v.word not in conformance_report.RIGHT for each in checked if each.package == "fused_opt" for v in each.verdicts.values())
    )
