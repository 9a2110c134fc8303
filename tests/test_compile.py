"""torch.compile of the model, of step(), and of functions that call it: the bits of the program that is not compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo import config
from torch._dynamo.utils import counters

import fused_opt
from fused_opt.bench.cases import CASES, Case
from fused_opt.compiled import step_group
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, needs_grad_dtype, ours, params_of
from pairs import ALL_STATES, assert_native, make, set_grads, step_with

# From within torch's compiler, about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

BACKENDS = [pytest.param("eager", marks=pytest.mark.slow), "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
# For long tables: functionalization, which hands the operator copies, is the harder of the two quick ones.
HARDER_BACKENDS = BACKENDS[1:]
STEPS = 4
SHAPES = ((8, 5), (33,), (300,))

# Classes and options with every kind of state: full, 16-bit beside 32-bit, in codes, of codes and full ones in one group.
STATES: tuple[tuple[str, dict[str, Any], torch.dtype], ...] = tuple(
    (name, {**ALL_STATES[name], **options}, dtype)
    for name in CLASSES
    for options, dtype in (
        ({}, torch.float64),
        ({}, torch.bfloat16),
        ({"state_dtype": torch.float32}, torch.bfloat16),
        ({"state_dtype": "int8", "min_8bit_size": 64, "block_size": 64}, torch.float32),
        ({"state_dtype": "int8", "min_8bit_size": 64, "block_size": 64}, torch.bfloat16),
    )
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """How many the compiler has made."""
    return int(counters["stats"].get("unique_graphs", 0))


def compiled_step(optimizer: torch.optim.Optimizer, backend: str = "eager", fullgraph: bool = True) -> Callable[[], Any]:
    return torch.compile(lambda: optimizer.step(), backend=backend, fullgraph=fullgraph)


def train(name: str, compile_step: Callable[[Any], Any], compile_loss: Callable[[Any], Any], schedule: bool) -> list[torch.Tensor]:
    """Losses and final parameters of a short course with a changing lr."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = getattr(fused_opt, name)(model.parameters(), **{"lr": 0.01, **ALL_STATES[name]})
    lr_schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5) if schedule else None

    def mean_square(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    loss_of = compile_loss(mean_square)

    def training_step(x: torch.Tensor) -> torch.Tensor:
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        for param in model.parameters():  # zero_grad() breaks the graph
            param.grad = None
        return loss.detach()

    compiled = compile_step(training_step)
    losses = []
    for _ in range(STEPS):
        losses.append(compiled(torch.randn(4, 8)))
        if lr_schedule:
            lr_schedule.step()
    assert_native(optimizer)
    return [*losses, *(p.detach() for p in model.parameters())]


def as_it_is(function: Any) -> Any:
    return function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_compiled_training_step_with_a_changing_lr(name: str, backend: str) -> None:
    """Model and loss are left as they are, so that no bit may change."""
    expected = train(name, as_it_is, torch.compiler.disable, schedule=True)
    actual = train(name, lambda f: torch.compile(f, backend=backend), torch.compiler.disable, schedule=True)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.skipif(not hasattr(config, "trace_autograd_ops"), reason="this torch cannot compile backward() in one graph")
@pytest.mark.parametrize("backend", BACKENDS[:2])  # inductor's matrix products and sums round otherwise
@pytest.mark.parametrize("name", CLASSES)
def test_a_whole_training_step_is_one_graph(name: str, backend: str) -> None:
    """Forward, backward and step; in all steps the same graph, but for the first of SGD with momentum."""
    expected = train(name, as_it_is, as_it_is, schedule=False)
    with config.patch(trace_autograd_ops=True):
        actual = train(name, lambda f: torch.compile(f, backend=backend, fullgraph=True), as_it_is, schedule=False)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)
    assert graphs() == 1 + (name == "SGD")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_beside_an_optimizer_as_it_is(backend: str) -> None:
    expected = train("AdamW", as_it_is, as_it_is, schedule=False)
    actual = train("AdamW", as_it_is, lambda f: torch.compile(f, backend=backend), schedule=False)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # inductor's matrix products and sums round otherwise


