"""Whatever the shapes, strides, dtypes, options and order of events: what torch's for-loop does, and no other byte touched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fused_opt
from exactness import continued, pairs
from forloop import ALL_DTYPES, SHORT_DTYPES, as_real, assert_same_optimizer, assert_same_values, forloop, forloop_step, proven_step
from fused_opt.bench.cases import CASES, Case
from fused_opt.bench.rounding import correctly_rounded, error_of, spacing_at
from fused_opt.bench.ulp import distance
from helpers import params_of
from layouts import SHAPES, Layout, layouts

# The same examples in each run. Derived from hypothesis' own profile: torch's test utilities load one of theirs for the whole process.
PROFILE: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def examples(count: int) -> settings:
    return settings(settings.get_profile("default"), max_examples=count, **PROFILE)


SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -3e38, 1.0)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, special: bool = False) -> torch.Tensor:
    """As gradients have them, from 1e-4 to 1e1; with `special`, every fourth is a zero, infinity, NaN, subnormal or large number."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exponent = torch.empty(shape, dtype=torch.float64).uniform_(-4, 1, generator=generator)
    drawn = torch.randn(shape, dtype=wide, generator=generator) * 10**exponent
    if special:
        parts = as_real(drawn)
        chosen = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), parts.shape, generator=generator)]
        parts.copy_(torch.where(torch.rand(parts.shape, generator=generator) < 0.25, chosen, parts))
    return drawn.to(dtype)


# With beta1 = 0, the vector body and the scalar tail of torch's own lerp differ in the sign of zero, for gradients that are zero.
DEFINED = [case for case in CASES if case.options.get("betas") != (0.0, 0.0)]

# --- what may be given to an optimizer ---


@dataclass(frozen=True)
class Parameter:
    """A parameter and its gradients. Its place is a storage of its own, that of the parameter before it ("tied"), or that one's gaps."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    grad_layout: Layout
    place: str = "own"


@dataclass(frozen=True)
class Event:
    """What happens before a step; the parameters that have no gradient in it; what its values are made from."""

    what: str
    without_grad: frozenset[int]
    seed: int
    special: bool


@dataclass(frozen=True)
class Scenario:
    case: Case
    options: dict[str, Any]
    parameters: tuple[Parameter, ...]
    events: tuple[Event, ...]


@st.composite
def one_parameter(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = ALL_DTYPES) -> Parameter:
    shape = draw(SHAPES)
    return Parameter(shape, draw(st.sampled_from(dtypes)), draw(layouts(len(shape))), draw(layouts(len(shape), expanded=True)))


@st.composite
def several_parameters(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = ALL_DTYPES) -> tuple[Parameter, ...]:
    found = draw(st.lists(one_parameter(dtypes), min_size=1, max_size=3))
    last = found[-1]
    has_gaps = bool(last.layout.gaps) and last.layout.gaps[-1] > 1
    place = draw(st.sampled_from(["own", "tied", "gaps"] if has_gaps else ["own", "tied"]))
    if place != "own":
        found.append(Parameter(last.shape, last.dtype, last.layout, draw(layouts(len(last.shape), expanded=True)), place))
    return tuple(found)


@st.composite
def scenarios(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = ALL_DTYPES) -> Scenario:
    case = draw(st.sampled_from(DEFINED))
    options: dict[str, Any] = draw(st.sampled_from([{}, {}, {"foreach": True}, {"lr": 1}, {"weight_decay": 0.3, "maximize": True}]))
    parameters = draw(several_parameters(dtypes))
    indices = st.frozensets(st.integers(0, len(parameters)))  # one more, for a parameter added later
    event = st.builds(Event, st.sampled_from(["nothing", *HAPPENINGS]), indices, st.integers(0, 2**20), st.booleans())
    return Scenario(case, {**case.options, **options}, parameters, tuple(draw(st.lists(event, min_size=1, max_size=5))))


# --- what may happen to one between steps ---

Optimizer = torch.optim.Optimizer


def halve_lr(optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / 2
    return optimizer


def make_lr_a_tensor(optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]) * 3)
        group["foreach"] = None  # torch refuses both together
    return optimizer


def zero_gradients(optimizer: Optimizer) -> Optimizer:
    for param in params_of(optimizer):
        param.grad = None if param.grad is None else param.grad.clone()  # an expanded one cannot be written to
    optimizer.zero_grad(set_to_none=False)
    return optimizer


def load_own_state(optimizer: Optimizer) -> Optimizer:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def add_group(optimizer: Optimizer) -> Optimizer:
    optimizer.add_param_group({"params": [torch.nn.Parameter(values((3, 5), torch.float64, len(params_of(optimizer))))], "lr": 0.05})
    return optimizer


HAPPENINGS: dict[str, Callable[[Optimizer], Optimizer]] = {
    "lr halved": halve_lr,
    "lr a tensor": make_lr_a_tensor,
    "gradients zeroed": zero_gradients,
    "own state loaded": load_own_state,
    "copied": copy.deepcopy,
    "pickled": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "group added": add_group,
}


# --- it happens to ours and to torch's ---


@dataclass
class World:
    """An optimizer on parameters that lie in storages with other elements before, between and behind them."""

    scenario: Scenario
    make: Callable[..., Optimizer]
    step: Callable[[Optimizer], Any]
    storages: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        made: list[torch.nn.Parameter] = []
        for i, spec in enumerate(self.scenario.parameters):
            if spec.place == "own":
                self.storages.append(values((spec.layout.extent(spec.shape) + 9,), spec.dtype, i))
            shift = 1 if spec.place == "gaps" else 0
            made.append(torch.nn.Parameter(spec.layout.view(self.storages[-1][shift:], spec.shape)))
        self.addresses = [param.data_ptr() for param in made]
        self.originals = made
        self.optimizer = self.make(self.scenario.case.optimizer, made, **self.scenario.options)

    def live(self, event: Event) -> None:
        """Let `event` happen, then step; neither gradients nor addresses of parameters and states may change by it."""
        if event.what in HAPPENINGS:
            self.optimizer = HAPPENINGS[event.what](self.optimizer)
        params, specs = params_of(self.optimizer), self.scenario.parameters
        storages = []
        for i, param in enumerate(params):
            if i in event.without_grad:
                param.grad = param.grad if event.what == "gradients zeroed" else None
                continue
            layout = specs[i].grad_layout if i < len(specs) else Layout((0, 1), (1, 1))
            storages.append(values((layout.extent(param.shape) + 5,), param.dtype, event.seed + i, event.special))
            param.grad = layout.view(storages[-1], param.shape)
        before = [storage.clone() for storage in storages]
        grads = [param.grad for param in params]
        states = [(param, key) for param in params for key in self.optimizer.state.get(param, {})]
        addresses = [self.optimizer.state[param][key].data_ptr() for param, key in states]
        self.step(self.optimizer)
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        for storage, old in zip(storages, before, strict=True):
            assert_same_values(storage, old)
        assert [self.optimizer.state[param][key].data_ptr() for param, key in states] == addresses
        assert [param.data_ptr() for param in self.originals] == self.addresses


def ours_of(name: str, params: Any, **options: Any) -> Optimizer:
    optimizer: Optimizer = getattr(fused_opt, name)(params, **options)
    return optimizer


@examples(150)
@given(scenarios())
def test_any_scenario_ends_as_with_torchs_for_loop(scenario: Scenario) -> None:
    """In bits of parameters, states and everything else in the parameters' storages, of which copied optimizers have left the old ones."""
    ours = World(scenario, ours_of, lambda optimizer: proven_step(optimizer, native=True))
    theirs = World(scenario, forloop, forloop_step)
    for event in scenario.events:
        for world in (ours, theirs):
            world.live(event)
        assert_same_optimizer(ours.optimizer, theirs.optimizer)
        for storage, expected in zip(ours.storages, theirs.storages, strict=True):
            assert_same_values(storage, expected, f"after {event}")


