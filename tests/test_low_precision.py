"""16-bit weights that lose nothing, or nothing on average: split, with fp32 masters, with Kahan's compensation, rounded stochastically."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.bench.cases import CASES, Case
from fused_opt.bench.layouts import gaps, permuted
from fused_opt.bench.stage_cases import RULES
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, needs_grad_dtype, run_steps
from pairs import assert_native, assert_resumes, nothing_changes, set_grads, step_with, through_file

Optimizer = torch.optim.Optimizer
SHAPES = ((31, 33), (77,), (), (0, 3), (4, 5, 6))
FORMATS: tuple[dict[str, Any], ...] = (
    {"state_dtype": torch.float32},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": "int8", "min_8bit_size": 0, "block_size": 64},
)


def exact(optimizer: Optimizer, param: torch.Tensor) -> torch.Tensor:
    """The fp32 number that a weight and its companion stand for."""
    state = optimizer.state[param]
    if "low_bits" in state:
        return (param.detach().contiguous().view(torch.int16).int() * 65536 + state["low_bits"].contiguous().int()).view(torch.float32)
    if "master" in state:
        return state["master"]
    return param.detach().float() + state["compensation"].float()


# --- nothing is lost ---


def beside_fp32(case: Case, weights: str, dtype: torch.dtype, place: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> None:
    """The same 16-bit gradients to `dtype` weights and to float32 ones, whose numbers must be the same after each step."""
    decades = (-4.0, 1.0) if dtype == torch.float16 else (-6.0, 1.0)
    values, grads = make_problem(SHAPES, 6, dtype, decades=decades, zeros=0.05)
    short, wide = ([torch.nn.Parameter(place(value.to(to))) for value in values] for to in (dtype, torch.float32))
    optimizer, expected = (
        getattr(fused_opt, case.optimizer)(params, **{**case.options, **options, **given})
        for params, given in ((short, {"weights": weights}), (wide, {}))
    )
    for step_grads in grads:
        set_grads(optimizer, [place(grad) for grad in step_grads])
        set_grads(expected, [place(grad.float()) for grad in step_grads])
        optimizer.step()
        expected.step()
        for i, (param, copied) in enumerate(zip(short, wide, strict=True)):
            assert_same_bits(exact(optimizer, param), copied, f"parameter {i}")
            if weights == "master":
                assert_same_bits(param, copied.detach().to(dtype), f"parameter {i}")
            else:
                assert bool(((param.float() - copied).abs() <= copied.abs() * 2.0**-8).all())
            state, wide_state = optimizer.state[param], expected.state[copied]
            for key, value in wide_state.items():
                assert_same_bits(state[key], value, f"{key} of parameter {i}")
    assert_native(optimizer)


LOSSLESS = [(torch.bfloat16, "split"), (torch.bfloat16, "master"), (torch.float16, "master")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_weights_are_those_of_fp32_training(case: Case) -> None:
    if case.options.get("eps") == 0.0:
        case = Case(case.optimizer, {**case.options, "eps": 1e-30})  # no 0 / 0: NaN has no lower half
    beside_fp32(case, "split", torch.bfloat16, torch.Tensor.clone, state_dtype=torch.float32)


# Every state with every optimizer, and all strides with every state.
TABLE = [(name, state, place) for name in CLASSES for state in FORMATS for place in (permuted, gaps) if place is gaps or name == "AdamW"]


@pytest.mark.parametrize(("name", "state", "place"), TABLE, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize(("dtype", "weights"), LOSSLESS, ids=str)
def test_all_states_and_strides(
    name: str, dtype: torch.dtype, weights: str, state: dict[str, Any], place: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    beside_fp32(Case(name, RULES[name]), weights, dtype, place, **state)


@pytest.mark.parametrize(("dtype", "weights"), LOSSLESS, ids=str)
def test_training_for_long(dtype: torch.dtype, weights: str) -> None:
    """200 steps of which most change no bit of the 16."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator).to(dtype)
    short, wide = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.float())
    optimizers = [
        fused_opt.AdamW([short], lr=1e-4, weights=weights, state_dtype=torch.float32),
        fused_opt.AdamW([wide], lr=1e-4),
    ]
    still = 0
    for _ in range(200):
        before = short.detach().clone()
        grad = torch.randn(500, generator=generator).to(dtype)
        step_with(optimizers[0], [grad])
        step_with(optimizers[1], [grad.float()])
        still += int((short == before).sum())
    assert_same_bits(exact(optimizers[0], short), wide)
    assert still > 200 * 500 * 0.8


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-40, -1e-45, 1e-38, 3.3e38, -3.4e38, math.inf, -math.inf, math.nan, 1.00390625, 1.001953125]
)
@pytest.mark.parametrize("weights", ["split", "master", "kahan"])
def test_numbers_at_the_edges(value: float, weights: str) -> None:
    """Subnormal and the largest numbers, ties, infinities and NaN: steps that do not move keep them."""
    param = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
    optimizer = fused_opt.SGD([param], lr=1.0, weights=weights)
    param.grad = torch.zeros(40, dtype=torch.bfloat16)
    optimizer.step()
    wide = torch.full((40,), value)
    if weights == "master":
        optimizer.state[param]["master"].copy_(wide)
        param.data.copy_(wide.bfloat16())
    elif weights == "split":
        bits = wide.view(torch.int32).to(torch.int64)
        upper = (bits + 0x8000) >> 16 << 16
        if math.isnan(value):
            upper = bits
        param.data.copy_(torch.full((40,), 0.0).bfloat16())
        param.data.view(torch.int16).copy_((upper >> 16).to(torch.int16))
        optimizer.state[param]["low_bits"].copy_(bits - upper)
    else:
        param.data.copy_(wide.bfloat16())
        if math.isfinite(float(param.detach()[0])):
            optimizer.state[param]["compensation"].copy_(wide - param.detach().float())
    before = param.detach().clone()
    for _ in range(3):
        optimizer.step()
        if weights == "kahan":
            assert_same_bits(param + 0.0, before + 0.0)  # -0 + 0 is 0
        else:
            assert_same_bits(param, before)
            assert_same_bits(exact(optimizer, param), wide)


