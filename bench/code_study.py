"""Which 8-bit codes should optimizer states have? `python -m fused_opt.bench.code_study [--quick] [--json FILE]`

States are simulated: Adam in float32, and after every step each moment x becomes decode(encode(x)), in blocks of 256. It uses one
thread, and none of the native code. CODES.md has what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fused_opt.arguments import whole_number, writable_file
from fused_opt.bench.char_model import CharModel, Corpus
from fused_opt.bench.codes import BLOCK, CODES, Format, scales

LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 3e-3, 0.1, (0.9, 0.999), 1e-8  # the demo's
BATCH_SIZE = 16
MIN_8BIT_SIZE = 4096  # smaller tensors keep fp32 moments

TENSORS = {
    "attention": "body.0.query_key_value.weight",
    "perceptron": "body.1.perceptron.1.weight",
    "embedding": "token.weight",  # half of its values have no gradient in a step: characters that the batch does not have
    "head": "head.weight",
}
PERIODS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 21, 34, 55, 89)  # those of Fibonacci are the worst for the golden ratio
STREAMS = ("recorded", "Student-t", "outliers")

Pair = tuple[str, str]  # the formats of the first and the second moment
EXACT, ACCURATE = "fp32", "shift 2 dither"
SHIPPED = "mu-law 4 step-hash"  # what fused_opt does, for both moments
NOISE = [SHIPPED, "mu-law 4 hash"] + [f"shift 2 {rounding}" for rounding in ("SR8", "dither8", "dither4", "step-hash")]
PAIRS: list[Pair] = [
    (SHIPPED, SHIPPED),
    (ACCURATE, ACCURATE),
    ("linear nearest", "linear nearest"),
    ("square nearest", "square nearest"),
    ("dynamic nearest", "dynamic nearest"),
    ("dynamic dither", "dynamic dither"),
    ("shift 2 nearest", "shift 2 nearest"),
    ("shift 2 SR", "shift 2 SR"),
    ("shift 2 nearest", ACCURATE),
    ("shift 1 dither", ACCURATE),
    ("shift 2 step-hash", "shift 2 step-hash"),
    ("mu-law 4 dither", "mu-law 4 dither"),
    ("mu-law 4 dither", ACCURATE),
    ("mu-law 4 dither", "root mu-law 5 dither"),
    ("mu-law 4 hash", "mu-law 4 hash"),
    ("fourth dither", "fourth dither"),
]


@dataclass(frozen=True)
class Size:
    """How much is run: codes tried alone, steps recorded, blocks kept of each tensor, and the trainings."""

    codes: tuple[str, ...]
    recorded_steps: int
    blocks: int
    trained_steps: int
    trained: list[Pair]
    seeds: int = 3

    def single(self) -> list[str]:
        return [f"{code} {rounding}" for code in self.codes for rounding in ("nearest", "SR", "dither")] + NOISE


FULL = Size(tuple(CODES), 500, 48, 200, PAIRS[:7])
QUICK = Size(("mu-law 4", "shift 2"), 60, 16, 15, PAIRS[:3])


@dataclass
class Adam:
    """The moments of one tensor, shape (blocks, size), each stored in its format."""

    first: Format
    second: Format
    m: Tensor
    v: Tensor
    generator: torch.Generator
    steps: int = 0
    collapsed: bool = False  # some positive second moment was stored as zero

    @classmethod
    def of(cls, like: Tensor, pair: Pair, seed: int = 0) -> Adam:
        first, second = map(Format.parse, pair)
        return cls(first, second, torch.zeros_like(like), torch.zeros_like(like), torch.Generator().manual_seed(seed))

    def step(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The update, without the learning rate, and its denominator."""
        self.steps += 1
        m = self.m.lerp(grad, 1 - BETAS[0])
        v = (self.v * BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        denominator = v.sqrt().div_(math.sqrt(1 - BETAS[1] ** self.steps)).add_(EPS)
        self.m = self.first.store(m, True, self.steps, self.generator)
        self.v = self.second.store(v, False, self.steps, self.generator)
        self.collapsed |= bool(((self.v == 0) & (v > 0)).any())
        return m / (1 - BETAS[0] ** self.steps) / denominator, denominator


class AdamW(torch.optim.Optimizer):
    """`Adam` with decoupled decay for the parameters of a model."""

    def __init__(self, params: list[dict[str, Any]], pair: Pair, seed: int) -> None:
        super().__init__(params, {"lr": LEARNING_RATE})
        self.pair, self.seed = pair, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param not in self.state:
                    pair = self.pair if param.numel() >= MIN_8BIT_SIZE else (EXACT, EXACT)
                    self.state[param] = Adam.of(in_blocks(param), pair, self.seed + len(self.state))
                update, _ = self.state[param].step(in_blocks(param.grad))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(update.flatten()[: param.numel()].view_as(param), alpha=group["lr"])


def in_blocks(x: Tensor) -> Tensor:
    """Shape (blocks, BLOCK), padded with zeros."""
    return nn.functional.pad(x.detach().flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def train(pair: Pair, steps: int, seed: int, watch: Callable[[CharModel], None] = lambda model: None) -> float:
    """Train the demo's model with its settings; the loss on held-out text, in nats a character."""
    corpus = Corpus()
    torch.manual_seed(seed)
    model = CharModel(len(corpus.vocabulary))
    optimizer = AdamW(model.param_groups(WEIGHT_DECAY), pair, seed)
    warm_up = max(1, steps // 10)

    def rate(step: int) -> float:
        cosine = max(0, step + 1 - warm_up) / (steps + 1 - warm_up)
        return min((step + 1) / warm_up, 1.0) * 0.5 * (1 + math.cos(math.pi * cosine))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model.loss(*corpus.batch(BATCH_SIZE, generator)))
        watch(model)
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return model.loss(*corpus.held_out_windows()).item()


def record(steps: int, blocks: int) -> Tensor:
    """Gradients of a training in fp32: shape (steps, tensors * blocks, BLOCK), in the order of TENSORS."""
    recorded: list[Tensor] = []

    def watch(model: CharModel) -> None:
        params = dict(model.named_parameters())
        for name in TENSORS.values():
            grad = params[name].grad
            assert grad is not None
            rows = in_blocks(grad)
            recorded.append(rows[torch.linspace(0, len(rows) - 1, blocks).long()])

    train((EXACT, EXACT), steps, 0, watch)
    return torch.cat(recorded).view(steps, -1, BLOCK)


def heavier_tails(grad: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient for each of STREAMS, one after the other: itself, by Student-t noise, with 4 columns of 256 a thousand times larger."""
    normal = torch.randn(3, *grad.shape, generator=generator)
    student = normal[0] * (normal[1:].square().sum(0) / 2).rsqrt()  # 2 degrees of freedom: its variance is infinite
    outliers = torch.where(torch.arange(BLOCK) % 64 == 5, 1e3, 1.0)
    return torch.cat([grad, grad * student, grad * outliers])


def update_errors(recorded: Tensor, pairs: list[Pair]) -> dict[str, Any]:
    """How far the updates u and denominators d of each pair are from fp32's on the same gradients: means over the last half of the steps.

    For each stream and tensor: |u - u32| / |u32|, and the mean and standard deviation of log(d / d32) where a gradient has been.
    """
    generator = torch.Generator().manual_seed(1)
    parts = len(STREAMS) * len(TENSORS)
    start = heavier_tails(recorded[0], generator)
    exact = Adam.of(start, (EXACT, EXACT))
    adams = {pair: Adam.of(start, pair) for pair in pairs}
    sums = {pair: torch.zeros(3, parts) for pair in pairs}
    for step, plain in enumerate(recorded):
        grad = heavier_tails(plain, generator)
        update, denominator = (x.view(parts, -1) for x in exact.step(grad))
        touched = exact.v.view(parts, -1) > 0
        for pair, adam in adams.items():
            u, d = (x.view(parts, -1) for x in adam.step(grad))
            if step < len(recorded) // 2:
                continue
            log_ratio = (d / denominator).log() * touched
            bias = log_ratio.sum(1) / touched.sum(1)
            variance = log_ratio.square().sum(1) / touched.sum(1) - bias.square()
            sums[pair] += torch.stack([(u - update).norm(dim=1) / update.norm(dim=1), bias, variance.clamp(min=0).sqrt()])

    def by_part(values: Tensor) -> dict[str, dict[str, float]]:
        return {s: dict(zip(TENSORS, row, strict=True)) for s, row in zip(STREAMS, values.view(len(STREAMS), -1).tolist(), strict=True)}

    count = len(recorded) - len(recorded) // 2
    return {
        "pairs": [
            {"pair": pair, "collapsed": adam.collapsed}
            | {key: by_part(values / count) for key, values in zip(("error", "bias", "spread"), sums[pair], strict=True)}
            for pair, adam in adams.items()
        ],
        "collapse": {name: collapse(name, exact.v.view(len(STREAMS), -1, BLOCK)) for name in CODES},
    }


def collapse(code: str, v: Tensor) -> dict[str, float]:
    """The part of the positive second moments, shape (streams, blocks, size), that the code rounds to zero if it may."""
    result = {}
    for stream, x in zip(STREAMS, v, strict=True):
        codes = CODES[code].encode(x, scales(x), False, None)
        result[stream] = ((codes == 0) & (x > 0)).sum().item() / (x > 0).sum().item()
    return result


@dataclass
class Synthetic:
    """Normal gradients whose sizes differ, in 64 blocks: a quarter of the values of each kind, or half of the last."""

    sizes: Tensor
    kinds: Tensor
    generator: torch.Generator

    @classmethod
    def make(cls) -> Synthetic:
        generator = torch.Generator().manual_seed(3)
        sizes = torch.randn(64, BLOCK, generator=generator).exp()
        return cls(sizes, (torch.rand(64, BLOCK, generator=generator) * 4).long().clamp(max=2), generator)

    def draw(self, factors: tuple[float, float, float]) -> Tensor:
        """A step's gradients, those of kind i times factors[i]."""
        return torch.randn(self.sizes.shape, generator=self.generator) * self.sizes * torch.tensor(factors)[self.kinds]


def drift(pair: Pair) -> dict[str, float]:
    """How far weights move in 1000 steps whose gradients ended 200 steps before, by the mean of those that go on having gradients.

    The third kind never has a gradient. Then the same where a weight of each block has a constant gradient, the largest: no scale changes.
    """
    (mean_, max_, never), (constant, *_) = (_drift(pair, *case) for case in ((100, False), (300, True)))
    return {"mean": mean_, "max": max_, "never": never, "constant scale": constant}


def _drift(pair: Pair, end: int, constant: bool) -> tuple[float, float, float]:
    data = Synthetic.make()
    adam = Adam.of(data.sizes, pair)
    moved = torch.zeros_like(data.sizes)
    for step in range(end + 1200):
        grad = data.draw((0.0, float(step < end), 1.0))
        if constant:
            grad[:, 0] = 200.0
        if step == end + 200:
            moved.zero_()
        update, _ = adam.step(grad)
        moved += update
    never, stopped, live = (moved[:, 1:][data.kinds[:, 1:] == kind].abs() for kind in range(3))
    return (stopped.mean() / live.mean()).item(), (stopped.max() / live.mean()).item(), never.max().item()


def tracking(second: str) -> dict[str, float]:
    """mean(log(d / d32)) 1000 steps after the gradients of a kind became 10 times smaller, 3 times larger, or stayed as they were."""
    data = Synthetic.make()
    adam, exact = Adam.of(data.sizes, (EXACT, second)), Adam.of(data.sizes, (EXACT, EXACT))
    for step in range(1500):
        grad = data.draw((1.0, 1.0, 1.0) if step < 500 else (0.1, 3.0, 1.0))
        (_, d), (_, d32) = adam.step(grad), exact.step(grad)
    log_ratio = (d / d32).log()
    names = ("10 times smaller", "3 times larger", "as before")
    return {name: log_ratio[data.kinds == kind].mean().item() for kind, name in enumerate(names)}


def periodic(second: str) -> dict[str, float]:
    """The standard deviation of log(d / d32) where gradients come every k-th step only: does a sequence of noise resonate?"""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.randn(len(PERIODS), 8 * BLOCK, generator=generator).exp()
    adam, exact = (Adam.of(sizes.view(-1, BLOCK), (EXACT, name)) for name in (second, EXACT))
    squares, count = torch.zeros(len(PERIODS)), 0
    for step in range(1500):
        comes = (step % torch.tensor(PERIODS) == 0)[:, None]
        grad = (torch.randn(sizes.shape, generator=generator) * sizes * comes).view(-1, BLOCK)
        (_, d), (_, d32) = adam.step(grad), exact.step(grad)
        if step >= 500:
            squares += (d / d32).log().view(sizes.shape).square().mean(1)
            count += 1
    return {str(k): value for k, value in zip(PERIODS, (squares / count).sqrt().tolist(), strict=True)}


def trainings(size: Size, progress: Callable[[str], object]) -> list[dict[str, Any]]:
    """Held-out losses, one a seed; the differences are between trainings that saw the same batches from the same weights."""
    rows: list[dict[str, Any]] = []
    for pair in [(EXACT, EXACT), *size.trained]:
        losses = []
        for seed in range(size.seeds):
            progress(f"training {', '.join(pair)}, seed {seed}")
            losses.append(train(pair, size.trained_steps, seed))
        differences = [loss - exact for loss, exact in zip(losses, rows[0]["losses"] if rows else losses, strict=True)]
        rows.append({"pair": pair, "losses": losses, "differences": differences})
    return rows


def show(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def error_table(title: str, errors: dict[str, Any], pairs: list[Pair], key: str = "error") -> Table:
    """For each pair, without its fp32, and each stream: the mean over the tensors."""
    found = {row["pair"]: row[key] for row in errors["pairs"]}
    rows = [(shown(pair), *(f"{mean(found[pair][stream].values()):.4f}" for stream in STREAMS)) for pair in pairs]
    return show(title, ("stored", *STREAMS), rows)


def shown(pair: Pair) -> str:
    return ", ".join(name for name in pair if name != EXACT) or EXACT


def run(size: Size, console: Console) -> dict[str, Any]:
    """Everything; prints the tables and returns what they were made from."""
    single = size.single()
    first: list[Pair] = [(name, EXACT) for name in single]
    second: list[Pair] = [(EXACT, name) for name in single]
    with console.status("recording gradients") as status:
        recorded = record(size.recorded_steps, size.blocks)
        status.update("errors of updates")
        errors = update_errors(recorded, first + second + PAIRS)
        console.print(error_table("First moment: error of the update", errors, first))
        console.print(error_table("Second moment: error of the update", errors, second))
        console.print(error_table("Second moment: log(d / d32), mean", errors, second, "bias"))
        console.print(error_table("Both moments: error of the update", errors, PAIRS))
        lost = [(name, *(f"{part:.2%}" for part in row.values())) for name, row in errors["collapse"].items()]
        console.print(show("Positive second moments that a code would round to zero", ("code", *STREAMS), lost))
        collapsed = [shown(row["pair"]) for row in errors["pairs"] if row["collapsed"]]
        console.print(f"Stored as zero, with the rule that positive ones stay so, in: {'; '.join(collapsed) or 'none'}")

        status.update("pathologies")
        drifts = {pair: drift(pair) for pair in [(EXACT, EXACT), *first, *PAIRS[:2]]}
        rows = [(shown(pair), *(f"{x:.6f}" for x in row.values())) for pair, row in drifts.items()]
        console.print(show("Weights move without gradients", ("stored", "mean", "max", "never had one", "mean, constant scale"), rows))
        tracked = {name: tracking(name) for name in single}
        rows = [(name, *(f"{x:+.4f}" for x in row.values())) for name, row in tracked.items()]
        console.print(show("Second moment, 1000 steps after gradients change: log(d / d32)", ("stored", *tracked[ACCURATE]), rows))
        rare = {name: periodic(name) for name in ("shift 2 nearest", "shift 2 SR", ACCURATE, "shift 2 step-hash")}
        rows = [(str(k), *(f"{row[str(k)]:.4f}" for row in rare.values())) for k in PERIODS]
        console.print(show("Second moment, gradients every k-th step: spread of log(d / d32)", ("k", *rare), rows))

        losses = trainings(size, status.update)
    rows = []
    for row in losses:
        figures = [f"{f(row[key]):{sign}.4f}" for key, sign in (("losses", ""), ("differences", "+")) for f in (mean, stdev)]
        rows.append((shown(row["pair"]), *figures))
    title = f"Loss on held-out text after {size.trained_steps} steps, {size.seeds} seeds"
    console.print(show(title, ("stored", "mean", "spread", "from fp32", "spread"), rows))
    return {
        "size": vars(size),
        "errors": errors,
        "drift": [{"pair": pair} | moves for pair, moves in drifts.items()],
        "tracking": tracked,
        "periodic": rare,
        "trainings": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_opt.bench.code_study", description="Compare 8-bit codes for optimizer states.")
    parser.add_argument("--quick", action="store_true", help="two minutes instead of twenty, with fewer codes, steps and trainings")
    parser.add_argument("--train", type=whole_number(1, 100_000), metavar="N", help="steps of each training (default: 200, or 20)")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything measured to FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if args.quick else FULL
    results = run(
        replace(size, trained_steps=args.train or size.trained_steps), Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
