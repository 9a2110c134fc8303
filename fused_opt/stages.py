"""What a step does to a tile of numbers before and after the rule, as data: options of a param group, the states they need, scalars.

The arithmetic stands once per backend (CPU: csrc/kernels/stages.h, GPU: kernels/stages.py; fused_opt/plain_stages.py for parameters that
torch steps). In this order, each only where it was asked for:

    before the rule                                             asked for by
        p = weight and its companion                            weights="kahan", "split", "master"
        g = clamp(factor * g, -limit, limit)                    max_grad_value (the factor has the sign, and that of max_grad_norm)
        g = g + l1 * sign(p)                                    l1 with l1_method="subgradient"
        g = g + anchor_decay * (p - anchor)                     anchor_decay
        g = 0 where the mask is False                           masks
        p = keep * p                                            decoupled_weight_decay of RMSprop and SGD
    after it
        p = sign(p) * max(|p| - lr * l1, 0)                     l1 with l1_method="proximal"
        p = 0 where the mask is False                           masks
        p = rounded to the weight's dtype                       weights="stochastic"; else to the nearest, if there is no companion
        average = lerp(average, p, weight)                      average
        weight and companion = p                                weights="kahan", "split", "master"
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from fused_opt.rules import Group, Rule

# Compile-time options, as in csrc/request.h and kernels/stages.py.
CLAMP, SUBGRADIENT, ANCHOR, MASK, SHRINK, PROXIMAL, AVERAGE, STOCHASTIC, KAHAN, SPLIT, MASTER = (1 << bit for bit in range(11))
# Those that change the gradient: it is then multiplied with the factor there and not by the rule.
OF_GRADIENT = CLAMP | SUBGRADIENT | ANCHOR | MASK
# Those of weights in 16 bits.
OF_WEIGHTS = STOCHASTIC | KAHAN | SPLIT | MASTER

# The scalars that stages take, in this order. FACTOR is the rule's of the gradient: its sign, the scaler's and the norm's part. SEED and
# STEP are whole numbers below 2^24.
FACTOR, LIMIT, L1, ANCHOR_DECAY, KEEP, THRESHOLD, AVERAGE_WEIGHT, SEED, STEP = range(9)
SCALARS = 9

WEIGHTS = ("stochastic", "kahan", "split", "master")
# Options of a group; what is not given is not in the group.
STAGE_OPTIONS = (
    "max_grad_norm",
    "grad_norm_type",
    "nonfinite_grad_norm",
    "max_grad_value",
    "l1",
    "l1_method",
    "anchor_decay",
    "average",
    "average_decay",
    "average_start",
    "average_every",
    "weights",
    "rounding_seed",
    "masked",  # whether some parameter has a mask
)
_OPTION_SET = frozenset(STAGE_OPTIONS)
# Those that a constructor takes: masks are set.
GIVEN_OPTIONS = STAGE_OPTIONS[:-1]

# Keys of states: where the CPU's code and the tables of devices have them, after a rule's own, and a weight's companion by `weights`.
MASK_STATE, ANCHOR_STATE, AVERAGE_STATE = "mask", "anchor", "average"
COMPANIONS = {"kahan": "compensation", "split": "low_bits", "master": "master"}
COMPANION_DTYPES = {"split": torch.int16, "master": torch.float32}  # that of Kahan's is the weight's own
STAGE_STATES = frozenset((MASK_STATE, ANCHOR_STATE, AVERAGE_STATE, *COMPANIONS.values()))
LOW_PRECISION = (torch.bfloat16, torch.float16)


def check_stage_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if one of STAGE_OPTIONS has a value that it cannot have, or needs another that is not there."""
    if not _OPTION_SET.isdisjoint(options):
        given = tuple((name, type(options[name]), options[name]) for name in STAGE_OPTIONS if name in options)
        try:
            _check_values(given)
        except TypeError:  # a list and the like
            _check_values.__wrapped__(given)


