"""`max_grad_norm` and `max_grad_value`: torch's functions followed by the step, but gradients stay as they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plain_loops import clip_norm, clip_value, train

import fused_opt
from forloop import forloop, forloop_step
from fused_opt.bench.plain_loop import total_norm
from fused_opt.bench.stage_cases import RULES
from fused_opt.bench.ulp import max_ulp
from helpers import CLASSES, SUPPORTED_ISAS, assert_same_bits, assert_same_state, make_problem, needs_grad_dtype, params_of, run_steps
from pairs import nothing_changes, set_grads

Optimizer = torch.optim.Optimizer
SHAPES = ((40, 25), (), (77,), (501,))
TYPES = (2, math.inf)
both_types = pytest.mark.parametrize("norm_type", TYPES, ids=str)


def clipped_by_torch(
    grads: Sequence[torch.Tensor | None], limit: float, norm_type: float
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """What torch makes of copies of these gradients, and their norm."""
    params = [torch.nn.Parameter(torch.empty_like(grad if grad is not None else torch.zeros(()))) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, limit, norm_type)
    return [param.grad for param in params], norm


def clipped_by_ours(grads: Sequence[torch.Tensor | None], **options: Any) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Steps of size one from zero: the weights are then the clipped gradients, of which torch's SGD changes no bit but the sign."""
    params = [torch.nn.Parameter(torch.zeros_like(grad if grad is not None else torch.zeros(()))) for grad in grads]
    optimizer = fused_opt.SGD(params, lr=1.0, maximize=True, **options)
    set_grads(optimizer, grads)
    before = [None if param.grad is None else param.grad.clone() for param in params]
    optimizer.step()
    for param, grad in zip(params, before, strict=True):
        if grad is not None:
            assert param.grad is not None
            assert_same_bits(param.grad, grad, "gradient")
    assert optimizer.last_grad_norm is not None
    return [None if grad is None else param.detach() for param, grad in zip(params, grads, strict=True)], optimizer.last_grad_norm


# --- torch's numbers ---


