"""`fused-opt gpu-check`: for somebody who has a GPU. Checks there what is promised of it, and writes one file to send back."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fused_opt.arguments import CannotRunError, one_of, writable_file
from fused_opt.bench import gpu_machine, gpu_options, gpu_parity, gpu_speed
from fused_opt.bench.gpu_checks import DRY, FAILED, FULL, NOT_RUN, PASSED, QUICK, Check, Extent, Result, perform
from fused_opt.bench.gpu_device import Gpu
from fused_opt.bench.gpu_interpreter import Interpreter
from fused_opt.native import native, triton_problem

HELP = "on a GPU: compare bits with the CPU's, capture CUDA graphs, time steps, and write one file to send back"

CHECKS: tuple[Check, ...] = (*gpu_machine.CHECKS, *gpu_parity.CHECKS, *gpu_options.CHECKS, *gpu_speed.CHECKS)

# Of the file: what its readers rely on.
FORMAT = 1
STATUSES = {"passed": PASSED, "failed": FAILED, "not_run": NOT_RUN}
# The checks that launch every kernel. PyTorch's own cache of memory would hide accesses beside a tensor from the sanitizer.
SANITIZED = ("cpu-bits", "quantize", "capturable")
SANITIZER = (
    f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 {{python}} -m fused_opt gpu-check --quick "
    f"--check {' '.join(SANITIZED)} --json gpu-check-memcheck.json"
)

# Of Triton: the interpreter of 3.6 rounds a fused multiply-add twice.
INTERPRETER_FROM = (3, 9)

WIDTH = 132
SHOWN = 10  # problems, of each check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    names = [check.name for check in CHECKS]
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument(
        "--check",
        nargs="+",
        action="extend",
        type=one_of("check", names),
        metavar="NAME",
        help=f"any of {', '.join(names)} (default: all)",
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: the checks themselves, by Triton's interpreter, tiny")
    default = "gpu-check.json"
    parser.add_argument("--json", type=writable_file, default=default, metavar="FILE", help=f"write everything found to it ({default})")


def run(args: argparse.Namespace) -> int:
    """Check, and show what was found.

    Returns:
        The exit status: 0; 1 if a check failed; 2 if no check could run.

    Raises:
        CannotRunError: there is no GPU, or not all that a dry run needs.
    """
    if args.dry_run:
        if problem := _no_interpreter():
            raise CannotRunError(problem)
        if not _interpreting():
            return _run_interpreted(args)
    gpu = Interpreter() if args.dry_run else Gpu.find()
    extent = DRY if args.dry_run else QUICK if args.quick else FULL
    return check(gpu, extent, args.check, args.json, Console(highlight=False))


def check(gpu: Gpu, extent: Extent, wanted: Sequence[str] | None, file: Path, console: Console, checks: Sequence[Check] = CHECKS) -> int:
    """Perform the checks whose names are wanted, or all. The file is written after each, lest a crash takes all with it."""
    if not console.is_terminal:
        console.width = WIDTH
    versions = gpu_machine.versions()
    results: list[Result] = []
    with gpu.session():
        for each in checks:
            with console.status(f"{each.name}: {each.promise}"):
                results.append(perform(each, gpu, extent, wanted is None or each.name in wanted))
            file.write_text(json.dumps(report(extent, versions, results, complete=len(results) == len(checks)), indent=1) + "\n")
    show(console, extent, versions, results)
    console.print(f"\nEverything found is in {file}.{'' if extent is DRY else ' Please send it back.'}", markup=False, soft_wrap=True)
    statuses = {result.status for result in results}
    return 1 if FAILED in statuses else 0 if PASSED in statuses else 2


def report(extent: Extent, versions: dict[str, Any], results: Sequence[Result], complete: bool) -> dict[str, Any]:
    """The file's content."""
    return {
        "command": "fused-opt gpu-check",
        "format": FORMAT,
        "extent": extent.name,
        "complete": complete,
        **{key: [result.name for result in results if result.status == status] for key, status in STATUSES.items()},
        "versions": versions,
        "sanitizer": sanitizer(),
        "checks": [_finite(asdict(result)) for result in results],
    }


