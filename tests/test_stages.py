"""What a step does beside its rule equals a plain training loop: every option alone, with every optimizer, and all of them together."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plain_loops import add_l1, add_pull, shrink, soft_threshold, train

import fused_opt
from forloop import as_real
from fused_opt import plan, stages
from fused_opt.bench import parity
from fused_opt.bench.cases import Case
from fused_opt.bench.layouts import permuted
from fused_opt.bench.plain_loop import PlainLoop
from fused_opt.bench.stage_cases import ALL_DTYPES, RULES, STAGE_CASES, WEIGHTS
from fused_opt.bench.ulp import max_ulp
from helpers import CLASSES, SUPPORTED_ISAS, assert_same_bits, assert_same_state, make_problem, params_of, run_steps
from layouts import Layout
from pairs import assert_native, nothing_changes

Optimizer = torch.optim.Optimizer
DECADES = {torch.float16: (-4.0, 1.0)}
SHAPES = ((), (7,), (0, 3), (31, 33))
LARGER = (*SHAPES, (4099,), (5, 8, 130))


def beside(
    case: Case,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
    steps: int,
    place: Callable[[torch.Tensor], torch.Tensor] = permuted,
    masks: bool = False,
) -> Optimizer:
    """Step ours and the plain loop; parameters, states, norms and their names must be the same, bit for bit."""
    values, grads = make_problem(shapes, steps, dtype, decades=DECADES.get(dtype, (-6.0, 1.0)), zeros=0.05)
    if case.options.get("maximize"):
        grads = [[-grad for grad in step_grads] for step_grads in grads]
    params = [torch.nn.Parameter(place(value)) for value in values]
    optimizer: Optimizer = getattr(fused_opt, case.optimizer)(params, **case.options)
    chosen = [value.double() > -0.5 if i % 2 == 0 else None for i, value in enumerate(values)] if masks else None
    loop = PlainLoop(case, [place(value) for value in values], chosen)
    if chosen is not None:
        optimizer.set_masks(dict(zip(params, chosen, strict=True)))
        for weight, param in zip(loop.weights, params, strict=True):
            weight.copy_(param)
    for step, step_grads in enumerate(grads):
        given: list[torch.Tensor | None] = [place(grad) for grad in step_grads]
        if step == 1:
            given[1] = None  # that parameter's average, counter and companion stay
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
        before = [None if grad is None else grad.clone() for grad in given]
        optimizer.step()
        for grad, copy in zip(given, before, strict=True):
            if grad is not None:
                assert_same_bits(grad, copy, "gradient")
        norm = optimizer.last_grad_norm
        loop.step(given, norm)
        if loop.last_grad_norm is None:
            assert norm is None
        else:
            assert max_ulp(norm, loop.last_grad_norm) <= (4 if norm.dtype == torch.float64 else 0)  # 256 numbers to a sum in float64
    assert_native(optimizer)
    compare(optimizer, loop, masks=chosen)
    return optimizer


def compare(optimizer: Optimizer, loop: PlainLoop, masks: Sequence[torch.Tensor | None] | None = None) -> None:
    for i, (param, expected) in enumerate(zip(params_of(optimizer), loop.result(), strict=True)):
        found = {"param": param.detach(), **optimizer.state[param]}
        mask = found.pop("mask", None)
        assert (mask is not None) == (masks is not None and masks[i] is not None)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert_same_bits(as_real(found[name]), value, f"{name} of parameter {i}")


# --- every option alone, and some together ---

FIRST_OF_THEIR_DTYPES = [(case, dtypes[0]) for case, dtypes in STAGE_CASES]
OTHERS = [(case, dtype) for case, dtypes in STAGE_CASES for dtype in dtypes[1:]]


@pytest.mark.parametrize(("case", "dtype"), FIRST_OF_THEIR_DTYPES, ids=str)
def test_a_plain_loop(case: Case, dtype: torch.dtype) -> None:
    beside(case, dtype, SHAPES, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [*FIRST_OF_THEIR_DTYPES, *OTHERS], ids=str)
def test_a_plain_loop_in_all_dtypes(case: Case, dtype: torch.dtype) -> None:
    beside(case, dtype, LARGER, steps=9)


@pytest.mark.parametrize(("case", "dtype"), random.Random(0).sample(OTHERS, 40), ids=str)
def test_a_plain_loop_in_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    beside(case, dtype, SHAPES, steps=4)


def with_gaps(values: torch.Tensor) -> torch.Tensor:
    layout = Layout(tuple(range(values.dim()))[::-1], (2,) * values.dim(), offset=3)
    return layout.view(torch.zeros(layout.extent(values.shape), dtype=values.dtype), values.shape).copy_(values)


# All stages that go together, with every way to keep the weights.
EVERYTHING: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "max_grad_value": 1e-3,
    "l1": 0.5,
    "l1_method": "subgradient",
    "anchor_decay": 0.1,
    "average": "ema",
    "average_decay": 0.9,
}
WAYS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"weights": "split"}),
    (torch.float16, {"weights": "kahan"}),
    (torch.bfloat16, {"weights": "master"}),
)


@pytest.mark.parametrize(("dtype", "weights"), WAYS, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_parameters_with_gaps_in_another_order(name: str, dtype: torch.dtype, weights: dict[str, Any]) -> None:
    beside(Case(name, {**RULES[name], **EVERYTHING, **weights}), dtype, ((), (40,), (31, 33)), 3, with_gaps)


@pytest.mark.parametrize(("dtype", "weights"), [*WAYS, (torch.bfloat16, {"weights": "stochastic"})], ids=str)
@pytest.mark.parametrize("state_dtype", ["int8", torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_states_of_another_format(name: str, state_dtype: Any, dtype: torch.dtype, weights: dict[str, Any]) -> None:
    coded = {"min_8bit_size": 0, "block_size": 32} if state_dtype == "int8" else {}
    case = Case(name, {**RULES[name], **EVERYTHING, **weights, "state_dtype": state_dtype, **coded})
    beside(case, dtype, ((), (40,), (31, 33)), 3, torch.Tensor.contiguous if coded else permuted)


@pytest.mark.parametrize("name", CLASSES)
def test_foreach_and_fused_change_nothing(name: str) -> None:
    values, grads = make_problem(SHAPES, 3, torch.float32)
    optimizers = []
    for given in ({}, {"foreach": True}, {"fused": True}):
        if name == "RMSprop" and "fused" in given:
            continue
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizers.append(getattr(fused_opt, name)(params, **RULES[name], **EVERYTHING, **given))
        run_steps(optimizers[-1], grads)
    for other in optimizers[1:]:
        assert_same_state(other, optimizers[0])


@pytest.mark.parametrize(("dtype", "weights"), [*WAYS, (torch.bfloat16, {"weights": "stochastic"})], ids=str)
def test_isas_and_threads_agree(dtype: torch.dtype, weights: dict[str, Any], use_isa, threads) -> None:
    values, grads = make_problem(((80_021,), (7,), (300, 101)), 2, dtype, decades=(-4.0, 1.0))
    values = [permuted(value) for value in values]
    optimizers = []
    for isa, count in itertools.product(SUPPORTED_ISAS, (1, 2, 3)):
        use_isa(isa)
        threads(count)
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizers.append(fused_opt.AdamW(params, **RULES["AdamW"], **EVERYTHING, **weights))
        run_steps(optimizers[-1], grads)
        assert optimizers[-1]._last_ran == (isa, count)
    for other in optimizers[1:]:
        assert_same_state(other, optimizers[0])
        assert_same_bits(other.last_grad_norm, optimizers[0].last_grad_norm)


# --- combinations ---


def combination(seed: int) -> tuple[Case, torch.dtype, bool]:
    """Each option is there or not."""
    draw = random.Random(seed)
    name, dtype = draw.choice(CLASSES), draw.choice(ALL_DTYPES)
    options: dict[str, Any] = {}
    for alternatives in (
        [{"maximize": True}, {"maximize": False}],
        [{"max_grad_norm": 1.0}, {"max_grad_norm": 0.1, "grad_norm_type": math.inf}],
        [{"max_grad_value": 1e-3}],
        [{"l1": 0.5}, {"l1": 0.5, "l1_method": "subgradient"}],
        [{"anchor_decay": 0.1}],
        [{"average": "swa", "average_every": 2}, {"average": "ema", "average_decay": 0.9, "average_start": 1}],
        [{"weight_decay": 0.3}, {"weight_decay": 0.0}],
    ):
        if draw.random() < 0.6:
            options |= draw.choice(alternatives)
    ways = [each.options for each in WEIGHTS if dtype in each.dtypes]
    if ways and draw.random() < 0.8:
        options |= draw.choice(ways)
    if name in ("RMSprop", "SGD") and draw.random() < 0.5:
        options |= {"decoupled_weight_decay": True, "weight_decay": 0.1}
    if draw.random() < 0.3:
        options["state_dtype"] = torch.float32
    return Case(name, {**RULES[name], **options}), dtype, draw.random() < 0.5


@pytest.mark.parametrize("seed", range(30))
def test_combinations(seed: int) -> None:
    case, dtype, masks = combination(seed)
    beside(case, dtype, SHAPES, 4, permuted, masks)


@pytest.mark.slow
@pytest.mark.parametrize("place", [permuted, with_gaps])
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_combinations(seed: int, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case, dtype, masks = combination(seed)
    if place is with_gaps and case.options.get("weights") == "stochastic":
        place = permuted  # what is drawn depends on the order, of which the plain loop knows only memory's
    beside(case, dtype, LARGER, 5, place, masks)


# --- `fused-opt parity` ---


def test_parity_sees_a_planted_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousandth in what L1 takes off; what it does not touch is kept."""
    right = plan.stage_scalars_of

    def wrong(*args: Any) -> tuple[float, ...]:
        scalars = list(right(*args))
        scalars[stages.THRESHOLD] *= 1.001
        return tuple(scalars)

    cases = [Case("SGD", {"lr": 0.02, "l1": 0.5}), Case("SGD", {"lr": 0.02, "average": "ema"})]
    for planted in (False, True):
        if planted:
            monkeypatch.setattr(plan, "stage_scalars_of", wrong)
        broken = [[row.tensor for row in parity.compare(case, "float32", 2, SUPPORTED_ISAS, [1]) if row.broken] for case in cases]
        assert broken == [["param"] * len(SUPPORTED_ISAS) if planted else [], []]


