"""Whole training steps: how long they take, how much of that is the optimizer, and what memory the process needs."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_opt.bench import machine
from fused_opt.bench.cases import Case
from fused_opt.bench.char_model import DEMO, GPT2, GPT2_VOCABULARY, CharModel, Corpus, Size
from fused_opt.bench.end_to_end_row import FUSED, OURS, OURS_8BIT, PART, TORCH, in_words
from fused_opt.bench.implementations import Implementation
from fused_opt.bench.measure import Effort, interleave
from fused_opt.bench.suite import OnShare, Record, Unit
from fused_opt.bench.training import Training
from fused_opt.bench.worker import SETTLE, Session, Worker, WorkerError

CASE = Case("AdamW")
SEED = 0

_NO_STEP = (math.nan, math.nan)

# torch's without options is what a user gets: on a CPU the for-loop.
OPTIMIZERS = (
    Implementation(TORCH, "torch", {"AdamW": "torch.optim:AdamW"}),
    Implementation(FUSED, "torch", {"AdamW": "torch.optim:AdamW"}, {"fused": True}),
    Implementation(OURS, "fused_opt", {"AdamW": "fused_opt:AdamW"}),
    Implementation(OURS_8BIT, "fused_opt", {"AdamW": "fused_opt:AdamW8bit"}),
)


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: of the model.
        size: its size.
        vocabulary: number of tokens that it knows; None: the characters of the corpus. Texts are characters in any case.
        batch, length: a step trains on `batch` texts of `length` tokens.
        lead_in: steps that are not timed before each one that is, because others have used the caches.
        effort: how many rounds.
    """

    name: str
    size: Size
    vocabulary: int | None
    batch: int
    length: int
    lead_in: int
    effort: Effort

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.batch * self.length

    def model(self) -> CharModel:
        """With initial weights from torch's generator."""
        return CharModel(self.vocabulary or len(Corpus().vocabulary), self.size)

    def parameters(self) -> int:
        """The number of values in them, without allocating any."""
        with torch.device("meta"):
            return sum(param.numel() for param in self.model().parameters())


# GPT-2 on 128 tokens, not on its 1024: the time outside of the optimizer grows with them, and a run has to end.
TASKS = (
    Task("demo", DEMO, None, batch=16, length=64, lead_in=1, effort=Effort(budget=12, least=5, most=60)),
    Task("gpt2", GPT2, GPT2_VOCABULARY, batch=1, length=128, lead_in=0, effort=Effort(budget=90, least=3, most=8)),
)
QUICK = Effort(budget=4, least=5, most=20)


def units(threads: int, full: bool) -> list[Unit]:
    """A unit for each model; without `full` only the demo's, with fewer rounds.

    Args:
        threads: torch's in each process.
        full: see above.
    """
    tasks = TASKS if full else TASKS[:1]

    def unit(task: Task) -> Unit:
        effort = task.effort if full else QUICK

        def measure(on_share: OnShare) -> Record:
            return measure_task(task, OPTIMIZERS, threads, effort, on_share)

        return Unit(PART, f"{task.name} {in_words(threads)}", measure, seconds=effort.budget + 20)

    return [unit(task) for task in tasks]


def measure_task(task: Task, optimizers: Sequence[Implementation], threads: int, effort: Effort, on_share: OnShare) -> Record:
    """Train with each optimizer in a process of its own, in turns, from equal weights and on equal batches."""
    parameters = task.parameters()
    record: Record = {"model": task.name, "threads": threads, "tokens": task.tokens, "parameters": parameters, "skipped": "", "trained": {}}
    needed, available = len(optimizers) * needed_bytes(parameters), machine.available_memory()
    if available is not None and needed > available:
        what = f"{len(optimizers)} processes need {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        return {**record, "skipped": f"{what}; end other programs"}
    with contextlib.ExitStack() as stack:
        trainers = [_Trainer(task, each, stack.enter_context(Worker(threads))) for each in optimizers]
        for i, trainer in enumerate(trainers):
            trainer.make()
            on_share(0.2 * (i + 1) / len(trainers))
        for trainer in trainers:  # now that no process is starting any more
            trainer.take_first_step()
        samplers = {trainer.implementation.name: trainer.sample for trainer in trainers}
        samples = interleave(samplers, effort, min_sample=0.0, on_round=lambda share: on_share(0.2 + 0.8 * share))
        record["trained"] = {trainer.implementation.name: trainer.end(len(samples[trainer.implementation.name])) for trainer in trainers}
    return record


