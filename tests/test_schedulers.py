"""Every learning rate scheduler of torch drives ours as it drives torch's: the same options after each step, the same parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from helpers import CLASSES, assert_same_state, make_problem
from pairs import SHAPES, assert_native, make_pair, step_with

# From within SequentialLR of older versions of torch, about itself.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

STEPS = 9

Make = Callable[[torch.optim.Optimizer], Any]


def _cyclic(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return lr_scheduler.CyclicLR(optimizer, base_lr=0.001, max_lr=0.1, step_size_up=3, cycle_momentum=True)


def _one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1, cycle_momentum=True)


def _sequential(optimizer: torch.optim.Optimizer) -> LRScheduler:
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)], milestones=[4])


def _chained(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 3)])


SCHEDULERS: dict[type, Make] = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, step_size=2),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5]),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3),
    lr_scheduler.LinearLR: lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    lr_scheduler.SequentialLR: _sequential,
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4, eta_min=1e-4),
    lr_scheduler.ChainedScheduler: _chained,
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lr_scheduler.CyclicLR: _cyclic,
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    lr_scheduler.OneCycleLR: _one_cycle,
    SWALR: lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=4),
}

OF_TORCH = {
    value
    for name, value in vars(lr_scheduler).items()
    if inspect.isclass(value) and value.__module__ == lr_scheduler.__name__ and hasattr(value, "step") and not name.startswith("_")
}


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Every value of every group, tensors as numbers."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [{key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()} for group in groups]


def test_the_table_has_every_scheduler_of_the_installed_torch() -> None:
    assert len(OF_TORCH) >= 15
    assert OF_TORCH - {lr_scheduler.LRScheduler} - set(SCHEDULERS) == set()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
def test_options_and_parameters_are_torchs(scheduler: type, name: str, tensor_lr: bool) -> None:
    """With momentum or betas cycled where the scheduler does that."""
    values, grads = make_problem(SHAPES, STEPS, torch.float64)
    histories: list[list[Any]] = [[], []]
    pair = make_pair(name, values, lr=0.02)
    for optimizer, history in zip(pair, histories, strict=True):
        if tensor_lr:  # in float64: torch's for-loop computes Adam's step size in the precision of a tensor lr
            optimizer.param_groups[0]["lr"] = torch.tensor(0.02, dtype=torch.float64)
        schedule = SCHEDULERS[scheduler](optimizer)
        for step, step_grads in enumerate(grads):
            step_with(optimizer, step_grads)
            schedule.step(*([1.0 + step // 2] if scheduler is lr_scheduler.ReduceLROnPlateau else []))
            history.append(options_of(optimizer))
    assert histories[0] == histories[1]
    assert len({str(options) for options in histories[0]}) > 1, "the scheduler changed nothing"
    assert_same_state(*pair)
    assert_native(pair[0])


@pytest.mark.parametrize("name", CLASSES)
def test_a_schedule_resumed_from_its_state_dict_continues(name: str) -> None:
    """Optimizer and schedule saved in mid-course and loaded into new ones; the options are those of the course that went on."""
    values, grads = make_problem(SHAPES, STEPS, torch.float32)
    optimizer, _ = make_pair(name, values)
    schedule = _one_cycle(optimizer)
    for step_grads in grads[:4]:
        step_with(optimizer, step_grads)
        schedule.step()
    resumed, _ = make_pair(name, [p.detach() for p in optimizer.param_groups[0]["params"]])
    resumed_schedule = _one_cycle(resumed)
    resumed_schedule.load_state_dict(schedule.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step_grads in grads[4:]:
        for each, its_schedule in ((optimizer, schedule), (resumed, resumed_schedule)):
            step_with(each, step_grads)
            its_schedule.step()
    assert options_of(resumed) == options_of(optimizer)
    assert_same_state(resumed, optimizer)
