"""Steps inside of backward: the bits are those of the normal loop, and what cannot work is refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_opt
from fused_opt.backward import StepInBackward, step_in_backward
from fused_opt.bench import backward, end_to_end
from fused_opt.bench.cases import CASES, Case
from fused_opt.bench.char_model import Size
from fused_opt.bench.end_to_end import Task
from fused_opt.bench.measure import Effort
from fused_opt.bench.stage_cases import STAGE_CASES
from helpers import assert_same_bits, assert_same_state, params_of

STEPS = 4
WIDTH = 8


class Net(nn.Module):
    """With a matrix used twice, one that no step uses, and one that is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float32, sparse: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(11, WIDTH, sparse=sparse)
        self.norm = nn.LayerNorm(WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        if not sparse:
            self.head.weight = self.token.weight
        self.unused = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.body(self.norm(self.token(tokens)))) * self.frozen)
        return logits


def make_net(dtype: torch.dtype = torch.float32, sparse: bool = False) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(dtype, sparse)


def loss_of(model: Callable[..., Any], seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(11, (2, 5, 3), generator=generator)
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def groups_of(model: Any) -> list[dict[str, Any]]:
    """Two, of which the second has an option of its own."""
    named = list(model.named_parameters())
    return [{"params": named[1::2]}, {"params": named[::2], "lr": 0.05}]


@dataclass
class Run:
    """A model in training, with a schedule."""

    model: Any
    optimizer: Any
    schedule: Any = None
    handle: StepInBackward | None = None

    def __post_init__(self) -> None:
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)

    def train(self, steps: range = range(STEPS)) -> None:
        for seed in steps:
            self.optimizer.zero_grad()
            loss_of(self.model, seed).backward()
            if self.handle is not None:
                assert all(param.grad is None for param in self.model.parameters())
            self.optimizer.step()
            self.schedule.step()


def make_runs(
    name: str = "AdamW", dtype: torch.dtype = torch.float32, prepare: Callable[[Any], None] = lambda optimizer: None, **options: Any
) -> tuple[Run, Run]:
    """Steps in backward, and the normal loop."""
    ours, normal = (
        Run(model, getattr(fused_opt, name)(groups_of(model), **copy.deepcopy(options))) for model in (make_net(dtype), make_net(dtype))
    )
    for run in (ours, normal):
        prepare(run.optimizer)
    ours.handle = step_in_backward(ours.model, ours.optimizer)
    return ours, normal


def assert_same_run(ours: Run, normal: Run) -> None:
    assert_same_state(ours.optimizer, normal.optimizer)
    assert [group["lr"] for group in ours.optimizer.param_groups] == [group["lr"] for group in normal.optimizer.param_groups]


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


# Bits


def mask(optimizer: Any) -> None:
    optimizer.set_masks({param: torch.arange(param.numel()).view_as(param) % 3 > 0 for param in params_of(optimizer)[::2]})


def anchor(optimizer: Any) -> None:
    optimizer.set_anchors({param: torch.full_like(param, 0.5) for param in params_of(optimizer)[::2]})


