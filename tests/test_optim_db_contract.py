"""What torch's own tests check for every optimizer of its database, beside the numbers: options, errors, checkpoints, hooks, schedulers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import optimizer as torchs_base
from torch.optim.lr_scheduler import ReduceLROnPlateau

import fused_opt
from forloop import ALL_DTYPES, as_real, assert_same_optimizer, assert_same_values, forloop_step, proven_step
from helpers import CLASSES, params_of
from optim_database import CONFIGURATIONS, INFOS, RICHEST, STEP_ERROR, options

SHAPES: tuple[tuple[int, ...], ...] = ((4, 9), (33,), ())

# Arguments beside the database's own: the implementations, and numbers given as tensors.
FLAGS: tuple[dict[str, Any], ...] = (
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": False},
    {"differentiable": True},
    {"capturable": True},
    {"foreach": True, "fused": True},
    {"foreach": True, "differentiable": True},
    {"fused": True, "differentiable": True},
    {"foreach": True, "capturable": True},
    {"lr": torch.tensor(0.01)},
    {"lr": torch.tensor(0.01), "foreach": True},
    {"lr": torch.tensor(0.01), "fused": True},
    {"lr": torch.tensor(0.01), "foreach": True, "capturable": True},
    {"lr": 1},
    {"lr": True},
    {"lr": None},
    {"lr": "0.01"},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
    {"betas": [0.5, 0.9]},
    {"betas": (0, 0.9)},
    {"eps": torch.tensor(1e-6)},
    {"weight_decay": torch.tensor(0.1)},
    {"momentum": 0.5, "nesterov": True, "dampening": 0.5},
    {"no_such_option": 1},
)
# Older versions of torch accept these, too, and then fail in the step.
if hasattr(torchs_base, "_to_scalar"):
    FLAGS += (
        {"lr": torch.tensor([0.01])},
        {"lr": torch.tensor([[0.01]], dtype=torch.float64)},
        {"betas": (torch.tensor([[0.9]]), torch.tensor([0.99]))},
    )


def make(module: Any, name: str, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **arguments: Any) -> torch.optim.Optimizer:
    """On parameters that are the same in each call."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    params = [torch.nn.Parameter(torch.randn(shape, dtype=wide, generator=generator).to(dtype)) for shape in shapes]
    optimizer: torch.optim.Optimizer = getattr(module, name)(params, **copy.deepcopy(arguments))
    return optimizer


def make_pair(name: str, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **arguments: Any) -> tuple[Any, Any]:
    """Ours, and torch's for-loop."""
    return make(fused_opt, name, dtype, shapes, **arguments), make(torch.optim, name, dtype, shapes, foreach=False, **arguments)


def set_grads(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params_of(optimizer):
        wide = torch.complex128 if param.is_complex() else torch.float64
        param.grad = torch.randn(param.shape, dtype=wide, generator=generator).to(param.dtype)


def run(optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    """A step for each seed, by native code if ours, and as ours promises if torch's."""
    for seed in seeds:
        set_grads(optimizer, seed)
        if isinstance(optimizer, fused_opt.step.FusedStep):
            proven_step(optimizer, native=True)
        else:
            forloop_step(optimizer)


def outcome(module: Any, name: str, dtype: torch.dtype, arguments: dict[str, Any]) -> tuple[str, Any]:
    """Where two steps end and with what exception, or with which parameters."""
    try:
        optimizer = make(module, name, dtype, **arguments)
    except Exception as error:
        return "constructor", type(error)
    for step in ("first step", "second step"):
        set_grads(optimizer, 1)
        try:
            optimizer.step()
        except Exception as error:
            return step, type(error)
    return "steps", [p.detach() for p in params_of(optimizer)]


@pytest.mark.filterwarnings("ignore:.*differentiable.*:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_constructs_and_steps_exactly_when_torchs_does(name: str, flags: dict[str, Any], dtype: torch.dtype) -> None:
    """With each of the database's configurations. Both have the same flags, so torch runs the implementation that is asked for."""
    for parameter in (p for p in (CONFIGURATIONS if dtype == torch.float32 else RICHEST) if p.values[0] == name):
        arguments = {**options(*parameter.values, dtype), **flags}
        expected = outcome(torch.optim, name, dtype, arguments)
        actual = outcome(fused_opt, name, dtype, arguments)
        assert actual[0] == expected[0], (arguments, actual, expected)
        if expected[0] != "steps":
            assert actual[1] is expected[1], arguments
        elif dtype != torch.bfloat16:  # whose for-loop and foreach round after each operation, and fused SGD is broken (pytorch 191763)
            for p, q in zip(actual[1], expected[1], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_the_databases_errors(name: str, dtype: torch.dtype) -> None:
    """Same type, and a message that torch's own regular expression finds."""
    errors = INFOS[name].optim_error_inputs_func(device="cpu", dtype=dtype)
    assert len(errors) >= 5
    for error in errors:
        wrong = error.optimizer_error_input
        params = [torch.nn.Parameter(torch.randn(2, 3, dtype=dtype))] if wrong.params is None else wrong.params
        expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        if error.error_on == STEP_ERROR:
            optimizer = getattr(fused_opt, name)(params, **wrong.kwargs)
            with expected(error.error_type, match=error.error_regex):
                optimizer.step()
        else:
            with expected(error.error_type, match=error.error_regex):
                getattr(fused_opt, name)(params, **wrong.kwargs)


# --- checkpoints ---


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ROUTES: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), through_file)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), RICHEST)
def test_checkpoints_both_ways_continue_with_the_bits_of_an_uninterrupted_run(name: str, index: int, dtype: torch.dtype) -> None:
    ours, theirs = make_pair(name, dtype, **options(name, index, dtype))
    for optimizer in (ours, theirs):
        run(optimizer, 1, 2, 3)
    continued = []
    for route in ROUTES:
        for source in (ours, theirs):
            for target in make_pair(name, dtype):  # made with other options: a checkpoint carries its own
                for p, q in zip(params_of(target), params_of(source), strict=True):
                    p.data.copy_(q)
                target.load_state_dict(route(source.state_dict()))
                continued.append(target)
    for optimizer in (ours, theirs, *continued):
        run(optimizer, 4, 5)
    for optimizer in (ours, *continued):
        assert_same_optimizer(optimizer, theirs)


