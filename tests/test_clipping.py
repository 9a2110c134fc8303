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
    optimizer = fused_opt.RMSprop(params, max_grad_norm=1.0, grad_norm_type=norm_type)
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


@both_types
def test_empty_gradients_that_torch_would_measure(norm_type: float) -> None:
    """An embedding that no word of the batch was looked up in, and a complex parameter without elements: torch's function for the largest
    magnitude has none of nothing."""
    embedding, empty = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Parameter(torch.ones(0, dtype=torch.complex64))
    embedding(torch.tensor([], dtype=torch.long)).sum().backward()
    empty.grad = torch.ones_like(empty)
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.full((3,), 2.0)
    optimizer = fused_opt.SGD([*embedding.parameters(), empty, param], lr=1.0, max_grad_norm=1.0, grad_norm_type=norm_type)
    optimizer.step()
    assert optimizer.last_grad_norm == (2.0 if math.isinf(norm_type) else torch.tensor(12.0).sqrt())


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


@pytest.mark.parametrize("grad", [[math.inf, 1.0, 1.0], [3e38, 3e38, 1.0], [1.0, 2.0, 3.0]])
def test_an_infinite_limit_only_measures(grad: list[float]) -> None:
    measuring, plain = (
        fused_opt.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1, **options) for options in ({"max_grad_norm": math.inf}, {})
    )
    for optimizer in (measuring, plain):
        set_grads(optimizer, [torch.tensor(grad)])
        optimizer.step()
    assert_same_bits(params_of(measuring)[0], params_of(plain)[0])
    assert measuring.last_grad_norm is not None
    assert measuring.last_grad_norm.isinf() == (max(grad) > 1e38)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ("x", TypeError, r"reduce_grad_norm returned 'x' of type str; it must return a tensor of one number, or None"),
        (torch.ones(2), TypeError, r"reduce_grad_norm returned a tensor of shape \(2,\)"),
        (torch.tensor(-1.0), ValueError, r"reduce_grad_norm returned -1.0; sums of squares"),
    ],
    ids=["text", "two numbers", "negative"],
)
def test_what_ranks_combined_must_be_a_norm(result: Any, error: type[Exception], message: str) -> None:
    optimizer = fused_opt.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1, max_grad_norm=1.0)
    optimizer.reduce_grad_norm = lambda _: result
    set_grads(optimizer, [torch.ones(3)])
    with nothing_changes(optimizer), pytest.raises(error, match=message):
        optimizer.step()


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


# --- where it runs ---


@both_types
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_norms_bits_are_those_of_every_isa_and_number_of_threads(dtype: torch.dtype, norm_type: float, use_isa, threads) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, dtype=dtype, generator=generator) for shape in ((50_001,), (7,), (30_003,))]
    grads.append(torch.randn(170, 100, dtype=dtype, generator=generator).t())
    for first_step in (True, False):
        norms = []
        for isa, count in itertools.product(SUPPORTED_ISAS, (1, 3)):
            use_isa(isa)
            threads(count)
            norms.append(norm_of(grads, norm_type, first_step))
        for norm in norms[1:]:
            assert_same_bits(norm, norms[0])
