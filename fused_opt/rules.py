"""What each update rule needs for a step, as data: its states, its flags and its scalars.

The arithmetic itself is written once per backend (CPU: csrc/kernels/rules.h). Every scalar is computed here, in Python's float64, and
handed to the backend, which rounds it once to the parameter's precision; so all backends compute with the same numbers.
"""

from __future__ import annotations

import math
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
        slots: param group -> state keys that the step reads and writes, in the backend's order, which is also torch's.
        program: (param group, step, fresh) -> flags and scalars, of which the first is a factor of the gradient. `step` is 1 in the first
            step; `fresh` says that the states were created for this very step.
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
    slots: Callable[[Group], tuple[str, ...]]
    program: Callable[[Group, float, bool], Program]
    l2: Callable[[Group], bool]
    lerps: Callable[[Group], bool]
    zero_states: bool = True
    sparse: bool = False
    takes_codes: Callable[[Group], bool] = _always


def _decays(group: Group) -> bool:
    return float(group["weight_decay"]) != 0


def _never(group: Group) -> bool:
    return False


def _adam_slots(group: Group) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


def _adam_l2(group: Group) -> bool:
    # torch before 2.7 has no such option, and in AdamW it cannot be switched off.
    return _decays(group) and not group.get("decoupled_weight_decay", False)


def _adam_program(group: Group, step: float, fresh: bool) -> Program:
    return _any_adam_program(group, step, _adam_l2(group))


def _adamw_program(group: Group, step: float, fresh: bool) -> Program:
    return _any_adam_program(group, step, l2=False)


def _any_adam_program(group: Group, step: float, l2: bool) -> Program:
    if group.get("foreach") and not isinstance(group["lr"], float | int):
        raise RuntimeError("lr as a Tensor is not supported for capturable=False and foreach=True; leave foreach out, or set a float")
    lr, weight_decay, (beta1, beta2) = float(group["lr"]), float(group["weight_decay"]), group["betas"]
    beta1, beta2 = float(beta1), float(beta2)
    flags = AMSGRAD * bool(group["amsgrad"]) + ADAM_L2 * l2
    return flags, (
        -1.0 if group["maximize"] else 1.0,
        weight_decay,
        1.0 if l2 else 1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        math.sqrt(1 - beta2**step),
        float(group["eps"]),
        -(lr / (1 - beta1**step)),
    )


def _rmsprop_slots(group: Group) -> tuple[str, ...]:
    momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
    return ("square_avg", *momentum, "grad_avg") if group["centered"] else ("square_avg", *momentum)


def _rmsprop_program(group: Group, step: float, fresh: bool) -> Program:
    alpha, momentum, weight_decay = float(group["alpha"]), float(group["momentum"]), float(group["weight_decay"])
    flags = CENTERED * bool(group["centered"]) + RMSPROP_MOMENTUM * (momentum > 0) + RMSPROP_L2 * _decays(group)
    sign = -1.0 if group["maximize"] else 1.0
    return flags, (sign, weight_decay, alpha, 1 - alpha, float(group["eps"]), momentum, -float(group["lr"]))


def _sgd_slots(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _sgd_program(group: Group, step: float, fresh: bool) -> Program:
    momentum, weight_decay = float(group["momentum"]), float(group["weight_decay"])
    flags = SGD_MOMENTUM * (momentum != 0) + NESTEROV * bool(group["nesterov"]) + FIRST * fresh + SGD_L2 * _decays(group)
    sign = -1.0 if group["maximize"] else 1.0
    return flags, (sign, weight_decay, momentum, 1 - float(group["dampening"]), -float(group["lr"]))


def _centered(group: Group) -> bool:
    return bool(group["centered"])


def _not_centered(group: Group) -> bool:
    # The variance is square_avg - grad_avg^2: of codes, which are off by 3%, it came out negative and weights became NaN after 100 to 200
    # steps wherever the mean of a gradient was not small beside its deviation.
    return not group["centered"]


ADAM = Rule("adam", "step", _adam_slots, _adam_program, l2=_adam_l2, lerps=_always)
ADAMW = Rule("adam", "step", _adam_slots, _adamw_program, l2=_never, lerps=_always)
RMSPROP = Rule("rmsprop", "step", _rmsprop_slots, _rmsprop_program, l2=_decays, lerps=_centered, takes_codes=_not_centered)
SGD = Rule("sgd", "", _sgd_slots, _sgd_program, l2=_decays, lerps=_never, zero_states=False, sparse=True)