# A complex state cannot belong to a real parameter.
DTYPE_CHANGES = [(saved, dtype) for saved in ALL_DTYPES for dtype in ALL_DTYPES if saved.is_complex == dtype.is_complex]


@pytest.mark.parametrize(("saved_dtype", "dtype"), DTYPE_CHANGES, ids=str)
@pytest.mark.parametrize(("name", "index"), RICHEST)
def test_checkpoints_of_another_dtype(name: str, index: int, saved_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """torch casts states to a real parameter's dtype. So do ours, but for states that were saved wider: they are kept, and used."""
    source = make(torch.optim, name, saved_dtype, foreach=False, **options(name, index))
    run(source, 1, 2)
    ours, theirs = make_pair(name, dtype, **options(name, index))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    wider = saved_dtype.itemsize > dtype.itemsize
    for p, q, saved in zip(*map(params_of, (ours, theirs, source)), strict=True):
        assert list(ours.state[p]) == list(theirs.state[q])
        for key, value in ours.state[p].items():
            if key != "step" and wider:
                assert_same_values(value, source.state[saved][key], key)
                theirs.state[q][key] = value.clone()  # the oracle computes with what it finds
            else:
                assert_same_values(value, theirs.state[q][key], key)
    for optimizer in (ours, theirs):
        run(optimizer, 3, 4)
    assert_same_optimizer(ours, theirs)


@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_checkpoints_of_older_torch_versions(name: str, index: int) -> None:
    """Without the options that they did not know, and with step counters that are plain numbers."""
    pair = make_pair(name, **options(name, index))
    for optimizer in pair:
        run(optimizer, 1, 2)
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for flag in INFOS[name].not_og_supported_flags:
                group.pop(flag, None)
        for state in old["state"].values():
            if "step" in state:
                state["step"] = state["step"].item()
        optimizer.load_state_dict(old)
        run(optimizer, 3)
    assert_same_optimizer(*pair)


@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_with_and_without_parameter_names(name: str) -> None:
    named = getattr(fused_opt, name)([("a", torch.nn.Parameter(torch.ones(3))), ("b", torch.nn.Parameter(torch.ones(2)))])
    plain = make(fused_opt, name, shapes=((3,), (2,)))
    for source, target, names in ((named, plain, ["a", "b"]), (plain, named, ["a", "b"])):
        run(source, 1)
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        run(target, 2)
        assert target.state_dict()["param_groups"][0]["param_names"] == names


@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_state_dict_is_deterministic_and_prints_as_torchs(name: str, index: int) -> None:
    first, second = (make_pair(name, **options(name, index)) for _ in range(2))
    for optimizer in (*first, *second):
        run(optimizer, 1, 2)
    assert_same_optimizer(first[0], second[0])
    ours, theirs = (optimizer.state_dict() for optimizer in first)
    assert [list(ours), list(ours["state"])] == [list(theirs), list(theirs["state"])]
    same = [{key: value for key, value in each["param_groups"][0].items() if key != "foreach"} for each in (ours, theirs)]
    assert list(same[0]) == list(same[1])
    assert same[0] == same[1]
    assert repr(first[0]) == repr(first[1]).replace("foreach: False", "foreach: None")


# --- hooks, groups, schedulers, gradients ---


@pytest.mark.parametrize("name", CLASSES)
def test_every_hook_is_called_as_torch_calls_it(name: str) -> None:
    logs: list[list[str]] = []
    for optimizer in make_pair(name):
        log: list[str] = []
        for hook in (kind for kind in dir(optimizer) if kind.startswith("register_") and kind.endswith("_hook")):
            for prepend in (False, True) if "state_dict" in hook else (None,):
                arguments = {} if prepend is None else {"prepend": prepend}
                getattr(optimizer, hook)(lambda *_, line=f"{hook} {prepend}", log=log: log.append(line), **arguments)
        for seed in (1, 2):
            set_grads(optimizer, seed)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        logs.append(log)
    assert len(set(logs[0])) == 10
    assert logs[0] == logs[1]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_groups_have_their_own_options(name: str, dtype: torch.dtype) -> None:
    pair = make_pair(name, dtype)
    for optimizer in pair:
        first, second, third = params_of(optimizer)
        optimizer.param_groups[0]["params"] = [first]
        optimizer.add_param_group({"params": [second], "lr": 0.03, "maximize": True})
        optimizer.add_param_group({"params": third, "weight_decay": 0.2, **({"momentum": 0.5} if name in ("RMSprop", "SGD") else {})})
        run(optimizer, 1, 2, 3)
    assert_same_optimizer(*pair)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_the_databases_schedulers(name: str, dtype: torch.dtype) -> None:
    for entry in INFOS[name].scheduler_inputs:
        pair = make_pair(name, dtype, shapes=((4, 9),), lr=0.01)
        for optimizer in pair:
            schedulers = [scheduler(optimizer) for scheduler in entry]
            for step in range(6):
                run(optimizer, step)
                for scheduler in schedulers:
                    scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert pair[0].param_groups[0]["lr"] == pair[1].param_groups[0]["lr"]
        assert_same_optimizer(*pair)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), RICHEST)
