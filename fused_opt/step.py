"""One optimizer step: first read and check everything (`plan`), then write (`Plan.run`)."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch._compile import _disable_dynamo
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.autograd.graph import increment_version
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fused_opt import fallback
from fused_opt.checkpoints import loading, saved
from fused_opt.errors import completed
from fused_opt.native import Native, native
from fused_opt.rules import NON_NEGATIVE, Group, Program, Rule
from fused_opt.states import (
    STORAGE_OPTIONS,
    State,
    asks_for_8bit,
    check_gradient_dtype,
    check_storage_options,
    format_of_new_states,
    new_state,
    scale_name,
)

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT, StateDict

    from fused_opt import _cpu


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
    _default_state_dtype: ClassVar[str | None] = None
    _kept: _Kept
    _last_ran: Ran | None = None  # the newest native call: for tests and reports, to prove which code ran

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            *args: Any,
            state_dtype: torch.dtype | str | Mapping[str, torch.dtype | str | None] | None = None,
            block_size: int | None = None,
            min_8bit_size: int | None = None,
            **options: Any,
        ) -> None: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not {"_torch_class", "_default_state_dtype"}.isdisjoint(cls.__dict__):
            cls.__init__ = _extended(cls._torch_class.__init__, cls._default_state_dtype)  # type: ignore[method-assign]

    def add_param_group(self, param_group: Group) -> None:
        try:
            if isinstance(param_group, dict):
                _complete_storage_options(param_group, self._default_state_dtype)
            super().add_param_group(param_group)
        except (TypeError, ValueError) as error:
            raise completed(error) from None

    def state_dict(self) -> StateDict:
        """As torch's. States in 8-bit codes stay so, each with version, code and block size: see `fused_opt.checkpoints`."""
        handle = self.register_state_dict_post_hook(lambda _, state_dict: saved(state_dict), prepend=True)  # before those of the user
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's. Also reads 8-bit states, those of bitsandbytes and torchao, too, and gives every state the format it is to have.

        That is the one that the group's `state_dtype` (and `block_size`, `min_8bit_size`) ask for: this optimizer's if it was given them,
        otherwise the saved ones. Without `state_dtype` it is the saved format if that is 8-bit or wider than the parameter's dtype, and
        otherwise, as in torch, the parameter's dtype.

        Raises:
            ValueError: the groups do not fit; a state is damaged, or in a format that this version does not know, or cannot be converted.
                Nothing has been changed then.
        """
        with loading(self, self._rule):
            super().load_state_dict(state_dict)

    @_disable_dynamo  # torch.compile breaks its graph here: it cannot trace native code. Costs 1 us a step.
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None without one.

        Raises:
            KeyError: an option that needs a state was switched on after the first step.
            RuntimeError: a state does not fit its parameter; a gradient or parameter is one that torch refuses, too (sparse where that is
                not supported, of a dtype that cannot be mixed, expanded, made in inference mode). Nothing has been changed then.
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
            return _step_with_hooks(self) if closure is None else _step_with_hooks(self, closure)  # hooks see the arguments
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


@dataclass(slots=True)
class _Kept:
    """What a step has allocated and verified, for the next one to use. An attribute of the optimizer that torch leaves out of copies."""

    batches: dict[tuple[int, tuple[str, ...]], _cpu.Batch] = field(default_factory=dict)  # by group index and states
    sharing: _cpu.Sharing | None = None


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(FusedStep._step)


def _extended(torch_init: Callable[..., None], default_state_dtype: str | None) -> Callable[..., None]:
    """Torch's constructor with our options after its own, and with complete error messages."""

    @functools.wraps(torch_init)
    def __init__(self: FusedStep, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        given = {name: kwargs.pop(name) for name in STORAGE_OPTIONS if name in kwargs}
        own = {name: value for name, value in {"state_dtype": default_state_dtype, **given}.items() if value is not None}
        try:
            _complete_storage_options(own, default_state_dtype)
            torch_init(self, *args, **kwargs)
            for group in self.param_groups:
                if not asks_for_8bit({**own, **group}):
                    _refuse_8bit_options(group)
                for name, value in own.items():
                    group.setdefault(name, value)
            if not any(asks_for_8bit(group) for group in self.param_groups):
                _refuse_8bit_options(own)
        except (TypeError, ValueError) as error:
            raise completed(error) from None
        self.defaults.update(own)
        with contextlib.suppress(ValueError, RuntimeError):  # said by the first step
            native()  # now, so that it sees forks from here on (see csrc/parallel.cpp)

    signature = inspect.signature(torch_init)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default_state_dtype if name == "state_dtype" else None)
        for name in STORAGE_OPTIONS
    ]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *options])  # type: ignore[attr-defined]
    return __init__


