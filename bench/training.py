"""Trains the demo's model with several optimizers side by side: from equal weights, on the same batches, with the same schedule."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_opt.bench.char_model import CharModel, Corpus

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # of param groups


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

    @property
    def values(self) -> int:
        """The number of the model's parameters."""
        return sum(param.numel() for param in self.model.parameters())

    @property
    def state_bytes(self) -> int:
        """The size of all states, with the scales of 8-bit ones and without step counters."""
        tensors = (value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
        return sum(tensor.nbytes for tensor in tensors if tensor.dim())


def make_trainings(vocabulary: int, steps: int, seed: int, weight_decay: float, optimizers: Mapping[str, MakeOptimizer]) -> list[Training]:
    """A training for each optimizer, by name; `steps` in all, with weights decided by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharModel(vocabulary)
    warm_up = max(1, steps // 10)

    def rate(step: int) -> float:
        """Linearly up to 1, then along a cosine towards 0, which it would reach one step after the last."""
        cosine = max(0, step + 1 - warm_up) / (steps + 1 - warm_up)
        return min((step + 1) / warm_up, 1.0) * 0.5 * (1 + math.cos(math.pi * cosine))

    trainings = []
    for name, make in optimizers.items():
        own = copy.deepcopy(model)
        optimizer = make(own.param_groups(weight_decay))
        trainings.append(Training(name, own, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)))
    return trainings


def train(
    trainings: list[Training], corpus: Corpus, steps: int, batch_size: int, seed: int, on_step: Callable[[int], None] = lambda step: None
) -> None:
    """Give each batch to every training, taking turns at being first, so that noise of the machine falls on all.

    `on_step` is called after each step with the number of steps done.
    """
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        inputs, targets = corpus.batch(batch_size, generator)
        for training in trainings if step % 2 == 0 else reversed(trainings):
            training.step(inputs, targets)
        on_step(step + 1)
    for training in trainings:
        with torch.no_grad():
            training.held_out_loss = training.model.loss(*corpus.held_out_windows()).item()
