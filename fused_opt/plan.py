"""One optimizer step: first read and check everything (`plan`), then write (`Plan.run`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.graph import increment_version

from fused_opt import clipping, fallback
from fused_opt.device import DeviceStep, GradNorm, Scaler, Share, computes_scalars
from fused_opt.device_norm import DeviceNorm
from fused_opt.native import CPU_KERNELS, DEVICE_KERNELS, NOBODY, Native, gpu_server, interprets, native, triton_problem
from fused_opt.rules import NON_NEGATIVE, Group, Program, Rule
from fused_opt.stages import (
    COMPANIONS,
    OF_GRADIENT,
    SPLIT,
    STOCHASTIC,
    check_parameter,
    check_stage_options,
    counter_of,
    has_stages,
    stage_flags,
    stage_scalars_of,
    stage_states,
)
from fused_opt.states import State, check_gradient_dtype, check_storage_options, format_of_new_states, is_fresh, new_state, scale_name

if TYPE_CHECKING:
    from fused_opt import _cpu
    from fused_opt.step import FusedStep


class Ran(NamedTuple):
    """What a native call ran on."""

    isa: str
    threads: int


class Programs(NamedTuple):
    """What is computed in a step, for each cohort of a batch."""

    rule: Sequence[Program] = ()
    stages: Sequence[Program] = ()  # none if the group has no stages


@dataclass(slots=True)
class Kept:
    """What a step has allocated and verified, for the next one to use. An attribute of the optimizer that torch leaves out of copies."""

    batches: dict[tuple[int, tuple[str, ...]], _cpu.Batch] = field(default_factory=dict)  # by group index and names of states
    sharing: _cpu.Sharing | None = None
    device: DeviceStep | None = None
    norm: DeviceNorm | None = None


@dataclass(slots=True)
class GroupPlan:
    """A param group's part of the step: what the native code takes (`batch`), and what it does not."""

    group: Group
    number: int
    names: tuple[str, ...]  # of states
    batch: _cpu.Batch | None  # None if nothing of this group is native
    missing: Sequence[int]  # of the batch: index in group["params"] of those that have no states yet, or not all
    programs: Programs
    declined: Sequence[tuple[int, str]]  # index in group["params"], reason
    in_tables: bool = False  # whether kernels on a device take some of the batch
    staged: bool = False  # whether the group asks for stages; most do not, and pay nothing for it