@functools.lru_cache(maxsize=256)
def _check_values(given: tuple[tuple[str, type, Any], ...]) -> None:
    """Check names, types and values. Once: in each step it would take 20 us."""
    options = {name: value for name, _, value in given}
    _check_number(options, "max_grad_norm", "a number, 0 or greater; inf only measures the norm", least=0.0)
    _check_choice(options, "grad_norm_type", (2, math.inf), "2 (Euclidean) or inf (largest magnitude)")
    _check_choice(options, "nonfinite_grad_norm", ("as_torch", "raise", "skip"), "'as_torch', 'raise' or 'skip'")
    _check_number(options, "max_grad_value", "a number, 0 or greater", least=0.0)
    _check_number(options, "l1", "a number, 0 or greater and finite; 0 switches it off", least=0.0, finite=True)
    _check_choice(options, "l1_method", ("proximal", "subgradient"), "'proximal' (exact zeros) or 'subgradient'")
    _check_number(options, "anchor_decay", "a number, 0 or greater and finite; 0 switches it off", least=0.0, finite=True)
    _check_choice(options, "average", ("ema", "swa"), "'ema' (exponential) or 'swa' (equal weights)")
    _check_number(options, "average_decay", "a number, at least 0 and at most 1; the default is 0.999", least=0.0, most=1.0)
    _check_whole(options, "average_start", "a whole number of steps, 0 or more", least=0)
    _check_whole(options, "average_every", "a whole number of steps, 1 or more", least=1)
    _check_choice(options, "weights", WEIGHTS, ", ".join(map(repr, WEIGHTS)) + ", or None: rounded to the nearest")
    _check_whole(options, "rounding_seed", f"a whole number from 0 to {_SEEDS - 1}", least=0, most=_SEEDS - 1)
    for name, needed in NEEDS.items():
        if options.get(name) is not None and options.get(needed) is None:
            raise ValueError(f"{name}={options[name]!r} has no effect without {needed}; give {needed}, too, or leave {name} out")
    if options.get("average_decay") is not None and options["average"] != "ema":
        raise ValueError(f"average_decay={options['average_decay']} has no effect with average='swa'; use average='ema', or leave it out")
    if options.get("rounding_seed") is not None and options["weights"] != "stochastic":
        raise ValueError(f"rounding_seed={options['rounding_seed']} has no effect with weights={options['weights']!r}; leave it out")


# Of whole numbers, the first that fp32, in which devices have a step's scalars, cannot tell from its neighbours.
_SEEDS = 1 << 24
# What an option means nothing without.
NEEDS = {
    "grad_norm_type": "max_grad_norm",
    "nonfinite_grad_norm": "max_grad_norm",
    "l1_method": "l1",
    "average_decay": "average",
    "average_start": "average",
    "average_every": "average",
    "rounding_seed": "weights",
}


