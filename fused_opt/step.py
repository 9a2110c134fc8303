"""One optimizer step: first read and check everything (`plan`), then write (`Plan.run`)."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.autograd.graph import increment_version
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fused_opt.errors import completed
from fused_opt.native import Native, native
from fused_opt.rules import Group, Program, Rule

if TYPE_CHECKING:
    from fused_opt import _cpu


State = dict[str, torch.Tensor]


class Ran(NamedTuple):
    """What a native call ran on."""

    isa: str
    threads: int


class FusedStep(torch.optim.Optimizer):
    """Mixed into a torch optimizer, replaces its step by one native call for each param group.

    Parameters that the native code does not serve are stepped by torch's own code on the same state; `fused_opt.explain` says which,
    and why.
    """

    _rule: ClassVar[Rule]
    _torch_class: ClassVar[type[torch.optim.Optimizer]]
    _last_ran: Ran | None = None  # the newest native call: for tests and reports, to prove which code ran

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_torch_class" in cls.__dict__:
            cls.__init__ = _with_complete_errors(cls._torch_class.__init__)  # type: ignore[method-assign]

    def add_param_group(self, param_group: Group) -> None:
        try:
            super().add_param_group(param_group)
        except (TypeError, ValueError) as error:
            raise completed(error) from None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None without one.

        Raises:
            KeyError: an option that needs a state was switched on after the first step.
            RuntimeError: a state does not fit its parameter. Nothing has been changed then.
        """
        # torch wraps the step of every optimizer class in code that names it to the profiler and calls hooks. That costs as much as the
        # rest of a small step (10 to 25 us of 50), so it is entered only where somebody is listening. A subclass with a step of its own
        # has been wrapped by torch and calls this one from within.
        if type(self).step is FusedStep.step and (
            _profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return _step_with_hooks(self, closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # tells torch not to wrap it

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        the_plan = plan(self)
        the_plan.run()
        the_plan.release()
        return loss


# Of each optimizer, by group index and states: what a step has allocated and verified, for the next one to use. Not an attribute of the
# optimizer, whose copies and pickles must not have it.
_batches: weakref.WeakKeyDictionary[FusedStep, dict[tuple[int, tuple[str, ...]], _cpu.Batch]] = weakref.WeakKeyDictionary()

_step_with_hooks = torch.optim.Optimizer.profile_hook_step(FusedStep._step)
_HOOKS_CODE = _step_with_hooks.__code__


def _with_complete_errors(torch_init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(torch_init)  # keeps the signature for those who inspect it
    def __init__(self: FusedStep, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            torch_init(self, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise completed(error) from None

    return __init__


@dataclass(slots=True)
class GroupPlan:
    """A param group's part of the step: what the native code takes (`batch`), and what it does not."""

    group: Group
    slots: tuple[str, ...]
    batch: _cpu.Batch | None  # None if nothing of this group is native
    missing: Sequence[int]  # of the batch: index in group["params"] of those that have no states yet
    programs: Sequence[Program]  # one for each cohort of the batch
    declined: Sequence[tuple[int, str]]  # index in group["params"], reason


@dataclass(slots=True)
class Plan:
    """Everything that a step will do. Making one writes nothing."""

    optimizer: FusedStep
    backend: Native
    groups: list[GroupPlan]

    def run(self) -> None:
        """Do it: unscale, then torch's share, then the native one."""
        attributes = self.optimizer.__dict__
        native_groups = [(group, group.batch) for group in self.groups if group.batch is not None]
        if "found_inf" in attributes and native_groups:
            # Set by GradScaler on optimizers made with fused=True, as torch's fused step expects them.
            found_inf, grad_scale = attributes["found_inf"], attributes.get("grad_scale")
            if found_inf is not None and found_inf.item():
                return
            if grad_scale is not None:
                _unscale(self.optimizer, grad_scale)
        new_states = [self._new_states(group.group, group.missing) for group, _ in native_groups]  # may run out of memory
        _torch_step(self.optimizer, self.groups)
        for (group, batch), states in zip(native_groups, new_states, strict=True):
            if batch.shares_memory():
                self._run_in_order(group.group, batch)
            else:
                self._run_batch(group.group, batch, group.programs, states)

    def release(self) -> None:
        """Drop every reference to tensors, and keep the batches for the next step."""
        kept = _batches.setdefault(self.optimizer, {})
        kept.clear()  # of groups and states that are no longer
        for index, group in enumerate(self.groups):
            if group.batch is not None:
                group.batch.clear()
                kept[index, group.slots] = group.batch

    def _run_in_order(self, group: Group, batch: _cpu.Batch) -> None:
        """A parameter listed twice, or two that overlap: each must see what the one before it wrote, as in torch's loop."""
        rule, state, params = self.optimizer._rule, self.optimizer.state, group["params"]
        stateless = set(batch.missing)
        for i in batch.indices:
            if i in stateless and not rule.zero_states:  # torch decides which buffers are new before the first update
                for slot in rule.slots(group):
                    state[params[i]].pop(slot, None)
            batch.gather([params[i]], state)
            only = {**group, "params": [params[i]]}
            self._run_batch(only, batch, _programs(rule, group, batch), self._new_states(only, batch.missing))

    def _run_batch(self, group: Group, batch: _cpu.Batch, programs: Sequence[Program], new_states: Sequence[State]) -> None:
        rule = self.optimizer._rule
        if new_states:
            for n, (i, new_state) in enumerate(zip(batch.missing, new_states, strict=True)):
                state = self.optimizer.state[group["params"][i]]
                state.update(new_state)
                batch.adopt(n, state)
            programs = _programs(rule, group, batch)
        self.optimizer._last_ran = Ran(*batch.run(rule.name, programs, self.backend.isa, torch.get_num_threads()))
        increment_version(batch.written)

    def _new_states(self, group: Group, missing: Sequence[int]) -> list[State]:
        return [_new_state(self.optimizer._rule, group, group["params"][i]) for i in missing]


def plan(optimizer: FusedStep, assume_grad: bool = False) -> Plan:
    """Read every parameter, gradient and state of `optimizer` and decide who serves it.

    With `assume_grad`, parameters without a gradient are treated as if they had one of their own layout.
    """
    backend = native()
    groups = [_plan_group(optimizer, backend, i, group, assume_grad) for i, group in enumerate(optimizer.param_groups)]
    if backend.forced:
        for i, group in enumerate(groups):
            for index, reason in group.declined:
                raise RuntimeError(
                    f"FUSED_OPT_BACKEND=cpu, but parameter {index} of group {i} cannot be served: {reason}; "
                    "unset it to let torch's own step serve this parameter"
                )
    return Plan(optimizer, backend, groups)


def _plan_group(optimizer: FusedStep, backend: Native, index: int, group: Group, assume_grad: bool) -> GroupPlan:
    params = group["params"]
    reason = _why_not_native(backend, group)
    if reason:
        with_grad = [i for i, p in enumerate(params) if assume_grad or p.grad is not None]
        return GroupPlan(group, (), None, (), (), [(i, reason) for i in with_grad])
    rule = optimizer._rule
    slots = rule.slots(group)
    # Taken out while in use: another thread, or explain(), must not find a batch whose kernels are running.
    kept = _batches.get(optimizer, {}).pop((index, slots), None)
    batch: _cpu.Batch = kept or backend.module.Batch(slots, rule.counter)
    batch.gather(params if type(params) is list else list(params), optimizer.state, assume_grad)
    missing = batch.missing
    try:
        programs = _programs(rule, group, batch)
        if missing:  # compute theirs too, to fail before anything is written
            rule.program(group, 1.0, True)
    except (TypeError, ValueError) as error:
        options = {name: value for name, value in group.items() if name != "params"}
        raise type(error)(f"param group {index} has an option of a value that cannot be used: {error}; its options are {options}") from None
    return GroupPlan(group, slots, batch, missing, programs, batch.declined)


def _why_not_native(backend: Native, group: Group) -> str:
    if backend.module is None:
        return backend.why
    if group.get("differentiable"):
        return "differentiable=True: autograd must see the update"
    if group.get("capturable"):
        return "capturable=True asks for torch's formula on the device"
    return ""


def _programs(rule: Rule, group: Group, batch: _cpu.Batch) -> list[Program]:
    return [rule.program(group, step + 1, fresh) for step, fresh in batch.cohorts]


def _new_state(rule: Rule, group: Group, param: torch.Tensor) -> State:
    """States as torch's own step creates them for `param`'s first gradient."""
    state = {}
    if rule.counter:
        wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        state[rule.counter] = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
    new = torch.zeros_like if rule.zero_states else torch.empty_like
    for slot in rule.slots(group):
        state[slot] = new(param, memory_format=torch.preserve_format, requires_grad=False)
    return state


@torch.no_grad()
def _unscale(optimizer: FusedStep, grad_scale: torch.Tensor) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                param.grad.div_(grad_scale.to(param.grad.device))


def _torch_step(optimizer: FusedStep, groups: list[GroupPlan]) -> None:
    """Let torch step the parameters that the native code declined."""
    for group in groups:
        if group.declined:
            break
    else:
        return
    step: Any = optimizer._torch_class.step
    while step.__code__ is _HOOKS_CODE:  # hooks and profiling have been entered already, by our own step
        step = step.__wrapped__
    with _only_declined(optimizer, groups):
        step(optimizer)


@contextlib.contextmanager
def _only_declined(optimizer: FusedStep, groups: list[GroupPlan]) -> Iterator[None]:
    """Show the optimizer to torch's step without the parameters that the native code serves."""
    if all(group.batch is None for group in groups):
        yield
        return
    attributes: dict[str, Any] = optimizer.__dict__
    original = optimizer.param_groups
    amp = {name: attributes.pop(name) for name in ("found_inf", "grad_scale") if name in attributes}  # dealt with already
    optimizer.param_groups = [{**g.group, "params": params, **options} for g in groups for params, options in _torch_share(g)]
    try:
        yield
    finally:
        optimizer.param_groups = original
        for name, value in amp.items():
            setattr(optimizer, name, value)


def _torch_share(plan: GroupPlan) -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
    params = [plan.group["params"][index] for index, _ in plan.declined]
    on_cpu = [p for p in params if p.device.type == "cpu"]
    elsewhere = [p for p in params if p.device.type != "cpu"]
    if on_cpu:
        # torch's fused CPU kernels misread strides and lose 16-bit updates (pytorch 191763): the for-loop is the one to trust.
        yield on_cpu, {option: False for option in ("foreach", "fused") if option in plan.group}
    if elsewhere:
        yield elsewhere, {}