@dataclass(slots=True)
class Plan:
    """Everything that a step will do. Making one writes nothing."""

    optimizer: FusedStep
    backend: Native
    groups: list[GroupPlan]
    kept: Kept
    staged: bool  # whether a group is

    def run(self, new_states: Sequence[Sequence[State]] = ()) -> None:
        """Do it: torch's share, then the native one. What fails, does so before the native part writes, and leaves all as it was.

        With `new_states`, for each native group and each of its `missing`, no others are created.
        """
        optimizer = self.optimizer
        native_groups = []
        in_tables = declines = False
        for group in self.groups:  # once: an any() of a generator takes a microsecond
            if group.batch is not None:
                native_groups.append((group, group.batch))
                in_tables |= group.in_tables
            declines |= bool(group.declined)
        if in_tables:
            _check_capture(optimizer)
        scaler = _scaler(optimizer) if native_groups else None
        if scaler is not None and self.host_must_know() and scaler.found_inf.item():
            return
        if declines:
            fallback.check(optimizer, self.groups)
        clip = clipping.measure(self, scaler) if self.staged else clipping.NONE
        if clip.skips:
            return
        factor = clip.factor if scaler is None else clip.factor * self._unscaling(scaler)
        new_states = new_states or [self._new_states(group.group, group.missing) for group, _ in native_groups]  # may run out of memory
        if native_groups and self.kept.sharing is None:
            self.kept.sharing = self.backend.module.Sharing()
        in_order = self.kept.sharing is not None and self.kept.sharing.found([batch for _, batch in native_groups])
        if in_order and scaler is not None and scaler.found_inf.item():
            return
        shares: list[Share] = []
        on_device = unscales = False
        try:
            for (group, batch), states in zip(native_groups, new_states, strict=True):
                self._adopt(group.group, batch, states)
                if not in_order:
                    changed = states or factor != 1
                    programs = self._programs(group, batch, group.in_tables, factor) if changed else group.programs
                    shares.append(Share(group.group, batch, *programs))
            if in_order:  # they have been checked, and are made in their turn
                self._forget(native_groups, new_states)
            else:
                unscales = scaler is not None and _gradients_of_their_own(shares)
                numbers = [group.number for group, _ in native_groups]
                on_device = in_tables and self._prepare(shares, numbers, scaler, unscales, clip.on_device)
            if declines:
                fallback.step(optimizer, self.groups, scaler and scaler.grad_scale, clip.factor)
        except BaseException:
            self._forget(native_groups, new_states)
            raise
        if in_order:
            for (group, _), states in zip(native_groups, new_states, strict=True):
                self._run_in_order(group, dict(zip(group.missing, states, strict=True)), scaler, factor, clip.on_device)
        else:
            self._run(shares, in_tables, on_device)
        if scaler is not None and scaler.grad_scale is not None:  # torch's fused kernels leave unscaled gradients behind, too
            done = {id(share.group["params"][i]) for share in shares for i in share.batch.table_indices} if unscales else set()
            params = [param for group in optimizer.param_groups for param in group["params"] if id(param) not in done]
            fallback.unscale(params, scaler.grad_scale)

    def release(self) -> None:
        """Drop every reference to tensors, and keep what was allocated for the next step."""
        kept = self.kept
        kept.batches.clear()  # of groups and states that are no longer
        for index, group in enumerate(self.groups):
            if group.batch is not None:
                group.batch.clear()
                kept.batches[index, group.names] = group.batch
        self.optimizer._kept = kept

    def host_must_know(self) -> bool:
        """Whether the host has to know that a step is left out, since a scaler found an infinity or the norm is not finite.

        All but kernels on a device can leave out a step only by not being called, counters in the host's memory are counted by it, and a
        buffer whose first value is the gradient has none before.
        """
        for group in self.groups:
            batch = group.batch
            if group.declined:
                return True
            if batch is None or not batch.indices:  # no gradients
                continue
            if batch.in_kernels or (group.missing and not self.optimizer._rule.zero_states):
                return True
            on_cpu = group.group["params"][batch.indices[0]].device.type == "cpu"
            if counter_of(self.optimizer._rule, group.group) and not on_cpu and any(step >= 0 for step, _ in batch.cohorts):
                return True
        return False

    def _prepare(
        self, shares: Sequence[Share], numbers: Sequence[int], scaler: Scaler | None, unscales: bool, norm: GradNorm | None
    ) -> bool:
        """Make kernels on devices ready. Returns whether they compute the scalars and count steps. With `unscales` also the gradients.

        `numbers`: of the shares' groups.
        """
        there = [(share, number) for share, number in zip(shares, numbers, strict=True) if share.batch.in_tables]
        shares = [share for share, _ in there]
        on_device = scaler is not None or norm is not None or any(computes_scalars(share.group, share.batch) for share in shares)
        if self.kept.device is None:
            self.kept.device = DeviceStep(self.optimizer.__dict__.setdefault("_captured", []))
        self.kept.device.prepare(self.optimizer._rule, shares, on_device, scaler, unscales, norm, [number for _, number in there])
        return on_device

    def _unscaling(self, scaler: Scaler) -> float:
        on_host = any(group.batch is not None and group.batch.in_kernels for group in self.groups)
        return 1 / float(scaler.grad_scale) if on_host and scaler.grad_scale is not None else 1.0

    def _programs(self, group: GroupPlan, batch: _cpu.Batch, in_tables: bool, factor: float) -> Programs:
        return _programs(self.optimizer._rule, group.group, group.number, group.staged, batch, in_tables, factor)

    def _run(self, shares: Sequence[Share], in_tables: bool, on_device: bool) -> None:
        if in_tables and self.kept.device is not None:
            self.kept.device.run()
            self.optimizer._last_launched = self.kept.device.ran
        for _, batch, programs, stages in shares:
            increment_version(batch.written)  # for autograd, whose checks do not see our writes
            isa, threads = batch.run(self.optimizer._rule.name, programs, self.backend.isa, torch.get_num_threads(), on_device, stages)
            if threads:
                self.optimizer._last_ran = Ran(isa, threads)

    def _run_in_order(
        self, plan: GroupPlan, new_states: dict[int, State], scaler: Scaler | None, factor: float, norm: GradNorm | None
    ) -> None:
        """A parameter listed twice, or two that overlap: each must see what the one before it wrote, as in torch's loop."""
        rule, state, group, batch = self.optimizer._rule, self.optimizer.state, plan.group, plan.batch
        assert batch is not None
        params = group["params"]
        gpu = gpu_server()
        _gather(batch, list(params), self.optimizer, group, gpu)  # groups before this one may have changed it
        indices, stateless = batch.indices, set(batch.missing)
        for i in indices:
            new = new_states.get(i, {})
            if i in stateless and not rule.zero_states:  # torch decides which buffers are new before the first update
                for slot in rule.slots(group):
                    if slot in new:
                        state[params[i]].pop(slot, None)
            _, in_tables = _gather(batch, [params[i]], self.optimizer, group, gpu, first=i)
            existing = state.get(params[i], {})  # where it was listed before, all but that
            lacking = {name: value for name, value in new.items() if existing.get(name) is None}
            self._adopt({**group, "params": [params[i]]}, batch, [lacking] if batch.missing else [])
            shares = [Share(group, batch, *self._programs(plan, batch, in_tables, factor))]
            on_device = in_tables and self._prepare(shares, [plan.number], scaler, False, norm)
            self._run(shares, in_tables, on_device)

    def _adopt(self, group: Group, batch: _cpu.Batch, new_states: Sequence[State]) -> None:
        if new_states:
            for n, (i, states) in enumerate(zip(batch.missing, new_states, strict=True)):
                state = self.optimizer.state[group["params"][i]]
                fresh = is_fresh(self.optimizer._rule, group, state)
                state.update(states)
                batch.adopt(n, state, fresh)

    def _forget(self, groups: Sequence[tuple[GroupPlan, _cpu.Batch]], new_states: Sequence[Sequence[State]]) -> None:
        """Take new states out again."""
        for (group, _), of_group in zip(groups, new_states, strict=True):
            for i, states in zip(group.missing, of_group, strict=True):
                param = group.group["params"][i]
                if param in self.optimizer.state:
                    for slot in states:
                        self.optimizer.state[param].pop(slot, None)
                    if not self.optimizer.state[param]:
                        del self.optimizer.state[param]

    def _new_states(self, group: Group, missing: Sequence[int]) -> list[State]:
        state: dict[torch.Tensor, Any] = self.optimizer.state
        return [new_state(self.optimizer._rule, group, i, state.get(group["params"][i], {})) for i in missing]


