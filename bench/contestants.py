"""Who is timed: an optimizer of an implementation on copies of a workload's values, in this process or in one of its own."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fused_opt.bench.exact_sample import COMPARED_STEPS, sample_indices, take
from fused_opt.bench.implementations import Implementation, state_bytes
from fused_opt.bench.layouts import LAYOUTS, Layout
from fused_opt.bench.machine import peak_memory
from fused_opt.bench.measure import samplers
from fused_opt.bench.speed_plan import DTYPES, Job
from fused_opt.bench.worker import SETTLE, Session, Worker
from fused_opt.bench.workloads import Workload


@dataclass(frozen=True)
class Tensors:
    """A workload's values, contiguous. `grads` are those of every step."""

    workload: Workload
    params: list[torch.Tensor]
    grads: list[torch.Tensor]

    # Values repeat after this many. A prime: where a gradient is read in another order, equal values do not happen to meet.
    PERIOD = 1_000_003

    @classmethod
    def random(cls, workload: Workload, dtype: str) -> Tensors:
        """The same in every run: normal parameters of usual size; gradients of either sign and of magnitudes 1 to 2.

        Gradients must be as large as that for steps of the default length to be seen in bfloat16, and for their squares to be normal
        numbers in float16.
        """
        generator = torch.Generator().manual_seed(0)
        params = torch.empty(cls.PERIOD).normal_(0, 0.02, generator=generator)
        signs = torch.empty(cls.PERIOD).normal_(generator=generator)
        grads = torch.empty(cls.PERIOD).uniform_(1, 2, generator=generator).copysign(signs)

        def repeated(values: torch.Tensor) -> list[torch.Tensor]:
            values = values.to(DTYPES[dtype])
            sizes = [divmod(math.prod(shape), cls.PERIOD) for shape in workload.shapes]
            flat = [torch.cat([*[values] * times, values[:rest]]) for times, rest in sizes]
            return [tensor.view(shape) for tensor, shape in zip(flat, workload.shapes, strict=True)]

        return cls(workload, repeated(params), repeated(grads))


class Contestant(Protocol):
    """Somebody who is timed. The methods must be called in this order."""

    def compared_steps(self) -> tuple[list[float], torch.Tensor]:
        """Take `COMPARED_STEPS` steps. Returns the seconds of each and what `exact_sample.take` takes of the parameters."""

    def sample(self, repeats: int, lead_in: float | None = None) -> float:
        """Seconds that so many steps in a row take; for `lead_in` see `measure.samplers`."""

    def peak_bytes(self) -> int | None:
        """By how much the process grew at the most during a step; None where the system does not tell."""

    def state_bytes(self) -> int:
        """The size of all states."""


class Here:
    """In this process.

    Args:
        make: gives the optimizer of parameters.
        params: their values, of which copies are made in the layout.
        grads: those of every step, in the layout.

    Attributes:
        optimizer: the one that steps.
        params: its parameters.
    """

    def __init__(
        self,
        make: Callable[[list[torch.nn.Parameter]], Any],
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        layout: Layout,
    ) -> None:
        self.params = [torch.nn.Parameter(layout.parameter(param.clone())) for param in params]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.optimizer = make(self.params)
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take one and remember its time in `seconds`."""
        start = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def compared_steps(self) -> tuple[list[float], torch.Tensor]:
        """See `Contestant`."""
        for _ in range(COMPARED_STEPS):
            self.step()
        return self.seconds, take(self.params, sample_indices(self.params))

    def sample(self, repeats: int, lead_in: float | None = None) -> float:
        """See `Contestant`."""
        (sample,) = samplers({"": self.optimizer.step}, lead_in).values()
        return sample(repeats)

    def peak_bytes(self) -> int | None:
        """See `Contestant`."""
        return peak_memory(self.optimizer.step)

    def state_bytes(self) -> int:
        """See `Contestant`."""
        return state_bytes(self.optimizer)


class Elsewhere:
    """In a process of its own: an implementation on the job's values.

    Raises:
        WorkerError: it cannot be made; so do the methods if something fails.
    """

    def __init__(self, worker: Worker, implementation: Implementation, job: Job) -> None:
        self._call = worker.call
        self._call(_make, implementation, job)

    def compared_steps(self) -> tuple[list[float], torch.Tensor]:
        """See `Contestant`."""
        seconds, values = self._call(_compared_steps)
        return seconds, torch.from_numpy(values)

    def sample(self, repeats: int, lead_in: float | None = None) -> float:
        """See `Contestant`."""
        time.sleep(SETTLE)
        return float(self._call(_sample, repeats, lead_in))

    def peak_bytes(self) -> int | None:
        """See `Contestant`."""
        found: int | None = self._call(_peak_bytes)
        return found

    def state_bytes(self) -> int:
        """See `Contestant`."""
        return int(self._call(_state_bytes))


def _make(session: Session, implementation: Implementation, job: Job) -> None:
    cache = session["cache"] = tempfile.TemporaryDirectory()  # so that first steps compile in every run
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    tensors = Tensors.random(job.workload, job.dtype)
    session["contestant"] = Here(lambda params: implementation.make(job.case, params), tensors.params, tensors.grads, LAYOUTS[job.layout])


def _compared_steps(session: Session) -> tuple[list[float], np.ndarray[Any, Any]]:
    """Tensors would be sent by shared memory, which is gone with the process."""
    seconds, values = session["contestant"].compared_steps()
    return seconds, values.numpy()


def _sample(session: Session, repeats: int, lead_in: float | None) -> float:
    seconds: float = session["contestant"].sample(repeats, lead_in)
    time.sleep(SETTLE)
    return seconds


def _peak_bytes(session: Session) -> int | None:
    found: int | None = session["contestant"].peak_bytes()
    return found


def _state_bytes(session: Session) -> int:
    return int(session["contestant"].state_bytes())
