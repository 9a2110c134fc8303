"""`fused-opt demo`: one real training run, with torch's fused AdamW and with fused_opt's, step by step side by side."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from fused_opt.arguments import whole_number, writable_file
from fused_opt.bench import machine
from fused_opt.bench.char_model import CONTEXT, CharModel, Corpus
from fused_opt.native import native

HELP = "train a small transformer with torch's fused AdamW and with fused_opt's, and compare every bit"

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
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured to FILE")


def _picture(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png; give a name that does")
    return writable_file(text)


@dataclass
class Training:
    """A model, its optimizer, and what has been measured: one entry a step; losses in nats a character, times in s."""

    name: str
    model: CharModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)  # the part of `seconds` inside optimizer.step()
    held_out_loss: float = math.nan

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Train on one batch, int64 tokens of shape (batch, CONTEXT)."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model.loss(inputs, targets)
        torch.autograd.backward(loss)
        before = time.perf_counter()
        self.optimizer.step()
        after = time.perf_counter()
        self.scheduler.step()
        self.losses.append(loss.item())
        self.optimizer_seconds.append(after - before)
        self.seconds.append(time.perf_counter() - start)

    @property
    def share(self) -> float:
        """The part of the training time, 0 to 1, that the optimizer took."""
        return sum(self.optimizer_seconds) / sum(self.seconds)


def make_trainings(vocabulary: int, steps: int, seed: int) -> list[Training]:
    """torch's training and fused_opt's, from equal weights, with equal param groups and schedules."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = [CharModel(vocabulary)]
    models.append(copy.deepcopy(models[0]))
    warm_up = max(1, steps // 10)

    def rate(step: int) -> float:
        """Linearly up to 1, then along a cosine towards 0, which it would reach one step after the last."""
        cosine = max(0, step + 1 - warm_up) / (steps + 1 - warm_up)
        return min((step + 1) / warm_up, 1.0) * 0.5 * (1 + math.cos(math.pi * cosine))

    theirs, ours = (model.param_groups(WEIGHT_DECAY) for model in models)
    optimizers = {
        "torch.optim.AdamW(fused=True)": torch.optim.AdamW(theirs, lr=LEARNING_RATE, fused=True),
        "fused_opt.AdamW": fused_opt.AdamW(ours, lr=LEARNING_RATE),
    }
    return [
        Training(name, model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate))
        for model, (name, optimizer) in zip(models, optimizers.items(), strict=True)
    ]