# --- regularisation, each against a loop that is written out ---

RULES_IN_FULL = [(name, {**RULES[name], "maximize": False}) for name in CLASSES]


def ours(name: str, values: Sequence[torch.Tensor], grads: Sequence[Sequence[torch.Tensor]], **options: Any) -> Optimizer:
    optimizer: Optimizer = getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **options)
    run_steps(optimizer, [[grad.clone() for grad in step_grads] for step_grads in grads])
    return optimizer


def assert_same_weights(optimizer: Optimizer, expected: Optimizer) -> None:
    for i, (p, q) in enumerate(zip(params_of(optimizer), params_of(expected), strict=True)):
        assert_same_bits(p, q, f"parameter {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "rule"), RULES_IN_FULL)
def test_regularisation(name: str, rule: dict[str, Any], dtype: torch.dtype) -> None:
    """L1 both ways, the pull to the first weights and to others, and decoupled decay; with `maximize`, too, of gradients turned round."""
    values, grads = make_problem(((4, 5), (33,)), 6, dtype)
    turned = [[-grad for grad in step_grads] for step_grads in grads]
    others = [value * 0.5 for value in values]
    loops: list[tuple[dict[str, Any], Optimizer]] = [
        ({"l1": 0.3, "l1_method": "subgradient"}, train(name, values, grads, add_l1(0.3), **rule)),
        ({"l1": 0.3}, train(name, values, grads, after=soft_threshold(0.02 * 0.3), **rule)),
        ({"anchor_decay": 0.3}, train(name, values, grads, add_pull(0.3, values), **rule)),
    ]
    if "betas" not in getattr(fused_opt, name)([torch.zeros(())]).defaults:
        plain = {**rule, "weight_decay": 0.0}
        loops.append(({"decoupled_weight_decay": True, "weight_decay": 0.3}, train(name, values, grads, shrink(1 - 0.02 * 0.3), **plain)))
    for options, expected in loops:
        for given, maximize in ((grads, False), (turned, True)):
            assert_same_weights(ours(name, values, given, **{**rule, **options, "maximize": maximize}), expected)
    optimizer = getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **rule, anchor_decay=0.3)
    optimizer.set_anchors(dict(zip(params_of(optimizer), others, strict=True)))
    run_steps(optimizer, grads)
    assert_same_weights(optimizer, train(name, values, grads, add_pull(0.3, others), **rule))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_proximal_l1_gives_exact_zeros_and_keeps_what_is_needed(dtype: torch.dtype) -> None:
    """Lasso by hand: the minimum of (w - target)^2 / 2 + l1 * |w| is target, moved towards zero by l1, and zero if it is nearer."""
    target = torch.tensor([3.0, -2.0, 0.25, -0.25, 0.0, 1.0])
    param = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0]).to(dtype))
    optimizer = fused_opt.SGD([param], lr=0.5, l1=0.5, **({"weights": "master"} if dtype in (torch.bfloat16, torch.float16) else {}))
    for _ in range(60):
        param.grad = (param.detach() - target).to(dtype)
        optimizer.step()
    assert param[2:5].tolist() == [0.0, 0.0, 0.0]
    expected = torch.tensor([2.5, -1.5, 0.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(param.detach().double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)  # the gradient is of `dtype`


def test_anchors_are_the_weights_of_the_first_step() -> None:
    """Not those at construction: a model may be loaded in between. One that is given counts from the next step on."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = fused_opt.SGD([param], lr=0.5, anchor_decay=1.0)
    with torch.no_grad():
        param.fill_(2.0)
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.tolist() == [1.5] * 3
    optimizer.step()
    assert param.tolist() == [1.25] * 3  # 1.5 - 0.5 * (1 + (1.5 - 2))
    optimizer.set_anchors({param: torch.full((3,), 0.25)})
    optimizer.step()
    assert param.tolist() == [0.25] * 3  # 1.25 - 0.5 * (1 + (1.25 - 0.25))


# --- options that cannot be had ---

BAD: tuple[dict[str, Any], ...] = (
    *({"max_grad_norm": value} for value in (-1.0, math.nan, "1", True, torch.tensor(1.0))),
    *({"max_grad_norm": 1.0, "grad_norm_type": value} for value in (1, 0, -math.inf, math.nan, "inf")),
    *({"max_grad_norm": 1.0, "nonfinite_grad_norm": value} for value in ("ignore", True, 1)),
    *({"max_grad_value": value} for value in (-1e-9, math.nan, "1", False)),
    *({"l1": value} for value in (-0.1, math.inf, math.nan, "1", True)),
    *({"l1": 0.1, "l1_method": value} for value in ("prox", True, 1)),
    *({"anchor_decay": value} for value in (-0.1, math.inf, math.nan, "1", True)),
    *({"average": value} for value in ("mean", True, 0.9)),
    *({"average": "ema", "average_decay": value} for value in (-0.1, 1.1, math.nan, "0.9", True)),
    *({"average": "ema", "average_start": value} for value in (-1, 1.5, "1", True)),
    *({"average": "swa", "average_every": value} for value in (0, -1, 1.5, "1", True)),
    {"average": "swa", "average_decay": 0.9},
    *({"weights": value} for value in ("bf16", True, 1)),
    *({"weights": "stochastic", "rounding_seed": value} for value in (-1, 1 << 24, 0.5, "1", True)),
    {"weights": "kahan", "rounding_seed": 1},
    # without the option that they need
    {"grad_norm_type": 2},
    {"nonfinite_grad_norm": "skip"},
    {"l1_method": "proximal"},
    {"average_decay": 0.9},
    {"average_start": 1},
    {"average_every": 2},
    {"rounding_seed": 1},
)


def culprits(options: dict[str, Any]) -> str:
    """A pattern: an error names the option."""
    return list(options)[-1]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_values_that_options_cannot_have(options: dict[str, Any]) -> None:
    """In the constructor, in a group, in a group that is added, and in a group that somebody changed, where the step changes nothing."""
    param = torch.nn.Parameter(torch.ones(3))
    for name in CLASSES:
        with pytest.raises(ValueError, match=culprits(options)):
            getattr(fused_opt, name)([param], **options)
    with pytest.raises(ValueError, match=culprits(options)):
        fused_opt.SGD([{"params": [param], **options}])
    optimizer = fused_opt.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=culprits(options)):
        optimizer.add_param_group({"params": [param], **options})
    assert len(optimizer.param_groups) == 1
    run_steps(optimizer, [[torch.ones(2)]])
    optimizer.param_groups[0].update(options)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=culprits(options)):
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in CLASSES if name in ("RMSprop", "SGD")])
def test_no_option_is_in_a_group_that_was_not_given_it(name: str) -> None:
    """So that checkpoints of those who do without are as they were; torch's own options are all there."""
    optimizer = getattr(fused_opt, name)([torch.nn.Parameter(torch.ones(2))], l1=0.1, average=None)
    plain = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(2))])
    assert set(optimizer.param_groups[0]) - set(plain.param_groups[0]) == {"l1"}


