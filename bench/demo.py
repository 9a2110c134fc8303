"""`fused-opt demo`: one real training run, with torch's fused AdamW and with fused_opt's, step by step side by side."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import fused_opt
from fused_opt.arguments import CannotRunError, whole_number, writable_file
from fused_opt.bench import machine
from fused_opt.bench.char_model import CONTEXT, Corpus
from fused_opt.bench.speed_plan import AS_TORCH, INT8, STATES
from fused_opt.bench.training import MakeOptimizer, Training, make_trainings, train
from fused_opt.native import native

HELP = (
    "train a small transformer with torch's fused AdamW and with fused_opt's, and compare: every bit, or with 8-bit states what becomes of "
    "the model"
)

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
PROMPT = "The "
SAMPLE_CHARACTERS = 200
SECONDS_PER_REFRESH = 0.125


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options: list[tuple[str, Callable[[str], Any], Any, str, str]] = [
        ("--steps", whole_number(1, 1_000_000), 500, "N", "training steps"),
        ("--batch-size", whole_number(1, 1024), 16, "N", f"texts of {CONTEXT} characters in a step"),
        ("--seed", whole_number(0, 2**63 - 1), 0, "N", "decides weights, batches and the text written at the end"),
        ("--output", _picture, "demo.png", "FILE", "picture of the loss curves"),
    ]
    for name, parse, default, metavar, text in options:
        parser.add_argument(name, type=parse, default=default, metavar=metavar, help=f"{text} (default: %(default)s)")
    parser.add_argument("--state", choices=STATES, default=AS_TORCH, help="format of fused_opt's states (default: %(default)s)")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured to FILE")


def _picture(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png; give a name that does")
    return writable_file(text)


def optimizers(state: str) -> dict[str, MakeOptimizer]:
    """torch's and ours, by name; `state` is the format of our states."""
    ours = {AS_TORCH: ("fused_opt.AdamW", fused_opt.AdamW), INT8: ("fused_opt.AdamW8bit", fused_opt.AdamW8bit)}
    name, optimizer_class = ours[state]
    return {
        "torch.optim.AdamW(fused=True)": lambda groups: torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True),
        name: lambda groups: optimizer_class(groups, lr=LEARNING_RATE),
    }