def plan(optimizer: FusedStep, assume_grad: bool = False) -> Plan:
    """Read every parameter, gradient and state of `optimizer` and decide who serves it.

    With `assume_grad`, parameters without a gradient are treated as if they had one of their own layout.
    """
    backend = native()
    # Taken out while in use: another thread, or explain(), must not find a batch whose kernels are running.
    kept = optimizer.__dict__.pop("_kept", None) or Kept()
    gpu = gpu_server()
    groups = [_plan_group(optimizer, backend, gpu, kept, i, group, assume_grad) for i, group in enumerate(optimizer.param_groups)]
    staged = any(group.staged for group in groups)
    if staged:
        clipping.check(optimizer)
    if backend.forced:
        for i, group in enumerate(groups):
            for index, reason in group.declined:
                raise RuntimeError(
                    f"FUSED_OPT_BACKEND={backend.forced}, but parameter {index} of group {i} cannot be served: {reason}; "
                    "unset it to let others, or torch's own step, serve this parameter"
                )
    return Plan(optimizer, backend, groups, kept, staged)


def _plan_group(optimizer: FusedStep, backend: Native, gpu: int, kept: Kept, index: int, group: Group, assume_grad: bool) -> GroupPlan:
    params, number, staged = group["params"], optimizer._place[0] + index, has_stages(group)
    if staged:
        check_stage_options(group)
        fallback.check_differentiable(group, number)
    reason = _why_not_native(backend, group, gpu)
    if reason:
        with_grad = [i for i, p in enumerate(params) if assume_grad or p.grad is not None]
        if staged:
            _check_parameters(group, stage_flags(group), with_grad)
        return GroupPlan(group, number, (), None, (), Programs(), [(i, reason) for i in with_grad], staged=staged)
    check_storage_options(group)
    rule = optimizer._rule
    slots = rule.slots(group)
    counter, names = rule.counter, slots
    stages: tuple[str, ...] = ()
    if staged:
        counter, stages = counter_of(rule, group), stage_states(group)
        names = (*slots, counter, *stages)
    batch: _cpu.Batch = kept.batches.get((index, names)) or backend.module.Batch(
        [(slot, scale_name(slot), slot in NON_NEGATIVE) for slot in slots],
        counter,
        rule.takes_codes(group),
        not rule.counter,
        stages,
        COMPANIONS["split"] in stages,
    )
    missing: Sequence[int] = ()
    declined: Sequence[tuple[int, str]] = ()
    in_list = params if type(params) is list else list(params)
    unusual, in_tables = _gather(batch, in_list, optimizer, group, gpu, assume_grad, optimizer._place[1])
    if staged:
        flags = stage_flags(group)
        _check_parameters(group, flags, batch.indices if flags & (SPLIT | STOCHASTIC) else batch.complex)
        _check_parameters(group, flags, (i for i, _ in batch.declined))
    if unusual:
        missing = batch.missing
        declined = [(i, _explained(reason, group)) for i, reason in batch.declined]
        if group.get("fused") and batch.complex:
            raise RuntimeError(
                f"`fused=True` requires all the params to be floating point Tensors, but parameter {batch.complex[0]} of group {index} has "
                f"dtype {params[batch.complex[0]].dtype}; leave fused out: without it, too, the step is fused"
            )
        for i in batch.mixed:
            check_gradient_dtype(rule, group, i)
        for i in missing:
            if format_of_new_states(rule, group, i) == torch.float64 and i in batch.table_indices:
                raise ValueError(
                    f"state_dtype=torch.float64 cannot be had for parameter {i} of group {index}, which is on {params[i].device}: kernels "
                    "there compute in float32; leave it out, or use float32, bfloat16, float16 or 'int8'"
                )
    try:
        programs = _programs(rule, group, number, staged, batch, in_tables, 1.0)
        if missing and batch.in_kernels:  # compute theirs too, to fail before anything is written
            rule.program(group, 1.0, True)
    except (TypeError, ValueError) as error:
        options = {name: value for name, value in group.items() if name != "params"}
        raise type(error)(f"param group {index} has an option of a value that cannot be used: {error}; its options are {options}") from None
    served = None if declined and not batch.indices else batch
    return GroupPlan(group, number, names, served, missing, programs, declined, in_tables, staged)


