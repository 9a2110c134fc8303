"""The case table of what a step does beside its rule (fused_opt/stages.py): options, with the optimizers and dtypes that are tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fused_opt.bench.cases import DTYPES, SHORT_DTYPES, Case

ALL_DTYPES = (*DTYPES, *SHORT_DTYPES)

# Of each optimizer the rule with all its states, decay and the sign turned; the rules alone are the subject of cases.py.
RULES: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.02, "momentum": 0.9, "eps": 1e-4},
    "SGD": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
DECOUPLED = ("RMSprop", "SGD")  # whose weight decay is decoupled by a stage


@dataclass(frozen=True)
class Stages:
    """Options of stages.

    Attributes:
        options: what is given beside the rule's options.
        dtypes: of parameters, for which they are tried.
        optimizers: likewise.
    """

    options: dict[str, Any]
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    optimizers: tuple[str, ...] = tuple(RULES)


# Norms and limits are such that about half of the gradients of `make_problem` are shortened.
CLIPPING: tuple[Stages, ...] = (
    Stages({"max_grad_norm": 1.0}),
    Stages({"max_grad_norm": 0.1, "grad_norm_type": math.inf}),
    Stages({"max_grad_norm": math.inf}),
    Stages({"max_grad_value": 1e-3}),
    Stages({"max_grad_norm": 1.0, "max_grad_value": 1e-3}),
)
REGULARISATION: tuple[Stages, ...] = (
    Stages({"l1": 0.5}),
    Stages({"l1": 0.5, "l1_method": "subgradient"}),
    Stages({"anchor_decay": 0.1}),
    Stages({"decoupled_weight_decay": True, "weight_decay": 0.1}, optimizers=DECOUPLED),
)
AVERAGES: tuple[Stages, ...] = (
    Stages({"average": "ema"}),
    Stages({"average": "ema", "average_decay": 0.3}),  # lerp's other formula, for weights of one half and more
    Stages({"average": "ema", "average_decay": 0.9, "average_start": 2, "average_every": 3}),
    Stages({"average": "swa"}),
    Stages({"average": "swa", "average_start": 3, "average_every": 2}),
)
WEIGHTS: tuple[Stages, ...] = (
    Stages({"weights": "split"}, dtypes=(torch.bfloat16,)),
    Stages({"weights": "master"}, dtypes=SHORT_DTYPES),
    Stages({"weights": "kahan"}, dtypes=SHORT_DTYPES),
    Stages({"weights": "stochastic", "rounding_seed": 3}, dtypes=(torch.bfloat16,)),
)
TOGETHER: tuple[Stages, ...] = (
    Stages({"max_grad_norm": 1.0, "average": "ema", "average_decay": 0.9}),
    Stages({"max_grad_value": 1e-3, "l1": 0.5, "l1_method": "subgradient", "anchor_decay": 0.1, "average": "swa"}),
    *(
        Stages({"max_grad_norm": 1.0, "l1": 0.5, "anchor_decay": 0.1, "average": "ema", "average_decay": 0.9, **weights.options}, dtypes)
        for weights in WEIGHTS
        for dtypes in [weights.dtypes]
    ),
)
STAGES: tuple[Stages, ...] = (*CLIPPING, *REGULARISATION, *AVERAGES, *WEIGHTS, *TOGETHER)


def cases_of(stages: Stages) -> Iterator[Case]:
    """The stages with each of their optimizers."""
    for optimizer in stages.optimizers:
        yield Case(optimizer, {**RULES[optimizer], **stages.options})


# Every one with every optimizer, and the dtypes for which it is tried.
STAGE_CASES: tuple[tuple[Case, tuple[torch.dtype, ...]], ...] = tuple(
    (case, stages.dtypes) for stages in STAGES for case in cases_of(stages)
)


def in_bits(case: Case, dtype: torch.dtype) -> bool:
    """Whether a plain loop gives the bits: the norm of float64 numbers depends in its last ones on the order of summation."""
    return dtype != torch.float64 or case.options.get("max_grad_norm") is None or math.isinf(case.options.get("grad_norm_type", 2))
