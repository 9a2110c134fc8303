"""The optimizer database that torch's own tests are driven by, cut down to our classes.

It is an internal module of the torch wheel, which needs expecttest and numpy. To import it has side effects: it reads sys.argv (torch
2.6), seeds torch's generator, loads a profile of hypothesis, and forbids changes of torch.backends' flags from then on.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch

from helpers import CLASSES

with mock.patch.object(sys, "argv", sys.argv[:1]):
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, optim_db

INFOS: dict[str, OptimizerInfo] = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in CLASSES}
STEP_ERROR = OptimizerErrorEnum.STEP_ERROR


def inputs(name: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The database's arguments for a class, made anew: Tensor arguments are shared by whoever uses them."""
    entries: list[Any] = INFOS[name].optim_inputs_func(device="cpu", dtype=dtype)
    return entries


def options(name: str, index: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    found: dict[str, Any] = inputs(name, dtype)[index].kwargs
    return found


# Name and index of all: to be read with `options`.
CONFIGURATIONS = [pytest.param(name, i, id=f"{name}: {entry.desc}") for name in CLASSES for i, entry in enumerate(inputs(name))]

# Of each class the last one, which has the most options and all states.
RICHEST = [pytest.param(name, len(inputs(name)) - 1, id=f"{name}: {inputs(name)[-1].desc}") for name in CLASSES]