@needs_grad_dtype
def test_every_lower_half() -> None:
    """All 65,536 of a few upper ones, reached by a step from zero."""
    lower = torch.arange(65536, dtype=torch.int32)
    for upper, sign in itertools.product((0x3F80, 0x0000, 0x0080, 0x7F7F), (0, 1)):
        wide = (lower + upper * 65536 - sign * 2**31).view(torch.float32)
        param = torch.nn.Parameter(torch.zeros(65536, dtype=torch.bfloat16))
        optimizer = fused_opt.SGD([param], lr=1.0, weights="split")
        param.grad_dtype = torch.float32  # type: ignore[attr-defined]
        param.grad = -wide
        optimizer.step()
        assert_same_bits(exact(optimizer, param) + 0.0, wide + 0.0)
        halves = (param.detach().view(torch.int16).int() & 0x7FFF, wide.view(torch.int32) >> 16 & 0x7FFF)
        assert set((halves[0] - halves[1]).tolist()) == {0, 1}  # the weight is the upper half, or the next one


# --- weights that somebody changed ---


@pytest.mark.parametrize("weights", ["split", "kahan", "master"])
def test_a_weight_that_was_changed_counts(weights: str) -> None:
    """As when a checkpoint of the model is loaded: training goes on from there."""
    param = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = fused_opt.SGD([param], lr=1.0, weights=weights)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        step_with(optimizer, [torch.randn(64, generator=generator).bfloat16() * 1e-3])
    new = (torch.randn(64, generator=generator) + 4).bfloat16()
    with torch.no_grad():
        param.copy_(new)
    step_with(optimizer, [torch.full((64,), 2.0**-12, dtype=torch.bfloat16)])
    found, expected = exact(optimizer, param), new.float() - 2.0**-12
    if weights == "master":
        assert_same_bits(found, expected)
    elif weights == "kahan":  # what the old weight had left out: half a unit of it, which is 2^-7
        torch.testing.assert_close(found, expected, rtol=0, atol=2.0**-8)
    else:  # the lower half is now that of the new weight: at the most half a unit of it
        torch.testing.assert_close(found, expected, rtol=2.0**-8, atol=0)
    assert bool(((param.float() - new.float()).abs() <= new.float().abs() * 2.0**-7).all())


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf])
@pytest.mark.parametrize("weights", ["split", "kahan", "master"])
def test_a_weight_that_was_set_to_zero_or_infinity_stays_a_number(weights: str, value: float) -> None:
    """Rows of an embedding are set to zero. The bits below those of zero, and above those of infinity, are NaN's."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 200).bfloat16())
    optimizer = fused_opt.SGD([param], lr=1.0, weights=weights)
    step_with(optimizer, [torch.full((200,), 2.0**-11, dtype=torch.bfloat16)])
    with torch.no_grad():
        param.fill_(value)
    step_with(optimizer, [torch.zeros(200, dtype=torch.bfloat16)])
    assert bool((param.float() - value).nan_to_num(nan=0.0).abs().max() <= 2.0**-8)
    assert not bool(param.isnan().any())
    assert not bool(exact(optimizer, param).isnan().any())


def test_one_that_was_not_changed_keeps_its_master() -> None:
    """Some elements were, others were not."""
    param = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = fused_opt.SGD([param], lr=1.0, weights="master")
    step_with(optimizer, [torch.full((8,), 2.0**-12, dtype=torch.bfloat16)])
    with torch.no_grad():
        param[::2] = 3.0
    step_with(optimizer, [torch.full((8,), 2.0**-12, dtype=torch.bfloat16)])
    assert optimizer.state[param]["master"].tolist() == [3 - 2.0**-12, 1 - 2.0**-11] * 4


# --- Kahan ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kahan_is_a_plain_loop(dtype: torch.dtype) -> None:
    """SGD by hand: weight + compensation in float32, a step, the nearest weight, and what it leaves out, itself rounded."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(300, generator=generator).to(dtype))
    weight, compensation = param.detach().clone(), torch.zeros(300, dtype=dtype)
    optimizer = fused_opt.SGD([param], lr=2.0**-10, weights="kahan")
    for _ in range(50):
        grad = torch.randn(300, generator=generator).to(dtype)
        step_with(optimizer, [grad])
        updated = (weight.float() + compensation.float()).add(grad.float(), alpha=-(2.0**-10))
        weight = updated.to(dtype)
        compensation = (updated - weight.float()).to(dtype)
        assert_same_bits(param, weight)
        assert_same_bits(optimizer.state[param]["compensation"], compensation)