def train(trainings: list[Training], corpus: Corpus, args: argparse.Namespace, console: Console) -> None:
    """Give each batch to both trainings, taking turns at being first, so that noise of the machine falls on both."""
    generator = torch.Generator().manual_seed(args.seed)
    progress = Progress(BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    task = progress.add_task("", total=args.steps)
    # Refreshed by hand, between steps: a thread that redraws would take time from what is measured.
    display = Live(console=console, auto_refresh=False, transient=True) if console.is_interactive else None
    with display or contextlib.nullcontext():
        refreshed = -math.inf
        for step in range(args.steps):
            inputs, targets = corpus.batch(args.batch_size, generator)
            for training in trainings if step % 2 == 0 else reversed(trainings):
                training.step(inputs, targets)
            if display and time.perf_counter() > refreshed + SECONDS_PER_REFRESH:
                progress.update(task, completed=step + 1)
                display.update(Group(progress, table(trainings)), refresh=True)
                refreshed = time.perf_counter()
    for training in trainings:
        with torch.no_grad():
            training.held_out_loss = training.model.loss(*corpus.held_out_windows()).item()


def table(trainings: list[Training]) -> Table:
    """The trainings side by side, as far as they have come."""
    rows: list[tuple[str, Callable[[Training], str]]] = [
        ("training loss, last batch", lambda t: f"{t.losses[-1]:.6f}"),
        ("loss on held-out text", lambda t: "" if math.isnan(t.held_out_loss) else f"{t.held_out_loss:.6f}"),
        ("training time", lambda t: f"{sum(t.seconds):.1f} s"),
        ("optimizer's share of it", lambda t: f"{t.share:.2%}"),
        ("optimizer step, median", lambda t: f"{1e3 * median(t.optimizer_seconds):.3f} ms"),
    ]
    result = Table("", *(training.name for training in trainings))
    for column in result.columns[1:]:
        column.justify = "right"
    for label, show in rows:
        result.add_row(label, *map(show, trainings))
    return result


@dataclass(frozen=True)
class Comparison:
    """How far two trainings agree, compared as bits.

    Attributes:
        different_steps: the steps, counted from 1, whose losses differ.
        different_values: how many of the `values` values of the final parameters differ.
        speedup: the first optimizer's time by the second's, median over the steps.
    """

    different_steps: list[int]
    different_values: int
    values: int
    speedup: float

    @classmethod
    def of(cls, a: Training, b: Training) -> Comparison:
        losses = (torch.tensor(training.losses, dtype=torch.float32) for training in (a, b))  # exact: made from float32
        params = [torch.nn.utils.parameters_to_vector(training.model.parameters()).detach() for training in (a, b)]
        return cls(
            different_steps=[i + 1 for i in _differences(*losses)],
            different_values=len(_differences(*params)),
            values=params[0].numel(),
            speedup=median(s / t for s, t in zip(a.optimizer_seconds, b.optimizer_seconds, strict=True)),
        )

    @property
    def identical(self) -> bool:
        return not self.different_steps and not self.different_values

    def sentences(self, steps: int) -> list[str]:
        """The verdict in words."""
        same = "identical bit for bit, all"
        curves, params = f"{same} {steps:,} steps", f"{same} {self.values:,} values"
        if self.different_steps:
            count, first = len(self.different_steps), self.different_steps[0]
            curves = f"DIFFERENT at {count:,} of {steps:,} steps, first at step {first:,}"
        if self.different_values:
            params = f"DIFFERENT in {self.different_values:,} of {self.values:,} values"
        return [
            f"Loss curves: {curves}.",
            f"Final parameters: {params}.",
            f"Optimizer step: fused_opt is {self.speedup:.2f} times as fast as torch (median of paired ratios).",
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
    """Train, compare, report. Returns the exit status: 0 if the trainings are identical bit for bit, else 1."""
    console = Console(highlight=False)
    corpus = Corpus()
    trainings = make_trainings(len(corpus.vocabulary), args.steps, args.seed)
    train(trainings, corpus, args, console)
    comparison = Comparison.of(*trainings)
    written = trainings[1].model.continue_from(corpus.encode(PROMPT), SAMPLE_CHARACTERS, args.seed)
    sample = " ".join(corpus.decode(written).split())

    size = f"{comparison.values:,} parameters, {args.steps:,} steps of {args.batch_size} x {CONTEXT} characters"
    setting = f"{size}, threads: {torch.get_num_threads()}"
    verdict = "identical bit for bit" if comparison.identical else "NOT identical"
    save_picture(trainings, f"The same training with two AdamW: {verdict}\n{setting}", args.output)
    backend = native()
    lines = comparison.sentences(args.steps)
    if backend.module is None:
        lines.append(f"fused_opt ran torch's for-loop, whose bits are not torch's fused ones, because: {backend.why}.")
    else:
        lines.append(f"fused_opt ran its native code for {backend.isa}: {backend.why}.")
        if not comparison.identical:
            lines.append("That breaks a promise: please report it, with the output of `fused-opt doctor`.")
    lines += [f"Picture: {args.output}", f"The trained model writes: {sample}"]
    console.print(setting, soft_wrap=True)
    console.print(table(trainings))
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if args.json:
        measured = ("losses", "held_out_loss", "seconds", "optimizer_seconds", "share")
        results = {
            "machine": machine.describe(),
            "settings": {"threads": torch.get_num_threads(), "batch_size": args.batch_size, "seed": args.seed},
            "identical": comparison.identical,
            **vars(comparison),
            "trainings": {t.name: {key: getattr(t, key) for key in measured} for t in trainings},
            "sample": sample,
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if comparison.identical else 1