@both_types
@pytest.mark.parametrize("limit", [0.0, 1e-3, 1.0, 50.0, 1e9, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_as_torch_clips_them(dtype: torch.dtype, limit: float, norm_type: float) -> None:
    """To 2 units in the last place, and so the norm, of a few hundred numbers: of many torch's norm is less exact."""
    _, (grads,) = make_problem(SHAPES, 1, dtype)
    expected, norm = clipped_by_torch(grads, limit, norm_type)
    found, found_norm = clipped_by_ours(grads, max_grad_norm=limit, grad_norm_type=norm_type)
    assert max_ulp(found_norm, norm) <= 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert max_ulp(ours, theirs) <= 2


@both_types
@pytest.mark.parametrize("name", CLASSES)
def test_weights_after_clip_and_step(name: str, norm_type: float) -> None:
    """Each step from the same numbers. Weights from 1 to 2, of which a unit in the last place is not a cancelled digit."""
    values, grads = make_problem(SHAPES, 5, torch.float32)
    values = [1 + value.abs().clamp(max=0.9) for value in values]
    rule = {**RULES[name], "lr": 1e-3}
    optimizer: Optimizer = getattr(fused_opt, name)(
        [torch.nn.Parameter(value.clone()) for value in values], **rule, max_grad_norm=0.3, grad_norm_type=norm_type
    )
    expected = forloop(name, [torch.nn.Parameter(value.clone()) for value in values], **rule)
    for step_grads in grads:
        for param, copy, grad in zip(params_of(optimizer), params_of(expected), step_grads, strict=True):
            copy.data.copy_(param.detach())
            param.grad, copy.grad = grad.clone(), grad.clone()
        if optimizer.state:
            expected.load_state_dict({**optimizer.state_dict(), "param_groups": expected.state_dict()["param_groups"]})
            for state in expected.state.values():
                for key, value in state.items():
                    state[key] = value.clone()
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(params_of(expected), 0.3, norm_type)
        forloop_step(expected)
        assert max_ulp(optimizer.last_grad_norm, norm) <= 2
        for param, copy in zip(params_of(optimizer), params_of(expected), strict=True):
            assert max_ulp(param, copy) <= 2


@pytest.mark.parametrize("name", CLASSES)
def test_clipping_by_value(name: str) -> None:
    """Bit for bit, also before a second limit, that of the norm, which torch applies first."""
    values, grads = make_problem(SHAPES, 4, torch.float32)
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = getattr(fused_opt, name)(params, **RULES[name], max_grad_value=1e-3)
    run_steps(optimizer, [[grad.clone() for grad in step_grads] for step_grads in grads])
    expected = train(name, values, grads, clip_value(1e-3), **RULES[name])
    assert_same_state(optimizer, expected)


@pytest.mark.parametrize("special", [0.0, math.inf, -math.inf, math.nan, 1e-3, -1e-3])
def test_clipping_by_value_keeps_nan(special: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        grad = torch.full((40,), special).to(dtype)
        params = [torch.nn.Parameter(torch.zeros(40, dtype=dtype)) for _ in range(2)]
        for param in params:
            param.grad = grad.clone()
        fused_opt.SGD(params[:1], lr=1.0, max_grad_value=1e-3).step()
        torch.nn.utils.clip_grad_value_(params[1:], 1e-3)
        torch.optim.SGD(params[1:], lr=1.0).step()
        torch.testing.assert_close(params[0], params[1], rtol=0, atol=0, equal_nan=True)


def test_both_limits() -> None:
    _, (grads,) = make_problem(SHAPES, 1, torch.float32)

    def both(params: Sequence[torch.Tensor]) -> None:
        clip_norm(1.0)(params)
        clip_value(1e-3)(params)

    zeros = [torch.zeros_like(grad) for grad in grads]
    expected = train("SGD", zeros, [grads], both, lr=1.0, maximize=True)
    found, _ = clipped_by_ours(grads, max_grad_norm=1.0, max_grad_value=1e-3)
    for ours, param in zip(found, params_of(expected), strict=True):
        assert ours is not None
        assert max_ulp(ours, param) <= 2
    assert any(bool((grad.abs() == 1e-3).any()) for grad in found if grad is not None)
    assert any(bool(((grad != 0) & (grad.abs() < 1e-3)).any()) for grad in found if grad is not None)


# --- what gradients may be ---


def norm_of(grads: Sequence[torch.Tensor], norm_type: float = 2, first_step: bool = True) -> torch.Tensor:
    """Ours, of a step in which states are made, or of the next one."""
    params = [torch.nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in grads]
    optimizer = fused_opt.AdamW(params, max_grad_norm=1.0, grad_norm_type=norm_type)
    for _ in range(1 if first_step else 2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    assert optimizer.last_grad_norm is not None
    return optimizer.last_grad_norm


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda grad: grad,
    "transposed": lambda grad: grad.t().contiguous().t(),
    "expanded": lambda grad: grad[:1].expand(grad.shape),
    "with gaps": lambda grad: torch.cat([grad, grad], 1)[:, ::2],
    "a slice": lambda grad: torch.cat([grad, grad], 1)[:, 1 : 1 + grad.shape[1]],
}


@both_types
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_any_gradient(kind: str, dtype: torch.dtype, norm_type: float) -> None:
    """Of float64 copies, rounded once; torch's own of 16-bit gradients has 16 bits. Both steps: in the first there are no states yet."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((60, 45), (3, 1), (1, 20), (90, 90))
    grads = [KINDS[kind](torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]
    for first_step in (True, False):
        found, expected = norm_of(grads, norm_type, first_step), total_norm(grads, norm_type)
        assert max_ulp(found, expected) <= (4 if found.dtype == torch.float64 else dtype.is_complex)  # 256 numbers to a sum in float64


@both_types
def test_the_norm_of_many_numbers(norm_type: float) -> None:
    """A million, on which torch's float32 norm is 150 units off; of magnitudes whose squares float32 does not have."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1_000_003, generator=generator)
    for scale in (1.0, 1e-25, 1e25):
        grads = [drawn * scale, drawn[:5] * scale]
        assert_same_bits(norm_of(grads, norm_type), total_norm(grads, norm_type))
    torchs = torch.linalg.vector_norm(drawn)
    assert max_ulp(torchs, total_norm([drawn])) > 20, "torch's norm has become exact: compare with it"


@both_types
def test_one_norm_of_all_groups_dtypes_and_absent_gradients(norm_type: float) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64)
    params = [torch.nn.Parameter(torch.zeros(30, dtype=dtype)) for dtype in dtypes for _ in range(2)]
    groups = [{"params": params[:3]}, {"params": params[3:7], "lr": 0.1}, {"params": params[7:], "momentum": 0.9}]
    optimizer = fused_opt.SGD(groups, lr=1.0, max_grad_norm=0.5, grad_norm_type=norm_type)
    for step in range(3):
        grads = [torch.randn(30, dtype=param.dtype, generator=generator) for param in params]
        given = [grad if (i + step) % 4 else None for i, grad in enumerate(grads)]
        set_grads(optimizer, given)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        assert max_ulp(optimizer.last_grad_norm, total_norm([grad for grad in given if grad is not None], norm_type)) <= 1
        for param, old, grad in zip(params, before, given, strict=True):
            assert torch.equal(param, old) == (grad is None)
    float32 = [grad for grad in given if grad is not None and grad.dtype == torch.float32]
    assert_same_bits(norm_of(float32, norm_type), total_norm(float32, norm_type))


@both_types
def test_no_gradient_at_all(norm_type: float) -> None:
    """The norm is 0, and nothing is stepped. Of empty tensors, too, of which torch refuses the largest magnitude."""
    param, empty = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(0, 4))
    optimizer = fused_opt.AdamW([param, empty], max_grad_norm=1.0, grad_norm_type=norm_type)
    optimizer.step()
    assert optimizer.last_grad_norm == 0.0
    empty.grad = torch.ones(0, 4)
    optimizer.step()
    assert optimizer.last_grad_norm == 0.0
    assert param not in optimizer.state


@needs_grad_dtype
def test_gradients_of_another_dtype() -> None:
    params = [torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16)) for _ in range(2)]
    grads = [torch.randn(300, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for param, grad in zip(params, grads, strict=True):
        param.grad_dtype = torch.float32  # type: ignore[attr-defined]
        param.grad = grad
    optimizer = fused_opt.SGD(params, lr=1.0, maximize=True, max_grad_norm=1.0)
    optimizer.step()
    assert_same_bits(optimizer.last_grad_norm, total_norm(grads))
    for param, expected in zip(params, clipped_by_torch(grads, 1.0, 2)[0], strict=True):
        assert expected is not None
        assert max_ulp(param, expected.bfloat16()) <= 1


def lazily_negated(grad: torch.Tensor) -> torch.Tensor:
    negated = torch.complex(grad, -grad).conj().imag
    assert negated.is_neg()
    return negated


def as_coo(grad: torch.Tensor) -> torch.Tensor:
    """With every entry twice, as an embedding's gradient has those of a word that occurs twice."""
    indices = torch.arange(len(grad)).repeat(2)[None]
    return torch.sparse_coo_tensor(indices, torch.cat([grad, grad]), grad.shape, check_invariants=False)


@both_types
@pytest.mark.parametrize("kind", [lazily_negated, as_coo])
def test_parameters_that_torch_steps_are_clipped_with_the_others(kind: Callable[[torch.Tensor], torch.Tensor], norm_type: float) -> None:
    grads = [torch.randn(20, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    given = [grads[0], kind(grads[1]), grads[2]]
    dense = [grad.to_dense().clone() if grad.is_sparse else grad.clone() for grad in given]
    params = [torch.nn.Parameter(torch.zeros(20, 3)) for _ in given]
    optimizer = fused_opt.SGD(params, lr=1.0, maximize=True, max_grad_norm=1.0, grad_norm_type=norm_type)
    for param, grad in zip(params, given, strict=True):
        param.grad = grad
    assert {row.path == "torch" for row in fused_opt.explain(optimizer).rows} == {True, False}
    optimizer.step()
    expected, norm = clipped_by_torch(dense, 1.0, norm_type)
    assert max_ulp(optimizer.last_grad_norm, norm) <= 2
    for param, theirs, grad, copy in zip(params, expected, given, dense, strict=True):
        assert theirs is not None
        assert max_ulp(param, theirs) <= 2
        assert_same_bits(grad.to_dense() if grad.is_sparse else grad.clone(), copy)


def test_without_the_extension(without_the_extension: None) -> None:
    _, (grads,) = make_problem(SHAPES, 1, torch.float32)
    expected, norm = clipped_by_torch(grads, 1.0, 2)
    found, found_norm = clipped_by_ours(grads, max_grad_norm=1.0)
    assert max_ulp(found_norm, norm) <= 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert max_ulp(ours, theirs) <= 2


def test_parameters_that_overlap() -> None:
    """Stepped one after the other, with one norm."""
    storage = torch.zeros(2, 60)
    grads = [torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected, norm = clipped_by_torch(grads, 1.0, 2)
    params = [torch.nn.Parameter(storage[0, :40]), torch.nn.Parameter(storage[0, 20:])]
    optimizer = fused_opt.SGD(params, lr=1.0, maximize=True, max_grad_norm=1.0)
    set_grads(optimizer, grads)
    optimizer.step()
    assert max_ulp(optimizer.last_grad_norm, norm) <= 2
    storage[1, :40] += expected[0]
    storage[1, 20:] += expected[1]
    torch.testing.assert_close(storage[0], storage[1], rtol=1e-6, atol=1e-8)


# --- norms that are not finite ---

BROKEN = (math.inf, -math.inf, math.nan)
ARRANGEMENTS = [(value, place) for value in BROKEN for place in (0, 1, -1)]


def broken_problem(value: float, place: int) -> tuple[Optimizer, list[torch.Tensor]]:
    """An optimizer after two steps, and gradients of which one has such a value."""
    values, grads = make_problem(((50,), (33, 3), (7,)), 3, torch.float32)
    params = [torch.nn.Parameter(each.clone()) for each in values]
    optimizer = fused_opt.AdamW(params, max_grad_norm=1.0)
    run_steps(optimizer, grads[:2])
    grads[2][place].view(-1)[3] = value
    set_grads(optimizer, grads[2])
    return optimizer, grads[2]


@both_types
@pytest.mark.parametrize(("value", "place"), ARRANGEMENTS)
def test_as_torch(value: float, place: int, norm_type: float) -> None:
    """Infinity makes the others zero, and NaN everything NaN."""
    _, (grads,) = make_problem(((50,), (33, 3), (7,)), 1, torch.float32)
    grads[place].view(-1)[3] = value
    expected, norm = clipped_by_torch(grads, 1.0, norm_type)
    for given in ({}, {"nonfinite_grad_norm": "as_torch"}):
        found, found_norm = clipped_by_ours(grads, max_grad_norm=1.0, grad_norm_type=norm_type, **given)
        torch.testing.assert_close(found_norm, norm, equal_nan=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@both_types
@pytest.mark.parametrize(("value", "place"), ARRANGEMENTS)
def test_raise(value: float, place: int, norm_type: float) -> None:
    optimizer, _ = broken_problem(value, place)
    optimizer.param_groups[0].update(nonfinite_grad_norm="raise", grad_norm_type=norm_type)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"cannot be clipped to max_grad_norm=1\.0"):
        optimizer.step()
    assert not torch.isfinite(optimizer.last_grad_norm)


@both_types
@pytest.mark.parametrize(("value", "place"), ARRANGEMENTS)
def test_skip(value: float, place: int, norm_type: float) -> None:
    """As if the step had not been: later ones are those of an optimizer that never saw it. Counters, averages, too."""
    optimizer, grads = broken_problem(value, place)
    optimizer.param_groups[0].update(nonfinite_grad_norm="skip", grad_norm_type=norm_type)
    with nothing_changes(optimizer):
        optimizer.step()
    assert not torch.isfinite(optimizer.last_grad_norm)
    other, _ = broken_problem(value, place)
    other.param_groups[0].update(nonfinite_grad_norm="skip", grad_norm_type=norm_type)
    again = [torch.ones_like(grad) for grad in grads]
    run_steps(optimizer, [again])
    run_steps(other, [again])
    assert_same_state(optimizer, other)


def test_the_first_step_is_skipped() -> None:
    """No state is made."""
    for name in CLASSES:
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = getattr(fused_opt, name)([param], max_grad_norm=1.0, nonfinite_grad_norm="skip", average="ema", anchor_decay=0.1)
        param.grad = torch.full((5,), math.inf)
        with nothing_changes(optimizer):
            optimizer.step()
        assert len(optimizer.state) == 0


# --- together with GradScaler ---


@both_types
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "RMSprop"])
@pytest.mark.parametrize("scale", [1024.0, 1000.0])
def test_with_a_scaler(name: str, scale: float, norm_type: float) -> None:
    """`fused=True` leaves unscaling to the step: norm and limit are those of unscaled gradients. A step with an infinity is left out."""
    values, grads = make_problem(((50,), (33, 3)), 4, torch.float32)
    options: dict[str, Any] = {**RULES[name], "max_grad_norm": 0.3, "grad_norm_type": norm_type}
    optimizer, expected = (
        getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **options, **given)
        for given in ({"fused": True}, {})
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    exact = scale == 1024.0
    for step, step_grads in enumerate(grads):
        set_grads(optimizer, [grad * scaler.get_scale() for grad in step_grads])
        if step == 2:
            params_of(optimizer)[0].grad[5] = math.inf
            with nothing_changes(optimizer):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
            set_grads(expected, step_grads)
            expected.step()
            assert max_ulp(optimizer.last_grad_norm, expected.last_grad_norm) <= (0 if exact else 2)
        scaler.update()
    if exact:
        assert_same_state(optimizer, expected)
    else:
        for p, q in zip(params_of(optimizer), params_of(expected), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# --- ranks ---


@both_types
@pytest.mark.parametrize("in_place", [True, False])
def test_two_ranks(norm_type: float, in_place: bool) -> None:
    """Each has half of the parameters; the norm is that of all. What the hook is given is a sum of squares, or the largest magnitude."""
    values, (grads,) = make_problem(SHAPES, 1, torch.float32)
    combine = torch.add if norm_type == 2 else torch.maximum
    options: dict[str, Any] = {"lr": 1.0, "max_grad_norm": 1.0, "grad_norm_type": norm_type}
    whole = fused_opt.SGD([torch.nn.Parameter(value.clone()) for value in values], **options)
    set_grads(whole, grads)
    whole.step()
    halves = [slice(0, 2), slice(2, None)]
    ranks = [fused_opt.SGD([torch.nn.Parameter(value.clone()) for value in values[half]], **options) for half in halves]
    seen: list[torch.Tensor] = []
    for half, rank in zip(halves, ranks, strict=True):
        rank.reduce_grad_norm = lambda total: seen.append(total.clone())
        set_grads(rank, grads[half])
        with torch.no_grad():
            before = [param.clone() for param in params_of(rank)]
            rank.step()
            for param, value in zip(params_of(rank), before, strict=True):
                param.copy_(value)
    assert [(total.dtype, total.shape) for total in seen] == [(torch.float64, ())] * 2

    def reduce(total: torch.Tensor) -> torch.Tensor | None:
        combined = combine(*seen)
        if not in_place:
            return combined
        total.copy_(combined)
        return None

    for half, rank in zip(halves, ranks, strict=True):
        rank.reduce_grad_norm = reduce
        rank.step()
        assert max_ulp(rank.last_grad_norm, whole.last_grad_norm) == 0
        for param, expected in zip(params_of(rank), params_of(whole)[half], strict=True):
            assert_same_bits(param, expected)


def test_a_rank_without_gradients_takes_part() -> None:
    """Or the others would wait for it for ever."""
    optimizer = fused_opt.AdamW([torch.nn.Parameter(torch.ones(3))], max_grad_norm=1.0)
    seen: list[float] = []
    optimizer.reduce_grad_norm = lambda total: seen.append(float(total))
    optimizer.step()
    assert seen == [0.0]


def test_a_hook_that_fails_changes_nothing() -> None:
    optimizer, _ = broken_problem(1.0, 0)

    def hook(total: torch.Tensor) -> None:
        raise ConnectionError("the other rank is gone")

    optimizer.reduce_grad_norm = hook
    with nothing_changes(optimizer), pytest.raises(ConnectionError, match="the other rank"):
        optimizer.step()


def test_a_norm_that_the_hook_makes_infinite_is_handled_as_one() -> None:
    optimizer, _ = broken_problem(1.0, 0)
    optimizer.param_groups[0]["nonfinite_grad_norm"] = "skip"
    optimizer.reduce_grad_norm = lambda total: total.fill_(math.inf)
    with nothing_changes(optimizer):
        optimizer.step()


# --- where it runs ---


@both_types
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_norms_bits_are_those_of_every_isa_and_number_of_threads(dtype: torch.dtype, norm_type: float, use_isa, threads) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, dtype=dtype, generator=generator) for shape in ((150_001,), (7,), (70_003,))]
    grads.append(torch.randn(300, 100, dtype=dtype, generator=generator).t())
    for first_step in (True, False):
        norms = []
        for isa, count in itertools.product(SUPPORTED_ISAS, (1, 2, 3)):
            use_isa(isa)
            threads(count)
            norms.append(norm_of(grads, norm_type, first_step))
        for norm in norms[1:]:
            assert_same_bits(norm, norms[0])


# --- one norm ---


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"max_grad_norm": 1.0}, {"max_grad_norm": 2.0}),
        ({"max_grad_norm": 1.0}, {"max_grad_norm": None}),
        ({"max_grad_norm": 1.0, "grad_norm_type": 2}, {"grad_norm_type": math.inf}),
        ({"max_grad_norm": 1.0, "nonfinite_grad_norm": "skip"}, {"nonfinite_grad_norm": "raise"}),
    ],
    ids=str,
)
def test_groups_that_differ(options: dict[str, Any], other: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = fused_opt.SGD([{"params": [param]} for param in params], **options)
    optimizer.step()
    optimizer.param_groups[1].update(other)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=rf"{next(iter(other))} is .* in group 0 and .* in group 1"):
        optimizer.step()


def test_there_is_no_norm_without_the_option() -> None:
    optimizer = fused_opt.SGD([torch.nn.Parameter(torch.ones(3))], max_grad_value=1.0)
    run_steps(optimizer, [[torch.ones(3)]])
    assert optimizer.last_grad_norm is None