# --- all of them ---


@pytest.mark.parametrize("how", [copy.deepcopy, through_file], ids=["in memory", "through a file"])
@pytest.mark.parametrize("weights", ["stochastic", "split", "kahan", "master"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_resumed_training_goes_on_as_if_it_had_not_been_interrupted(
    name: str, weights: str, how: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Companions keep every bit; random numbers go on."""
    values, grads = make_problem(SHAPES, 6, torch.bfloat16)

    def make(tensors: Sequence[torch.Tensor]) -> Optimizer:
        params = [torch.nn.Parameter(tensor.detach().clone()) for tensor in tensors]
        optimizer: Optimizer = getattr(fused_opt, name)(params, **RULES[name], weights=weights)
        return optimizer

    assert_resumes(make, values, grads, how)


def test_wide_weights_are_as_without() -> None:
    """float32 and float64 have no 16 bits to care for."""
    for dtype, weights in itertools.product((torch.float32, torch.float64), ("stochastic", "split", "kahan", "master")):
        values, grads = make_problem(SHAPES, 3, dtype)
        optimizer, plain = (
            fused_opt.AdamW([torch.nn.Parameter(value.clone()) for value in values], **given) for given in ({"weights": weights}, {})
        )
        run_steps(optimizer, grads)
        run_steps(plain, grads)
        assert_same_state(optimizer, plain)


# --- what it is for ---


def regression(dtype: torch.dtype, weights: str | None) -> float:
    """The loss of a linear regression after training from near its solution."""
    generator = torch.Generator().manual_seed(0)
    x, solution = torch.randn(128, 32, generator=generator), torch.randn(32, generator=generator)
    param = torch.nn.Parameter((solution + 0.1 * torch.randn(32, generator=generator)).to(dtype))
    optimizer = fused_opt.SGD([param], lr=8e-3, weights=weights, average="ema", average_decay=0.98)
    for _ in range(500):
        param.grad = (x.T @ (x @ (param.detach().float() - solution)) / 128).to(dtype)
        optimizer.step()
    return float((x @ (optimizer.state[param]["average"] - solution)).square().mean())


def test_rounding_to_the_nearest_stagnates_where_others_do_not() -> None:
    losses = {weights: regression(torch.bfloat16, weights) for weights in (None, "stochastic", "kahan", "split", "master")}
    in_fp32 = regression(torch.float32, None)
    assert losses[None] > 100 * in_fp32, (losses, in_fp32)
    for weights in ("stochastic", "kahan", "split", "master"):
        assert losses[weights] < losses[None] / 10, (losses, in_fp32)


def test_an_error_names_what_cannot_be_had() -> None:
    """torch steps a parameter whose gradient is lazily negated, and knows nothing of companions."""
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    negated = torch._neg_view(torch.ones(4, dtype=torch.bfloat16))  # type: ignore[attr-defined]
    param.grad = negated
    for weights in ("stochastic", "kahan", "split", "master"):
        optimizer = fused_opt.SGD([param], weights=weights)
        with nothing_changes(optimizer), pytest.raises(RuntimeError, match=f"weights='{weights}'"):
            optimizer.step()
