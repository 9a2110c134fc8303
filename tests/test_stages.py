"""What a step does beside its rule equals a plain training loop: every option alone, with every optimizer, and all of them together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import fused_opt
from forloop import as_real
from fused_opt import plan, stages
from fused_opt.bench import parity
from fused_opt.bench.cases import Case
from fused_opt.bench.layouts import permuted
from fused_opt.bench.plain_loop import PlainLoop
from fused_opt.bench.stage_cases import ALL_DTYPES, RULES, STAGE_CASES, STAGES, WEIGHTS
from fused_opt.bench.ulp import max_ulp
from helpers import CLASSES, SUPPORTED_ISAS, assert_same_bits, assert_same_state, make_problem, params_of, run_steps
from layouts import Layout
from pairs import assert_isas_and_threads_agree, assert_native, nothing_changes

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
    chosen = [value.double() > -0.5 if i % 2 else None for i, value in enumerate(values)] if masks else None
    if chosen is not None:
        optimizer.set_masks(dict(zip(params, chosen, strict=True)))  # zeros weights, of which anchors are made
    loop = PlainLoop(case, [place(param.detach()) for param in params], chosen)
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

WITH_DTYPES = [(case, dtype) for case, dtypes in STAGE_CASES for dtype in dtypes]


@pytest.mark.parametrize(("case", "dtype"), WITH_DTYPES[::3], ids=str)
def test_a_plain_loop(case: Case, dtype: torch.dtype) -> None:
    """Every third; the others are slow."""
    beside(case, dtype, SHAPES, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), WITH_DTYPES, ids=str)
def test_a_plain_loop_in_all_dtypes(case: Case, dtype: torch.dtype) -> None:
    beside(case, dtype, LARGER, steps=9)


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
@pytest.mark.parametrize(("name", "state_dtype"), [*((name, "int8") for name in CLASSES), ("RMSprop", torch.float32)], ids=str)
def test_states_of_another_format(name: str, state_dtype: Any, dtype: torch.dtype, weights: dict[str, Any]) -> None:
    coded = {"min_8bit_size": 0, "block_size": 32} if state_dtype == "int8" else {}
    case = Case(name, {**RULES[name], **EVERYTHING, **weights, "state_dtype": state_dtype, **coded})
    beside(case, dtype, ((), (40,), (31, 33)), 3, torch.Tensor.contiguous if coded else permuted)


@pytest.mark.parametrize(("dtype", "weights"), WAYS, ids=str)
def test_states_of_other_strides_than_their_parameter(dtype: torch.dtype, weights: dict[str, Any]) -> None:
    """As after loading a checkpoint of parameters that lay otherwise. Several parameters: each has its own order."""
    case = Case("AdamW", {**RULES["AdamW"], **EVERYTHING, **weights})
    values, grads = make_problem(((31, 33), (12, 7), (6, 5)), 4, dtype, decades=(-4.0, 1.0))
    optimizer: Optimizer = fused_opt.AdamW([torch.nn.Parameter(permuted(value)) for value in values], **case.options)
    masks = [value.double() > 0 for value in values]
    optimizer.set_masks(dict(zip(params_of(optimizer), masks, strict=True)))
    loop = PlainLoop(case, params_of(optimizer), masks)
    for step, step_grads in enumerate(grads):
        run_steps(optimizer, [step_grads])
        loop.step(step_grads, optimizer.last_grad_norm)
        if step == 1:
            for state in optimizer.state.values():
                for name, value in state.items():
                    state[name] = value.contiguous().clone(memory_format=torch.contiguous_format)
            assert all(state["mask"].is_contiguous() for state in optimizer.state.values())
    assert_native(optimizer)
    compare(optimizer, loop, masks)


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
    values, grads = make_problem(((70_021,), (7,), (300, 101)), 1, dtype, decades=(-4.0, 1.0))
    values = [permuted(value) for value in values]

    def make() -> fused_opt.AdamW:
        params = [torch.nn.Parameter(value.clone()) for value in values]
        return fused_opt.AdamW(params, **RULES["AdamW"], **EVERYTHING, **weights)

    optimizers = assert_isas_and_threads_agree(make, grads, use_isa, threads)
    for other in optimizers[1:]:
        assert_same_bits(other.last_grad_norm, optimizers[0].last_grad_norm)


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
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_many_combinations(seed: int, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case, dtype, masks = combination(seed)
    if place is with_gaps and case.options.get("weights") == "stochastic":
        place = permuted  # what is drawn depends on the order, of which the plain loop knows only memory's
    beside(case, dtype, LARGER, 5, place, masks)


# --- groups, and parameters that share memory ---


def test_groups_with_stages_of_their_own() -> None:
    """One norm; else each as if the other were not there. What is rounded stochastically depends on the group's number."""
    own: list[dict[str, Any]] = [
        {"l1": 0.5, "average": "ema", "average_decay": 0.9},
        {},
        {"weights": "stochastic", "anchor_decay": 0.1},
        {"weights": "split", "max_grad_value": 1e-3, "average": "swa"},
    ]
    together: dict[str, Any] = {**RULES["AdamW"], "max_grad_norm": 1.0}
    values, grads = make_problem(SHAPES, 4, torch.bfloat16)
    groups = [{"params": [torch.nn.Parameter(value.clone()) for value in values], **options} for options in own]
    optimizer = fused_opt.AdamW(groups, **together)
    loops = [PlainLoop(Case("AdamW", {**together, **options}), values, group=i) for i, options in enumerate(own)]
    for step_grads in grads:
        run_steps(optimizer, [[grad.clone() for _ in own for grad in step_grads]])
        for loop in loops:
            loop.step(step_grads, optimizer.last_grad_norm)
    params = iter(params_of(optimizer))
    for i, loop in enumerate(loops):
        for expected in loop.result():
            found = optimizer.state[param := next(params)]
            assert list(found) == list(expected)[1:]
            for name, value in expected.items():
                assert_same_bits(param.detach() if name == "param" else found[name], value, f"{name} in group {i}")


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_that_share_memory_are_stepped_one_after_the_other(name: str) -> None:
    """Each with its own average, anchor and counter, as if each had an optimizer of its own."""
    options: dict[str, Any] = {**RULES[name], **EVERYTHING, "max_grad_norm": math.inf}
    (values,), grads = make_problem([(90,)], 4, torch.float32)
    places = (slice(0, 50), slice(0, 50), slice(20, 90))
    storages = [values.clone(), values.clone()]
    params, others = ([torch.nn.Parameter(storage[place]) for place in places] for storage in storages)
    optimizer = getattr(fused_opt, name)(params, **options)
    optimizer.set_anchors({param: values[place] for param, place in zip(params, places, strict=True)})
    alone = [getattr(fused_opt, name)([param], **options) for param in others]
    for each, param, place in zip(alone, others, places, strict=True):
        each.set_anchors({param: values[place]})
    for (grad,) in grads:
        run_steps(optimizer, [[grad[place] for place in places]])
        for each, place in zip(alone, places, strict=True):
            run_steps(each, [[grad[place]]])
    assert_same_bits(*storages)
    for param, other, each in zip(params, others, alone, strict=True):
        assert set(optimizer.state[param]) == set(each.state[other]) >= {"average", "anchor"}
        for key, value in each.state[other].items():
            assert_same_bits(optimizer.state[param][key], value, key)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_written_under_a_mask_is_gone_after_the_next_step(name: str) -> None:
    """And what is not under it is stepped as if there were no mask."""
    mask = torch.arange(40) % 3 > 0
    params = [torch.nn.Parameter(torch.ones(40)) for _ in range(2)]
    optimizers = [getattr(fused_opt, name)([param], **RULES[name]) for param in params]
    optimizers[0].set_masks({params[0]: mask})
    for _ in range(3):
        with torch.no_grad():
            params[0][~mask] = 5.0
        for optimizer in optimizers:
            run_steps(optimizer, [[torch.full((40,), 0.5)]])
        assert_same_bits(params[0], torch.where(mask, params[1].detach(), torch.zeros(())))


