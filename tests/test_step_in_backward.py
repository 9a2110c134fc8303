"""Steps inside of backward have the bits of the normal loop."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from backward_runs import WIDTH, Run, adamw, assert_same_run, loss_of, make_net, make_runs
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_opt
from fused_opt.backward import step_in_backward
from fused_opt.bench.cases import CASES, Case
from fused_opt.bench.stage_cases import STAGE_CASES
from helpers import assert_same_bits, assert_same_state, params_of


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


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
        for dtype in dict.fromkeys((dtypes[0], dtypes[-1]))
    ),
    *KINDS,
)


# All of them take 6 s: of the case tables every fifth runs always.
MARKED = [pytest.param(kind, marks=() if kind in KINDS or number % 12 == 0 else pytest.mark.slow) for number, kind in enumerate(ALL_KINDS)]


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