def check_steps(optimizer: torch.optim.Optimizer, expected: torch.optim.Optimizer, grads: Sequence[Any], backend: str) -> list[int]:
    """Compiled steps of one, plain steps of the other: the same bits each time. Returns the number of graphs after each."""
    step, made = compiled_step(optimizer, backend), []
    for step_grads in grads:
        set_grads(optimizer, step_grads)
        step()
        step_with(expected, step_grads)
        assert_same_state(optimizer, expected)
        made.append(graphs())
    return made


def graphs_expected(optimizer: torch.optim.Optimizer) -> list[int]:
    """One for all steps. SGD's first step with momentum has one of its own, as torch's."""
    first_differs = isinstance(optimizer, fused_opt.SGD) and optimizer.param_groups[0]["momentum"] != 0
    return [1, *[1 + first_differs] * (STEPS - 1)]


@pytest.mark.parametrize("backend", HARDER_BACKENDS)
@pytest.mark.parametrize("case", [c if len(c.options) == 3 else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=str)
def test_every_case_is_one_graph(case: Case, backend: str) -> None:
    values, grads = make_problem(SHAPES, STEPS, torch.float32)
    (_, optimizer), (_, expected) = (ours(case, values) for _ in range(2))
    assert check_steps(optimizer, expected, grads, backend) == graphs_expected(optimizer)


@pytest.mark.parametrize("backend", HARDER_BACKENDS)
@pytest.mark.parametrize(("name", "options", "dtype"), STATES, ids=str)
def test_states_of_every_format_are_one_graph(name: str, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    values, grads = make_problem(SHAPES, STEPS, dtype)
    (_, optimizer), (_, expected) = (ours(Case(name, options), values) for _ in range(2))
    assert check_steps(optimizer, expected, grads, backend) == graphs_expected(optimizer)


@pytest.mark.parametrize("name", CLASSES)
def test_groups_of_different_options_and_names(name: str) -> None:
    values, grads = make_problem(SHAPES, STEPS, torch.float32)
    optimizers = []
    for _ in range(2):
        a, b, c = (torch.nn.Parameter(v.clone()) for v in values)
        groups = [{"params": [("a", a), ("embed", c)]}, {"params": [("b", b)], "lr": 0.5, "weight_decay": 0.1}]
        if torch.__version__.startswith("2.6"):  # names in groups came with 2.7
            groups = [{"params": [a, c]}, {"params": [b], "lr": 0.5, "weight_decay": 0.1}]
            formats: Any = torch.bfloat16
        else:
            formats = {"embed": "int8", "*": torch.bfloat16}
        optimizers.append(getattr(fused_opt, name)(groups, **ALL_STATES[name], state_dtype=formats))
    optimizer, expected = optimizers
    in_order = [[a, c, b] for a, b, c in grads]
    assert check_steps(optimizer, expected, in_order, "aot_eager") == graphs_expected(optimizer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("name", CLASSES)
def test_a_changing_lr_needs_no_more_graphs(name: str, kind: Any, backend: str) -> None:
    """A tensor never; a number once, from when on it is an input of the graph."""
    values, grads = make_problem(SHAPES, 12, torch.float32)
    optimizer, expected = (make(fused_opt, name, values, lr=kind(0.1)) for _ in range(2))
    step = compiled_step(optimizer, backend)
    for step_grads in grads:
        set_grads(optimizer, step_grads)
        step()
        step_with(expected, step_grads)
        assert_same_state(optimizer, expected)
        for each in (optimizer, expected):
            each.param_groups[0]["lr"] = each.param_groups[0]["lr"] * 0.7
    assert graphs() == 1 + (kind is float or name == "SGD")


def test_a_gradient_that_comes_and_goes() -> None:
    values, grads = make_problem(SHAPES, 6, torch.float32)
    optimizer, expected = (make(fused_opt, "AdamW", values) for _ in range(2))
    given = [[g if number in (2, 3) or i != 1 else None for i, g in enumerate(step_grads)] for number, step_grads in enumerate(grads)]
    made = check_steps(optimizer, expected, given, "eager")
    assert made[:2] == [1, 1], "and then one for each that has not been seen, at most"
    assert made[-1] <= 3


def test_loaded_and_cleared_states_and_plain_steps_between() -> None:
    values, grads = make_problem(SHAPES, 6, torch.float32)
    optimizer, expected = (make(fused_opt, "AdamW", values) for _ in range(2))
    step = compiled_step(optimizer)
    for number, step_grads in enumerate(grads):
        for each in (optimizer, expected):
            if number == 3:
                each.load_state_dict(copy.deepcopy(each.state_dict()))
            elif number == 4:
                each.state.clear()
        set_grads(optimizer, step_grads)
        (optimizer.step if number == 1 else step)()
        step_with(expected, step_grads)
        assert_same_state(optimizer, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_steps_in_one_graph(backend: str) -> None:
    values, grads = make_problem(SHAPES, 1, torch.float32)
    optimizer, expected = (make(fused_opt, "SGD", values) for _ in range(2))

    def two(each: torch.optim.Optimizer) -> None:
        each.step()
        each.step()

    for each in (optimizer, expected):
        set_grads(each, grads[0])
    torch.compile(two, backend=backend, fullgraph=True)(optimizer)
    two(expected)
    assert_same_state(optimizer, expected)


def test_hooks_are_called() -> None:
    values, grads = make_problem(SHAPES, 1, torch.float32)
    optimizer = make(fused_opt, "AdamW", values)
    calls = {"before": 0, "after": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    optimizer.register_step_pre_hook(count("before"))
    optimizer.register_step_post_hook(count("after"))
    set_grads(optimizer, grads[0])
    step = compiled_step(optimizer)
    step()
    step()
    assert calls == {"before": 2, "after": 2}


def test_states_stay_where_they_are() -> None:
    """inductor and functionalization copy what an operator writes, or may; optimizer.state must see it all the same."""
    values, grads = make_problem(SHAPES, 1, torch.float32)
    optimizer = make(fused_opt, "AdamW", values)
    set_grads(optimizer, grads[0])
    step = compiled_step(optimizer, "aot_eager")
    step()
    tensors = [t for p in params_of(optimizer) for t in (p, *optimizer.state[p].values())]
    addresses, versions = [t.data_ptr() for t in tensors], [t._version for t in tensors]
    step()
    assert [t.data_ptr() for t in tensors] == addresses
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True)), "autograd must see the writes"


Change = Callable[[torch.optim.Optimizer], None]


def _complex(optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]})
    params_of(optimizer)[-1].grad = torch.full((3,), 1 + 2j)


def _views_of_one_buffer(optimizer: torch.optim.Optimizer) -> None:
    buffer = torch.linspace(-1, 1, 9)
    for part in (buffer[:4], buffer[4:]):
        optimizer.add_param_group({"params": [torch.nn.Parameter(part)]})
        params_of(optimizer)[-1].grad = torch.ones_like(part)


def _other_dtype(optimizer: torch.optim.Optimizer) -> None:
    param: Any = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad_dtype = None
    optimizer.add_param_group({"params": [param], "state_dtype": torch.float32})
    param.grad = torch.full((3,), 0.3)


def _scaled(optimizer: Any) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)


