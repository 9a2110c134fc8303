"""step() under torch.compile: one custom operator for each param group, which the compiler calls and does not look into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo

from fused_opt.plan import plan
from fused_opt.stages import STAGE_OPTIONS
from fused_opt.states import Format, State, format_of_new_states, is_codes, new_slot, new_state, scale_name

if TYPE_CHECKING:
    from fused_opt.rules import Group, Rule
    from fused_opt.step import FusedStep


def step(optimizer: FusedStep) -> None:
    """What the compiler traces in place of a step. Where that cannot be, it breaks its graph here."""
    rule = optimizer._rule
    fresh_formats = None
    if not hasattr(optimizer, "found_inf") and optimizer._traceable() and not _asks_for_stages(optimizer.param_groups):
        groups = optimizer.param_groups
        with_grad = [[i for i, param in enumerate(group["params"]) if param.grad is not None] for group in groups]
        fresh_formats = optimizer._prepare(with_grad)
    if fresh_formats is None:
        optimizer._run()
        return
    for group, indices, formats in zip(groups, with_grad, fresh_formats, strict=True):
        if not indices:
            continue
        params = [group["params"][i] for i in indices]
        states: list[torch.Tensor] = []
        fresh: list[int] = []
        for n, (param, made) in enumerate(zip(params, formats, strict=True)):
            state = optimizer.state[param] if rule.counter or rule.slots(group) else {}
            if made is not None and state.get(rule.slots(group)[0]) is None:  # not by an earlier step of this graph
                fresh.append(n)
                for slot in rule.slots(group):
                    state.update(new_slot(slot, param, made, zeros=False))
            states.extend(state[name] for name in _names(rule, group, state))
        lr = group["lr"]
        with torch.no_grad():
            if not isinstance(lr, torch.Tensor):  # as a product it may change; an operator's float is a constant of the graph
                device = states[0].device if rule.counter else params[0].device  # that of the step's scalars
                lr = torch.ones((), dtype=torch.float64, device=device) * lr
            numbers = [float(number) for number in _numbers(rule, group)]
            step_group(params, [param.grad for param in params], states, lr, numbers, fresh, optimizer._torch_class.__name__)


def _asks_for_stages(groups: Sequence[Group]) -> bool:
    """Whether a group may ask for what the operator does not know. Traced, key by key: so the compiler sees if that changes later."""
    for group in groups:
        for name in STAGE_OPTIONS:
            if group.get(name) is not None:  # 0 is a limit, too
                return True
        if "betas" not in group and group.get("decoupled_weight_decay"):
            return True
    return False


@_disable_dynamo
def traceable(optimizer: FusedStep) -> bool:
    """Called while the compiler traces, before it reads a parameter: where a gradient has another dtype, it fails (torch 2.13, 2.14)."""
    return all(param.grad is None or param.grad.dtype == param.dtype for group in optimizer.param_groups for param in group["params"])


@_disable_dynamo
def prepare(optimizer: FusedStep, with_grad: Sequence[Sequence[int]]) -> list[list[Format | None]] | None:
    """Called while the compiler traces. Creates missing states, so that the graph of the first step serves the later ones, too.

    Not those that the first step must not read: their graph creates them, as in torch, and the next step has another one.

    Args:
        with_grad: for each group, indices of the parameters that have a gradient in the graph.

    Returns:
        The formats of states that the graph is to create, for each parameter of each group; or None if this step cannot be compiled.
    """
    rule = optimizer._rule
    formats: list[list[Format | None]] = []
    new_states: list[tuple[torch.Tensor, State]] = []
    written: list[torch.Tensor] = []
    grads: list[torch.Tensor] = []
    try:
        the_plan = plan(optimizer, assume_grad=True)
        # inductor cannot compile an operator with complex tensors (torch 2.6 to 2.14)
        refused = [{*(i for i, _ in part.declined), *(part.batch.complex if part.batch else ())} for part in the_plan.groups]
        the_plan.release()
        for part, indices, not_these in zip(the_plan.groups, with_grad, refused, strict=True):
            params = part.group["params"]
            if not not_these.isdisjoint(indices) or any(isinstance(number, torch.Tensor) for number in _numbers(rule, part.group)):
                return None
            missing = set(part.missing).intersection(indices)
            if rule.zero_states:
                new_states += [(params[i], new_state(rule, part.group, i)) for i in sorted(missing)]
                missing.clear()
            formats.append([format_of_new_states(rule, part.group, i) if i in missing else None for i in indices])
            for param in (params[i] for i in indices):
                written += [param, *(value for value in optimizer.state.get(param, {}).values() if isinstance(value, torch.Tensor))]
                grads += [] if param.grad is None else [param.grad]
    except Exception:  # the step that is not compiled will raise it
        return None
    if not _apart(written, grads):
        return None
    for param, states in new_states:
        optimizer.state[param].update(states)
    return formats


def _apart(written: list[torch.Tensor], read: list[torch.Tensor]) -> bool:
    """Whether each of `written` has a storage to itself. If not, inductor can give wrong results (torch 2.6 to 2.14)."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in written if tensor.numel() > 0]
    return len(set(storages)) == len(storages) and set(storages).isdisjoint(tensor.untyped_storage().data_ptr() for tensor in read)