# --- parameters that torch steps ---

BY_TORCH = [
    Case(name, {**RULES[name], **each.options})
    for i, each in enumerate(each for each in STAGES if "weights" not in each.options)
    for name in [each.optimizers[i % len(each.optimizers)]]
]


@pytest.mark.parametrize("case", BY_TORCH, ids=str)
@pytest.mark.parametrize("extension", [True, False])
def test_what_torch_steps_passes_the_same_stages(case: Case, extension: bool, request: pytest.FixtureRequest) -> None:
    """By torch's operations, so to a rounding or two. Gradients that are lazily negated, or no extension at all."""
    if not extension:
        request.getfixturevalue("without_the_extension")
    values, grads = make_problem(((31, 33), (7,)), 4, torch.float32)
    optimizer: Optimizer = getattr(fused_opt, case.optimizer)([torch.nn.Parameter(value.clone()) for value in values], **case.options)
    loop = PlainLoop(case, values)
    for step_grads in grads:
        given = [torch.complex(grad, -grad).conj().imag for grad in step_grads] if extension else step_grads
        run_steps(optimizer, [given])
        loop.step(step_grads)
    assert optimizer._last_ran is None
    for param, expected in zip(params_of(optimizer), loop.result(), strict=True):
        found = {"param": param.detach(), **optimizer.state[param]}
        assert set(found) == set(expected)
        for name, value in expected.items():
            largest = float(value.abs().max())  # of what cancels the rest has the error
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6 * largest, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", [{"l1": 0.1}, {"max_grad_value": 1.0}, {"anchor_decay": 0.1}, {"average": "ema"}], ids=str)
def test_sparse_gradients_are_refused(options: dict[str, Any]) -> None:
    """A step of a few rows; clipping by the norm is what it can have (see test_clipping)."""
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    optimizer = fused_opt.SGD(embedding.parameters(), lr=0.1, **options)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


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
