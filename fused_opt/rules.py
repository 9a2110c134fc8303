"""What each update rule needs for a step, as data: its states, its flags and its scalars.

The arithmetic itself is written once per backend (CPU: csrc/kernels/rules.h, GPU: kernels/rules.py). Every scalar is computed here, in
Python's float64, and handed to the backend, which rounds it once to the parameter's precision; so all backends compute with the same
numbers. Where step counter or learning rate are on a GPU, kernels/scalars.py compiles the same text.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Group = dict[str, Any]

# Compile-time options (the bits below, as in csrc/request.h) and the scalars in the backend's order.
Program = tuple[int, tuple[float, ...]]

# All states that any of the rules has, beside the step counter.
SLOTS = frozenset(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "momentum_buffer", "grad_avg"))
# States whose values are never negative, as `kKinds` in csrc/kernels/rules.h has it.
NON_NEGATIVE = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg"))

AMSGRAD, ADAM_L2 = 1, 2
CENTERED, RMSPROP_MOMENTUM, RMSPROP_L2 = 1, 2, 4
SGD_MOMENTUM, NESTEROV, FIRST, SGD_L2 = 1, 2, 4, 8


def _always(group: Group) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """One optimizer's update, seen from outside the arithmetic.

    Attributes:
        name: the backend's name for it.
        counter: state key of the step counter, or "" if the rule does not count.
        options: options of a param group that are numbers, beside lr and betas.
        slots: param group -> state keys that the step reads and writes, in the backend's order, which is also torch's.
        flags: (param group, fresh) -> compile-time options. `fresh` says that the states were created for this very step.
        constants: param group -> numbers, of which the first is the gradient's sign, the others are its options.
        scalars: (constants, lr, step, factor, power, root) -> what the backend computes with, in its order; the first is a factor of the
            gradient. `step` is 1 in the first step, `factor` is what gradients are to be multiplied with. Plain arithmetic, which also
            compiles to a kernel; `power` and `root` are then the kernel's.
        l2: param group -> whether weight decay is added to the gradient (and not decoupled from it).
        lerps: param group -> whether torch's update moves a state towards the gradient by `lerp`, which refuses a gradient of
            another dtype.
        zero_states: whether new states are zeros of the parameter's dtype; otherwise the first step sets them to the gradient without
            reading them, and they have its dtype.
        sparse: whether torch takes sparse gradients.
        takes_codes: param group -> whether states may be in 8-bit codes.
    """

    name: str
    counter: str
    options: tuple[str, ...]
    slots: Callable[[Group], tuple[str, ...]]
    flags: Callable[[Group, bool], int]
    constants: Callable[[Group], tuple[float, ...]]
    scalars: Callable[..., tuple[Any, ...]]
    l2: Callable[[Group], bool]
    lerps: Callable[[Group], bool]
    zero_states: bool = True
    sparse: bool = False
    takes_codes: Callable[[Group], bool] = _always

    def program(self, group: Group, step: float, fresh: bool, factor: float = 1.0) -> Program:
        """Flags and scalars of a step, from float64 numbers."""
        if group.get("foreach") and self.counter and "betas" in group and not isinstance(group["lr"], float | int):
            raise RuntimeError("lr as a Tensor is not supported for capturable=False and foreach=True; leave foreach out, or set a float")
        scalars = self.scalars(self.constants(group), float(group["lr"]), step, factor, operator.pow, math.sqrt)
        return self.flags(group, fresh), scalars


# torch's Adam has the option since 2.7, and in AdamW it cannot be switched off; in RMSprop and SGD it is this package's.
def _decays(group: Group) -> bool:
    return float(group["weight_decay"]) != 0 and not group.get("decoupled_weight_decay", False)


def _never(group: Group) -> bool:
    return False


def _adam_slots(group: Group) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


def _sign(group: Group) -> float:
    return -1.0 if group["maximize"] else 1.0


def _adam_flags(group: Group, fresh: bool) -> int:
    return AMSGRAD * bool(group["amsgrad"]) + ADAM_L2 * _decays(group)


def _adamw_flags(group: Group, fresh: bool) -> int:
    return AMSGRAD * bool(group["amsgrad"])


def _adam_constants(group: Group) -> tuple[float, ...]:
    return _any_adam_constants(group, _decays(group))


def _adamw_constants(group: Group) -> tuple[float, ...]:
    return _any_adam_constants(group, l2=False)


def _any_adam_constants(group: Group, l2: bool) -> tuple[float, ...]:
    weight_decay, (beta1, beta2) = float(group["weight_decay"]), group["betas"]
    return _sign(group), weight_decay, 0.0 if l2 else weight_decay, float(beta1), float(beta2), float(group["eps"])


def adam_scalars(constants, lr, step, factor, power, root):  # type: ignore[no-untyped-def]
    """Of Adam and AdamW."""
    sign, weight_decay, decoupled_decay, beta1, beta2, eps = constants
    return (
        factor * sign,
        weight_decay,
        1 - lr * decoupled_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        root(1 - power(beta2, step)),
        eps,
        -(lr / (1 - power(beta1, step))),
    )


def _rmsprop_slots(group: Group) -> tuple[str, ...]:
    momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
    return ("square_avg", *momentum, "grad_avg") if group["centered"] else ("square_avg", *momentum)


def _rmsprop_flags(group: Group, fresh: bool) -> int:
    return CENTERED * bool(group["centered"]) + RMSPROP_MOMENTUM * (float(group["momentum"]) > 0) + RMSPROP_L2 * _decays(group)


def eps_of(group: Group) -> float:
    """RMSprop's. Not zero where weights have masks: their momentum would be 0 / 0, and with it their whole block of 8-bit codes.

    The smallest normal float changes nothing beside any other square root of a float, which is at least 3.7e-23.
    """
    return float(group["eps"]) or (2.0**-126 if group.get("masked") else 0.0)


def _rmsprop_constants(group: Group) -> tuple[float, ...]:
    return _sign(group), float(group["weight_decay"]), float(group["alpha"]), eps_of(group), float(group["momentum"])


def rmsprop_scalars(constants, lr, step, factor, power, root):  # type: ignore[no-untyped-def]
    """Of RMSprop."""
    sign, weight_decay, alpha, eps, momentum = constants
    return factor * sign, weight_decay, alpha, 1 - alpha, eps, momentum, -lr


def _sgd_slots(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _sgd_flags(group: Group, fresh: bool) -> int:
    return SGD_MOMENTUM * (float(group["momentum"]) != 0) + NESTEROV * bool(group["nesterov"]) + FIRST * fresh + SGD_L2 * _decays(group)


def _sgd_constants(group: Group) -> tuple[float, ...]:
    return _sign(group), float(group["weight_decay"]), float(group["momentum"]), float(group["dampening"])


def sgd_scalars(constants, lr, step, factor, power, root):  # type: ignore[no-untyped-def]
    """Of SGD."""
    sign, weight_decay, momentum, dampening = constants
    return factor * sign, weight_decay, momentum, 1 - dampening, -lr


def _centered(group: Group) -> bool:
    return bool(group["centered"])


def _not_centered(group: Group) -> bool:
    # The variance is square_avg - grad_avg^2: of codes, which are off by 3%, it came out negative and weights became NaN after 100 to 200
    # steps wherever the mean of a gradient was not small beside its deviation.
    return not group["centered"]


_ADAM_OPTIONS = ("eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
_RMSPROP_OPTIONS = ("alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
_SGD_OPTIONS = ("weight_decay", "momentum", "dampening", "nesterov", "maximize")

ADAM = Rule("adam", "step", _ADAM_OPTIONS, _adam_slots, _adam_flags, _adam_constants, adam_scalars, l2=_decays, lerps=_always)
ADAMW = Rule("adam", "step", _ADAM_OPTIONS, _adam_slots, _adamw_flags, _adamw_constants, adam_scalars, l2=_never, lerps=_always)
RMSPROP = Rule(
    "rmsprop",
    "step",
    _RMSPROP_OPTIONS,
    _rmsprop_slots,
    _rmsprop_flags,
    _rmsprop_constants,
    rmsprop_scalars,
    l2=_decays,
    lerps=_centered,
    takes_codes=_not_centered,
)
SGD = Rule(
    "sgd", "", _SGD_OPTIONS, _sgd_slots, _sgd_flags, _sgd_constants, sgd_scalars, l2=_decays, lerps=_never, zero_states=False, sparse=True
)
