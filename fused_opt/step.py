"""The mixin that replaces the step of a torch optimizer, and completes its constructor."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch._compile import _disable_dynamo
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fused_opt import clipping, compiled
from fused_opt.attached import set_anchors, set_masks
from fused_opt.averages import average_weights
from fused_opt.checkpoints import loading, saved
from fused_opt.errors import completed
from fused_opt.fallback import check_differentiable
from fused_opt.native import native
from fused_opt.plan import Kept, Ran, plan
from fused_opt.rules import Group, Rule
from fused_opt.stages import GIVEN_OPTIONS, STAGE_OPTIONS, STAGE_STATES, check_stage_options, inherited
from fused_opt.states import STORAGE_OPTIONS, Format, asks_for_8bit, check_storage_options
from fused_opt.weights import float32_weights

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT, StateDict

    from fused_opt import device


class FusedStep(torch.optim.Optimizer):
    """Mixed into a torch optimizer, replaces its step by one native call for each param group.

    Parameters that the native code does not serve are stepped by torch's own code on the same state; `fused_opt.explain` says which,
    and why.

    Options beside torch's own are keyword arguments, and can be given for each group; what is left out is as in torch. How states are
    stored: `state_dtype`, `block_size`, `min_8bit_size` (see `AdamW8bit`). What is done in the same pass over memory, in the order of
    `fused_opt.stages`, with g the gradient, p the weight:

    Args:
        max_grad_norm: g is multiplied with min(1, max_grad_norm / (norm + 1e-6)), as by torch.nn.utils.clip_grad_norm_ but that `.grad`
            stays as it is (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063). One norm of all gradients of all groups, for which they
            are read once more; `last_grad_norm` has it. inf only measures. `reduce_grad_norm`, if set, is called with the sum of squares
            (the largest magnitude), a float64 tensor without dimensions, to combine it with those of other ranks: it changes the tensor in
            place or returns another. Copies of the optimizer do not have it, as they have none of torch's hooks: set it there again.
        grad_norm_type: 2 (the default), or inf: the largest magnitude.
        nonfinite_grad_norm: what a norm that is infinite or NaN means: "as_torch" (the default: weights become NaN), "raise" a
            RuntimeError before anything is changed, or "skip" the step.
        max_grad_value: after that g is clamped to [-max_grad_value, max_grad_value], as by torch.nn.utils.clip_grad_value_.
        l1: adds l1 * |p| to the loss. With l1_method="proximal" (the default) p is moved towards zero by lr * l1 after the update, and is
            exactly zero where it would pass it (Parikh and Boyd 2014, https://doi.org/10.1561/2400000003); with "subgradient" l1 * sign(p)
            is added to g.
        anchor_decay: adds anchor_decay / 2 * |p - anchor|^2 to the loss: g + anchor_decay * (p - anchor) (L2-SP: Li et al. 2018,
            https://arxiv.org/abs/1802.01483). The anchor is the weight at the first step, or what `set_anchors` was given.
        decoupled_weight_decay: of RMSprop and SGD, as torch's Adam has it: p is multiplied with 1 - lr * weight_decay before the update,
            and g stays as it is (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).
        average: "ema": average = average_decay * average + (1 - average_decay) * p after the update (Polyak and Juditsky 1992), or "swa":
            the mean of all p so far (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407); the first average is p. As
            torch.optim.swa_utils has them. See `average_weights`.
        average_decay: default 0.999.
        average_start, average_every: steps before the first average (default 0), and from one to the next (default 1).
        weights: what bfloat16 and float16 weights are, whose updates are lost where they are smaller than half the distance to the next
            such number. None: rounded to the nearest. "stochastic": rounded up or down, right on average (bfloat16; Gupta et al. 2015,
            https://arxiv.org/abs/1502.02551), by counters: the same for any number of threads, and after a resume. "kahan": 16 more bits
            have what was rounded off (Zamirai et al. 2020, https://arxiv.org/abs/2010.06192). "split": 16 more bits, with which the weight
            is the exact float32 (bfloat16). "master": float32 weights beside them (Micikevicius et al. 2017,
            https://arxiv.org/abs/1710.03740). Weights of other dtypes stay as they are. See `float32_weights`.
        rounding_seed: of "stochastic"; from 0 (the default) to 2^24 - 1.
    """

    _rule: ClassVar[Rule]
    _torch_class: ClassVar[type[torch.optim.Optimizer]]
    _default_state_dtype: ClassVar[str | None] = None
    _kept: Kept
    _place: tuple[int, int] = (0, 0)  # numbers of the first group and of its first parameter, if this is a part of another optimizer
    _evaluates: bool = False  # whether the weights are their averages
    _is_made: bool = True  # False while torch's constructor adds groups, which have not all their options yet
    _last_grad_norm: torch.Tensor | tuple[float, torch.dtype] | None = None
    reduce_grad_norm: Callable[[torch.Tensor], torch.Tensor | None] | None = None
    _last_ran: Ran | None = None  # the newest native call: for tests and reports, to prove which code ran
    _last_launched: device.Ran | None = None  # likewise of kernels on a device

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            *args: Any,
            state_dtype: torch.dtype | str | Mapping[str, torch.dtype | str | None] | None = None,
            block_size: int | None = None,
            min_8bit_size: int | None = None,
            max_grad_norm: float | None = None,
            grad_norm_type: float | None = None,
            nonfinite_grad_norm: str | None = None,
            max_grad_value: float | None = None,
            l1: float | None = None,
            l1_method: str | None = None,
            anchor_decay: float | None = None,
            average: str | None = None,
            average_decay: float | None = None,
            average_start: int | None = None,
            average_every: int | None = None,
            weights: str | None = None,
            rounding_seed: int | None = None,
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
                if self._is_made:  # otherwise torch gives it all defaults
                    without = {name for name in STAGE_OPTIONS if name in self.defaults}.difference(
                        param_group, inherited(self.defaults, param_group)
                    )
                    param_group.update(dict.fromkeys(without))
                check_stage_options({**self.defaults, **param_group})
            super().add_param_group(param_group)
            if self._is_made:
                try:
                    _check_groups(self)
                except ValueError:
                    self.param_groups.pop()
                    raise
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, which expects a step counter in each state that is not empty: also in one with only a mask or an anchor."""
        states = {**self.__dict__, **state}["state"]
        counted = {key: value for key, value in states.items() if not (isinstance(value, dict) and STAGE_STATES.issuperset(value))}
        super().__setstate__({**state, "state": counted})
        self.state = states

    @property
    def last_grad_norm(self) -> torch.Tensor | None:
        """With `max_grad_norm`: the norm of all gradients, before they were clipped, in the newest step, as a tensor without dimensions.

        float32 (float64 if all gradients are), on the parameters' device, where reading it waits for the step. None before the first step.
        """
        if isinstance(self._last_grad_norm, tuple):
            norm, dtype = self._last_grad_norm
            return torch.tensor(norm, dtype=dtype, device="cpu")
        return self._last_grad_norm

    def average_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the parameters have the averages of their weights (`average="ema"` or "swa") as values, to evaluate with.

        Those without an average, such as frozen ones, those whose average has not begun (`average_start`), and those of groups that average
        no more, stay as they are; so do buffers: see torch.optim.swa_utils.update_bn, whose statistics stay when this is left. Afterwards
        the weights are what they were, bit for bit, whatever was raised. Meanwhile there is a copy of them, and the optimizer cannot step.

        Raises:
            RuntimeError: no group averages; or this context is entered already.
        """
        return average_weights(self)

    def float32_weights(self) -> dict[torch.Tensor, torch.Tensor]:
        """Each parameter's value in float32, a new tensor, with what `weights="kahan"`, "split" or "master" keep beside it: to export.

        Complex parameters are complex64. Within `average_weights()` those that have an average are it: so averages of 16-bit weights, which
        the parameters then show rounded, are exported in float32.
        """
        return float32_weights(self)

    def set_masks(self, masks: Mapping[torch.Tensor, torch.Tensor | None]) -> None:
        """Hold weights at zero from now on: see `fused_opt.attached.set_masks`, and `fused_opt.magnitude_masks` for what makes masks."""
        set_masks(self, masks)

    def set_anchors(self, anchors: Mapping[torch.Tensor, torch.Tensor | None]) -> None:
        """What `anchor_decay` pulls weights towards: see `fused_opt.attached.set_anchors`."""
        set_anchors(self, anchors)

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
            (not torch.compiler.is_dynamo_compiling() and _profiler_enabled())
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
            self._check_weights()  # before the closure, with the averages as weights, makes gradients
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_dynamo_compiling():
            compiled.step(self)
        else:
            self._run()
        return loss

    @_disable_dynamo  # it cannot be traced: torch.compile breaks its graph here, unless it takes the other way. Costs 1 us a step.
    def _run(self) -> None:
        self._check_weights()
        the_plan = plan(self)
        the_plan.run()
        the_plan.release()

    def _check_weights(self) -> None:
        if self._evaluates:
            raise RuntimeError("the weights are their averages, which a step would overwrite; leave average_weights() first")

    def _traceable(self) -> bool:
        return compiled.traceable(self)

    def _prepare(self, with_grad: list[list[int]]) -> list[list[Format | None]] | None:
        return compiled.prepare(self, with_grad)

    # As torch.compiler.assume_constant_result, which would import the compiler: it calls these while it traces.
    vars(_traceable)["_dynamo_marked_constant"] = vars(_prepare)["_dynamo_marked_constant"] = True


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(FusedStep._step)


def _extended(torch_init: Callable[..., None], default_state_dtype: str | None) -> Callable[..., None]:
    """Torch's constructor with our options after its own, and with complete error messages."""

    @functools.wraps(torch_init)
    def __init__(self: FusedStep, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        given = {name: kwargs.pop(name) for name in own_options if name in kwargs}
        own = {name: value for name, value in {"state_dtype": default_state_dtype, **given}.items() if value is not None}
        try:
            _complete_storage_options(own, default_state_dtype)
            check_stage_options(own)
            self._is_made = False
            torch_init(self, *args, **kwargs)
            del self._is_made
            for group in self.param_groups:
                its_own = inherited(own, group)
                check_stage_options({**its_own, **group})
                if not asks_for_8bit({**own, **group}):
                    _refuse_8bit_options(group)
                group.update(its_own)
            if not any(asks_for_8bit(group) for group in self.param_groups):
                _refuse_8bit_options(own)
            _check_groups(self)
        except (TypeError, ValueError) as error:
            raise completed(error) from None
        self.defaults.update(own)
        with contextlib.suppress(ValueError, RuntimeError):  # said by the first step
            native()  # now, so that it sees forks from here on (see csrc/parallel.cpp)

    signature = inspect.signature(torch_init)
    own_options = (*STORAGE_OPTIONS, *GIVEN_OPTIONS, *(() if "betas" in signature.parameters else ("decoupled_weight_decay",)))
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default_state_dtype if name == "state_dtype" else None)
        for name in own_options
    ]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *options])  # type: ignore[attr-defined]
    return __init__


def _check_groups(optimizer: FusedStep) -> None:
    """Raise ValueError for options that the first step would refuse."""
    clipping.check(optimizer)
    for number, group in enumerate(optimizer.param_groups):
        check_differentiable(group, number)


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
