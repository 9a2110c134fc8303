"""Trainings with and without steps in backward, for tests."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fused_opt
from fused_opt.backward import StepInBackward, step_in_backward
from helpers import assert_same_bits, assert_same_state, params_of

STEPS = 4


WIDTH = 8


class Net(nn.Module):
    """With a matrix used twice, one that no step uses, and one that is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float32, sparse: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(11, WIDTH, sparse=sparse)
        self.norm = nn.LayerNorm(WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        if not sparse:
            self.head.weight = self.token.weight
        self.unused = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.body(self.norm(self.token(tokens)))) * self.frozen)
        return logits


def make_net(dtype: torch.dtype = torch.float32, sparse: bool = False) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(dtype, sparse)


def loss_of(model: Callable[..., Any], seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(11, (2, 5, 3), generator=generator)
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def groups_of(model: Any) -> list[dict[str, Any]]:
    """Two, of which the second has an option of its own."""
    named = list(model.named_parameters())
    return [{"params": named[1::2]}, {"params": named[::2], "lr": 0.05}]


@dataclass
class Run:
    """A model in training, with a schedule."""

    model: Any
    optimizer: Any
    schedule: Any = None
    handle: StepInBackward | None = None

    def __post_init__(self) -> None:
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)

    def train(self, steps: range = range(STEPS)) -> None:
        for seed in steps:
            self.optimizer.zero_grad()
            loss_of(self.model, seed).backward()
            if self.handle is not None:
                assert all(param.grad is None for param in self.model.parameters())
            self.optimizer.step()
            self.schedule.step()


def make_runs(
    name: str = "AdamW", dtype: torch.dtype = torch.float32, prepare: Callable[[Any], None] = lambda optimizer: None, **options: Any
) -> tuple[Run, Run]:
    """Steps in backward, and the normal loop."""
    ours, normal = (
        Run(model, getattr(fused_opt, name)(groups_of(model), **copy.deepcopy(options))) for model in (make_net(dtype), make_net(dtype))
    )
    for run in (ours, normal):
        prepare(run.optimizer)
    ours.handle = step_in_backward(ours.model, ours.optimizer)
    return ours, normal


def assert_same_run(ours: Run, normal: Run) -> None:
    assert_same_state(ours.optimizer, normal.optimizer)
    assert [group["lr"] for group in ours.optimizer.param_groups] == [group["lr"] for group in normal.optimizer.param_groups]


def state_of(optimizer: Any) -> list[torch.Tensor]:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*params_of(optimizer), *tensors)]


@contextlib.contextmanager
def nothing_changed(optimizer: Any) -> Iterator[None]:
    before = state_of(optimizer)
    attributes = set(vars(optimizer))
    hooks = dict(optimizer._optimizer_step_pre_hooks)
    yield
    after = state_of(optimizer)
    assert set(vars(optimizer)) <= attributes | {"_captured"}
    assert dict(optimizer._optimizer_step_pre_hooks) == hooks
    for one, other in zip(before, after, strict=True):
        assert_same_bits(one, other)


def adamw(model: Any, **options: Any) -> Any:
    return fused_opt.AdamW(list(model.parameters()), **options)
