"""`fused-opt quality`: what states, or weights, in fewer bits do to trained models, beside what another seed does."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection

import torch
from rich.console import Console

from fused_opt.arguments import CannotRunError, one_of, whole_number, writable_file
from fused_opt.bench import machine, suite
from fused_opt.bench.quality_recipes import RECIPES
from fused_opt.bench.quality_report import sheets
from fused_opt.bench.quality_tasks import TASKS
from fused_opt.bench.quality_units import DEFAULT, DEFAULT_OF_WEIGHTS, PART, SEEDS, SHARED, Combination, combinations, units, why_not
from fused_opt.bench.quality_weights import NEAREST, WEIGHTS, formats
from fused_opt.bench.sheet import to_rich
from fused_opt.bench.speed_plan import AS_TORCH, STATES
from fused_opt.bench.training import SCHEDULES

HELP = (
    "train models with states as in torch, in bfloat16 and in 8 bits, or with weights in bfloat16, with several seeds, and compare what "
    "they do on held-out data"
)

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
    text = "by which the recipes' learning rates are multiplied (default: 1, if one of these is given)"
    parser.add_argument("--rate", nargs="+", action="extend", type=_factor, metavar="FACTOR", help=text)
    states = [state for state in STATES if state != AS_TORCH]
    text = f"formats of states to compare with torch's: any of {', '.join(states)} (default: all; with --weights: float32)"
    parser.add_argument("--state", nargs="+", action="extend", type=one_of("format of states", states), metavar="FORMAT", help=text)
    text = f"ways to keep weights in bfloat16 to compare with float32, with float32 states or those of --state: any of {', '.join(WEIGHTS)}"
    parser.add_argument("--weights", nargs="+", action="extend", type=one_of("way to keep weights", WEIGHTS), metavar="NAME", help=text)
    parser.add_argument("--seeds", type=whole_number(2, 1000), default=SEEDS, metavar="N", help="how many (default: %(default)s)")
    steps = ", ".join(f"{name} {task.steps}" for name, task in TASKS.items())
    parser.add_argument("--steps", type=whole_number(1, 1_000_000), metavar="N", help=f"of each training (default: {steps})")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured to FILE")
    parser.add_argument("--resume", action="store_true", help="measure only what is not in the file of --json yet")
    parser.epilog = (
        "Without a selection (5 minutes): the transformer with adamw and warm-up; the others with every optimizer along a cosine, and with "
        "adamw along every schedule. Decay is decoupled in adamw and L2 in the others. "
        f"With --weights, such as --weights {NEAREST} stochastic (3 minutes), and no selection but of tasks: adamw and warm-up, at a tenth "
        "of the learning rates."
    )


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no factor of a learning rate; give a number greater than 0, such as 0.1")
    return value


def run(args: argparse.Namespace) -> int:
    """Train, compare, report, also when interrupted.

    Returns:
        The exit status: 0; 1 if a training failed; 130 if interrupted. How much difference is too much is for the reader to say.

    Raises:
        CannotRunError: states have torch's formats only here, or there is nothing to go on with.
    """
    if why := why_not():
        raise CannotRunError(why)
    weights = args.weights or []
    compared = formats(args.state or ([AS_TORCH] if weights else STATES), weights)
    steps = {name: args.steps or task.steps for name, task in TASKS.items()}
    settings = {"threads": torch.get_num_threads(), "steps": steps, "states": [str(each) for each in compared]}
    results = suite.Results(machine.describe(), settings, path=args.json)
    if args.resume:
        if args.json is None:
            raise CannotRunError("--resume needs the file to go on with; give --json FILE, too")
        results.resume(args.json)
    console = Console(highlight=False)
    complete = suite.run(units(_selection(args), args.seeds, args.steps, compared), results, console)
    Console(width=max(console.width, WIDTH), highlight=False).print(to_rich(sheets(results.part(PART))))
    return int(bool(results.failures)) if complete else 130


def _selection(args: argparse.Namespace) -> list[Combination]:
    tasks = args.tasks or list(TASKS)
    if not (args.optimizer or args.schedule or args.decay or args.rate):
        return [combination for combination in (DEFAULT_OF_WEIGHTS if args.weights else DEFAULT) if combination.task in tasks]
    decays = [DECAYS[name] for name in args.decay or ["default"]]
    return combinations(tasks, args.optimizer or SHARED[:1], args.schedule or SHARED[1:], decays, args.rate or [1.0])
