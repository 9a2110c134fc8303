"""How 8-bit states are asked for: classes, options, groups and names; copies of such optimizers; and everything that is refused."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.native import native
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, own_options, params_of, run_steps
from pairs import ALL_STATES, assert_native, nothing_changes, set_grads, step_with

Optimizer = torch.optim.Optimizer
every_class = pytest.mark.parametrize("name", CLASSES)
WITH_STATES: dict[str, dict[str, Any]] = {**ALL_STATES, "RMSprop": {"momentum": 0.9}}


def make(name: str, *shapes: int | tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Optimizer:
    """The 8-bit class, on parameters that have a gradient."""
    values, grads = make_problem([(shape,) if isinstance(shape, int) else shape for shape in shapes], 1, torch.float32)
    params = [torch.nn.Parameter(value.to(dtype)) for value in values]
    optimizer: Optimizer = getattr(fused_opt, f"{name}8bit")(params, **{**WITH_STATES[name], **options})
    set_grads(optimizer, [grad.to(dtype) for grad in grads[0]])
    return optimizer


def kinds(optimizer: Optimizer) -> list[str]:
    """Of each parameter, how its states are kept: as explained before there are any, and after a step."""

    def explained() -> list[str]:
        found = {}
        for row in fused_opt.explain(optimizer).rows:
            for index in row.indices:
                found[row.group, index] = row.states[-1][1]
        return [found[key] for key in sorted(found)]

    promised = explained()
    optimizer.step()
    assert explained() == promised
    return [kind.removeprefix("u") for kind in promised]


# --- classes and options ---


@every_class
def test_classes(name: str) -> None:
    """A subclass of torch's, whose arguments it has, then ours; the same as the option."""
    ours, torchs = getattr(fused_opt, f"{name}8bit"), getattr(torch.optim, name)
    assert issubclass(ours, getattr(fused_opt, name))
    assert issubclass(ours, torchs)
    parameters = list(inspect.signature(ours).parameters.values())
    expected = list(inspect.signature(torchs).parameters.values())
    assert parameters[: len(expected)] == expected
    assert [(p.name, p.default, p.kind) for p in parameters[len(expected) :]] == [
        (option, "int8" if option == "state_dtype" else None, inspect.Parameter.KEYWORD_ONLY) for option in own_options(name)
    ]
    values, grads = make_problem([(5003,), (70, 80), (100,)], 3, torch.float32)
    optimizers = [
        cls([torch.nn.Parameter(value.clone()) for value in values], **WITH_STATES[name], **options)
        for cls, options in ((ours, {}), (getattr(fused_opt, name), {"state_dtype": "int8"}))
    ]
    for optimizer in optimizers:
        run_steps(optimizer, grads)
        assert isinstance(optimizer, torchs)
        assert_native(optimizer)
    assert_same_state(*optimizers)
    assert [group["state_dtype"] for group in optimizers[0].param_groups] == ["int8"]
    assert "state_dtype: int8" in repr(optimizers[0])


def test_positional_arguments_are_torchs() -> None:
    optimizer = fused_opt.Adam8bit([torch.nn.Parameter(torch.ones(3))], 0.5, (0.1, 0.2), block_size=64)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["block_size"]) == (0.5, (0.1, 0.2), 64)


def test_sgd_without_momentum_has_no_states() -> None:
    optimizer, plain = make("SGD", 5000, momentum=0), fused_opt.SGD([torch.nn.Parameter(make_problem([(5000,)], 0, torch.float32)[0][0])])
    plain.param_groups[0]["weight_decay"] = optimizer.param_groups[0]["weight_decay"]
    set_grads(plain, [p.grad for p in params_of(optimizer)])
    (row,) = fused_opt.explain(optimizer).rows
    assert (row.states, row.state_bytes) == ((), 0)
    optimizer.step()
    plain.step()
    assert_same_bits(params_of(optimizer)[0], params_of(plain)[0])