def _check_parameters(group: Group, flags: int, indices: Iterable[int]) -> None:
    """Raise ValueError if one of these cannot have what the group asks for."""
    for i in indices:
        if fallback.may_be_stepped(group["params"][i]):
            check_parameter(group, i, flags)


def _gather(
    batch: _cpu.Batch, params: list[torch.Tensor], optimizer: FusedStep, group: Group, gpu: int, assume_grad: bool = False, first: int = 0
) -> tuple[bool, bool]:
    """As Batch.gather, for whoever serves the devices of this process. Also returns whether kernels on a device take some."""
    cpu = _cpu_server(group)
    unusual = batch.gather(params, optimizer.state, assume_grad, cpu, gpu, first)
    if DEVICE_KERNELS not in (cpu, gpu):
        return unusual, False
    if batch.in_tables and triton_problem():
        unusual = batch.gather(params, optimizer.state, assume_grad, cpu, NOBODY, first)
    return unusual, batch.in_tables


def _cpu_server(group: Group) -> int:
    if native().forced == "triton":
        return DEVICE_KERNELS if interprets() else NOBODY
    return NOBODY if group.get("capturable") else CPU_KERNELS


def _why_not_native(backend: Native, group: Group, gpu: int) -> str:
    if backend.module is None:
        return backend.why
    if group.get("differentiable"):
        return "differentiable=True: autograd must see the update"
    if gpu == DEVICE_KERNELS and any(isinstance(beta, torch.Tensor) and beta.device.type != "cpu" for beta in group.get("betas", ())):
        return "a beta is a tensor on a device"
    return ""