WITH_STATES = [case for case in CASES if case.optimizer != "SGD" or "momentum" in case.options]
STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@examples(60)
@given(st.sampled_from(WITH_STATES), one_parameter(STATE_DTYPES), st.data())
def test_states_of_any_dtype(case: Case, spec: Parameter, data: st.DataObject) -> None:
    """Computed in float64 if the parameter or its states have that, else in float32; each result rounded once, to its own dtype."""
    state_dtype = data.draw(st.sampled_from(STATE_DTYPES), "state_dtype")
    scenario = Scenario(case, case.options, (spec,), ())
    ours = World(scenario, lambda *args, **kwargs: ours_of(*args, **kwargs, state_dtype=state_dtype), lambda o: proven_step(o, native=True))
    theirs = World(scenario, forloop, forloop_step)
    theirs.optimizer.param_groups[0]["state_dtype"] = state_dtype
    for seed in range(4):
        event = Event(data.draw(st.sampled_from(["nothing", "lr halved", "copied", "pickled"]), "event"), frozenset(), seed, special=False)
        for world in (ours, theirs):
            world.live(event)
        for key, (actual, expected) in pairs(ours.optimizer, theirs.optimizer):
            assert actual.dtype == (spec.dtype if key == "param" else state_dtype)
            assert_same_values(actual, expected, key)
        if data.draw(st.booleans(), "own state loaded"):
            load_own_state(ours.optimizer)


@examples(150)
@given(st.sampled_from(CASES), one_parameter(SHORT_DTYPES), st.integers(0, 3))
def test_16_bit_results_are_the_correctly_rounded_ones_or_their_neighbours(case: Case, spec: Parameter, steps_before: int) -> None:
    """Computed in float64 from the same 16-bit numbers. Where equal numbers nearly cancel, fp32 itself is off by more than a quarter of the
    spacing of 16-bit numbers; there the result may be off by that much more than rounding the exact one."""
    world = World(Scenario(case, case.options, (spec,), ()), ours_of, lambda optimizer: proven_step(optimizer, native=True))
    for seed in range(steps_before):
        world.live(Event("nothing", frozenset(), seed, special=False))
    (param,) = params_of(world.optimizer)
    param.grad = values(spec.shape, spec.dtype, 99)
    single, exact = (continued(case.optimizer, case.options, world.optimizer, forloop, wide) for wide in (torch.float32, torch.float64))
    proven_step(world.optimizer, native=True)
    for optimizer in (single, exact):
        forloop_step(optimizer)
    for (key, (actual, expected)), (_, (intermediate, _)) in zip(pairs(world.optimizer, exact), pairs(single, exact), strict=True):
        rounded = correctly_rounded(expected, spec.dtype)
        slack = 2 * error_of(intermediate, expected)
        assert bool((error_of(actual, expected) <= error_of(rounded, expected) + slack).all()), key
        assert bool((distance(actual, rounded) <= 1)[slack <= spacing_at(expected, spec.dtype) / 2].all()), key