def needed_bytes(parameters: int) -> int:
    """About what a process takes that trains a model with so many parameters.

    16 bytes each, for weights, gradients and two states, and for GPT-2 on 128 tokens another quarter for what lives for a while; Python and
    torch with their libraries. Seen: 2.1 to 3.0 GB for GPT-2, 0.46 for the demo.
    """
    return parameters * 20 + 500_000_000


@dataclass
class _Trainer:
    """Somebody who trains, seen from here. Once something has failed, nothing more is tried."""

    task: Task
    implementation: Implementation
    worker: Worker
    first_loss: float = math.nan
    first_seconds: float = math.nan
    steps: list[tuple[float, float]] = field(default_factory=list)  # seconds: of the whole step, of the optimizer's
    failure: str = ""

    def make(self) -> None:
        """Make the model and the optimizer."""
        self.first_loss = self._try(math.nan, _make, self.implementation, self.task)

    def take_first_step(self) -> None:
        """The one in which states are made."""
        self.first_seconds, _ = self._try(_NO_STEP, _take_steps, 1)

    def sample(self, repeats: int) -> float:
        """Take steps of which the last one is timed: once, whatever `repeats`. Returns its seconds."""
        self.steps.append(self._try(_NO_STEP, _take_steps, self.task.lead_in + 1))
        return self.steps[-1][0]

    def end(self, rounds: int) -> Record:
        """What was measured in so many rounds. What came before is for warming up."""
        loss, peak_bytes = self._try((math.nan, None), _end)
        if self.failure:
            return {"failure": self.failure}
        return {
            "failure": "",
            "seconds": [whole for whole, _ in self.steps[-rounds:]],
            "optimizer_seconds": [own for _, own in self.steps[-rounds:]],
            "first_seconds": self.first_seconds,
            "losses": [self.first_loss, loss],
            "peak_bytes": peak_bytes,
        }

    def _try(self, default: Any, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns in the worker, or the default."""
        if not self.failure:
            time.sleep(SETTLE)
            try:
                return self.worker.call(function, *args)
            except WorkerError as error:
                self.failure = str(error)
                self.worker.close()  # others need the memory
        return default


# In the worker:


@dataclass
class _Here:
    task: Task
    corpus: Corpus
    generator: torch.Generator
    training: Training

    def step(self) -> None:
        self.training.step(*self.corpus.batch(self.task.batch, self.generator, self.task.length))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """On as many tokens as a step has."""
        texts = [self.corpus.held_out[start:][: self.task.tokens].view(self.task.batch, self.task.length) for start in (0, 1)]
        return float(self.training.model.loss(*texts).item())


def _make(session: Session, implementation: Implementation, task: Task) -> float:
    """Returns the loss on held-out text."""
    gc.disable()  # a training step leaves nothing to it, and a collection, tens of milliseconds, would be timed with some step
    torch.manual_seed(SEED)
    model = task.model()
    optimizer = implementation.make(CASE, list(model.parameters()))
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    training = Training(implementation.name, model, optimizer, constant)
    session["here"] = here = _Here(task, Corpus(), torch.Generator().manual_seed(SEED), training)
    return here.held_out_loss()


def _take_steps(session: Session, count: int) -> tuple[float, float]:
    """Returns the seconds of the last one, and of the optimizer's part."""
    here: _Here = session["here"]
    for _ in range(count):
        here.step()
    return here.training.seconds[-1], here.training.optimizer_seconds[-1]


def _end(session: Session) -> tuple[float, int | None]:
    """Returns the loss on held-out text and the process's peak memory."""
    here: _Here = session["here"]
    return here.held_out_loss(), machine._size("/proc/self/status", "VmHWM")
