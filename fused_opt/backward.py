"""Steps inside of backward: each parameter is updated as soon as its gradient is complete, and the gradient is freed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo

from fused_opt.step import FusedStep

if TYPE_CHECKING:
    from types import TracebackType

    from torch.utils.hooks import RemovableHandle

    from fused_opt.plan import Kept

    ModelOrParams = torch.nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]]

# Modules that add up the gradients of all processes after a parameter's hooks have run. By name, so that nothing has to be imported.
_REDUCING_LATER = ("DistributedDataParallel", "FullyShardedDataParallel")

# What GradScaler sets for the duration of a step, and what makes it call step() in any case.
_SCALED = ("found_inf", "grad_scale")
_CALL_STEP = "_step_supports_amp_scaling"

_PASS = "pass model, model.parameters() or model.named_parameters() first, and then the optimizer"


def step_in_backward(model_or_params: ModelOrParams, optimizer: torch.optim.Optimizer) -> StepInBackward:
    """From now on `loss.backward()` steps each parameter as soon as its gradient is complete, and frees the gradient (`param.grad = None`).

    The gradients of a model then never exist all at once, which saves up to 4 bytes a parameter in fp32 (but see below); results have the
    bits of a step after backward. After Lv et al., 2023, https://arxiv.org/abs/2306.09782 (LOMO), for all optimizers here.

        handle = fused_opt.step_in_backward(model, optimizer)
        for x, y in batches:                    # the loop stays as it is
            optimizer.zero_grad()               # there is nothing left for it to do
            loss(model(x), y).backward()        # steps
            optimizer.step()                    # steps what still has a gradient, and counts for the scheduler
            scheduler.step()

    `optimizer.step()` steps every parameter that has a gradient left: those that were not given here, those whose gradient did not come
    from backward, and those that got one only while accumulating. Options are read from `param_groups` at each step, so that schedules act;
    `state_dict`, `load_state_dict` and copies of the optimizer are what they were. Parameters that join later, by `add_param_group` or
    `requires_grad_()`, are stepped by `optimizer.step()` until `handle.add(params)`. Each backward() is a step, unless
    `handle.accumulating()` says otherwise. With `optimizer.step(closure)` the backward() in the closure steps.

    Gradients are None afterwards, as after `zero_grad()`, also where the loop calls `zero_grad(set_to_none=False)`. What runs between
    backward and step sees none: `clip_grad_norm_`, logging of `param.grad`, hooks of `register_step_pre_hook` and
    `register_step_post_hook` (which run in `optimizer.step()` as always). Hooks of `register_post_accumulate_grad_hook` run in the order in
    which they were registered: those before this call may change the gradient that is stepped with, those after it see none. A graph that
    is used again (`retain_graph=True`) fails with torch's error about modified variables, unless it is accumulating. Parameters shared by
    several checkpointed segments need `use_reentrant=False`: with True each segment has a backward of its own, and each would step.
    After torch.compile of a model, a graph's gradients come all at once: what is freed early is those of one graph.

    A parameter's step costs as much as that of an optimizer with one parameter, 40 us or with cold caches 0.3 ms: it is for models whose
    gradients count. On a CPU glibc keeps what is freed for later, if it is smaller than 32 MB: of 160 MB of gradients of 10 layers the
    process's peak had 80 less, and 144 with MALLOC_MMAP_THRESHOLD_=4000000 in the environment.

    Args:
        model_or_params: the module, or tensors, or (name, tensor) pairs. Those that do not require gradients are left out.
        optimizer: one of fused_opt, which has all these parameters.

    Returns:
        A handle, with which to accumulate and to remove this; `with` it, this ends with the context. It need not be kept, but the
        optimizer must be: without it nothing steps.

    Raises:
        TypeError: the optimizer is none of fused_opt; what was given is no module and no tensors.
        ValueError: a parameter is not in the optimizer, or twice; none of them requires gradients.
        RuntimeError: a parameter is stepped in backward already; the optimizer's class has a step of its own; or it cannot work: with
            `max_grad_norm`, `differentiable`, GradScaler, and DistributedDataParallel or FullyShardedDataParallel (whose mere parameters
            are not recognised). Options and GradScaler's attributes are looked at in each backward, too, which then raises; a scaled loss
            is noticed by `scaler.step()` only, after the first backward has stepped with it. What fails in backward leaves the parameter at
            fault, its states and its gradient as they were; those whose gradients were complete before have been stepped.
    """
    handle = StepInBackward(optimizer)
    try:
        handle.add(model_or_params)
    except BaseException:
        handle.remove()
        raise
    return handle


class StepInBackward:
    """What `step_in_backward` returns."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = _checked(optimizer)
        self._hooks: list[RemovableHandle] = []
        self._accumulating = 0
        self._stepped = False  # whether a parameter was, since the last optimizer.step()
        # GradScaler does not call the step of an optimizer that has no gradients, and fails with "No inf checks were recorded". With this
        # it does call it, where `_before_step` can say more; every optimizer here can serve it.
        self._asked_for_calls = getattr(optimizer, _CALL_STEP, False)
        vars(optimizer)[_CALL_STEP] = True
        vars(optimizer).setdefault("_captured", [])  # CUDA graphs refer to what is in it: it must outlive the parts
        self._step_hook: RemovableHandle | None = optimizer.register_step_pre_hook(self._before_step)

    def add(self, model_or_params: ModelOrParams) -> None:
        """Step these in backward, too. Raises as `step_in_backward`, which says what is taken; nothing has been changed then."""
        if self._step_hook is None:
            raise RuntimeError("this handle was removed; call fused_opt.step_in_backward again")
        hooks = self._made(model_or_params)
        for param, hook in hooks.items():
            self._hooks.append(param.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """A context in which backward() leaves its gradients, for all micro-batches but the last: the next backward() steps with the sums.

        for i, micro_batch in enumerate(micro_batches):
            with handle.accumulating() if i + 1 < len(micro_batches) else contextlib.nullcontext():
                loss(micro_batch).backward()
        """
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def remove(self) -> None:
        """Let `optimizer.step()` do all of it again. Gradients that are there stay. A second call does nothing."""
        if self._step_hook is None:
            return
        for hook in (*self._hooks, self._step_hook):
            hook.remove()
        self._hooks.clear()
        self._step_hook = None
        if not self._asked_for_calls:
            vars(self._optimizer).pop(_CALL_STEP, None)

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.remove()

    def _made(self, model_or_params: ModelOrParams) -> dict[torch.Tensor, _Hook]:
        """A hook for each parameter that requires gradients. Registers nothing."""
        params = [param for param in _tensors(model_or_params) if param.requires_grad]
        if not params:
            raise ValueError(
                "there is no parameter that requires gradients; pass the model that is trained, or call requires_grad_() first"
            )
        _check_options(self._optimizer)
        places = _places(self._optimizer)
        for param in params:
            found = places.get(param, [])
            if len(found) != 1:
                raise ValueError(_not_once(param, found))
            if any(isinstance(hook, _Hook) for hook in (param._post_accumulate_grad_hooks or {}).values()):
                where = _name(self._optimizer, *found[0])
                raise RuntimeError(f"{where} is stepped in backward already; leave it out, or remove() the handle that does")
        return {param: _Hook(self, places[param][0]) for param in params}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before `optimizer.step()`."""
        if self._stepped and _is_scaled(optimizer):
            for name in _SCALED:  # as the scaler does after a step
                vars(optimizer).pop(name, None)
            raise RuntimeError(
                "GradScaler cannot be used with step_in_backward: backward has stepped with scaled gradients, before the scaler knew "
                "whether all of them are finite; restore the weights, and train in bfloat16, which needs no scaler, or remove() the handle"
            )
        self._stepped = False


class _Hook:
    """Called when the gradient of a parameter is complete."""

    def __init__(self, owner: StepInBackward, place: tuple[int, int]) -> None:
        self._owner = weakref.ref(owner)  # torch never frees a cycle through such a hook (2.6 to 2.14); the optimizer's step hook holds it
        self._place = place  # numbers of its group and in it
        self._kept: Kept | None = None

    @_disable_dynamo  # where backward is compiled, too, its graph breaks here
    def __call__(self, param: torch.Tensor) -> None:
        owner = self._owner()
        if owner is None or owner._accumulating or param.grad is None:
            return
        optimizer = owner._optimizer
        if not self._find(param, optimizer):
            return
        try:
            _check_options(optimizer)
            self._step(param, optimizer)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if type(error) not in (KeyError, RuntimeError, TypeError, ValueError):  # others may not be made of a message
                raise
            where = _name(optimizer, *self._place)
            raise type(error)(f"{where} could not be stepped in backward (alone, as parameter 0 of its group): {error}") from error
        param.grad = None
        owner._stepped = True

    def _find(self, param: torch.Tensor, optimizer: FusedStep) -> bool:
        """Make sure of the place. False if the parameter has been taken out of the optimizer."""
        number, index = self._place
        groups = optimizer.param_groups
        if number < len(groups) and index < len(groups[number]["params"]) and groups[number]["params"][index] is param:
            return True
        found = _places(optimizer).get(param)
        if found:
            self._place = found[0]
        return bool(found)

    def _step(self, param: torch.Tensor, optimizer: FusedStep) -> None:
        """By a light view of the optimizer that has this parameter only."""
        number, index = self._place
        group = {**optimizer.param_groups[number], "params": [param]}
        if "param_names" in group:
            group["param_names"] = [group["param_names"][index]]
        part: FusedStep = object.__new__(type(optimizer))
        vars(part).update(vars(optimizer), param_groups=[group], _place=self._place, _kept=self._kept)
        self._kept = None
        part._run()
        self._kept = part._kept
        optimizer._last_ran, optimizer._last_launched = part._last_ran, part._last_launched


def _checked(optimizer: torch.optim.Optimizer) -> FusedStep:
    if not isinstance(optimizer, FusedStep):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}, which cannot step a parameter alone; make it "
            "with fused_opt.AdamW or another class of fused_opt, and pass it second, after the model or its parameters"
        )
    if type(optimizer).step is not FusedStep.step:
        raise RuntimeError(
            f"{type(optimizer).__name__} has a step() of its own, which backward would not call; use the class that it is derived from, "
            "or the normal loop"
        )
    if any(isinstance(getattr(hook, "__self__", None), StepInBackward) for hook in optimizer._optimizer_step_pre_hooks.values()):
        raise RuntimeError("the optimizer steps in backward already; add(params) to the handle that does, or remove() it")
    return optimizer


def _check_options(optimizer: FusedStep) -> None:
    """Raise RuntimeError for what a step of single parameters cannot do."""
    for number, group in enumerate(optimizer.param_groups):
        if group.get("max_grad_norm") is not None:
            raise RuntimeError(
                f"group {number} has max_grad_norm={group['max_grad_norm']}, but the norm of all gradients is not known before the last "
                "one is complete; use max_grad_value, or the normal loop"
            )
        if group.get("differentiable"):
            raise RuntimeError(
                f"group {number} has differentiable=True, but a step in backward is in no graph; leave it out, or use the normal loop"
            )
    if _is_scaled(optimizer):
        raise RuntimeError(
            "the optimizer has GradScaler's attributes (found_inf, grad_scale), but whether all gradients are finite is not known before "
            "the last one is complete; train in bfloat16, which needs no scaler, or use the normal loop"
        )


def _is_scaled(optimizer: torch.optim.Optimizer) -> bool:
    return any(vars(optimizer).get(name) is not None for name in _SCALED)


def _tensors(model_or_params: ModelOrParams) -> list[torch.Tensor]:
    if isinstance(model_or_params, torch.nn.Module):
        for name, module in model_or_params.named_modules():
            for cls in type(module).__mro__:
                if cls.__name__ in _REDUCING_LATER and cls.__module__.startswith("torch."):
                    raise RuntimeError(
                        f"{f'the module {name!r}' if name else 'the model'} is a {cls.__name__}, which adds up the gradients of all "
                        "processes only after their hooks; use the normal loop, or do without it and average param.grad in a hook of your "
                        "own that is registered (register_post_accumulate_grad_hook) before this call"
                    )
        return list(model_or_params.parameters())
    if isinstance(model_or_params, torch.Tensor) or not isinstance(model_or_params, Iterable):
        raise TypeError(f"a {type(model_or_params).__name__} is neither a model nor a list of parameters; {_PASS}")
    params = [each[1] if isinstance(each, tuple) and len(each) == 2 else each for each in model_or_params]
    for param in params:
        if not isinstance(param, torch.Tensor):
            raise TypeError(f"a {type(param).__name__} is among the parameters, which must be tensors; {_PASS}")
    return list(dict.fromkeys(params))


def _places(optimizer: FusedStep) -> dict[torch.Tensor, list[tuple[int, int]]]:
    """Parameter -> numbers of its group and in it."""
    places: dict[torch.Tensor, list[tuple[int, int]]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            places.setdefault(param, []).append((number, index))
    return places


def _not_once(param: torch.Tensor, found: list[tuple[int, int]]) -> str:
    if found:
        where = " and ".join(f"{index} of group {number}" for number, index in found)
        return f"a parameter is listed more than once, as parameters {where}; in backward it would be stepped once: list it once"
    return (
        f"a parameter of shape {tuple(param.shape)} and dtype {param.dtype} is not in the optimizer; pass those that are: "
        "[param for group in optimizer.param_groups for param in group['params']]"
    )


def _name(optimizer: FusedStep, number: int, index: int) -> str:
    names = optimizer.param_groups[number].get("param_names")
    return f"parameter {index} of group {number}" + (f" ({names[index]})" if names else "")
