"""`fused-opt quality`: what 8-bit states do to trained models, beside what another seed does."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fused_opt.arguments import CannotRunError, one_of, whole_number, writable_file
from fused_opt.bench import machine
from fused_opt.bench.quality_tasks import RECIPES, TASKS, Trained
from fused_opt.bench.speed_plan import AS_TORCH, INT8
from fused_opt.native import native

HELP = "train models with states as in torch and in 8 bits, with several seeds, and compare losses and accuracies on held-out data"

WIDTH = 130  # of the table, where the terminal is narrower: lines that wrap are better than columns cut off


@dataclass(frozen=True)
class Comparison:
    """A metric of a task, seed by seed: values at the same index began with equal weights and saw equal batches.

    Attributes:
        task, optimizer, metric: their names.
        exact: with states as torch has them.
        coded: with 8-bit states.
        state_bytes: of a parameter's value, with 8-bit states.
    """

    task: str
    optimizer: str
    metric: str
    exact: list[float]
    coded: list[float]
    state_bytes: float

    @property
    def differences(self) -> list[float]:
        """What 8-bit states change."""
        return [coded - exact for coded, exact in zip(self.coded, self.exact, strict=True)]

    @property
    def seeds_spread(self) -> float:
        """What another seed changes: the standard deviation with states as torch has them."""
        return stdev(self.exact)

    @property
    def within(self) -> bool:
        """Whether the mean difference is at most what another seed changes."""
        return abs(mean(self.differences)) <= self.seeds_spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    tasks, recipes = (", ".join(names) for names in (TASKS, RECIPES))
    parser.add_argument("tasks", nargs="*", type=one_of("task", TASKS), metavar="task", help=f"any of {tasks} (default: all)")
    text = f"any of {recipes} (default: adamw)"
    parser.add_argument("--optimizer", nargs="+", type=one_of("optimizer", RECIPES), default=["adamw"], metavar="NAME", help=text)
    parser.add_argument("--seeds", type=whole_number(2, 1000), default=3, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=whole_number(1, 1_000_000),
        default=500,
        metavar="N",
        help="of each training (default: %(default)s, 4 minutes in all)",
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured to FILE")


def run(args: argparse.Namespace) -> int:
    """Train, compare, report.

    Returns:
        The exit status: 0. How much difference is too much is for the reader to say.

    Raises:
        CannotRunError: there are no 8-bit states here.
    """
    if native().module is None:
        raise CannotRunError(f"8-bit states need the extension, and {native().why}")
    console = Console(highlight=False)
    comparisons: list[Comparison] = []
    with console.status("") as status:
        for task, optimizer in itertools.product(dict.fromkeys(args.tasks or TASKS), dict.fromkeys(args.optimizer)):
            trained = []
            for seed in range(args.seeds):
                status.update(f"{task}, {optimizer}, seed {seed + 1} of {args.seeds}")
                trained.append(TASKS[task](RECIPES[optimizer], seed, args.steps))
            comparisons += compare(task, optimizer, trained)
    Console(width=max(console.width, WIDTH)).print(table(comparisons))
    console.print("\n".join(notes(comparisons, args.seeds, args.steps)), markup=False, soft_wrap=True)
    if args.json:
        results = {
            "machine": machine.describe(),
            "settings": {"threads": torch.get_num_threads(), "seeds": args.seeds, "steps": args.steps},
            "comparisons": [_json(comparison) for comparison in comparisons],
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(task: str, optimizer: str, trained: list[Trained]) -> list[Comparison]:
    """A comparison for each metric, from what came of each seed."""
    return [
        Comparison(
            task=task,
            optimizer=optimizer,
            metric=metric,
            exact=[seed.metrics[AS_TORCH][metric] for seed in trained],
            coded=[seed.metrics[INT8][metric] for seed in trained],
            state_bytes=trained[0].state_bytes[INT8],
        )
        for metric in trained[0].metrics[AS_TORCH]
    ]


def table(comparisons: list[Comparison]) -> Table:
    """One line for each."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "optimizer", "metric"):
        result.add_column(name, no_wrap=True)
    for name in ("as torch", "seeds' spread", "8-bit", "difference", "its spread", "within", "state bytes"):
        result.add_column(name, justify="right")
    for row in comparisons:
        result.add_row(
            row.task,
            row.optimizer,
            row.metric,
            f"{mean(row.exact):.4f}",
            f"{row.seeds_spread:.4f}",
            f"{mean(row.coded):.4f}",
            f"{mean(row.differences):+.4f}",
            f"{stdev(row.differences):.4f}",
            "yes" if row.within else "NO",
            f"{row.state_bytes:.2f}",
        )
    return result


def notes(comparisons: list[Comparison], seeds: int, steps: int) -> list[str]:
    """How to read the table."""
    return [
        f"{seeds} seeds, {steps} steps, threads: {torch.get_num_threads()}. Loss in nats, on held-out data; of digits means of 5 folds.",
        "as torch, 8-bit: means over the seeds; spread: standard deviation over them; difference: of trainings with equal weights and",
        "batches; within: the mean difference is at most the seeds' spread; state bytes: of a parameter's value, with 8-bit states.",
        *(f"8-bit states changed {row.metric} of {row.task} by more than another seed does." for row in comparisons if not row.within),
    ]


def _json(row: Comparison) -> dict[str, Any]:
    return {
        **asdict(row),
        "seeds_spread": row.seeds_spread,
        "difference": mean(row.differences),
        "spread_of_difference": stdev(row.differences),
        "within": row.within,
    }
