"""Trains a model with several optimizers side by side: from equal weights, on the same batches, with the same schedule."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from fused_opt.bench.char_model import CharModel, Corpus

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # of param groups
Batch = tuple[Tensor, Tensor]  # inputs and targets
OnStep = Callable[[int], None]  # called after each step with the number of steps done


def _warm_up(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Linearly up for a tenth of the steps, then along a cosine towards 0."""
    first = max(1, steps // 10)
    return lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=1 / (first + 1), total_iters=first),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - first)),
        ],
        milestones=[first],
    )


# Name -> what makes the schedule of a training of so many steps. Those that fall to 0 reach it one step after the last.
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "step": lambda optimizer, steps: lr_scheduler.StepLR(optimizer, step_size=max(1, steps // 3), gamma=0.1),
    "exponential": lambda optimizer, steps: lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / steps)),
    "linear": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps),
    "cosine": lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
    "warm-up": _warm_up,
}


@dataclass
class Training:
    """A model, its optimizer, and what has been measured: one entry a step; losses as the model has them, times in s.

    `model` is a `torch.nn.Module` with `loss` and `param_groups`, such as `CharModel`.
    """

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)  # the part of `seconds` inside optimizer.step()
    held_out_loss: float = math.nan

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Train on one batch, of what the model's `loss` takes."""
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

    @property
    def values(self) -> int:
        """The number of the model's parameters."""
        return sum(int(param.numel()) for param in self.model.parameters())

    @property
    def state_bytes(self) -> int:
        """The size of all states, with the scales of 8-bit ones and without step counters."""
        tensors = (value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
        return sum(tensor.nbytes for tensor in tensors if tensor.dim())


def side_by_side(
    make_model: Callable[[], nn.Module], seed: int, weight_decay: float, optimizers: Mapping[str, MakeOptimizer], schedule: str, steps: int
) -> list[Training]:
    """A training for each optimizer, by name, of `steps` in all.

    Args:
        make_model: called once; its weights, which all trainings begin with, are decided by `seed`.
        weight_decay: of what the model's `param_groups` decays.
        schedule: a key of `SCHEDULES`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model()
    trainings = []
    for name, make in optimizers.items():
        own: Any = copy.deepcopy(model)
        optimizer = make(own.param_groups(weight_decay))
        trainings.append(Training(name, own, optimizer, SCHEDULES[schedule](optimizer, steps)))
    return trainings


def take_turns(trainings: list[Training], batches: Iterable[Batch], on_step: OnStep = lambda step: None) -> None:
    """Give each batch to every training, in an order that changes, so that noise of the machine falls on all."""
    with warnings.catch_warnings():
        # Of torch 2.6's SequentialLR, about a call of its own.
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step", UserWarning)
        for step, (inputs, targets) in enumerate(batches):
            for training in trainings if step % 2 == 0 else reversed(trainings):
                training.step(inputs, targets)
            on_step(step + 1)


def make_trainings(vocabulary: int, steps: int, seed: int, weight_decay: float, optimizers: Mapping[str, MakeOptimizer]) -> list[Training]:
    """The demo's model with each optimizer, by name."""
    return side_by_side(lambda: CharModel(vocabulary), seed, weight_decay, optimizers, "warm-up", steps)


def train(trainings: list[Training], corpus: Corpus, steps: int, batch_size: int, seed: int, on_step: OnStep = lambda step: None) -> None:
    """Train the demo's models; at the end they have their loss on held-out text."""
    generator = torch.Generator().manual_seed(seed)
    take_turns(trainings, (corpus.batch(batch_size, generator) for _ in range(steps)), on_step)
    for training in trainings:
        with torch.no_grad():
            training.held_out_loss = training.model.loss(*corpus.held_out_windows()).item()