def _complete_storage_options(options: dict[str, Any], default_state_dtype: str | None) -> None:
    """Check them; a dict of patterns gets what those parameters have that no pattern fits."""
    check_storage_options(options)
    asked = options.get("state_dtype")
    if isinstance(asked, Mapping) and default_state_dtype is not None:
        options["state_dtype"] = {**asked, "*": asked.get("*", default_state_dtype)}


def _refuse_8bit_options(options: dict[str, Any]) -> None:
    for name in ("block_size", "min_8bit_size"):
        if name in options:
            raise ValueError(f"{name}={options[name]} has no effect without 8-bit states; pass state_dtype='int8', or leave it out")


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
    kept: _Kept

    def run(self) -> None:
        """Do it: torch's share, then the native one. What fails, does so before the native part writes, and leaves all as it was."""
        optimizer = self.optimizer
        native_groups = [(group, group.batch) for group in self.groups if group.batch is not None]
        grad_scale: torch.Tensor | None = None
        if "found_inf" in optimizer.__dict__ and native_groups:
            # Set by GradScaler on optimizers made with fused=True, as torch's fused step expects them.
            found_inf, grad_scale = optimizer.__dict__["found_inf"], optimizer.__dict__.get("grad_scale")
            if found_inf is not None and found_inf.item():
                return
        declines = any(group.declined for group in self.groups)
        if declines:
            fallback.check(optimizer, self.groups)
        new_states = [self._new_states(group.group, group.missing) for group, _ in native_groups]  # may run out of memory
        if native_groups and self.kept.sharing is None:
            self.kept.sharing = self.backend.module.Sharing()
        in_order = self.kept.sharing is not None and self.kept.sharing.found([batch for _, batch in native_groups])
        try:
            if not in_order:
                for (group, batch), states in zip(native_groups, new_states, strict=True):
                    self._adopt(group.group["params"], batch, states)
            if declines:
                fallback.step(optimizer, self.groups, grad_scale)
        except BaseException:
            for (group, _), states in zip(native_groups, new_states, strict=True):
                self._forget(group, states)
            raise
        factor = 1.0 if grad_scale is None else 1 / float(grad_scale)
        for (group, batch), states in zip(native_groups, new_states, strict=True):
            if in_order:
                self._run_in_order(group.group, batch, dict(zip(group.missing, states, strict=True)), factor)
            else:
                self._run_batch(batch, _programs(optimizer._rule, group.group, batch) if states else group.programs, factor)
        if grad_scale is not None:  # torch's fused kernels leave unscaled gradients behind, too
            fallback.unscale([param for group in optimizer.param_groups for param in group["params"]], grad_scale)

    def release(self) -> None:
        """Drop every reference to tensors, and keep what was allocated for the next step."""
        kept = self.kept
        kept.batches.clear()  # of groups and states that are no longer
        for index, group in enumerate(self.groups):
            if group.batch is not None:
                group.batch.clear()
                kept.batches[index, group.slots] = group.batch
        self.optimizer._kept = kept

    def _run_in_order(self, group: Group, batch: _cpu.Batch, new_states: dict[int, State], factor: float) -> None:
        """A parameter listed twice, or two that overlap: each must see what the one before it wrote, as in torch's loop."""
        rule, state, params = self.optimizer._rule, self.optimizer.state, group["params"]
        batch.gather(list(params), state)  # groups before this one may have changed it
        indices, stateless = batch.indices, set(batch.missing)
        for i in indices:
            if i in stateless and not rule.zero_states:  # torch decides which buffers are new before the first update
                for slot in rule.slots(group):
                    state[params[i]].pop(slot, None)
            batch.gather([params[i]], state)
            self._adopt([params[i]], batch, [new_states[i]] if batch.missing else [])
            self._run_batch(batch, _programs(rule, group, batch), factor)

    def _run_batch(self, batch: _cpu.Batch, programs: Sequence[Program], factor: float) -> None:
        if factor != 1:
            programs = [(flags, (factor * sign, *scalars)) for flags, (sign, *scalars) in programs]
        increment_version(batch.written)  # for autograd, whose checks do not see our writes
        isa, threads = batch.run(self.optimizer._rule.name, programs, self.backend.isa, torch.get_num_threads())
        if threads:
            self.optimizer._last_ran = Ran(isa, threads)

    def _adopt(self, params: Sequence[torch.Tensor], batch: _cpu.Batch, new_states: Sequence[State]) -> None:
        if new_states:
            for n, (i, states) in enumerate(zip(batch.missing, new_states, strict=True)):
                state = self.optimizer.state[params[i]]
                state.update(states)
                batch.adopt(n, state)

    def _forget(self, group: GroupPlan, new_states: Sequence[State]) -> None:
        """Take new states out again."""
        for i, states in zip(group.missing, new_states, strict=True):
            param = group.group["params"][i]
            if param in self.optimizer.state:
                for slot in states:
                    self.optimizer.state[param].pop(slot, None)
                if not self.optimizer.state[param]:
                    del self.optimizer.state[param]

    def _new_states(self, group: Group, missing: Sequence[int]) -> list[State]:
        return [new_state(self.optimizer._rule, group, i) for i in missing]