def _skipped(optimizer: Any) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)


def _differentiable(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["differentiable"] = True


@pytest.mark.parametrize(
    "change",
    [_complex, _views_of_one_buffer, pytest.param(_other_dtype, marks=needs_grad_dtype), _scaled, _skipped, _differentiable],
)
@pytest.mark.parametrize("late", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_the_operator_does_not_take_breaks_the_graph(change: Change, late: bool) -> None:
    """And has the bits of a step that is not compiled, also where steps before it were compiled."""
    values, grads = make_problem(SHAPES, 3, torch.float32)
    optimizer, expected = (make(fused_opt, "AdamW", values) for _ in range(2))
    step = compiled_step(optimizer, fullgraph=False)
    for number, step_grads in enumerate(grads):
        for each in (optimizer, expected):
            if number == int(late):
                change(each)
            for param, grad in zip(params_of(each), step_grads, strict=False):
                param.grad = grad.clone()
        step()
        expected.step()
        assert_same_state(optimizer, expected)


@pytest.mark.parametrize(
    ("error", "spoil"),
    [
        (KeyError, lambda o: o.param_groups[0].update(amsgrad=True)),
        (RuntimeError, lambda o: o.state[params_of(o)[0]].update(exp_avg=torch.zeros(2))),
        (ValueError, lambda o: (o.state.clear(), o.param_groups[0].update(state_dtype=torch.int64))),
    ],
)
def test_errors_are_those_of_a_plain_step(error: type[Exception], spoil: Change) -> None:
    values, grads = make_problem(SHAPES, 1, torch.float32)
    optimizer = make(fused_opt, "AdamW", values)
    set_grads(optimizer, grads[0])
    step = compiled_step(optimizer, fullgraph=False)
    step()
    spoil(optimizer)
    with pytest.raises(error) as compiled:
        step()
    with pytest.raises(error) as plain:
        optimizer.step()
    assert str(compiled.value) == str(plain.value)


class Calls(torch.fx.Interpreter):
    """Runs a graph and keeps what step_group is given."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.given: list[tuple[Any, Any]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "fused_opt" in str(target):
            self.given.append((args, kwargs))
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize(("name", "options"), [("AdamW", {"state_dtype": "int8", "min_8bit_size": 64}), ("SGD", {"momentum": 0.9})])
def test_the_operator_is_what_it_says(name: str, options: dict[str, Any]) -> None:
    """Its schema names all that it writes, and it may be traced."""
    values, grads = make_problem(SHAPES, 1, torch.float32)
    _, optimizer = ours(Case(name, options), values)
    set_grads(optimizer, grads[0])
    made: list[Calls] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(Calls(graph))
        return made[-1].run

    torch.compile(lambda: optimizer.step(), backend=backend, fullgraph=True)()
    ((args, kwargs),) = made[0].given
    assert set(torch.library.opcheck(step_group, args, kwargs).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_compiled_step_alone(name: str, backend: str) -> None:
    """torch.compile(optimizer.step), with lr a number and then a tensor, and then a parameter without gradient."""
    values, grads = make_problem([(8, 5), (33,)], STEPS, torch.float32)
    optimizer, expected = (make(fused_opt, name, values) for _ in range(2))
    step = torch.compile(optimizer.step, backend=backend, fullgraph=True)
    for number, step_grads in enumerate(grads):
        given = [None, *step_grads[1:]] if number == 3 else step_grads
        for each in (optimizer, expected):
            if number == 2:
                each.param_groups[0]["lr"] = torch.tensor(0.02, dtype=torch.float64)
        set_grads(optimizer, given)
        step()
        step_with(expected, given)
    for p, q in zip(params_of(optimizer), params_of(expected), strict=True):
        assert_same_bits(p, q)


def test_a_step_with_closure_in_a_compiled_function() -> None:
    results = []
    for compiler in (as_it_is, lambda f: torch.compile(f, backend="eager")):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 9))
        optimizer = fused_opt.SGD([param], lr=0.1, momentum=0.9)

        def run(param: torch.nn.Parameter = param, optimizer: torch.optim.Optimizer = optimizer) -> Any:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = (param**2).sum()
                loss.backward()
                return loss

            return optimizer.step(closure)

        compiled = compiler(run)
        results.append((*(compiled().detach() for _ in range(3)), param.detach()))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