@pytest.mark.parametrize("options", [{"max_grad_value": 1.0}, {"l1": 0.1}, {"l1": 0.1, "l1_method": "subgradient"}], ids=str)
def test_complex_parameters_are_refused(options: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = fused_opt.Adam([param], **options)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="complex64"):
        optimizer.step()


@pytest.mark.parametrize("weights", ["stochastic", "split"])
def test_float16_is_refused(weights: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    param.grad = torch.ones_like(param)
    optimizer = fused_opt.Adam([param], weights=weights)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="float16"):
        optimizer.step()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_are_pairs_of_reals(name: str, dtype: torch.dtype) -> None:
    """For what they can have: clipping by the norm, a pull, decay, an average."""
    rule = {**RULES[name], "max_grad_norm": 0.5, "anchor_decay": 0.1, "average": "ema", "average_decay": 0.9}
    decoupled = {"decoupled_weight_decay": True, "weight_decay": 0.1} if name in ("RMSprop", "SGD") else {}
    case = Case(name, {**rule, **decoupled})
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, dtype=dtype, generator=generator) for shape in ((3, 5), (40,))]
    optimizer: Optimizer = getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **case.options)
    loop = PlainLoop(case, values)
    for _ in range(4):
        grads = [torch.randn(value.shape, dtype=dtype, generator=generator) for value in values]
        run_steps(optimizer, [grads])
        loop.step(grads, optimizer.last_grad_norm)
        assert max_ulp(optimizer.last_grad_norm, loop.last_grad_norm) <= (2 if dtype == torch.complex128 else 0)
    compare(optimizer, loop)