@every_class
def test_small_tensors_keep_fp32_states(name: str) -> None:
    shapes = (4095, 4096, (64, 64), (63, 65), (1, 4097), (), 0)
    assert kinds(make(name, *shapes)) == ["float32", "int8/256", "int8/256", "float32", "int8/256", "float32", "float32"]
    assert kinds(make(name, 99, 100, 101, min_8bit_size=100, block_size=64)) == ["float32", "int8/64", "int8/64"]
    assert kinds(make(name, 4096, min_8bit_size=10**9)) == ["float32"]


@every_class
def test_tensors_of_one_block(name: str) -> None:
    """The option's block size is named before and after the first step."""
    assert kinds(make(name, 300, 1, (), min_8bit_size=0, block_size=4096)) == ["int8/4096"] * 3


@every_class
def test_groups_have_options_of_their_own(name: str) -> None:
    params = [torch.nn.Parameter(torch.ones(5000)) for _ in range(6)]
    groups: list[dict[str, Any]] = [
        {},
        {"block_size": 32},
        {"state_dtype": torch.bfloat16},
        {"state_dtype": None},
        {"min_8bit_size": 5001},
    ]
    groups = [{"params": [param], **group} for param, group in zip(params, groups, strict=False)]
    optimizer = getattr(fused_opt, f"{name}8bit")(groups, block_size=1024, **WITH_STATES[name])
    optimizer.add_param_group({"params": params[5:]})
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    assert kinds(optimizer) == ["int8/1024", "int8/32", "bfloat16", "float32", "float32", "int8/1024"]


