"""Bytes a parameter of weights, gradients and states together: for every mode of weights with every format of states, and for others.

Measured, not computed by hand: of the tensors that are there after a step of one parameter.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch

import fused_opt
from fused_opt.bench.cases import Case
from fused_opt.bench.implementations import Implementation, implementations, state_bytes
from fused_opt.bench.sheet import BAD, STRONG, Cell, Sheet
from fused_opt.bench.speed_plan import CONFIGURATIONS, DTYPES
from fused_opt.bench.suite import OnShare, Record, Unit
from fused_opt.bench.worker import Session, Worker, WorkerError
from fused_opt.native import native

# Of the parameter, one of 8-bit states' block sizes many times over.
ELEMENTS = 2**20
# Steps after which weights are compared with those of a training in float32.
STEPS = 3

OPTIMIZERS = ("adamw", "sgd-momentum", "rmsprop")
FORMATS: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8"}  # of our states
# How our weights are kept -> their dtype, and the option.
WEIGHTS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16, nearest": ("bfloat16", None),
    **{f"bfloat16, {mode}": ("bfloat16", mode) for mode in ("stochastic", "kahan", "split", "master")},
}
OURS, PUBLISHED = "ours", "flashoptim, as published"


@dataclass(frozen=True)
class Held:
    """What is held for a parameter.

    Attributes:
        optimizer: a key of `CONFIGURATIONS`.
        implementation: whose: `OURS`, another one's name, or `PUBLISHED`.
        weights: how they are kept: a dtype, and what is done about its rounding.
        states: their format.
        weight_bytes, gradient_bytes, state_bytes: of a parameter.
        released_bytes: of its gradient where steps are taken inside of backward; None if the implementation has nothing for that.
        keeps_float32: whether the weight's value in float32 survives. Ours: whether, after `STEPS` steps, a weight and what is kept beside
            it make the very value that float32 weights have with such states. Others': whether the weights are float32.
        failure: why nothing was measured, or "".
    """

    optimizer: str
    implementation: str
    weights: str
    states: str
    weight_bytes: float = 0.0
    gradient_bytes: float = 0.0
    state_bytes: float = 0.0
    released_bytes: float | None = None
    keeps_float32: bool = False
    failure: str = ""

    @property
    def total(self) -> float:
        """Of weights, gradients and states."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes

    @property
    def released_total(self) -> float | None:
        """The same with steps inside of backward."""
        return None if self.released_bytes is None else self.weight_bytes + self.released_bytes + self.state_bytes


# "AdamW memory from 16 bytes to 7 bytes per parameter, or 5 bytes with gradient release": Gonzalez Ortiz et al., 2026,
# https://arxiv.org/abs/2602.23349. Weights in bfloat16 and 8 bits that make 24 of them; scales of the states are not counted. It quantizes
# on CUDA devices only: elsewhere there is nothing to measure.
FLASHOPTIM = Held("adamw", PUBLISHED, "bfloat16, 24 bits with states", "int8", 2.0, 2.0, 3.0, released_bytes=0.0)


@dataclass(frozen=True)
class Peer:
    """Another implementation in one of its modes.

    Attributes:
        name: of an implementation.
        dtype: of the weights, a key of `DTYPES`.
        states: what they are called.
        mode: what it does about rounding of 16-bit weights.
        options: that make it do so.
        releases: whether it has a way to step inside of backward.
    """

    name: str
    dtype: str
    states: str
    mode: str = "nearest"
    options: tuple[tuple[str, Any], ...] = ()
    releases: bool = False

    @property
    def weights(self) -> str:
        """As in `Held`."""
        return self.dtype if self.dtype == "float32" else f"{self.dtype}, {self.mode}"


_STOCHASTIC = (("bf16_stochastic_round", True),)
PEERS = (
    Peer("fused", "float32", "float32"),
    Peer("fused", "bfloat16", "bfloat16"),
    Peer("bitsandbytes", "float32", "float32"),
    Peer("bitsandbytes", "bfloat16", "float32"),
    Peer("bitsandbytes 8-bit", "float32", "int8"),
    Peer("bitsandbytes 8-bit", "bfloat16", "int8"),
    *(
        peer
        for bits, states in (("8-bit", "int8"), ("fp8", "float8"), ("4-bit", "int4"))
        for peer in (
            Peer(f"torchao {bits}", "float32", states),
            Peer(f"torchao {bits}", "bfloat16", states, "stochastic", _STOCHASTIC),
        )
    ),
    Peer("torch-optimi", "float32", "float32", releases=True),
    Peer("torch-optimi", "bfloat16", "bfloat16", "kahan", (("kahan_sum", True),), releases=True),
)


