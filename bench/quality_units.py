"""What `fused-opt quality` measures, unit by unit: the same training with each format of states, or of weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fused_opt
from fused_opt.bench.quality_recipes import NO_DECAY, RECIPES
from fused_opt.bench.quality_tasks import TASKS, Problem
from fused_opt.bench.quality_weights import Format, formats
from fused_opt.bench.speed_plan import STATES
from fused_opt.bench.suite import OnShare, Record, Unit
from fused_opt.bench.training import SCHEDULES, Training, side_by_side, take_turns
from fused_opt.native import native

PART = "quality"
SEEDS = 3
EXACT = Format()  # what others are compared with
FORMATS = formats(STATES, ())

CURVE_POINTS = 100  # at the most, of a curve of training losses


@dataclass(frozen=True)
class Combination:
    """What is trained, with several seeds.

    Attributes:
        task: a key of `TASKS`.
        optimizer: a key of `RECIPES`.
        schedule: a key of `SCHEDULES`.
        decay: whether the recipe's decay is used; otherwise none is.
        rate: by which the recipe's learning rate is multiplied.
    """

    task: str
    optimizer: str
    schedule: str
    decay: bool = True
    rate: float = 1.0

    def __str__(self) -> str:
        rate = "" if self.rate == 1 else f" rate x {self.rate:g}"
        return f"{self.task} {self.optimizer}{'' if self.decay else ' without decay'} {self.schedule}{rate}"


def combinations(
    tasks: Iterable[str],
    optimizers: Iterable[str],
    schedules: Iterable[str],
    decays: Iterable[bool] = (True,),
    rates: Iterable[float] = (1.0,),
) -> list[Combination]:
    """All of these, each once."""
    selection = itertools.product(tasks, optimizers, schedules, decays, rates)
    return list(dict.fromkeys(Combination(*names) for names in selection))


# Begins with the one that all tasks have. The transformer takes half of the time with this one alone.
SHARED = "adamw", "warm-up"
SMALL_TASKS = [task for task in TASKS if task != "characters"]
DEFAULT = [
    *combinations(TASKS, SHARED[:1], SHARED[1:]),
    *combinations(SMALL_TASKS, ["adamw"], [schedule for schedule in SCHEDULES if schedule != SHARED[1]]),
    *combinations(SMALL_TASKS, [optimizer for optimizer in RECIPES if optimizer != "adamw"], ["cosine"]),
]
# Of formats of weights. The recipe's rate is one for a model of this size; a tenth of it, 3e-4, is what large ones are trained with.
# After 300 steps the characters' loss was 0.148 higher there with weights rounded to the nearest (seeds differ by 0.002), and at the
# recipe's rate 0.026 (seeds differ by 0.022).
DEFAULT_OF_WEIGHTS = combinations(TASKS, SHARED[:1], SHARED[1:], rates=[0.1])


def units(
    selection: Sequence[Combination] = (), seeds: int = SEEDS, steps: int | None = None, formats: Sequence[Format] = FORMATS
) -> list[Unit]:
    """A unit for each seed of each combination; a single one that says why if formats other than torch's cannot be had.

    Args:
        selection: what to train; `DEFAULT` if nothing.
        seeds: how many of each.
        steps: of each training; None: as many as `TASKS` says.
        formats: beside float32 weights with states as in torch.
    """
    if why := why_not():
        return [Unit(PART, "not measured", lambda on_share: {"skipped": why})]

    def unit(combination: Combination, seed: int) -> Unit:
        task = TASKS[combination.task]
        count = steps or task.steps
        measure = functools.partial(_measure, combination, seed, count, (EXACT, *formats))
        return Unit(PART, f"{combination} seed {seed}", measure, seconds=(1 + len(formats)) * count * task.seconds)

    return [unit(combination, seed) for combination in selection or DEFAULT for seed in range(seeds)]


def why_not() -> str:
    """Why states have torch's formats only, or ""."""
    return "" if native().module else f"bfloat16 and 8-bit states need the extension, and {native().why}"


def _measure(combination: Combination, seed: int, steps: int, formats: Sequence[Format], on_share: OnShare) -> Record:
    task, recipe = TASKS[combination.task], RECIPES[combination.optimizer]
    lr, weight_decay = recipe.rates[combination.task]
    lr *= combination.rate
    if not combination.decay:
        weight_decay = 0.0
    problem = task.make()
    optimizers = {str(each): functools.partial(recipe.make, lr=lr, storage=each.options) for each in formats}
    trainings = side_by_side(problem.make_model, seed, weight_decay, optimizers, combination.schedule, steps)
    for training, each in zip(trainings, formats, strict=True):
        training.model = each.stored(training.model)
    held_out: dict[str, list[Record]] = {training.name: [] for training in trainings}
    checks = {max(1, round(steps * (i + 1) / task.checks)) for i in range(task.checks)}
    before_last = {training.name: _values(training) for training in trainings}

    def on_step(done: int) -> None:
        if done == steps - max(1, steps // 10):
            before_last.update((training.name, _values(training)) for training in trainings)
        if done in checks:
            for training in trainings:
                held_out[training.name].append({"step": done, "scores": _scores(problem, training)})
        on_share(done / steps)

    generator = torch.Generator().manual_seed(seed)
    take_turns(trainings, (problem.batch(generator) for _ in range(steps)), on_step)
    return {
        "task": combination.task,
        "optimizer": combination.optimizer,
        "schedule": combination.schedule,
        "decay": recipe.decay if weight_decay else NO_DECAY,
        "weight_decay": weight_decay,
        "lr": lr,
        "rate": combination.rate,
        "seed": seed,
        "steps": steps,
        "folds": problem.folds,
        "parameters": trainings[0].values,
        "states": {
            training.name: {
                "scores": {name: sum(values) / len(values) for name, values in held_out[training.name][-1]["scores"].items()},
                "held_out": held_out[training.name],
                "curve": _thinned(training.losses, problem.folds),
                "moved": (before_last[training.name] != _values(training)).double().mean().item(),
                **_size(training),
            }
            for training in trainings
        },
    }


def _values(training: Training) -> torch.Tensor:
    """A copy of all weights as they are stored, of shape (n,)."""
    return torch.cat([param.detach().flatten() for param in training.model.parameters()])


@torch.no_grad()
def _scores(problem: Problem, training: Training) -> dict[str, list[float]]:
    return problem.scores(training.model)


def _thinned(losses: Sequence[float], folds: int) -> dict[str, list[Any]]:
    """Means of a fold's training loss over windows, and the last step of each."""
    width = -(-len(losses) // CURVE_POINTS)
    windows = [losses[start : start + width] for start in range(0, len(losses), width)]
    ends = list(itertools.accumulate(map(len, windows)))
    return {"steps": ends, "losses": [sum(window) / len(window) / folds for window in windows]}


def _size(training: Training) -> dict[str, float]:
    """By the number of parameters the bytes of all states, and of weights, gradients and states; the share of the states' values that
    are not in float32.
    """
    rows = fused_opt.explain(training.optimizer).rows
    weights = sum(param.nbytes for param in training.model.parameters()) / training.values
    narrow = sum(row.elements for row in rows for _, dtype in row.states if dtype != "float32")
    values = sum(row.elements * len(row.states) for row in rows)
    states = sum(row.state_bytes for row in rows) / sum(row.elements for row in rows)
    return {"bytes": states, "memory": 2 * weights + states, "narrow": narrow / values}
