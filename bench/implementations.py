"""Whoever has these optimizers: torch, ours, and other packages where they are installed. A new one is an entry in `IMPLEMENTATIONS`.

A package elsewhere can add its own without a change here: an entry point of the group "fused_opt.bench" that names an `Implementation`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from fused_opt.bench.cases import Case
from fused_opt.bench.speed_plan import AS_TORCH, BF16, INT8

ENTRY_POINTS = "fused_opt.bench"

# What every implementation is given, at torch's defaults where the case does not say: their own defaults differ.
_HYPERPARAMETERS = {
    "Adam": ("lr", "betas", "eps", "weight_decay"),
    "AdamW": ("lr", "betas", "eps", "weight_decay"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay"),
    "SGD": ("lr", "momentum", "weight_decay"),
}


class NotOfferedError(Exception):
    """An implementation has no such optimizer."""


@dataclass(frozen=True)
class Implementation:
    """Optimizers of a package.

    Attributes:
        name: what tables and the command line call it.
        package: to import.
        classes: torch's name of an optimizer -> the module and the class that has it, "bitsandbytes.optim:AdamW8bit".
        options: arguments of all these classes beside those that torch's have.
        own_options: torch's name of an optimizer -> more of them.
        state: format of its states, a key of `speed_plan.STATES`: ours are compared in the nearest one that we have.
        compiled: whether its step is given to torch.compile.
        install: how to get it.
        broken: why it cannot be used though it is there, or "".
    """

    name: str
    package: str
    classes: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    own_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    state: str = AS_TORCH
    compiled: bool = False
    install: str = ""
    broken: str = ""

    @property
    def missing(self) -> str:
        """Why it cannot be used, or "". The package is looked for, not imported."""
        with contextlib.suppress(ModuleNotFoundError):  # of a parent
            if self.broken or importlib.util.find_spec(self.package):
                return self.broken
        return f"not installed; {self.install or f'pip install {self.package}'}"

    @property
    def version(self) -> str:
        """See `version`."""
        return version(self.package)

    def offers(self, case: Case) -> bool:
        """Whether it has the case's optimizer. Which options that takes is seen when it is made."""
        return case.optimizer in self.classes

    def make(self, case: Case, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The case's optimizer, with its options by torch's names. Imports the package.

        Raises:
            NotOfferedError: it has none.
            Exception: whatever the package raises; TypeError for an option that it does not know.
        """
        if not self.offers(case):
            raise NotOfferedError(f"{self.name} has no {case.optimizer}")
        module, _, name = self.classes[case.optimizer].partition(":")
        arguments = {**hyperparameters(case), **case.options, **self.options, **self.own_options.get(case.optimizer, {})}
        optimizer: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(params, **arguments)
        if self.compiled:
            optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign, assignment]
        return optimizer


def hyperparameters(case: Case) -> dict[str, Any]:
    """torch's defaults of the numbers that every implementation knows."""
    parameters = inspect.signature(getattr(torch.optim, case.optimizer)).parameters
    return {name: parameters[name].default for name in _HYPERPARAMETERS[case.optimizer]}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The size of all states of any implementation: what their tensors store, each memory once, step counters left out."""
    stored = {tensor.untyped_storage().data_ptr(): tensor for state in optimizer.state.values() for tensor in _tensors(state)}
    return sum(tensor.untyped_storage().nbytes() for tensor in stored.values() if tensor.dim())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a subclass that wraps others: codes and scales
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _all_of(prefix: str, *names: str) -> dict[str, str]:
    return {name: f"{prefix}{name}" for name in names}


TORCH, OURS = "torch.optim:", "fused_opt:"
ALL = ("Adam", "AdamW", "RMSprop", "SGD")
HAVE_FUSED = tuple(name for name in ALL if "fused" in inspect.signature(getattr(torch.optim, name)).parameters)

_BUILT_IN = (
    Implementation("ours", "fused_opt", _all_of(OURS, *ALL)),
    Implementation("ours bf16", "fused_opt", _all_of(OURS, *ALL), {"state_dtype": torch.bfloat16}, state=BF16),
    Implementation("ours 8-bit", "fused_opt", {name: f"{OURS}{name}8bit" for name in ALL}, state=INT8),
    Implementation("fused", "torch", _all_of(TORCH, *HAVE_FUSED), {"fused": True}),
    Implementation("for-loop", "torch", _all_of(TORCH, *ALL), {"foreach": False}),
    Implementation("foreach", "torch", _all_of(TORCH, *ALL), {"foreach": True}),
    Implementation("compiled", "torch", _all_of(TORCH, *ALL), {"foreach": True}, compiled=True),
    Implementation("bitsandbytes", "bitsandbytes", _all_of("bitsandbytes.optim:", *ALL)),
    Implementation("bitsandbytes 8-bit", "bitsandbytes", {name: f"bitsandbytes.optim:{name}8bit" for name in ALL}, state=INT8),
    Implementation("torchao 8-bit", "torchao", {"Adam": "torchao.optim:Adam8bit", "AdamW": "torchao.optim:AdamW8bit"}, state=INT8),
    Implementation("torchao fp8", "torchao", {"Adam": "torchao.optim:AdamFp8", "AdamW": "torchao.optim:AdamWFp8"}, state=INT8),
    Implementation("torchao 4-bit", "torchao", {"Adam": "torchao.optim:Adam4bit", "AdamW": "torchao.optim:AdamW4bit"}, state=INT8),
    Implementation("torch-optimi", "optimi", _all_of("optimi:", "Adam", "AdamW", "SGD"), install="pip install torch-optimi"),
    Implementation(
        "flashoptim",
        "flashoptim",
        {name: f"flashoptim:Flash{name}" for name in ("Adam", "AdamW", "SGD")},
        state=INT8,
    ),
    Implementation(
        "deepspeed",
        "deepspeed",
        dict.fromkeys(("Adam", "AdamW"), "deepspeed.ops.adam:DeepSpeedCPUAdam"),
        own_options={"Adam": {"adamw_mode": False}},
        install="DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed; it compiles its code when first used",
    ),
    Implementation(
        "apex",
        "apex",
        {"Adam": "apex.optimizers:FusedAdam", "AdamW": "apex.optimizers:FusedAdam", "SGD": "apex.optimizers:FusedSGD"},
        own_options={"Adam": {"adam_w_mode": False}},
        install="from NVIDIA's sources (the package of that name on PyPI is another one); for GPUs only",
    ),
)


@cache
def implementations() -> dict[str, Implementation]:
    """All that are known, installed or not, by name."""
    found = {each.name: each for each in _BUILT_IN}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        each = _plug_in(point)
        found[each.name] = each
    return found


def _plug_in(point: importlib.metadata.EntryPoint) -> Implementation:
    """What the entry point names; one that is broken if that fails."""
    package = point.module.partition(".")[0]
    try:
        each = point.load()
    except Exception as error:  # whatever another package does
        return Implementation(point.name, package, {}, broken=f"{point.value} cannot be loaded: {type(error).__name__}: {error}")
    if not isinstance(each, Implementation):
        return Implementation(point.name, package, {}, broken=f"{point.value} is {each!r}, not a {__name__}.Implementation")
    return each


def version(package: str) -> str:
    """Of the distribution that has an installed package, with its name where that is another (a fork's)."""
    for distribution in _distributions().get(package, []):
        found = importlib.metadata.version(distribution)
        own = distribution.replace("_", "-").lower()
        return found if own in (package, f"torch-{package}") else f"{distribution} {found}"
    return ""


def others() -> list[Implementation]:
    """Those of packages that are neither torch nor ours, installed or not."""
    return [each for each in implementations().values() if each.package not in ("torch", "fused_opt")]


def packages() -> dict[str, str]:
    """Packages of others -> version, or why they cannot be used."""
    return {each.package: each.missing or each.version for each in others()}


@cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