def train_and_show(trainings: list[Training], corpus: Corpus, args: argparse.Namespace, console: Console) -> None:
    """Train, with the table on the screen where that is a terminal."""
    progress = Progress(BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    task = progress.add_task("", total=args.steps)
    # Refreshed by hand, between steps: a thread that redraws would take time from what is measured.
    display = Live(console=console, auto_refresh=False, transient=True) if console.is_interactive else None
    refreshed = -math.inf

    def show(step: int) -> None:
        nonlocal refreshed
        if display and time.perf_counter() > refreshed + SECONDS_PER_REFRESH:
            progress.update(task, completed=step)
            display.update(Group(progress, table(trainings)), refresh=True)
            refreshed = time.perf_counter()

    with display or contextlib.nullcontext():
        train(trainings, corpus, args.steps, args.batch_size, args.seed, show)


def table(trainings: list[Training]) -> Table:
    """The trainings side by side, as far as they have come."""
    rows: list[tuple[str, Callable[[Training], str]]] = [
        ("training loss, last batch", lambda t: f"{t.losses[-1]:.6f}"),
        ("loss on held-out text", lambda t: "" if math.isnan(t.held_out_loss) else f"{t.held_out_loss:.6f}"),
        ("training time", lambda t: f"{sum(t.seconds):.1f} s"),
        ("optimizer's share of it", lambda t: f"{t.share:.2%}"),
        ("optimizer step, median", lambda t: f"{1e3 * median(t.optimizer_seconds):.3f} ms"),
        ("states", lambda t: f"{t.state_bytes:,} bytes"),
        ("states of a parameter", lambda t: f"{t.state_bytes / t.values:.2f} bytes"),
    ]
    result = Table("", *(training.name for training in trainings))
    for column in result.columns[1:]:
        column.justify = "right"
    for label, show in rows:
        result.add_row(label, *map(show, trainings))
    return result


@dataclass(frozen=True)
class Comparison:
    """How far two trainings agree.

    Attributes:
        different_steps: the steps, counted from 1, whose losses differ.
        different_values: how many of the `values` values of the final parameters differ.
        speedup: the first optimizer's time by the second's, median over the steps.
        losses: of both, on held-out text, in nats a character.
        state_bytes: of both.
    """

    different_steps: list[int]
    different_values: int
    values: int
    speedup: float
    losses: tuple[float, float]
    state_bytes: tuple[int, int]

    @classmethod
    def of(cls, a: Training, b: Training) -> Comparison:
        losses = (torch.tensor(training.losses, dtype=torch.float32) for training in (a, b))  # exact: made from float32
        params = [torch.nn.utils.parameters_to_vector(training.model.parameters()).detach() for training in (a, b)]
        return cls(
            different_steps=[i + 1 for i in _differences(*losses)],
            different_values=len(_differences(*params)),
            values=a.values,
            speedup=median(s / t for s, t in zip(a.optimizer_seconds, b.optimizer_seconds, strict=True)),
            losses=(a.held_out_loss, b.held_out_loss),
            state_bytes=(a.state_bytes, b.state_bytes),
        )

    @property
    def identical(self) -> bool:
        return not self.different_steps and not self.different_values

    @property
    def verdict(self) -> str:
        """On trainings that are to be identical."""
        return "identical bit for bit" if self.identical else "NOT identical"

    @property
    def difference(self) -> str:
        """Of trainings that are not to be identical."""
        return f"{self.losses[1] - self.losses[0]:+.4f} nats a character on held-out text"

    def of_bits(self, steps: int) -> list[str]:
        """The verdict in words, on trainings that are to be identical."""
        same = "identical bit for bit, all"
        curves, params = f"{same} {steps:,} steps", f"{same} {self.values:,} values"
        if self.different_steps:
            count, first = len(self.different_steps), self.different_steps[0]
            curves = f"DIFFERENT at {count:,} of {steps:,} steps, first at step {first:,}"
        if self.different_values:
            params = f"DIFFERENT in {self.different_values:,} of {self.values:,} values"
        return [f"Loss curves: {curves}.", f"Final parameters: {params}."]

    def of_models(self) -> list[str]:
        """The verdict in words, on trainings that are not to be identical."""
        torchs, ours = self.state_bytes
        return [
            f"8-bit states changed the loss by {self.difference}. `fused-opt quality` compares that with what other seeds change.",
            f"Memory of the states: {ours / torchs:.1%} of torch's.",
        ]


def _differences(a: Tensor, b: Tensor) -> list[int]:
    """Indices at which two float32 tensors of shape (n,) do not hold the same bits."""
    indices: list[int] = (a.view(torch.int32) != b.view(torch.int32)).nonzero()[:, 0].tolist()
    return indices


def save_picture(trainings: list[Training], title: str, path: Path) -> None:
    """Both loss curves, and their difference below, as a PNG."""
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps = range(1, len(trainings[0].losses) + 1)
    marker = "o" if len(steps) == 1 else ""  # one point makes no line
    wide: dict[str, Any] = {"color": "#9ecae1", "linewidth": 4, "marker": marker}
    dashed: dict[str, Any] = {"color": "#a63603", "linewidth": 1.2, "linestyle": (0, (4, 3)), "marker": marker}
    for training, style in zip(trainings, (wide, dashed), strict=True):
        label = f"{training.name}, on held-out text at the end: {training.held_out_loss:.4f}"
        upper.plot(steps, training.losses, label=label, **style)
    upper.set_title(title)
    upper.set_ylabel("training loss (nats a character)")
    upper.legend()
    difference = [ours - theirs for theirs, ours in zip(*(training.losses for training in trainings), strict=True)]
    lower.plot(steps, difference, **dashed)
    lower.set_ylabel("difference")
    lower.set_xlabel("step")
    if not any(difference):
        lower.set_ylim(-1, 1)
        lower.set_yticks([0])
        lower.annotate("0 at every step", (0.5, 0.6), xycoords="axes fraction", ha="center")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def run(args: argparse.Namespace) -> int:
    """Train, compare, report.

    Returns:
        The exit status: 0; 1 if the trainings are not identical bit for bit though they should be, or if 8-bit states made one diverge.

    Raises:
        CannotRunError: 8-bit states are asked for, but cannot be had.
    """
    backend, coded = native(), args.state == INT8
    if coded and backend.module is None:
        raise CannotRunError(f"8-bit states need the extension, and {backend.why}")
    console = Console(highlight=False)
    corpus = Corpus()
    trainings = make_trainings(len(corpus.vocabulary), args.steps, args.seed, WEIGHT_DECAY, optimizers(args.state))
    train_and_show(trainings, corpus, args, console)
    comparison = Comparison.of(*trainings)
    finite = all(map(math.isfinite, comparison.losses))
    sample = "nothing: it diverged"
    if finite:
        written = trainings[1].model.continue_from(corpus.encode(PROMPT), SAMPLE_CHARACTERS, args.seed)
        sample = " ".join(corpus.decode(written).split())

    size = f"{comparison.values:,} parameters, {args.steps:,} steps of {args.batch_size} x {CONTEXT} characters"
    setting = f"{size}, threads: {torch.get_num_threads()}"
    title = f"8-bit states: {comparison.difference}" if coded else f"two AdamW: {comparison.verdict}"
    save_picture(trainings, f"The same training with {title}\n{setting}", args.output)
    lines = comparison.of_models() if coded else comparison.of_bits(args.steps)
    lines.append(f"Optimizer step: fused_opt is {comparison.speedup:.2f} times as fast as torch (median of paired ratios).")
    if backend.module is None:
        lines.append(f"fused_opt ran torch's for-loop, whose bits are not torch's fused ones, because: {backend.why}.")
    else:
        lines.append(f"fused_opt ran its native code for {backend.isa}: {backend.why}.")
        if not (comparison.identical or coded):
            lines.append("That breaks a promise: please report it, with the output of `fused-opt doctor`.")
    lines += [f"Picture: {args.output}", f"The trained model writes: {sample}"]
    console.print(setting, soft_wrap=True)
    console.print(table(trainings))
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if args.json:
        measured = ("losses", "held_out_loss", "seconds", "optimizer_seconds", "share", "state_bytes")
        results = {
            "machine": machine.describe(),
            "settings": {"threads": torch.get_num_threads(), "batch_size": args.batch_size, "seed": args.seed, "state": args.state},
            "identical": comparison.identical,
            **vars(comparison),
            "trainings": {t.name: {key: getattr(t, key) for key in measured} for t in trainings},
            "sample": sample,
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(not (finite if coded else comparison.identical))