def _finite(value: Any) -> Any:
    """With words for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def sanitizer() -> str:
    """The command that looks for accesses outside of tensors; slow."""
    return SANITIZER.format(python=shlex.quote(sys.executable))


def show(console: Console, extent: Extent, versions: dict[str, Any], results: Sequence[Result]) -> None:
    """Print what came of the checks."""
    what = " by Triton's interpreter on the CPU: nothing here was run on a GPU" if extent is DRY else ""
    header = f"fused-opt {versions['fused_opt']}, torch {versions['torch']}, triton {versions['triton']}; {extent.name}{what}"
    console.print(header, markup=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("check", "status", "compared"):
        table.add_column(name, no_wrap=True, justify="right" if name == "compared" else "left")
    table.add_column("what")
    for result in results:
        table.add_row(result.name, result.status, f"{result.compared:,}" if result.compared else "-", result.why or result.promise)
    console.print(table)
    for result in results:
        for problem in result.problems[:SHOWN]:
            console.print(f"FAILED: {result.name}: {problem}", markup=False)
        if len(result.problems) > SHOWN:
            console.print(f"... and {len(result.problems) - SHOWN} more of {result.name}, in the file")
        if result.name == "speed" and result.data:
            console.print(_speed_table(result.data))
    if extent is not DRY:
        console.print(f"Accesses outside of tensors are found by (slow, not run here):\n{sanitizer()}", markup=False, soft_wrap=True)


def _speed_table(data: dict[str, Any]) -> Table:
    title = f"{data['case']}: times, medians of {data['rounds']} rounds; times ours: in the same round"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("workload", no_wrap=True)
    table.add_column("implementation", no_wrap=True)
    for name in ("device ms", "times ours", "host us", "times ours", "GB/s", "of stream", ""):
        table.add_column(name, no_wrap=True, justify="right")
    for row in data["rows"]:
        what = f"{row['workload']}, {row['dtype']}"
        for name, found in row["summary"].items():
            ratios = ["-" if found[key] is None else f"{found[key]['median']:.2f}" for key in ("device_ratio", "host_ratio")]
            table.add_row(
                what,
                name,
                f"{found['device_s']['median'] * 1e3:.3f}",
                ratios[0],
                f"{found['host_s']['median'] * 1e6:.0f}",
                ratios[1],
                "-" if found["gb_per_s"] is None else f"{found['gb_per_s']:.0f}",
                "-" if found["of_stream"] is None else f"{found['of_stream']:.0%}",
                "WRONG" if name in row["wrong"] else "",
            )
        for name, why in row["failures"].items():
            table.add_row(what, name, "failed", end_section=False)
            table.caption = f"{table.caption or ''}{name}: {why}\n"
        if row["skipped"]:
            table.add_row(what, "skipped")
            table.caption = f"{table.caption or ''}{row['skipped']}\n"
        table.add_section()
    return table


def _no_interpreter() -> str:
    """Why there can be no dry run, or ""."""
    if native().module is None:
        return f"nothing to compare: {native().why}; `fused-opt doctor` says more"
    try:
        import triton
    except ImportError:
        return triton_problem()
    if tuple(map(int, triton.__version__.split(".")[:2])) < INTERPRETER_FROM:
        needed = ".".join(map(str, INTERPRETER_FROM))
        return f"a dry run needs Triton {needed}, not {triton.__version__}, whose interpreter rounds otherwise than GPUs do"
    return ""


def _interpreting() -> bool:
    from fused_opt.kernels.launch import launcher

    return bool(launcher.takes_cpu)


def _run_interpreted(args: argparse.Namespace) -> int:
    """The same command in a process of its own: Triton reads the variable when it is imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CannotRunError("TRITON_INTERPRET=1, but Triton's interpreter does not run: it was set after triton was imported")
    words = ["--dry-run", "--json", str(args.json), *(["--check", *args.check] if args.check else [])]
    environment = {name: value for name, value in os.environ.items() if name != "FUSED_OPT_BACKEND"}
    # It is to find the modules that this process has found, wherever it is.
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-m", "fused_opt", "gpu-check", *words], env=environment, check=False).returncode
