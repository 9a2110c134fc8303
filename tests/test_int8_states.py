"""Optimizer states in 8-bit codes: a step is that of fp32 between decoding and encoding, to the byte; and what the codes must never do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_memory import peak_mib

import fused_opt
from fused_opt import QuantizedTensor
from fused_opt.bench.cases import CASES, Case
from fused_opt.quantization import BLOCK_SIZES, decode, encode, step_seeds
from fused_opt.rules import NON_NEGATIVE
from helpers import SUPPORTED_ISAS, assert_same_bits, assert_same_state, make_problem, needs_grad_dtype, ours, params_of, run_steps
from layouts import SHAPES, Layout, layouts
from pairs import nothing_changes

Optimizer = torch.optim.Optimizer
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATEFUL = [case for case in CASES if "centered" not in case.options and (case.optimizer != "SGD" or "momentum" in case.options)]
INT8: dict[str, Any] = {"state_dtype": "int8", "min_8bit_size": 0}
SHORT = (Case("AdamW"), Case("RMSprop", {"momentum": 0.9}), Case("SGD", {"momentum": 0.9}))


def code_of(slot: str) -> str:
    return "unsigned_mulaw" if slot in NON_NEGATIVE else "mulaw"


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a densely packed tensor, as blocks run over them."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def decoded(state: dict[str, torch.Tensor], slot: str, block_size: int) -> torch.Tensor:
    """What an 8-bit state stands for, in the order of its memory."""
    codes = in_memory_order(state[slot])
    return QuantizedTensor(codes, state[f"{slot}_scale"], code_of(slot), torch.float32, block_size).dequantize()


def slots_of(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if name != "step" and not name.endswith("_scale")]


def alone_in_fp32(case: Case, params: Sequence[torch.Tensor]) -> list[Optimizer]:
    """An optimizer with fp32 states for each parameter."""
    return [getattr(fused_opt, case.optimizer)([param], **case.options, state_dtype=torch.float32) for param in params]


def step_beside_fp32(optimizer: Optimizer, references: Sequence[Optimizer], block_sizes: Sequence[int]) -> None:
    """Step all, then quantize the states of the references, compare, and let them go on with what those have become.

    The seed of a block's rounding is made of its parameters before the step and its states after it; a maximum is rounded to the nearest.

    Args:
        references: for each parameter an optimizer of its copy.
        block_sizes: of each parameter.
    """
    optimizer.step()
    seeds = []
    for reference, size in zip(references, block_sizes, strict=True):
        (q,) = params_of(reference)
        before = in_memory_order(torch.empty_like(q).copy_(q.detach()))  # a copy without gaps, in their order
        reference.step()
        states = {slot: in_memory_order(reference.state[q][slot]) for slot in slots_of(reference.state[q])}
        seeds.append(step_seeds(before, states, size))
    for i, (p, reference, size) in enumerate(zip(params_of(optimizer), references, block_sizes, strict=True)):
        (q,) = params_of(reference)
        assert_same_bits(p, q, f"parameter {i}")
        state, wide = optimizer.state[p], reference.state[q]
        assert slots_of(state) == slots_of(wide) != []
        assert state.get("step") == wide.get("step")
        for slot in slots_of(wide):
            assert state[slot].stride() == wide[slot].stride()
            values, codes, scales = in_memory_order(wide[slot]), in_memory_order(state[slot]), state[f"{slot}_scale"]
            expected, expected_scales = torch.empty_like(codes), torch.empty_like(scales)
            encode(values, expected, expected_scales, code_of(slot), size, None if slot.startswith("max_") else seeds[i])
            assert_same_bits(codes, expected, f"{slot} of parameter {i}, blocks of {size}")
            assert_same_bits(scales, expected_scales, f"scales of {slot} of parameter {i}, blocks of {size}")
            decode(expected, expected_scales, code_of(slot), size, values)


# --- the step equals dequantize, fp32 step, quantize ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_a_step_is_that_of_fp32_between_decoding_and_encoding(case: Case, dtype: torch.dtype) -> None:
    """In all block sizes, with tails, without elements, without dimensions."""
    of_blocks = {size: [(size - 1,), (size,), (3, size), (2 * size + 5,)] for size in BLOCK_SIZES}
    of_blocks[32] += [(), (0,), (2, 0, 3), (1,), (7, 5)]
    decades = (-1.0, 1.0) if dtype == torch.float16 else (-6.0, 1.0)  # no gradient becomes 0, by whose root eps=0.0 would divide
    values, grads = make_problem(list(itertools.chain(*of_blocks.values())), steps=3, dtype=dtype, decades=decades)
    params = [torch.nn.Parameter(value.clone()) for value in values]
    rest = iter(params)
    groups = [{"params": list(itertools.islice(rest, len(shapes))), "block_size": size} for size, shapes in of_blocks.items()]
    optimizer: Optimizer = getattr(fused_opt, case.optimizer)(groups, **case.options, **INT8)
    references = alone_in_fp32(case, [torch.nn.Parameter(value.clone()) for value in values])
    for step_grads in grads:
        for param, reference, grad in zip(params, references, step_grads, strict=True):
            param.grad, params_of(reference)[0].grad = grad, grad.clone()
        step_beside_fp32(optimizer, references, [size for size, shapes in of_blocks.items() for _ in shapes])
    assert optimizer._last_ran.isa == SUPPORTED_ISAS[-1]
    for group, row, size in zip(optimizer.param_groups, fused_opt.explain(optimizer).rows, BLOCK_SIZES, strict=True):
        assert row.path == f"cpu-{SUPPORTED_ISAS[-1]}"
        assert {kind for _, kind in row.states} <= {f"int8/{size}", f"uint8/{size}"}
        states = [optimizer.state[param] for param in group["params"]]
        assert row.state_bytes == sum(tensor.nbytes for state in states for key, tensor in state.items() if key != "step")


@settings(
    settings.get_profile("default"),
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    case=st.sampled_from(STATEFUL),
    dtype=st.sampled_from(DTYPES),
    shape=SHAPES,
    block_size=st.sampled_from([32, 64, 256]),
    data=st.data(),
)
def test_any_strides(case: Case, dtype: torch.dtype, shape: tuple[int, ...], block_size: int, data: st.DataObject) -> None:
    """Of parameters and gradients; blocks run over the codes' memory, and no byte between the parameter's elements is touched."""
    layout: Layout = data.draw(layouts(len(shape)))
    grad_layout: Layout = data.draw(layouts(len(shape), expanded=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    storage = torch.randn(layout.extent(shape) + 5, generator=generator).to(dtype)
    grads = [torch.randn(grad_layout.extent(shape), generator=generator).to(dtype) for _ in range(3)]
    storages = [storage, storage.clone()]
    params = [torch.nn.Parameter(layout.view(each, shape)) for each in storages]
    optimizer: Optimizer = getattr(fused_opt, case.optimizer)(params[:1], **case.options, **INT8, block_size=block_size)
    references = alone_in_fp32(case, params[1:])
    for grad in grads:
        for param in params:
            param.grad = grad_layout.view(grad, shape)
        step_beside_fp32(optimizer, references, [block_size])
        assert_same_bits(storages[0], storages[1])
    assert optimizer._last_ran is not None or 0 in shape


@needs_grad_dtype
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_gradients_of_another_dtype(case: Case, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Read as fp32, even those of float64."""
    values, grads = make_problem([(5003,), (77, 65)], steps=3, dtype=torch.float64)
    params, optimizer = ours(case, [value.to(dtype) for value in values], **INT8)
    references = alone_in_fp32(case, [torch.nn.Parameter(value.to(dtype)) for value in values])
    for step_grads in grads:
        for p, reference, grad in zip(params, references, step_grads, strict=True):
            (q,) = params_of(reference)
            p.grad_dtype, q.grad_dtype = grad_dtype, torch.float32
            p.grad = grad.to(grad_dtype)
            q.grad = p.grad.float()
        step_beside_fp32(optimizer, references, [256] * len(params))


