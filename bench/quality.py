"""`fused-opt quality`: what states in fewer bits do to trained models, beside what another seed does."""

from __future__ import annotations

import argparse
from collections.abc import Collection

import torch
from rich.console import Console

from fused_opt.arguments import CannotRunError, one_of, whole_number, writable_file
from fused_opt.bench import machine, suite
from fused_opt.bench.quality_recipes import RECIPES
from fused_opt.bench.quality_report import sheets
from fused_opt.bench.quality_tasks import TASKS
from fused_opt.bench.quality_units import DEFAULT, FORMATS, PART, SEEDS, SHARED, Combination, combinations, units, why_not
from fused_opt.bench.sheet import to_rich
from fused_opt.bench.training import SCHEDULES

HELP = "train models with states as in torch, in bfloat16 and in 8 bits, with several seeds, and compare what they do on held-out data"

WIDTH = 140  # of the tables, where the terminal is narrower: lines that wrap are better than columns cut off

DECAYS = {"default": True, "none": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    tasks = ", ".join(TASKS)
    parser.add_argument("tasks", nargs="*", type=one_of("task", TASKS), metavar="task", help=f"any of {tasks} (default: all)")
    selections: list[tuple[str, str, Collection[str], str]] = [
        ("--optimizer", "optimizer", RECIPES, SHARED[0]),
        ("--schedule", "schedule", SCHEDULES, SHARED[1]),
        ("--decay", "decay", DECAYS, "default"),
    ]
    for option, kind, names, default in selections:
        text = f"any of {', '.join(names)} (default: {default}, if one of these is given)"
        parser.add_argument(option, nargs="+", action="extend", type=one_of(kind, names), metavar="NAME", help=text)
    text = f"formats of states to compare with torch's: any of {', '.join(FORMATS)} (default: all)"
    parser.add_argument("--state", nargs="+", action="extend", type=one_of("format of states", FORMATS), metavar="FORMAT", help=text)
    parser.add_argument("--seeds", type=whole_number(2, 1000), default=SEEDS, metavar="N", help="how many (default: %(default)s)")
    steps = ", ".join(f"{name} {task.steps}" for name, task in TASKS.items())
    parser.add_argument("--steps", type=whole_number(1, 1_000_000), metavar="N", help=f"of each training (default: {steps})")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured to FILE")
    parser.add_argument("--resume", action="store_true", help="measure only what is not in the file of --json yet")
    parser.epilog = (
        "Without a selection (5 minutes): the transformer with adamw and warm-up; the others with every optimizer along a cosine, and with "
        "adamw along every schedule. Decay is decoupled in adamw and L2 in the others."
    )


def run(args: argparse.Namespace) -> int:
    """Train, compare, report, also when interrupted.

    Returns:
        The exit status: 0; 1 if a training failed; 130 if interrupted. How much difference is too much is for the reader to say.

    Raises:
        CannotRunError: states have torch's formats only here, or there is nothing to go on with.
    """
    if why := why_not():
        raise CannotRunError(why)
    formats = [state for state in FORMATS if state in (args.state or FORMATS)]
    steps = {name: args.steps or task.steps for name, task in TASKS.items()}
    settings = {"threads": torch.get_num_threads(), "steps": steps, "states": formats}
    results = suite.Results(machine.describe(), settings, path=args.json)
    if args.resume:
        if args.json is None:
            raise CannotRunError("--resume needs the file to go on with; give --json FILE, too")
        results.resume(args.json)
    console = Console(highlight=False)
    complete = suite.run(units(_selection(args), args.seeds, args.steps, formats), results, console)
    Console(width=max(console.width, WIDTH), highlight=False).print(to_rich(sheets(results.part(PART))))
    return int(bool(results.failures)) if complete else 130


def _selection(args: argparse.Namespace) -> list[Combination]:
    tasks = args.tasks or list(TASKS)
    if not (args.optimizer or args.schedule or args.decay):
        return [combination for combination in DEFAULT if combination.task in tasks]
    decays = [DECAYS[name] for name in args.decay or ["default"]]
    return combinations(tasks, args.optimizer or SHARED[:1], args.schedule or SHARED[1:], decays)