def _explained(reason: str, group: Group) -> str:
    """What the native code says, which does not know options and installations."""
    if reason == "the parameter is on the CPU":
        if native().forced == "triton":
            return f"{reason}, where Triton's kernels run by its interpreter only (TRITON_INTERPRET=1)"
        return "capturable=True, which torch does not support for parameters on the CPU"
    known = triton_problem() if native().forced != "cpu" and triton_problem.cache_info().currsize else ""
    if reason == "the parameter is not on the CPU" and known:
        return f"{reason}; {known}"
    return reason


def _programs(rule: Rule, group: Group, number: int, staged: bool, batch: _cpu.Batch, in_tables: bool, factor: float) -> Programs:
    """Where all scalars are computed on a device, those here are none."""
    elsewhere = in_tables and not batch.in_kernels and computes_scalars(group, batch)
    programs = [
        (rule.flags(group, fresh), ()) if elsewhere or step < 0 else rule.program(group, step + 1, fresh, factor)
        for step, fresh in batch.cohorts
    ]
    if not staged:
        return Programs(programs)
    flags = stage_flags(group)
    stages: list[Program] = []
    for i, ((step, _), (rule_flags, scalars)) in enumerate(zip(batch.cohorts, programs, strict=True)):
        stages.append((flags, stage_scalars_of(group, number, step + 1, scalars[0]) if scalars else ()))
        if flags & OF_GRADIENT and scalars:  # the factor is a stage's
            programs[i] = rule_flags, (1.0, *scalars[1:])
    return Programs(programs, stages)


def _check_capture(optimizer: FusedStep) -> None:
    """Raise what torch raises where a CUDA graph is captured of a step that would not work in it, and warn as it does.

    Asking torch takes 10 us, so that is done only where it has something to say.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    if not all("capturable" in group for group in optimizer.param_groups):  # SGD needs nothing from the host but its options
        return
    if not torch.cuda.is_current_stream_capturing() and not any(group["capturable"] for group in optimizer.param_groups):
        return
    name = "_accelerator_graph_capture_health_check"  # before torch 2.12: the other
    getattr(optimizer, name if hasattr(optimizer, name) else "_cuda_graph_capture_health_check")()


def _gradients_of_their_own(shares: Sequence[Share]) -> bool:
    """Whether no gradient is that of two parameters: a kernel would unscale it twice."""
    addresses = [share.group["params"][i].grad.data_ptr() for share in shares for i in share.batch.table_indices]
    return len(set(addresses)) == len(addresses)


def _scaler(optimizer: FusedStep) -> Scaler | None:
    """Set by GradScaler on optimizers made with fused=True, as torch's fused step expects them."""
    found_inf, grad_scale = optimizer.__dict__.get("found_inf"), optimizer.__dict__.get("grad_scale")
    if found_inf is None and grad_scale is None:
        return None
    return Scaler(torch.zeros((), device="cpu") if found_inf is None else found_inf, grad_scale)