@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.float32) for case in STATEFUL), *itertools.product(SHORT, DTYPES[1:])], ids=str)
def test_isas_and_threads(case: Case, dtype: torch.dtype, use_isa: Callable[[str], None], threads: Callable[[int], None]) -> None:
    values, grads = make_problem(((80_021,), (7,), (300, 101), (), (8192,)), steps=3, dtype=dtype)
    results = []
    for isa, count in itertools.product(SUPPORTED_ISAS, (1, 2, 3)):
        use_isa(isa)
        threads(count)
        _, optimizer = ours(case, values, **INT8, block_size=4096 if "lr" in case.options else 256)
        run_steps(optimizer, grads)
        assert optimizer._last_ran == (isa, count)
        results.append(optimizer)
    for other in results[1:]:
        assert_same_state(other, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_isas_agree_on_parameters_that_are_not_finite(case: Case, dtype: torch.dtype, use_isa: Callable[[str], None]) -> None:
    """Whichever NaN it is: the weights beside it go on alike."""
    (values,), grads = make_problem([(1000,)], 4, dtype)
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    exponent = torch.tensor(math.inf, dtype=dtype).view(as_int)
    for place, bits in ((3, 0), (77, 1), (300, 1 << 6), (301, -1)):
        values.view(as_int)[place] = exponent | bits
    optimizers = []
    for isa in SUPPORTED_ISAS:
        use_isa(isa)
        optimizers.append(ours(case, [values], **INT8)[1])
        run_steps(optimizers[-1], grads)
    for other in optimizers[1:]:
        assert_same_state(other, optimizers[0])


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_parameters_that_share_memory(case: Case) -> None:
    """One after the other, each seeing what the one before it wrote: the same memory twice, and overlapping pieces of one."""
    storage, grad = make_problem([(9000,)], 3, torch.float32)
    places = [slice(0, 5000), slice(0, 5000), slice(100, 5100), slice(3, 9000, 2)]
    storages = [storage[0].clone(), storage[0].clone()]
    params, others = ([torch.nn.Parameter(each[place]) for place in places] for each in storages)
    optimizer: Optimizer = getattr(fused_opt, case.optimizer)(params, **case.options, **INT8)
    references = alone_in_fp32(case, others)
    for step_grad in grad:
        for p, q, place in zip(params, others, places, strict=True):
            p.grad, q.grad = step_grad[0][place], step_grad[0][place].clone()
        step_beside_fp32(optimizer, references, [256] * len(params))
        assert_same_bits(storages[0], storages[1])


# --- memory ---


@pytest.mark.slow
def test_a_step_allocates_nothing_of_a_parameters_size() -> None:
    assert peak_mib("fused_opt", "AdamW8bit") < 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_a_parameter(dtype: torch.dtype) -> None:
    """At most 2.04 for Adam's two moments in blocks of 256."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((300, 257), (4097,), (64, 64))]
    optimizer = fused_opt.Adam8bit(params)
    (row,) = fused_opt.explain(optimizer).rows
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert fused_opt.explain(optimizer).rows == (row,)
    held = sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step")
    assert row.state_bytes == held
    assert row.states == (("exp_avg", "int8/256"), ("exp_avg_sq", "uint8/256"))
    assert 2 < held / row.elements <= 2.04
    for param in params:
        state = optimizer.state[param]
        assert {key: (value.dtype, value.shape) for key, value in state.items() if key != "step"} == {
            "exp_avg": (torch.int8, param.shape),
            "exp_avg_scale": (torch.float32, (math.ceil(param.numel() / 256),)),
            "exp_avg_sq": (torch.uint8, param.shape),
            "exp_avg_sq_scale": (torch.float32, (math.ceil(param.numel() / 256),)),
        }


# --- what 8-bit states must never do ---


def random_gradients(*shape: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(shape, generator=generator)


def train(optimizer: Optimizer, steps: int, gradient: Callable[[], torch.Tensor]) -> torch.Tensor:
    """So many steps of an optimizer of one parameter, of which a copy is returned."""
    (param,) = params_of(optimizer)
    for _ in range(steps):
        param.grad = gradient()
        optimizer.step()
    return param.detach().clone()


def int8(name: str, shape: Sequence[int], **options: Any) -> Optimizer:
    optimizer: Optimizer = getattr(fused_opt, name)([torch.nn.Parameter(torch.zeros(shape))], lr=1e-3, **INT8, **options)
    return optimizer


@pytest.mark.parametrize("case", [Case("Adam"), Case("Adam", {"amsgrad": True}), Case("RMSprop")], ids=str)
def test_positive_second_moments_never_become_zero(case: Case) -> None:
    """However small beside the others of their block, and however long ago; so weights do not run away."""
    sizes = torch.logspace(-12, 0, 256)
    sizes[1::5] = 0
    only_last = torch.nn.functional.one_hot(torch.full((16,), 255), 256)
    distances = []
    for own in (INT8, {"state_dtype": torch.float32}):
        (param,), optimizer = ours(case, [torch.zeros(16, 256)], **own)
        draw = random_gradients(16, 256)
        train(optimizer, 20, lambda draw=draw: sizes * next(draw))
        distances.append(train(optimizer, 3000, lambda draw=draw: only_last * next(draw)).abs())
        for slot in NON_NEGATIVE & set(optimizer.state[param]):
            assert bool(((optimizer.state[param][slot] > 0) == (sizes > 0)).all()), slot
    assert bool((distances[0][:, 1::5] == 0).all())
    assert float(distances[0].max()) < 1.1 * float(distances[1].max())


FORGETFUL = (Case("Adam"), Case("AdamW", {"amsgrad": True, "weight_decay": 0.0}), Case("RMSprop", {"momentum": 0.9}), SHORT[2])


@pytest.mark.parametrize("others", ["constant", "random"])
@pytest.mark.parametrize("case", FORGETFUL, ids=str)
def test_weights_without_a_gradient_stop_while_their_block_goes_on(case: Case, others: str) -> None:
    """A third never had one and never moves; a third has none any more, and comes to rest as in fp32.

    With a constant gradient the momentum of the others is a fixed point of fp32, so nothing in their block's scale changes any more.
    """
    optimizer = int8(case.optimizer, (6, 128), **case.options)
    never, stopped = torch.arange(128) % 3 == 0, torch.arange(128) % 3 == 1
    draw = random_gradients(6, 128)

    def gradient(silent: torch.Tensor) -> torch.Tensor:
        drawn = next(draw)
        return torch.where(silent, 0.0, torch.ones_like(drawn) if others == "constant" else drawn)

    train(optimizer, 2000, lambda: gradient(never))
    before = train(optimizer, 1500, lambda: gradient(never | stopped))
    after = train(optimizer, 100, lambda: gradient(never | stopped))
    assert bool((after[:, never] == 0).all())
    assert bool((before[:, stopped] != 0).all())
    assert_same_bits(after[:, stopped], before[:, stopped], "what had come to rest moves")
    assert bool((after[:, ~never & ~stopped] != before[:, ~never & ~stopped]).all())


def test_slow_decay_is_right_on_average() -> None:
    """With beta2=0.9999 a step takes a 400th of the distance between two codes; after 3000 of them a quarter must be gone. The error of the
    mean of 2048 elements is 1%."""
    optimizers = [int8("Adam", (4096,), betas=(0.9, 0.9999)), fused_opt.Adam([torch.nn.Parameter(torch.zeros(4096))], betas=(0.9, 0.9999))]
    even = torch.arange(4096) % 2 == 0
    moments = []
    for optimizer in optimizers:
        draw = random_gradients(4096)
        train(optimizer, 100, lambda draw=draw: next(draw))
        train(optimizer, 3000, lambda draw=draw: next(draw).masked_fill_(even, 0))
        (state,) = optimizer.state.values()
        moments.append(decoded(state, "exp_avg_sq", 256) if "exp_avg_sq_scale" in state else state["exp_avg_sq"])
    for chosen in (even, ~even):
        assert float(moments[0][chosen].mean()) == pytest.approx(float(moments[1][chosen].mean()), rel=0.05)


def test_second_moments_follow_while_parameters_stand_still() -> None:
    """Neither they nor the first moment's scale then tell one step from the next: with lr=0, and the largest gradient always the same.

    The random walk of a single value has a standard deviation of about 0.2 in the logarithm, so the mean of 2000 one of 0.005; with the
    same draw in every step it was 2.
    """
    largest, grows = torch.arange(4096) % 256 == 0, torch.arange(4096) % 2 == 0
    moments = []
    for optimizer in (int8("Adam", (4096,)), fused_opt.Adam([torch.nn.Parameter(torch.zeros(4096))])):
        optimizer.param_groups[0]["lr"] = 0.0
        train(optimizer, 3000, lambda: torch.full((4096,), 0.1).masked_fill_(largest, 1.0))
        train(optimizer, 3000, lambda: torch.where(largest, 1.0, torch.where(grows, 0.3, 0.03)))
        (state,) = optimizer.state.values()
        moments.append(decoded(state, "exp_avg_sq", 256) if "exp_avg_sq_scale" in state else state["exp_avg_sq"])
    ratios = (moments[0] / moments[1])[~largest].log()
    for chosen in (grows[~largest], ~grows[~largest]):
        assert abs(float(ratios[chosen].mean())) < 0.05


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_a_gradient_that_is_not_finite_shows(case: Case, value: float) -> None:
    """Its block has the scale NaN and decodes to NaN, never to ordinary numbers; the other blocks go on as without it."""
    optimizer, clean = (int8(case.optimizer, (1000,), **case.options) for _ in range(2))
    draw = random_gradients(1000)
    for step in range(4):
        grad = next(draw)
        train(clean, 1, grad.clone)
        if step == 1:
            grad[300] = value
        after = train(optimizer, 1, grad.clone)
    (state,), (clean_state,) = optimizer.state.values(), clean.state.values()
    for slot in slots_of(state):
        assert state[f"{slot}_scale"].isnan().tolist() == [False, True, False, False]
        values, expected = decoded(state, slot, 256), decoded(clean_state, slot, 256)
        assert bool(values[256:512].isnan().all())
        expected[256:512] = math.nan
        assert_same_bits(values, expected)
    assert bool(after[256:512].isnan().all())
    assert bool(after[:256].isfinite().all())
    assert bool(after[512:].isfinite().all())


@pytest.mark.parametrize(("case", "fused"), [*((case, False) for case in SHORT), (SHORT[0], True), (SHORT[2], True)], ids=str)
def test_a_step_that_the_scaler_skips(case: Case, fused: bool) -> None:
    """Changes nothing; the others are as without a scaler, whose scale is a power of two."""
    optimizer, expected = (int8(case.optimizer, (5003,), **case.options, **({"fused": True} if fused else {})) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    draw, (param,) = random_gradients(5003), params_of(optimizer)
    for step in range(6):
        grad = next(draw)
        param.grad = grad * scaler.get_scale()
        if step in (0, 3):
            param.grad[7] = math.inf
            before = {key: value.clone() for key, value in optimizer.state.get(param, {}).items()}
            scaler.step(optimizer)
            assert optimizer.state.get(param, {}).keys() == before.keys()
            for key, value in before.items():
                assert_same_bits(optimizer.state[param][key], value)
        else:
            scaler.step(optimizer)
            train(expected, 1, grad.clone)
        scaler.update()
    assert_same_state(optimizer, expected)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)  # type: ignore[attr-defined]
    param.grad = next(draw)
    with nothing_changes(optimizer):
        optimizer.step()