def plan(optimizer: FusedStep, assume_grad: bool = False) -> Plan:
    """Read every parameter, gradient and state of `optimizer` and decide who serves it.

    With `assume_grad`, parameters without a gradient are treated as if they had one of their own layout.
    """
    backend = native()
    # Taken out while in use: another thread, or explain(), must not find a batch whose kernels are running.
    kept = optimizer.__dict__.pop("_kept", None) or _Kept()
    groups = [_plan_group(optimizer, backend, kept, i, group, assume_grad) for i, group in enumerate(optimizer.param_groups)]
    if backend.forced:
        for i, group in enumerate(groups):
            for index, reason in group.declined:
                raise RuntimeError(
                    f"FUSED_OPT_BACKEND=cpu, but parameter {index} of group {i} cannot be served: {reason}; "
                    "unset it to let torch's own step serve this parameter"
                )
    return Plan(optimizer, backend, groups, kept)


def _plan_group(optimizer: FusedStep, backend: Native, kept: _Kept, index: int, group: Group, assume_grad: bool) -> GroupPlan:
    params = group["params"]
    reason = _why_not_native(backend, group)
    if reason:
        with_grad = [i for i, p in enumerate(params) if assume_grad or p.grad is not None]
        return GroupPlan(group, (), None, (), (), [(i, reason) for i in with_grad])
    check_storage_options(group)
    rule = optimizer._rule
    slots = rule.slots(group)
    batch: _cpu.Batch = kept.batches.get((index, slots)) or backend.module.Batch(
        [(slot, scale_name(slot), slot in NON_NEGATIVE) for slot in slots], rule.counter, rule.takes_codes(group)
    )
    missing: Sequence[int] = ()
    declined: Sequence[tuple[int, str]] = ()
    if batch.gather(params if type(params) is list else list(params), optimizer.state, assume_grad):
        missing, declined = batch.missing, batch.declined
        if group.get("fused") and batch.complex:
            raise RuntimeError(
                f"`fused=True` requires all the params to be floating point Tensors, but parameter {batch.complex[0]} of group {index} has "
                f"dtype {params[batch.complex[0]].dtype}; leave fused out: without it, too, the step is fused"
            )
        for i in batch.mixed:
            check_gradient_dtype(rule, group, i)
        for i in missing:
            format_of_new_states(rule, group, i)
    try:
        programs = _programs(rule, group, batch)
        if missing:  # compute theirs too, to fail before anything is written
            rule.program(group, 1.0, True)
    except (TypeError, ValueError) as error:
        options = {name: value for name, value in group.items() if name != "params"}
        raise type(error)(f"param group {index} has an option of a value that cannot be used: {error}; its options are {options}") from None
    return GroupPlan(group, slots, None if declined and not batch.indices else batch, missing, programs, declined)


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