def inherited(options: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """What a group takes of an optimizer's options: not those that belong to an option of which it has a value of its own."""
    return {name: value for name, value in options.items() if name not in group and NEEDS.get(name, name) not in group}


def _check_number(options: Mapping[str, Any], name: str, allowed: str, least: float, most: float = math.inf, finite: bool = False) -> None:
    value = options.get(name)
    if value is None:
        return
    fits = not isinstance(value, bool | str) and isinstance(value, int | float) and least <= value <= most
    if not fits or (finite and math.isinf(value)):
        raise ValueError(f"Invalid {name}: {value!r}; it must be {allowed}")


def _check_whole(options: Mapping[str, Any], name: str, allowed: str, least: int, most: float = math.inf) -> None:
    value = options.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise ValueError(f"Invalid {name}: {value!r}; it must be {allowed}")


def _check_choice(options: Mapping[str, Any], name: str, choices: tuple[Any, ...], allowed: str) -> None:
    value = options.get(name)
    if value is not None and (isinstance(value, bool) or value not in choices):
        raise ValueError(f"Invalid {name}: {value!r}; it must be {allowed}")


def has_stages(group: Group) -> bool:
    """Whether a group asks for anything here; most do not."""
    return not _OPTION_SET.isdisjoint(group) or shrinks(group)


def shrinks(group: Group) -> bool:
    """Whether weight decay is decoupled by a stage and not by the rule, which those of Adam and AdamW do themselves."""
    return "betas" not in group and bool(group.get("decoupled_weight_decay")) and float(group["weight_decay"]) != 0


def counter_of(rule: Rule, group: Group) -> str:
    """State key of the step counter: that of the rule, or "step" if only a stage of the group has to know which step it is; else ""."""
    counts = group.get("average") is not None or group.get("weights") == "stochastic"
    return rule.counter or ("step" if counts else "")


def stage_flags(group: Group) -> int:
    """The stages that a group asks for. Those whose state a parameter does not have are left out there."""
    l1 = float(group.get("l1") or 0)
    subgradient = group.get("l1_method") == "subgradient"
    weights = group.get("weights")
    return (
        CLAMP * (group.get("max_grad_value") is not None or bool(group.get("masked")))  # of parameters without a mask, for the factor
        + SUBGRADIENT * (l1 != 0 and subgradient)
        + ANCHOR * bool(group.get("anchor_decay"))
        + MASK * bool(group.get("masked"))
        + SHRINK * shrinks(group)
        + PROXIMAL * (l1 != 0 and not subgradient)
        + AVERAGE * (group.get("average") is not None)
        + (STOCHASTIC << WEIGHTS.index(weights) if weights is not None else 0)
    )


def stage_constants(group: Group, index: int) -> tuple[float, ...]:
    """What `stage_scalars` takes for group number `index`: numbers."""
    l1 = float(group.get("l1") or 0)
    subgradient = group.get("l1_method") == "subgradient"
    decay = group.get("average_decay")
    limit = group.get("max_grad_value")
    return (
        math.inf if limit is None else float(limit),
        l1 if subgradient else 0.0,
        float(group.get("anchor_decay") or 0),
        float(group["weight_decay"]) if shrinks(group) else 0.0,
        0.0 if subgradient else l1,
        -1.0 if group.get("average") == "swa" else 0.999 if decay is None else float(decay),
        float(group.get("average_start") or 0),
        float(group.get("average_every") or 1),
        float(((group.get("rounding_seed") or 0) + 65537 * index) % _SEEDS),
    )


def stage_scalars(constants, lr, step, factor, select, floor):  # type: ignore[no-untyped-def]
    """What stages compute with. `step` is 1 in the first step. Plain arithmetic, which also compiles to a kernel, as `Rule.scalars`.

    The weight of an average is 1 - decay, or 1 / n for the n-th of equal weights; 1 for the first and 0 where there is none in this step.
    """
    limit, l1, anchor_decay, decoupled_decay, threshold, decay, start, every, seed = constants
    since = step - start - 1
    number = floor(since / every)
    weight = select(decay < 0, 1 / (select(since < 0, 0.0, number) + 1), 1 - decay)
    weight = select(number == 0, 1.0, weight)
    weight = select(since < 0, 0.0, select(number * every == since, weight, 0.0))
    return (
        factor,
        limit,
        l1,
        anchor_decay,
        1 - lr * decoupled_decay,
        lr * threshold,
        weight,
        seed,
        step - floor(step / 16777216) * 16777216,
    )


def _select(condition: bool, yes: float, no: float) -> float:
    return yes if condition else no


def stage_scalars_of(group: Group, index: int, step: float, factor: float) -> tuple[float, ...]:
    """The scalars of a step of group number `index`. `factor`: the rule's of the gradient."""
    scalars: tuple[float, ...] = stage_scalars(  # type: ignore[no-untyped-call]
        stage_constants(group, index), float(group["lr"]), step, factor, _select, math.floor
    )
    return scalars


def stage_states(group: Group) -> tuple[str, ...]:
    """Keys of the states that stages of the group use, as the backends take them: mask, anchor, average, companion; "" for none."""
    return (
        MASK_STATE if group.get("masked") else "",
        ANCHOR_STATE if group.get("anchor_decay") else "",
        AVERAGE_STATE if group.get("average") is not None else "",
        COMPANIONS.get(group.get("weights") or "", ""),
    )


def stage_dtypes(group: Group, param: torch.Tensor) -> dict[str, torch.dtype]:
    """The dtypes in which a parameter's states for stages are made, by their keys."""
    short = param.dtype in LOW_PRECISION
    mask, anchor, average, companion = stage_states(group)
    dtypes = {mask: torch.bool, anchor: param.dtype, average: torch.float32 if short else param.dtype}
    if short and companion:
        dtypes[companion] = COMPANION_DTYPES.get(group["weights"], param.dtype)
    return {name: dtype for name, dtype in dtypes.items() if name}


@torch.no_grad()
def new_stage_states(group: Group, param: torch.Tensor, existing: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Those that a parameter does not have yet, in its shape and strides, but for masks. Anchor, average and master are copies of it.

    Raises:
        ValueError: the average would have a weight in its first step that is right only after those that it has missed.
    """
    made: dict[str, torch.Tensor] = {}
    for name, dtype in stage_dtypes(group, param).items():
        if name != MASK_STATE and name not in existing:
            if name == AVERAGE_STATE:
                _check_beginning(group, param, existing)
            new = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
            made[name] = new.zero_() if name in (COMPANIONS["kahan"], COMPANIONS["split"]) else new.copy_(param)
    return made


def _check_beginning(group: Group, param: torch.Tensor, existing: Mapping[str, Any]) -> None:
    done, start = int(existing.get("step", 0)), group.get("average_start") or 0
    if done > start:
        raise ValueError(
            f"average={group['average']!r} begins after {start} steps (average_start), but a parameter of shape {tuple(param.shape)} has "
            f"done {done} and has no average; set average_start={done} in its group, so that its average begins now"
        )


def check_parameter(group: Group, index: int, flags: int) -> None:
    """Raise ValueError if a parameter of the group cannot have what the group asks for. `flags`: the group's stages."""
    param = group["params"][index]
    if param.is_complex() and (group.get("max_grad_value") is not None or flags & (SUBGRADIENT | PROXIMAL)):
        asked = [f"{name}={group[name]}" for name in ("max_grad_value", "l1") if group.get(name) is not None]
        raise ValueError(
            f"parameter {index} of its group is {param.dtype}, for which {' and '.join(asked)} has no meaning; put it in a group without"
        )
    if flags & STOCHASTIC and param.dtype == torch.float16:
        raise ValueError(
            f"weights='stochastic' cannot be had for parameter {index} of its group, which is float16: it is for bfloat16; "
            "use weights='kahan' or 'master'"
        )
    if flags & SPLIT and param.dtype == torch.float16:
        raise ValueError(
            f"weights='split' cannot be had for parameter {index} of its group: float16 is not the upper half of a float32; "
            "use bfloat16, or weights='master'"
        )


def stages_in_words(group: Group, dtype: torch.dtype) -> tuple[str, ...]:
    """What a group asks for of parameters of a dtype, for people: with every option that is not left out."""
    weights, average = group.get("weights"), group.get("average")
    l1 = group.get("l1")

    def details(*first: str, **names: str) -> str:
        found = [*first, *(f"{words} {group[name]}" for name, words in names.items() if group.get(name) is not None)]
        return f" ({', '.join(found)})" if found else ""

    norm = f"clip by norm {group.get('max_grad_norm')}{details(grad_norm_type='norm type', nonfinite_grad_norm='if it is not finite:')}"
    averages = details(str(average), average_decay="decay", average_start="after step", average_every="every")
    asked = (
        (group.get("max_grad_norm") is not None, norm),
        (group.get("max_grad_value") is not None, f"clip by value {group.get('max_grad_value')}"),
        (bool(l1), f"l1 {l1} ({group.get('l1_method') or 'proximal'})"),
        (bool(group.get("anchor_decay")), f"pull to anchor {group.get('anchor_decay')}"),
        (bool(group.get("masked")), "masks"),
        (shrinks(group), f"decoupled weight decay {group.get('weight_decay')}"),
        (average is not None, f"average{averages}"),
        (weights is not None and dtype in LOW_PRECISION, f"weights {weights}{details(rounding_seed='seed')}"),
    )
    return tuple(words for asks, words in asked if asks)