def units(part: str, with_peers: bool) -> list[Unit]:
    """One, of ours and torch's; and of the packages that are installed, if `with_peers`."""

    def measure(on_share: OnShare) -> Record:
        peers = [peer for peer in PEERS if with_peers or implementations()[peer.name].package == "torch"]
        return {"held": [asdict(each) for each in [*ours(), *others(peers), FLASHOPTIM]]}

    return [Unit(part, f"{UNIT}{' with other packages' if with_peers else ''}", measure, seconds=30 if with_peers else 2)]


UNIT = "bytes a parameter"


def from_record(record: Record) -> list[Held]:
    """What was measured."""
    return [Held(**each) for each in record["held"]]


def ours(elements: int = ELEMENTS) -> list[Held]:
    """Every combination."""
    found = []
    for optimizer in OPTIMIZERS:
        for weights, (dtype, mode) in WEIGHTS.items():
            for states in FORMATS:
                try:
                    found.append(_ours(optimizer, weights, dtype, mode, states, elements))
                except ValueError as error:
                    found.append(Held(optimizer, OURS, weights, states, failure=str(error)))
    return found


def _ours(optimizer: str, weights: str, dtype: str, mode: str | None, states: str, elements: int) -> Held:
    if native().module is None and (mode or states == "int8"):
        raise ValueError(f"needs the extension, and {native().why}")
    case, options = CONFIGURATIONS[optimizer], {"state_dtype": FORMATS[states]}
    make = getattr(fused_opt, case.optimizer)

    def made(dtype: str, **more: Any) -> tuple[torch.nn.Parameter, Any]:
        param = torch.nn.Parameter(_values(elements)[0].to(DTYPES[dtype]))
        return param, make([param], **case.options, **options, **more)

    param, stepper = made(dtype, **({"weights": mode} if mode else {}))
    exact, in_float32 = made("float32")
    _step(param, stepper, elements, STEPS)
    _step(exact, in_float32, elements, STEPS)
    keeps = torch.equal(stepper.float32_weights()[param], exact)
    held = _held(optimizer, OURS, weights, states, param, stepper)
    with fused_opt.step_in_backward([param], stepper):
        torch.autograd.backward((param * param.detach()).sum())
        released = 0 if param.grad is None else param.grad.nbytes
    return replace(held, keeps_float32=keeps, released_bytes=released / elements)


