"""What is exported and what is evaluated: `float32_weights` are what the next step computes with, averages only those that have begun."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.step import FusedStep
from helpers import CLASSES, assert_same_bits, params_of
from pairs import ALL_STATES, nothing_changes, step_with

COMPANIONS = ["split", "kahan", "master"]
every_class = pytest.mark.parametrize("name", CLASSES)


def trained(name: str = "AdamW", dtype: torch.dtype = torch.bfloat16, steps: int = 5, **options: Any) -> FusedStep:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((6, 7), (5,))]
    optimizer: FusedStep = getattr(fused_opt, name)(params, **{"lr": 0.01, **ALL_STATES[name], **options})
    for _ in range(steps):
        step_with(optimizer, [torch.randn(param.shape, generator=generator).to(dtype) for param in params])
    return optimizer


def joined(optimizer: FusedStep) -> torch.Tensor:
    """The numbers that SGD's step computes with, seen in a float32 average of a step that does not move; NaN for infinity."""
    (param,) = params_of(optimizer)
    step_with(optimizer, [torch.zeros_like(param)])
    average = optimizer.state[param]["average"]
    assert isinstance(average, torch.Tensor)
    return average


# --- float32_weights ---


@pytest.mark.parametrize("weights", COMPANIONS)
def test_every_weight_that_was_set_is_joined_as_by_a_step(weights: str) -> None:
    """All 65,536 of them, beside companions of both signs and none."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for low_bits, rest in ((-32768, -1e-3), (-1, 1e-3), (0, 0.0), (1, 3e38), (32767, math.inf)):
        param = torch.nn.Parameter(torch.zeros_like(every))
        optimizer = fused_opt.SGD([param], lr=1.0, weights=weights, average="ema", average_decay=0.0)
        joined(optimizer)
        for key in ("low_bits", "compensation", "master"):
            if key in optimizer.state[param]:
                optimizer.state[param][key].fill_(low_bits if key == "low_bits" else rest)
        with torch.no_grad():
            param.copy_(every)
        exported = optimizer.float32_weights()[param]
        average, finite = joined(optimizer), exported.isfinite()
        assert_same_bits(exported[finite] + 0.0, average[finite] + 0.0, f"{low_bits}, {rest}")
        assert not bool(average[~finite].isfinite().any())


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf])
def test_split_weights_that_were_set_to_zero_or_infinity(value: float) -> None:
    """The lower half is at most that much of such a weight, and no NaN."""
    optimizer = trained(weights="split")
    with torch.no_grad():
        for param in params_of(optimizer):
            param.fill_(value)
    for exported in optimizer.float32_weights().values():
        assert bool((exported.abs() > 3e38).all() if value else (exported.abs() < 1e-40).all())
        assert bool((exported.signbit() == (math.copysign(1.0, value) < 0)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [None, "stochastic", *COMPANIONS])
def test_averages_are_exported_in_float32_from_within(weights: str | None, dtype: torch.dtype) -> None:
    """Not the averages rounded, with the companions of other weights."""
    optimizer = trained(dtype=dtype, weights=weights, average="ema", average_decay=0.9)
    outside = optimizer.float32_weights()
    with optimizer.average_weights():
        for param, exported in optimizer.float32_weights().items():
            assert_same_bits(exported, optimizer.state[param]["average"])
            assert exported.data_ptr() not in (param.data_ptr(), optimizer.state[param]["average"].data_ptr())
            assert not torch.equal(exported, outside[param])
    for param, exported in optimizer.float32_weights().items():
        assert_same_bits(exported, outside[param])


def test_those_that_do_not_average_are_joined_from_within() -> None:
    first, second = (torch.nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [first], "average": "ema"}, {"params": [second]}]
    optimizer = fused_opt.SGD(groups, lr=2.0**-10, weights="split")
    step_with(optimizer, [torch.ones(4, dtype=torch.bfloat16)] * 2)
    with optimizer.average_weights():
        assert optimizer.float32_weights()[second].tolist() == [1 - 2.0**-10] * 4


def test_a_companion_of_other_weights_is_not_joined() -> None:
    """An option that was changed in the middle: the state of the first is still there."""
    optimizer = trained(weights="split")
    optimizer.param_groups[0]["weights"] = "kahan"
    step_with(optimizer, [torch.ones_like(param) for param in params_of(optimizer)])
    for param, exported in optimizer.float32_weights().items():
        assert {"low_bits", "compensation"} <= set(optimizer.state[param])
        assert_same_bits(exported, param.detach().float() + optimizer.state[param]["compensation"].float())
    del optimizer.param_groups[0]["weights"]
    for param, exported in optimizer.float32_weights().items():
        assert_same_bits(exported, param.detach().float())


@pytest.mark.parametrize(
    ("dtype", "exported"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
        (torch.complex64, torch.complex64),
        (torch.complex128, torch.complex64),
    ],
    ids=str,
)
def test_other_weights_are_copies(dtype: torch.dtype, exported: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.randn(3, 4, dtype=dtype).t())
    optimizer = fused_opt.AdamW([param], weights="master")
    found = optimizer.float32_weights()[param]
    assert_same_bits(found, param.detach().to(exported))
    assert found.data_ptr() != param.data_ptr()
    assert not found.requires_grad


# --- average_weights ---


@every_class
def test_groups_that_average_no_more_stay_as_they_are(name: str) -> None:
    """Their averages, of long ago, are still in the state."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = getattr(fused_opt, name)([{"params": [param]} for param in params], lr=0.1, average="ema")
    for _ in range(2):
        step_with(optimizer, [torch.ones(4)] * 2)
        optimizer.param_groups[0]["average"] = None
    before = [param.detach().clone() for param in params]
    with optimizer.average_weights():
        assert_same_bits(params[0], before[0])
        assert_same_bits(params[1], optimizer.state[params[1]]["average"])
        assert not torch.equal(params[1], before[1])


@pytest.mark.parametrize("kind", ["ema", "swa"])
@every_class
def test_an_average_that_has_not_begun_is_not_shown(name: str, kind: str) -> None:
    """Nor exported: the weights are. The state has those before the first step until then."""
    optimizer = trained(name, average=kind, average_start=3, average_every=2, steps=0)
    for step in range(6):
        before = [param.detach().clone() for param in params_of(optimizer)]
        with nothing_changes(optimizer), optimizer.average_weights():
            for param, value in zip(params_of(optimizer), before, strict=True):
                if step > 3:
                    assert_same_bits(param, optimizer.state[param]["average"].to(param.dtype))
                    assert_same_bits(optimizer.float32_weights()[param], optimizer.state[param]["average"])
                else:
                    assert_same_bits(param, value)
                    assert_same_bits(optimizer.float32_weights()[param], value.float())
        step_with(optimizer, [torch.ones_like(param) for param in params_of(optimizer)])