@dataclass(frozen=True)
class Kind:
    """What is trained beside the case tables."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    prepare: Callable[[Any], None] = lambda optimizer: None


INT8: dict[str, Any] = {"min_8bit_size": 0, "block_size": 32}
KINDS = (
    *(Kind(name, INT8, dtype) for name in ("Adam8bit", "AdamW8bit", "RMSprop8bit") for dtype in (torch.float32, torch.bfloat16)),
    Kind("SGD8bit", {"momentum": 0.9, **INT8}),
    Kind("AdamW8bit", {**INT8, "state_dtype": {"*.bias": torch.float32, "body.*": torch.bfloat16}}),
    Kind("AdamW8bit", {**INT8, "weights": "stochastic", "rounding_seed": 5}, torch.bfloat16),
    Kind("AdamW8bit", {**INT8, "weights": "split", "average": "ema"}, torch.bfloat16),
    Kind("Adam", {"state_dtype": torch.float32}, torch.bfloat16),
    Kind("AdamW", {"lr": torch.tensor(0.02)}),
    Kind("AdamW", {"fused": True}),
    Kind("SGD", {"momentum": 0.9, "foreach": True}),
    Kind("AdamW", {"weight_decay": 0.1, "l1": 0.01}, prepare=mask),
    Kind("SGD", {"momentum": 0.9, "average": "swa"}, torch.bfloat16, mask),
    Kind("RMSprop", {"anchor_decay": 0.1}, prepare=anchor),
)
ALL_KINDS = (
    *(Kind(case.optimizer, case.options) for case in CASES),
    *(
        Kind(case.optimizer, case.options, dtype)
        for case, dtypes in STAGE_CASES
        if "max_grad_norm" not in case.options
        for dtype in {dtypes[0], dtypes[-1]}
    ),
    *KINDS,
)


# All of them take 6 s: of the case tables every fifth runs always.
MARKED = [pytest.param(kind, marks=() if kind in KINDS or number % 5 == 0 else pytest.mark.slow) for number, kind in enumerate(ALL_KINDS)]


@pytest.mark.parametrize("kind", MARKED, ids=lambda kind: f"{Case(kind.name, kind.options)} {kind.dtype}")
def test_has_the_bits_of_the_normal_loop(kind: Kind) -> None:
    ours, normal = make_runs(kind.name, kind.dtype, kind.prepare, **kind.options)
    for run in (ours, normal):
        run.train()
    assert_same_run(ours, normal)
    assert not torch.equal(ours.model.body.weight, make_net(kind.dtype).body.weight)


@pytest.mark.usefixtures("without_the_extension")
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_by_torch_where_there_is_no_extension(name: str) -> None:
    ours, normal = make_runs(name, weight_decay=0.1)
    for run in (ours, normal):
        run.train()
    assert_same_run(ours, normal)
    assert ours.optimizer._last_ran is None


def test_the_native_code_runs_and_frees_each_gradient_at_once() -> None:
    ours, _ = make_runs()
    left: list[int] = []
    for param in ours.model.parameters():
        if param.requires_grad:  # a hook that runs after ours
            param.register_post_accumulate_grad_hook(lambda _: left.append(sum(p.grad is not None for p in ours.model.parameters())))
    loss_of(ours.model, 0).backward()
    assert left == [0] * 5
    assert ours.optimizer._last_ran is not None
    steps = {float(state["step"]) for state in ours.optimizer.state.values()}
    assert steps == {1.0}  # of the tied matrix, too
    assert len(ours.optimizer.state) == 5


def test_sparse_gradients_are_stepped_by_torch() -> None:
    models = make_net(sparse=True), make_net(sparse=True)
    runs = [Run(model, fused_opt.SGD(model.parameters(), lr=0.1)) for model in models]
    runs[0].handle = step_in_backward(runs[0].model, runs[0].optimizer)
    for run in runs:
        run.train()
    assert_same_run(*runs)


# The loop


def test_accumulation_steps_with_the_sum() -> None:
    ours, normal = make_runs()
    assert ours.handle is not None
    for first in range(0, 9, 3):
        with ours.handle.accumulating():
            for seed in (first, first + 1):
                loss_of(ours.model, seed).backward()
        before = ours.model.body.weight.detach().clone()
        assert ours.model.body.weight.grad is not None
        loss_of(ours.model, first + 2).backward()
        assert not torch.equal(before, ours.model.body.weight)
        for seed in range(first, first + 3):
            loss_of(normal.model, seed).backward()
        normal.optimizer.step()
        normal.optimizer.zero_grad()
    assert_same_run(ours, normal)


def test_step_steps_what_is_left() -> None:
    """What has a gradient from accumulation only, and what got one by hand."""
    ours, normal = make_runs()
    assert ours.handle is not None
    for run in (ours, normal):
        with ours.handle.accumulating():
            run.model.unused(torch.ones(3)).sum().backward()
        loss_of(run.model, 0).backward()
        run.model.body.bias.grad = torch.ones(WIDTH) if run is ours else run.model.body.bias.grad
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.optimizer.state[run.model.unused.weight]["step"] == 1
    assert ours.optimizer.state[ours.model.body.bias]["step"] == 2
    assert_same_bits(ours.model.unused.weight, normal.model.unused.weight)
    assert_same_bits(ours.model.token.weight, normal.model.token.weight)


def test_only_the_parameters_that_were_given() -> None:
    ours, normal = make_runs()
    assert ours.handle is not None
    ours.handle.remove()
    model = ours.model
    with step_in_backward(model.body.named_parameters(), ours.optimizer):
        loss_of(model, 0).backward()
        assert [name for name, param in model.named_parameters() if param.grad is not None] == ["token.weight", "norm.weight", "norm.bias"]
        ours.optimizer.step()
    loss_of(normal.model, 0).backward()
    normal.optimizer.step()
    assert_same_run(ours, normal)


def test_checkpoints_and_copies_in_the_middle() -> None:
    ours, normal = make_runs("AdamW8bit", **INT8)
    for run in (ours, normal):
        run.train()
    saved = io.BytesIO()
    torch.save([ours.model.state_dict(), ours.optimizer.state_dict(), ours.schedule.state_dict()], saved)
    saved.seek(0)
    again, _ = make_runs("AdamW8bit", **INT8)
    for part, content in zip((again.model, again.optimizer, again.schedule), torch.load(saved), strict=True):
        part.load_state_dict(content)
    for run in (ours, again, normal):
        run.train(range(4, 7))
    assert_same_run(ours, normal)
    assert_same_run(again, normal)
    for made in (copy.deepcopy((ours.model, ours.optimizer)), pickle.loads(pickle.dumps((ours.model, ours.optimizer)))):
        model, optimizer = made
        loss_of(model, 0).backward()
        assert model.body.weight.grad is not None  # a copy has no hooks
        optimizer.step()
        assert_same_bits(model.body.weight, stepped_copy(normal).body.weight)


def stepped_copy(run: Run) -> Any:
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    loss_of(model, 0).backward()
    optimizer.step()
    return model


def test_parameters_that_join_later() -> None:
    ours, normal = make_runs()
    assert ours.handle is not None
    for run in (ours, normal):
        run.train()
        run.optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(WIDTH)))], "lr": 0.5})
        run.model.body.register_parameter("extra", params_of(run.optimizer)[-1])
        run.model.body.register_forward_hook(lambda module, _, out: out * module.extra)
        run.model.frozen.requires_grad_()
        run.schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, step_size=2, gamma=0.5)
    loss_of(ours.model, 0).backward()
    joined = [ours.model.body.extra, ours.model.frozen]
    assert [p for p in ours.model.parameters() if p.grad is not None] == [joined[1], joined[0]]
    ours.optimizer.step()
    ours.schedule.step()
    ours.handle.add(joined)
    ours.train(range(1, 4))
    normal.train()
    assert_same_state(ours.optimizer, normal.optimizer)


def test_groups_that_were_moved_and_parameters_that_were_taken_out() -> None:
    ours, normal = make_runs("SGD", lr=0.1)
    for run in (ours, normal):
        run.optimizer.param_groups.reverse()
        taken = run.optimizer.param_groups[1]["params"].pop(1)
        run.optimizer.param_groups[1]["param_names"].pop(1)
        loss_of(run.model, 0).backward()
        run.optimizer.step()
        assert taken.grad is not None
    assert_same_run(ours, normal)


def test_a_closure_steps_in_its_backward() -> None:
    ours, normal = make_runs()

    def closure(run: Run) -> torch.Tensor:
        run.optimizer.zero_grad()
        loss = loss_of(run.model, 0)
        loss.backward()
        return loss

    for run in (ours, normal):
        assert run.optimizer.step(lambda run=run: closure(run)) > 0
    assert_same_run(ours, normal)


def halve(param: torch.Tensor) -> None:
    assert param.grad is not None
    param.grad.mul_(0.5)


def test_hooks_before_ours_change_the_gradient() -> None:
    ours, normal = make_runs()
    assert ours.handle is not None
    ours.handle.remove()
    for run in (ours, normal):
        for param in (run.model.body.weight, run.model.norm.bias):
            param.register_post_accumulate_grad_hook(halve)
    ours.handle = step_in_backward(ours.model, ours.optimizer)
    for run in (ours, normal):
        run.train()
    assert_same_run(ours, normal)


def test_it_ends() -> None:
    ours, normal = make_runs(fused=False)
    assert ours.handle is not None
    with ours.handle as handle:
        ours.train(range(2))
    handle.remove()
    ours.handle = None
    assert "_step_supports_amp_scaling" not in vars(ours.optimizer)
    loss_of(ours.model, 9).backward()
    assert ours.model.body.weight.grad is not None
    ours.train(range(2, 4))
    normal.train()
    assert_same_run(ours, normal)
    with pytest.raises(RuntimeError, match=r"was removed; call .*step_in_backward again"):
        handle.add(ours.model)


def test_nothing_is_kept_alive() -> None:
    ours, _ = make_runs()
    ours.train()
    models = weakref.ref(ours.model), weakref.ref(ours.optimizer)
    del ours
    gc.collect()
    assert [model() for model in models] == [None, None]


def test_the_handle_need_not_be_kept() -> None:
    """The optimizer is: without it nothing steps."""
    model = make_net()
    optimizer = adamw(model)
    step_in_backward(model, optimizer)
    gc.collect()
    before = model.body.weight.detach().clone()
    loss_of(model, 0).backward()
    assert not torch.equal(before, model.body.weight)
    assert model.body.weight.grad is None
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert model.body.weight.grad is not None


# Graphs


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, *self.blocks[: 0 if self.reentrant else 2]):
            x = checkpoint(lambda y, block=block: torch.tanh(block(y)), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments(reentrant: bool) -> None:
    """Which compute their forward again in backward. With shared parameters if that is one backward."""
    model = Checkpointed(reentrant)
    models = model, copy.deepcopy(model)
    runs = [Run(each, fused_opt.AdamW(each.parameters(), lr=0.1)) for each in models]
    runs[0].handle = step_in_backward(models[0], runs[0].optimizer)
    for seed in range(3):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        for run in runs:
            run.optimizer.zero_grad()
            run.model(x).square().sum().backward()
            run.optimizer.step()
    assert_same_run(*runs)


def test_a_graph_that_is_used_again_needs_accumulation() -> None:
    ours, normal = make_runs()
    assert ours.handle is not None
    loss = loss_of(ours.model, 0)
    with ours.handle.accumulating():
        loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = loss_of(normal.model, 0)
    loss.backward(retain_graph=True)
    loss.backward()
    normal.optimizer.step()
    assert_same_run(ours, normal)


@pytest.mark.slow
def test_a_compiled_model() -> None:
    ours, normal = make_runs()
    compiled = torch.compile(ours.model, backend="aot_eager")
    for seed in range(3):
        loss_of(compiled, seed).backward()
        assert all(param.grad is None for param in ours.model.parameters())
        ours.optimizer.step()
        loss_of(normal.model, seed).backward()
        normal.optimizer.step()
        normal.optimizer.zero_grad()
    assert_same_run(ours, normal)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "compiled_autograd"), reason="this torch compiles no backward")
def test_a_compiled_backward() -> None:
    """The hooks are called as they are: the graph breaks there."""
    ours, normal = make_runs()
    with torch._dynamo.config.patch(compiled_autograd=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler looks at gradients of tensors that are no leaves
        backward = torch.compile(lambda seed: loss_of(ours.model, seed).backward(), backend="eager")
        for seed in range(2):
            backward(seed)
            assert all(param.grad is None for param in ours.model.parameters())
            ours.optimizer.step()
            loss_of(normal.model, seed).backward()
            normal.optimizer.step()
            normal.optimizer.zero_grad()
    assert_same_run(ours, normal)


def test_weights_that_are_their_averages_are_not_stepped() -> None:
    ours, _ = make_runs(average="ema")
    ours.train()
    with ours.optimizer.average_weights(), pytest.raises(RuntimeError, match=r"could not be stepped.*leave average_weights\(\) first"):
        loss_of(ours.model, 0).backward()


# What cannot work


def state_of(optimizer: Any) -> list[torch.Tensor]:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*params_of(optimizer), *tensors)]


@contextlib.contextmanager
def nothing_changed(optimizer: Any) -> Iterator[None]:
    before = state_of(optimizer)
    attributes = set(vars(optimizer))
    hooks = dict(optimizer._optimizer_step_pre_hooks)
    yield
    after = state_of(optimizer)
    assert set(vars(optimizer)) <= attributes | {"_captured"}
    assert dict(optimizer._optimizer_step_pre_hooks) == hooks
    for one, other in zip(before, after, strict=True):
        assert_same_bits(one, other)


class OwnStep(fused_opt.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def adamw(model: Any, **options: Any) -> Any:
    return fused_opt.AdamW(list(model.parameters()), **options)


def swapped(model: Any) -> tuple[Any, Any]:
    return adamw(model), model


def listed_twice(model: Any) -> tuple[Any, Any]:
    optimizer = adamw(model)
    optimizer.param_groups[0]["params"].append(model.body.weight)
    return model, optimizer


def again(model: Any) -> tuple[Any, Any]:
    optimizer = adamw(model)
    step_in_backward(model.body, optimizer)
    return model, optimizer


def by_two(model: Any) -> tuple[Any, Any]:
    step_in_backward(model, adamw(model))
    return model, adamw(model)


def clipped_group(model: Any) -> tuple[Any, Any]:
    optimizer = adamw(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "max_grad_norm": 2.0})
    return model, optimizer


def scaled(model: Any) -> tuple[Any, Any]:
    optimizer = adamw(model)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    return model, optimizer


REFUSED: dict[str, tuple[Callable[[Any], tuple[Any, Any]], type[Exception], str]] = {
    "torch's": (
        lambda model: (model, torch.optim.AdamW(model.parameters())),
        TypeError,
        "is a torch.optim.adamw.AdamW.*make it with fused_opt",
    ),
    "swapped": (swapped, TypeError, "second, after the model"),
    "own step": (lambda model: (model, OwnStep(model.parameters())), RuntimeError, "OwnStep has a step.* of its own.*normal loop"),
    "a tensor": (lambda model: (model.body.weight, adamw(model)), TypeError, "a Parameter is neither a model nor a list.*pass model"),
    "a number": (lambda model: ([1.0], adamw(model)), TypeError, "a float is among the parameters.*pass model"),
    "none": (lambda model: ([model.frozen], adamw(model)), ValueError, "no parameter that requires gradients"),
    "another's": (
        lambda model: (model, adamw(model.body)),
        ValueError,
        r"shape \(11, 8\) and dtype torch.float32 is not in the optimizer; pass",
    ),
    "twice": (listed_twice, ValueError, "as parameters 4 of group 0 and 8 of group 0"),
    "again": (again, RuntimeError, "steps in backward already; add"),
    "by two": (by_two, RuntimeError, "parameter 1 of group 0 is stepped in backward already; leave it out, or remove"),
    "norm": (lambda model: (model, adamw(model, max_grad_norm=1.0)), RuntimeError, "group 0 has max_grad_norm=1.0.*use max_grad_value"),
    "norm of a group": (clipped_group, RuntimeError, "group 1 has max_grad_norm=2.0"),
    "differentiable": (lambda model: (model, adamw(model, differentiable=True)), RuntimeError, "differentiable=True.*leave it out"),
    "scaler": (scaled, RuntimeError, "GradScaler's attributes.*bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, error, message = REFUSED[name]
    model = make_net()
    given, optimizer = make(model)
    hooks = {param: dict(param._post_accumulate_grad_hooks or {}) for param in model.parameters()}
    with nothing_changed(optimizer if isinstance(optimizer, torch.optim.Optimizer) else given), pytest.raises(error, match=message):
        step_in_backward(given, optimizer)
    assert {param: dict(param._post_accumulate_grad_hooks or {}) for param in model.parameters()} == hooks


def test_the_same_parameter_is_added_once() -> None:
    model = make_net()
    handle = step_in_backward(model.body, adamw(model))
    with pytest.raises(RuntimeError, match="parameter 4 of group 0 is stepped in backward already"):
        handle.add([model.norm.weight, model.body.weight])
    loss_of(model, 0).backward()
    assert model.norm.weight.grad is not None


def test_distributed_modules_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(2, 2), nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
        with pytest.raises(RuntimeError, match=r"module '1' is a DistributedDataParallel.*average param.grad in a hook"):
            step_in_backward(model, adamw(model))
    finally:
        torch.distributed.destroy_process_group()


def set_norm(optimizer: Any) -> None:
    optimizer.param_groups[1]["max_grad_norm"] = 1.0


def set_scale(optimizer: Any) -> None:
    optimizer.grad_scale = torch.tensor(2.0)


def set_rate(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = "much"


def spoil(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].flatten()[:1]


@pytest.mark.parametrize(
    ("spoils", "message"),
    [
        (set_norm, "group 1 has max_grad_norm=1.0"),
        (set_scale, "GradScaler's attributes"),
        (
            spoil,
            r"parameter \d of group \d \((norm|body).*\) could not be stepped in backward \(alone, as parameter 0 .*\): .*exp_avg",
        ),
        (set_rate, "an option of a value that cannot be used"),
    ],
)
def test_errors_in_backward_leave_the_parameter_as_it_was(spoils: Callable[[Any], None], message: str) -> None:
    ours, _ = make_runs()
    ours.train()
    spoils(ours.optimizer)
    with nothing_changed(ours.optimizer), pytest.raises((RuntimeError, ValueError), match=message):
        loss_of(ours.model, 0).backward()
    assert any(param.grad is not None for param in ours.model.parameters())


def test_an_error_in_the_middle() -> None:
    ours, normal = make_runs()
    for run in (ours, normal):
        run.train()
    ours.optimizer.state[ours.model.norm.weight]["exp_avg"] = torch.zeros(1)
    before = ours.model.norm.weight.detach().clone(), ours.model.token.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"\(norm.weight\) could not be stepped"):
        loss_of(ours.model, 4).backward()
    normal.optimizer.zero_grad()
    loss_of(normal.model, 4).backward()
    normal.optimizer.step()
    assert_same_bits(ours.model.body.weight, normal.model.body.weight)  # complete before
    assert_same_bits(ours.model.norm.weight, before[0])
    assert_same_bits(ours.model.token.weight, before[1])  # not complete
    assert ours.model.body.weight.grad is None
    assert ours.model.norm.weight.grad is not None


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_is_refused_when_it_steps(fused: bool) -> None:
    ours, normal = make_runs(fused=fused)
    assert ours.handle is not None
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2))
    for run, its in ((ours, scaler), (normal, other)):  # with gradients left to the scaler it can work
        with ours.handle.accumulating():
            its.scale(loss_of(run.model, 0)).backward()
        its.step(run.optimizer)
        its.update()
        run.optimizer.zero_grad()
    assert_same_run(ours, normal)
    scaler.scale(loss_of(ours.model, 1)).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with step_in_backward"):
        scaler.step(ours.optimizer)
    ours.optimizer.step()  # goes on without
    ours.train(range(2))


# The measurement


class Inside:
    """A worker that is no process of its own."""

    def __init__(self, threads: int) -> None:
        self.session: dict[str, Any] = {}

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.session, *args)

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *exception: object) -> None:
        self.session.clear()


def test_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    effort = Effort(budget=1, least=2, most=2)
    small = Task("small", Size(width=16, layers=1, heads=2, context=8), vocabulary=128, batch=4, length=8, lead_in=0, effort=effort)
    monkeypatch.setattr(end_to_end, "Worker", Inside)
    monkeypatch.setattr(backward, "TASKS", (small,))
    with torch.random.fork_rng(devices=[]):
        try:
            status = backward.main(["--model", "small", "--threads", "1", "--json", str(tmp_path / "found.json")])
        finally:
            gc.enable()
    assert status == 0
    trained = json.loads((tmp_path / "found.json").read_text())["trained"]
    assert list(trained) == ["AdamW", "AdamW, in backward", "AdamW8bit", "AdamW8bit, in backward"]
    for name in ("AdamW", "AdamW8bit"):
        assert trained[f"{name}, in backward"]["losses"] == trained[name]["losses"]
        assert trained[name]["losses"][1] < trained[name]["losses"][0]
        assert len(trained[name]["seconds"]) == 2
    assert "WRONG" not in capsys.readouterr().out


def test_what_the_measurement_finds_wrong() -> None:
    some = {"failure": "", "seconds": [0.2, 0.2], "optimizer_seconds": [0.1, 0.1], "first_seconds": 1.0}
    trained = {
        "AdamW": {**some, "losses": [5.0, 3.0], "peak_bytes": 500_000_000},
        "AdamW, in backward": {**some, "losses": [5.0, 3.5], "seconds": [0.1, 0.1], "peak_bytes": 400_000_000},
        "AdamW8bit": {"failure": "no [8] bits"},
    }
    record = {"model": "small", "threads": 2, "tokens": 8, "parameters": 1_000_000, "skipped": "", "trained": trained}
    sheet = backward.sheet(record)
    assert [[cell.text for cell in row] for row in sheet.rows] == [
        ["AdamW", "200.0", "", "500", "", "3.0000"],
        ["AdamW, in backward", "100.0", "2.00 (2.00 to 2.00)", "400", "100", "3.5000"],
        ["AdamW8bit", "failed"],
    ]
    assert sheet.notes[:2] == [
        "AdamW8bit failed: no [8] bits.",
        "AdamW, in backward is WRONG: its loss went from 5.0 to 3.5, not to 3.0.",
    ]
    assert backward.sheet({**record, "trained": {}, "skipped": "too little memory"}).notes[0] == "Skipped: too little memory."