def test_centered_groups_keep_fp32_states() -> None:
    """Their variance is a difference of two states: of codes, which are off by 3%, it comes out negative where a gradient has a mean."""
    params = [torch.nn.Parameter(torch.zeros(4096)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": params[:1], "centered": True}, {"params": params[1:]}]
    optimizer = fused_opt.RMSprop8bit(groups, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        for param in params:
            param.grad = 1 + torch.randn(4096, generator=generator)
        optimizer.step()
    assert kinds(optimizer) == ["float32", "int8/256"]
    assert all(bool(param.isfinite().all()) for param in params)
    optimizer.param_groups[1]["centered"] = True
    with nothing_changes(optimizer), pytest.raises((KeyError, RuntimeError), match="delete"):
        optimizer.step()


def test_one_8bit_group_of_a_plain_class() -> None:
    params = [torch.nn.Parameter(torch.ones(5000)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "state_dtype": "int8"}]
    optimizer = fused_opt.AdamW(groups, block_size=512)
    for param in params:
        param.grad = torch.ones_like(param)
    assert kinds(optimizer) == ["float32", "int8/512"]


NAMES = ("embed.weight", "layers.0.weight", "layers.1.weight", "head.Weight")

# state_dtype, class, what each of NAMES has
PATTERNS: tuple[tuple[dict[str, Any], str, tuple[str, ...]], ...] = (
    ({"*embed*": torch.float32}, "Adam8bit", ("float32", "int8/256", "int8/256", "int8/256")),
    ({"*embed*": torch.bfloat16}, "Adam", ("bfloat16", "float32", "float32", "float32")),
    ({"layers.*": "int8"}, "Adam", ("float32", "int8/256", "int8/256", "float32")),
    ({"layers.0.*": torch.float64, "layers.*": "int8", "*": torch.float16}, "Adam", ("float16", "float64", "int8/256", "float16")),
    ({"*": "int8", "*embed*": torch.float32}, "Adam", ("int8/256",) * 4),
    ({"*.weight": None}, "Adam8bit", ("float32", "float32", "float32", "int8/256")),
    ({"layers.[0-9].weight": torch.bfloat16, "HEAD*": torch.float32}, "Adam8bit", ("int8/256", "bfloat16", "bfloat16", "int8/256")),
    ({"embed": torch.float32}, "Adam8bit", ("int8/256",) * 4),
    ({}, "Adam8bit", ("int8/256",) * 4),
    ({}, "Adam", ("float32",) * 4),
)


@pytest.mark.parametrize(("state_dtype", "name", "expected"), PATTERNS, ids=str)
def test_patterns_of_names(state_dtype: dict[str, Any], name: str, expected: tuple[str, ...]) -> None:
    """The first that fits, whatever the order of the parameters; of the others the class decides."""
    for order in (NAMES, NAMES[::-1]):
        named = [(each, torch.nn.Parameter(torch.ones(5000))) for each in order]
        given = dict(state_dtype)
        optimizer = getattr(fused_opt, name)(named, state_dtype=given)
        assert given == state_dtype, "the caller's dict was changed"
        for _, param in named:
            param.grad = torch.ones_like(param)
        assert kinds(optimizer) == list(expected if order is NAMES else expected[::-1])


def test_patterns_hold_for_groups_added_later_and_need_names() -> None:
    first, second, third = (torch.nn.Parameter(torch.ones(5000)) for _ in range(3))
    optimizer = fused_opt.Adam8bit([("a", first)], state_dtype={"b": torch.float32})
    optimizer.add_param_group({"params": [("b", second), ("c", third)]})
    for param in (first, second, third):
        param.grad = torch.ones_like(param)
    assert kinds(optimizer) == ["int8/256", "float32", "int8/256"]
    nameless = fused_opt.Adam8bit([first], state_dtype={"b": torch.float32})
    with nothing_changes(nameless), pytest.raises(ValueError, match=r"goes by names.*named_parameters"):
        nameless.step()


def test_options_that_change_later_are_for_new_states() -> None:
    optimizer = make("Adam", 5000, 6000)
    later = params_of(optimizer)[1]
    grad, later.grad = later.grad, None
    optimizer.step()
    optimizer.param_groups[0].update(block_size=32)
    later.grad = grad
    optimizer.step()
    sizes = [len(optimizer.state[param]["exp_avg_scale"]) for param in params_of(optimizer)]
    assert sizes == [math.ceil(5000 / 256), math.ceil(6000 / 32)]


# --- copies ---


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@every_class
def test_copies_go_on_with_the_same_bits(name: str, copied: Callable[[Optimizer], Optimizer]) -> None:
    shapes = (5003, (70, 80), 100)
    _, grads = make_problem([(5003,), (70, 80), (100,)], 4, torch.float32, seed=1)
    original = make(name, *shapes, block_size=512)
    original.step()
    other = copied(original)
    assert type(other) is type(original)
    for step_grads in grads:
        for optimizer in (original, other):
            step_with(optimizer, step_grads)
        assert_same_state(other, original)
    codes = [optimizer.state[params_of(optimizer)[0]] for optimizer in (original, other)]
    assert all(codes[0][key].data_ptr() != codes[1][key].data_ptr() for key in codes[0])


# --- refusals ---

BAD_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    *(("block_size", bad, "Invalid block_size.*power of two from 32 to 4096") for bad in (0, 16, 48, 8192, -256, 256.0, True, "256")),
    *(("min_8bit_size", bad, "Invalid min_8bit_size.*0 or more.*4096") for bad in (-1, 1.5, True, "0", math.inf)),
    *(("state_dtype", bad, "Invalid state_dtype.*'int8'") for bad in (torch.int8, torch.uint8, "int4", "uint8", 8, ["int8"], True)),
    ("state_dtype", {"*": "int4"}, "Invalid state_dtype: 'int4'"),
    ("state_dtype", {3: "int8"}, "its key 3 is no pattern"),
    ("state_dtype", {"*": {"*": "int8"}}, r"for '\*' it is"),
)


@pytest.mark.parametrize(("option", "bad", "message"), BAD_OPTIONS, ids=[f"{option} {bad!r}" for option, bad, _ in BAD_OPTIONS])
def test_values_of_options(option: str, bad: Any, message: str) -> None:
    """For all, for a group, for a group added later."""
    param, other = (torch.nn.Parameter(torch.ones(5000)) for _ in range(2))
    for params, options in (([param], {option: bad}), ([{"params": [param], option: bad}], {})):
        with pytest.raises(ValueError, match=message):
            fused_opt.AdamW8bit(params, **options)
    optimizer = fused_opt.AdamW8bit([param])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], option: bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", ["block_size", "min_8bit_size"])
def test_options_without_effect(option: str) -> None:
    for options in ({}, {"state_dtype": torch.float32}, {"state_dtype": {"*": torch.bfloat16}}):
        with pytest.raises(ValueError, match=f"{option}=64 has no effect.*state_dtype='int8'"):
            fused_opt.Adam([torch.nn.Parameter(torch.ones(5))], **{option: 64}, **options)


def sparse(param: torch.Tensor) -> None:
    param.grad = param.detach().to_sparse()


def negated(param: torch.Tensor) -> None:
    param.grad = torch._neg_view(torch.ones_like(param))


# Where a parameter cannot have 8-bit states: its dtype, how it is given a gradient, options, error.
IMPOSSIBLE: dict[str, tuple[torch.dtype, Callable[[torch.Tensor], None] | None, dict[str, Any], type[Exception], str]] = {
    "float64": (torch.float64, None, {}, ValueError, "parameter 1 .*torch.float64.*torch.float32, torch.bfloat16, torch.float16.*cast it"),
    "complex": (torch.complex64, None, {}, ValueError, "parameter 1 .*torch.complex64.*cast it"),
    "sparse": (
        torch.float32,
        sparse,
        {},
        RuntimeError,
        "state_dtype=int8 cannot be had for parameter 1.*not a plain strided.*group without",
    ),
    "negated": (torch.float32, negated, {}, RuntimeError, "state_dtype=int8 cannot be had for parameter 1.*lazily negated.*group without"),
    "differentiable": (torch.float32, None, {"differentiable": True}, RuntimeError, "int8 cannot be had.*differentiable"),
    "capturable": (torch.float32, None, {"capturable": True}, RuntimeError, "int8 cannot be had.*capturable"),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in CLASSES for case in IMPOSSIBLE if (name, case) != ("SGD", "capturable")], ids=str
)
def test_parameters_that_cannot_have_them(name: str, case: str, begun: bool) -> None:
    """Found before the first write, behind a parameter and a group that can; whether or not those have states already."""
    dtype, set_grad, options, error, message = IMPOSSIBLE[case]
    optimizer = make(name, 5000)
    if begun:
        optimizer.step()
    params = [torch.nn.Parameter(torch.ones(5000)), torch.nn.Parameter(torch.ones(5000, dtype=dtype))]
    optimizer.add_param_group({"params": params, **options})
    for param in params:
        param.grad = torch.ones_like(param)
    if set_grad is not None:
        set_grad(params[1])
    if options:
        message = message.replace("parameter 1", "parameter 0")
    with nothing_changes(optimizer), pytest.raises(error, match=message):
        optimizer.step()


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it to leave everything to torch until the test ends."""

    def switch() -> None:
        monkeypatch.setenv("FUSED_OPT_BACKEND", "torch")
        native.cache_clear()

    yield switch
    monkeypatch.undo()
    native.cache_clear()


@pytest.mark.parametrize("begun", [False, True])
@every_class
def test_the_torch_backend_has_none(name: str, begun: bool, torch_backend: Callable[[], None]) -> None:
    optimizer = make(name, 5000)
    if begun:
        optimizer.step()
    torch_backend()
    message = "8-bit codes, but torch" if begun else "state_dtype=int8 cannot be had"
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=f"{message}.*FUSED_OPT_BACKEND=torch"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"8-bit codes need the extension.*FUSED_OPT_BACKEND=torch"):
        fused_opt.quantize_blockwise(torch.ones(3))


CODES, SCALES = torch.zeros(5000, dtype=torch.int8), torch.zeros(20)

# Changes to the states of a parameter of 5000 elements in blocks of 256; None: taken out.
DAMAGED: dict[str, tuple[dict[str, torch.Tensor | None], type[Exception], str]] = {
    "codes of fewer elements": ({"exp_avg": CODES[1:]}, RuntimeError, r"'exp_avg' has shape \(4999\).*parameter has shape \(5000\)"),
    "codes of another shape": ({"exp_avg_sq": CODES.view(100, 50).view(torch.uint8)}, RuntimeError, r"'exp_avg_sq' has shape \(100, 50\)"),
    "unsigned codes": ({"exp_avg": CODES.view(torch.uint8)}, RuntimeError, "'exp_avg'.*uint8, but its codes are int8"),
    "signed codes": ({"exp_avg_sq": CODES}, RuntimeError, "'exp_avg_sq'.*int8, but its codes are uint8"),
    "wide codes": ({"exp_avg": CODES.int()}, RuntimeError, "'exp_avg'.*int32"),
    "codes with gaps": ({"exp_avg": torch.zeros(10000, dtype=torch.int8)[::2]}, RuntimeError, "codes of its states are not densely packed"),
    "no codes": ({"exp_avg_sq": None}, KeyError, "no state 'exp_avg_sq'.*delete"),
    "no scales": ({"exp_avg_scale": None}, KeyError, "no state 'exp_avg_scale'.*delete"),
    "fewer scales": ({"exp_avg_sq_scale": SCALES[1:]}, RuntimeError, "'exp_avg_sq' has 5000 codes and 19 scales, which is no block size"),
    "more scales": ({"exp_avg_scale": torch.zeros(21)}, RuntimeError, "'exp_avg' has 5000 codes and 21 scales, which is no block size"),
    "another block size": ({"exp_avg_sq_scale": torch.zeros(40)}, RuntimeError, "5000 codes and 40 scales.*not that of the other states"),
    "scales of another dtype": ({"exp_avg_scale": SCALES.double()}, RuntimeError, "scales of state 'exp_avg' are not a contiguous float32"),
    "scales of two dimensions": ({"exp_avg_scale": SCALES[:, None]}, RuntimeError, "scales of state 'exp_avg' are not.*one dimension"),
    "scales with gaps": ({"exp_avg_scale": torch.zeros(40)[::2]}, RuntimeError, "scales of state 'exp_avg' are not a contiguous"),
    "first moment wide": ({"exp_avg": torch.zeros(5000)}, RuntimeError, "some of its states are 8-bit codes and others are not"),
    "second moment wide": ({"exp_avg_sq": torch.zeros(5000)}, RuntimeError, "some of its states are 8-bit codes and others are not"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_states(damage: str) -> None:
    """Of the last parameter of the last group; nothing of the others has been written."""
    changes, error, message = DAMAGED[damage]
    optimizer = make("Adam", 5000, 5000, amsgrad=False)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(5000)) for _ in range(2)]})
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[params_of(optimizer)[-1]]
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    with nothing_changes(optimizer), pytest.raises(error, match=message):
        optimizer.step()


def test_states_of_another_parameter_order() -> None:
    """Codes whose memory runs in another order than those of the other state."""
    optimizer = make("Adam", (70, 80), amsgrad=False)
    optimizer.step()
    (state,) = optimizer.state.values()
    for key, other in itertools.product(("exp_avg", "exp_avg_sq"), (False, True)):
        kept = state[key]
        state[key] = kept.t().contiguous().t() if other else kept
        if other:
            with nothing_changes(optimizer), pytest.raises(RuntimeError, match="one and the same order"):
                optimizer.step()
        state[key] = kept
    optimizer.step()
