"""What the part "passes" of `fused-opt bench` measures, as data: what is done in the same pass as the update, and torch's way to it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_opt.bench import speed_plan
from fused_opt.bench.cases import Case
from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED
from fused_opt.bench.implementations import implementations
from fused_opt.bench.speed_plan import AS_TORCH, CONFIGURATIONS, INT8
from fused_opt.bench.speed_row import FOR_LOOP, FUSED
from fused_opt.bench.workloads import WORKLOADS, Workload

FLOAT32 = "float32"
STATES = {**speed_plan.STATES, FLOAT32: {"state_dtype": torch.float32}}

# Gradients are 1 to 2 in magnitude. What a step would do without its pass must be far from what it does with it, or nobody could tell
# them apart: hence a pull and a penalty of the gradient's own size, and an average that forgets more quickly than the usual 0.999.
MAX_NORM, MAX_VALUE, L1, ANCHOR_DECAY, AVERAGE_DECAY = 1.0, 1.5, 1.0, 10.0, 0.99
PRUNED = 0.0135  # a weight of such magnitude; of normal ones of 0.02, half are smaller

# The compared steps' gradients are this many times the workload's: Adam does not see a factor that stays, such as that of clipping.
FACTORS = (1.0, 4.0, 0.25)
assert len(FACTORS) == COMPARED_STEPS

# torch adds up the norm in float32: that of gpt2's gradients is 2.4e-4 too small, and so SGD's steps too long.
NORM_DETOUR = 1e-3
# With bfloat16 weights: what states of less precision cost. Seen: 0.0012 in bfloat16, 0.016 in 8 bits. Weights rounded to the nearest, with
# nothing kept beside them, cost 0.077.
STATE_DETOURS = {FLOAT32: 0.0, AS_TORCH: 0.01, INT8: 0.05}


@dataclass(frozen=True)
class Pass:
    """What is done beside the update.

    Attributes:
        options: those of ours that do it; `masks` is none, but says that there are some.
        torchs: the same in torch: what is called before its step, and after it, keys of `passes.AROUND`.
        dtype: of our weights and gradients, a key of `speed_plan.DTYPES`. torch's are float32.
    """

    options: dict[str, Any]
    torchs: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    dtype: str = "float32"

    def in_words(self, step: str) -> str:
        """What torch's user calls. `step` is torch's implementation."""
        before, after = self.torchs
        return " + ".join([*before, f"{step} step", *after])


CLIP, CLIP_INF, CLIP_VALUE = "clip_grad_norm_", "clip_grad_norm_(norm_type=inf)", "clip_grad_value_"
PULL, SHRINK, PRUNE, AVERAGE = "grad.add_(param - anchor)", "softshrink", "param.mul_(mask)", "AveragedModel.update_parameters"
_NORM, _EMA = {"max_grad_norm": MAX_NORM}, {"average": "ema", "average_decay": AVERAGE_DECAY}

PASSES: dict[str, Pass] = {
    "clip": Pass(_NORM, ((CLIP,), ())),
    "clip-inf": Pass({**_NORM, "grad_norm_type": math.inf}, ((CLIP_INF,), ())),
    "clip-value": Pass({"max_grad_value": MAX_VALUE}, ((CLIP_VALUE,), ())),
    "ema": Pass(_EMA, ((), (AVERAGE,))),
    "clip-ema": Pass({**_NORM, **_EMA}, ((CLIP,), (AVERAGE,))),
    "anchor": Pass({"anchor_decay": ANCHOR_DECAY}, ((PULL,), ())),
    "l1": Pass({"l1": L1}, ((), (SHRINK,))),
    "masks": Pass({"masks": PRUNED}, ((), (PRUNE,))),
    **{name: Pass({"weights": name}, dtype="bfloat16") for name in ("stochastic", "kahan", "split", "master")},
}


@dataclass(frozen=True)
class PassJob:
    """A row to measure.

    Attributes:
        workload: the tensors' shapes.
        configuration: a key of `CONFIGURATIONS`.
        what: a key of `PASSES`.
        state: the format of our states, a key of `STATES`. torch's are float32.
        threads: of both; 0 for torch's default.
    """

    workload: Workload
    configuration: str
    what: str
    state: str = AS_TORCH
    threads: int = 0

    @property
    def case(self) -> Case:
        """The optimizer and its options."""
        return CONFIGURATIONS[self.configuration]

    @property
    def row(self) -> Pass:
        """What is done."""
        return PASSES[self.what]

    @property
    def step(self) -> str:
        """torch's fused implementation where it has one, else what its users get."""
        return FUSED if implementations()[FUSED].offers(self.case) else FOR_LOOP

    @property
    def detour(self) -> float:
        """How far the two may be apart: first, as a share of their way."""
        if self.row.dtype == "float32":
            return NORM_DETOUR if "max_grad_norm" in self.row.options else 0.0
        return STATE_DETOURS[self.state]

    @property
    def rounding(self) -> float:
        """Second, as a share of a parameter's magnitude. bfloat16 is off by less than eps a step when rounded stochastically; what Kahan's
        compensation, half of that at the most, leaves out in bfloat16 is eps / 2 of it."""
        eps = torch.finfo(torch.bfloat16).eps
        stored = {"stochastic": eps, "kahan": eps**2 / 4}.get(self.what, 0.0)
        return COMPARED_STEPS * stored + TOLERATED * torch.finfo(torch.float32).eps

    def __str__(self) -> str:
        words = [self.workload.name, self.configuration, self.what]
        if self.state != AS_TORCH:
            words.append(f"{self.state} states")
        if self.threads:
            words.append("1 thread" if self.threads == 1 else f"{self.threads} threads")
        return " ".join(words)


def _jobs(workloads: Iterable[str], configuration: str, passes: Iterable[str], states: Iterable[str] = (AS_TORCH,)) -> list[PassJob]:
    return [PassJob(WORKLOADS[name], configuration, what, state) for name in workloads for state in states for what in passes]


_IN_FLOAT32 = [name for name, each in PASSES.items() if each.dtype == "float32"]
_IN_BFLOAT16 = [name for name, each in PASSES.items() if each.dtype == "bfloat16"]


def every_job(workloads: Sequence[str]) -> list[PassJob]:
    """All that there is to measure on these workloads, what is on the same values together."""
    found: list[PassJob] = []
    for name in workloads:
        found += _jobs([name], "adamw", _IN_FLOAT32)
        found += [job for configuration in ("sgd-momentum", "rmsprop") for job in _jobs([name], configuration, ["clip", "ema"])]
        found += [*_jobs([name], "adamw", _IN_BFLOAT16, [AS_TORCH, INT8]), *_jobs([name], "adamw", ["split"], [FLOAT32])]
    return found


FULL_WORKLOADS, QUICK_WORKLOADS = ("gpt2", "mlp"), ("mlp",)
# 3 s.
QUICK_JOBS = [*_jobs(QUICK_WORKLOADS, "adamw", ["clip", "ema"]), *_jobs(QUICK_WORKLOADS, "adamw", ["stochastic"], [INT8])]


def selected(
    jobs: Iterable[PassJob],
    configurations: Collection[str] | None,
    dtypes: Collection[str] | None,
    states: Collection[str] | None,
    threads: Iterable[int],
) -> list[PassJob]:
    """Those that are asked for, None meaning all, each with every number of threads."""
    return [
        replace(job, threads=count)
        for job in jobs
        if (configurations is None or job.configuration in configurations)
        and (dtypes is None or job.row.dtype in dtypes)
        and (states is None or job.state in states)
        for count in threads
    ]