@cache
def _values(elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and gradients that bfloat16 has."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.empty(elements).normal_(0, 0.02, generator=generator)
    return weights.bfloat16(), torch.empty(elements).normal_(generator=generator).bfloat16()


def _step(param: torch.nn.Parameter, optimizer: torch.optim.Optimizer, elements: int, steps: int) -> None:
    param.grad = _values(elements)[1].to(param.dtype)
    for _ in range(steps):
        optimizer.step()


def _held(
    optimizer: str, implementation: str, weights: str, states: str, param: torch.nn.Parameter, stepper: torch.optim.Optimizer
) -> Held:
    assert param.grad is not None
    sizes = [each / param.numel() for each in (param.nbytes, param.grad.nbytes, state_bytes(stepper))]
    return Held(optimizer, implementation, weights, states, sizes[0], sizes[1], sizes[2], keeps_float32=param.dtype == torch.float32)


def others(peers: Iterable[Peer], elements: int = ELEMENTS) -> list[Held]:
    """With AdamW: torch's here, those of each other package in a process of its own; once that has failed, so do the rest of them."""
    found = []
    known = implementations()
    for package, of_package in itertools.groupby(peers, lambda peer: known[peer.name].package):
        with contextlib.ExitStack() as stack:
            worker = None
            for peer in of_package:
                failure = known[peer.name].missing
                try:
                    if package == "torch":
                        found.append(_peer(known[peer.name], peer, elements))
                    elif not failure:
                        worker = worker or stack.enter_context(Worker(1))
                        found.append(worker.call(_elsewhere, known[peer.name], peer, elements))
                except WorkerError as error:
                    failure = str(error)
                if failure:
                    found.append(Held("adamw", peer.name, peer.weights, peer.states, failure=failure))
    return found


def _elsewhere(session: Session, implementation: Implementation, peer: Peer, elements: int) -> Held:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torchao compiles its step, which changes no size
    return _peer(implementation, peer, elements)


def _peer(implementation: Implementation, peer: Peer, elements: int) -> Held:
    param = torch.nn.Parameter(_values(elements)[0].to(DTYPES[peer.dtype]))
    stepper = replace(implementation, options={**implementation.options, **dict(peer.options)}).make(Case("AdamW"), [param])
    _step(param, stepper, elements, 1)
    held = _held("adamw", peer.name, peer.weights, peer.states, param, stepper)
    return replace(held, released_bytes=0.0 if peer.releases else None)


def sheets(measured: Sequence[Held]) -> list[Sheet]:
    """A table for each optimizer; the first has others, too."""
    return [_sheet(optimizer, of_one) for optimizer in OPTIMIZERS if (of_one := [each for each in measured if each.optimizer == optimizer])]


def _sheet(optimizer: str, measured: Sequence[Held]) -> Sheet:
    columns = ["weights", "gradients", "states", "sum", "in backward", "float32 kept"]
    result = Sheet(f"Bytes a parameter: {optimizer}", ["implementation", "weights in", "states in"], columns)
    for each, following in zip(measured, [*measured[1:], None], strict=True):
        last = following is not None and OURS in (each.implementation, following.implementation) and each.weights != following.weights
        cells = [Cell("not measured", BAD)] if each.failure else _cells(each)
        result.add(_full_name(each.implementation), each.weights, each.states, *cells, end_section=last)
    result.notes = [
        *(f"{each.implementation}, {each.weights}, {each.states}: {each.failure}" for each in measured if each.failure),
        f"Of one parameter of {ELEMENTS:,} values after a step. states: with scales, and with what is kept beside 16-bit weights. in "
        "backward: the sum where gradients are freed as soon as the step has been taken (step_in_backward); - where the implementation "
        "has nothing for that. float32 kept: whether the weight's float32 value survives; ours: compared with a training of float32 "
        f"weights with the same states, bit for bit after {STEPS} steps.",
        "torch's float32 is also what torch.autocast takes, which keeps weights, gradients and states in float32. An average of the "
        "weights (4 bytes) and a mask (1 byte) would come on top. float16 takes what bfloat16 does; it cannot be rounded stochastically or "
        "split.",
    ]
    return result


def _cells(each: Held) -> list[Cell | str]:
    sizes = [each.weight_bytes, each.gradient_bytes, each.state_bytes]
    released = each.released_total
    return [
        *(f"{size:.2f}" for size in sizes),
        Cell(f"{each.total:.2f}", STRONG),
        "-" if released is None else f"{released:.2f}",
        "yes" if each.keeps_float32 else "no",
    ]


def _full_name(name: str) -> str:
    implementation = implementations().get(name)
    return f"torch {name}" if implementation and implementation.package == "torch" else name


# A text, or the lines of a table with its header.
Figure = Callable[[], str | list[list[str]]]

# Lines of ours in the README's table.
TOLD = (
    ("float32", "float32"),
    ("float32", "int8"),
    *((f"bfloat16, {mode}", states) for mode in ("stochastic", "kahan", "split", "master") for states in ("bfloat16", "int8")),
)


def figures(measured: Iterable[Held]) -> dict[str, Figure]:
    """See `passes_report.figures`."""
    found: dict[str, Figure] = {}
    lines = [["implementation", "weights in", "states in", "weights", "gradients", "states", "sum", "in backward", "float32 kept"]]
    for each in measured:
        if each.optimizer != "adamw" or each.failure:
            continue
        if each.implementation == OURS:
            name = f"{each.weights.removeprefix('bfloat16, ')}-{each.states}"
            found[f"bytes-{name}"] = partial(format, each.total, ".2f")
            found[f"released-bytes-{name}"] = partial(format, each.released_total, ".2f")
        if each.implementation != OURS or (each.weights, each.states) in TOLD:
            cells = (cell.text if isinstance(cell, Cell) else cell for cell in _cells(each))
            lines.append([_full_name(each.implementation), each.weights, each.states, *cells])
    return {**found, "bytes": lambda: lines} if len(lines) > 1 else found