_captured: list[Any] = []  # what CUDA graphs refer to, as an optimizer's own: the operator's are gone after each step


# It keeps tables of its own, which a graph tree would not know. (torch 2.6 knows no tags.)
_TAGS: dict[str, Any] = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op(
    "fused_opt::step",
    mutates_args=("params", "states"),
    **_TAGS,
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor lr, float[] numbers, int[] fresh, str kind) -> ()",
)
def step_group(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    lr: torch.Tensor,
    numbers: Sequence[float],
    fresh: Sequence[int],
    kind: str,
) -> None:
    """Step an optimizer made of these tensors: they may be copies of those that were there when the compiler traced.

    Args:
        params: those of a group that have a gradient.
        grads: their gradients.
        states: of each parameter in turn, as `_names` has them.
        lr: of the group.
        numbers: betas, if the group has any, and what `Rule.options` names.
        fresh: indices in `params` of those whose states are written without being read.
        kind: the optimizer's class.
    """
    from fused_opt import optimizers

    optimizer: FusedStep = object.__new__(getattr(optimizers, kind))
    rule, remaining, count = optimizer._rule, iter(states), len(optimizer._rule.options)
    group: Group = {"params": [param.detach() for param in params], "lr": lr, "betas": tuple(numbers[:-count])}
    group.update(zip(rule.options, numbers[-count:], strict=True))
    optimizer.param_groups, optimizer.state = [group], defaultdict(dict)
    optimizer.__dict__["_captured"] = _captured
    made: list[State] = []
    for n, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
        param.grad = grad
        state: State = {}
        for name in _names(rule, group, state):
            state[name] = next(remaining)
        if n in fresh:
            made.append(state)
        elif state:
            optimizer.state[param] = state
    the_plan = plan(optimizer)
    for n, reason in the_plan.groups[0].declined:
        raise RuntimeError(f"parameter {n} of a compiled step cannot be served: {reason}; compile again")
    the_plan.run([made])


@step_group.register_fake
def _(*args: object) -> None:
    pass


def _numbers(rule: Rule, group: Group) -> list[Any]:
    return [*group.get("betas", ()), *(group.get(option, 0) for option in rule.options)]


def _names(rule: Rule, group: Group, state: State) -> Iterator[str]:
    """The keys of a parameter's states in the operator's order. The next one is asked for when those before it are in `state`."""
    if rule.counter:
        yield rule.counter
    for slot in rule.slots(group):
        yield slot
        if is_codes(state[slot]):
            yield scale_name(slot)