def test_without_gradients_nothing_happens_and_partial_ones_make_partial_states(name: str, index: int, dtype: torch.dtype) -> None:
    ours, theirs = make_pair(name, dtype, ((3, 2), (0,), (5,), ()), **options(name, index, dtype))
    before = [p.detach().clone() for p in params_of(ours)]
    proven_step(ours)
    assert len(ours.state) == 0
    for p, value in zip(params_of(ours), before, strict=True):
        assert_same_values(p, value)
    for seed, with_grad in ((1, (0, 1)), (2, (1, 2)), (3, ()), (4, (0, 1, 2))):
        for optimizer, step in ((ours, proven_step), (theirs, forloop_step)):
            set_grads(optimizer, seed)
            for i, param in enumerate(params_of(optimizer)):
                param.grad = param.grad if i in with_grad else None
            step(optimizer)
        assert_same_optimizer(ours, theirs)
    assert_same_values(params_of(ours)[3], before[3])
    assert params_of(ours)[3] not in ours.state


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_zero_gradients_move_nothing_without_decay(name: str, dtype: torch.dtype) -> None:
    optimizer = make(fused_opt, name, dtype, weight_decay=0)
    before = [p.detach().clone() for p in params_of(optimizer)]
    for param in params_of(optimizer):
        param.grad = torch.zeros_like(param)
    proven_step(optimizer, native=True)
    for p, value in zip(params_of(optimizer), before, strict=True):
        assert_same_values(p, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in CLASSES if "cpu" in INFOS[name].supports_fused_on])
def test_a_fused_step_after_an_overflow_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """The first one, which would make the states, and a later one."""
    optimizer = make(fused_opt, name, dtype, fused=True, **({"momentum": 0.9} if name == "SGD" else {}))
    for seed in (1, 2):
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
        set_grads(optimizer, seed)
        before = copy.deepcopy(optimizer)
        optimizer.step()
        assert_same_optimizer(optimizer, before)
        optimizer.found_inf = torch.tensor(0.0)
        proven_step(optimizer, native=True)
        assert len(optimizer.state) == len(SHAPES)
        assert any(bool((as_real(p) != as_real(q)).any()) for p, q in zip(params_of(optimizer), params_of(before), strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_sparse_gradients_are_taken_or_refused_as_the_database_says(name: str) -> None:
    info = INFOS[name]
    arguments, schedulers = info.metadata_for_sparse
    ours, theirs = make_pair(name, shapes=((5, 2),), **arguments)
    for optimizer in (ours, theirs):
        running = [scheduler(optimizer) for scheduler in schedulers]
        (param,) = params_of(optimizer)
        before = param.detach().clone()
        for step in range(3):
            indices = torch.tensor([[step, step + 2, step]])  # one of them twice
            param.grad = torch.sparse_coo_tensor(indices, torch.ones(3, 2), (5, 2), check_invariants=True)
            if info.supports_sparse:
                optimizer.step()
                for scheduler in running:
                    scheduler.step()
            else:
                with pytest.raises(RuntimeError, match="sparse"):
                    optimizer.step()
        assert torch.equal(param, before) != info.supports_sparse
    assert_same_optimizer(ours, theirs)
