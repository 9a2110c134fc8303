"""`fused-opt quality`: what it trains, and that only the format of states differs."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score
from torch import nn

from fused_opt.bench import quality_units
from fused_opt.bench.quality_recipes import DECOUPLED, L2, RECIPES
from fused_opt.bench.quality_report import compare
from fused_opt.bench.quality_tasks import FOLDS, TASKS, diabetes, digits
from fused_opt.bench.quality_units import DEFAULT, DEFAULT_OF_WEIGHTS, SHARED, Combination, units
from fused_opt.bench.speed_plan import AS_TORCH, BF16, INT8, STATES
from fused_opt.bench.training import SCHEDULES, side_by_side, take_turns
from quality_runs import BLOCK, SMALL, measure, measure_one

pytestmark = pytest.mark.usefixtures("little_text")


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


# Of a training of 30 steps: the learning rate of step n, counted from 0, by the first one.
CLOSED_FORMS = {
    "constant": lambda n: 1.0,
    "step": lambda n: 0.1 ** (n // 10),
    "exponential": lambda n: 0.01 ** (n / 30),
    "linear": lambda n: 1 - n / 30,
    "cosine": lambda n: cosine(n / 30),
    "warm-up": lambda n: (n + 1) / 4 if n < 3 else cosine((n - 3) / 27),
}


def learning_rates(schedule: str, steps: int) -> list[float]:
    """Of each step, by the first one's, in the loop that all trainings go through; a warning there would be an error."""
    seen = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (self.weight * inputs - targets).square().mean()

        def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
            return [{"params": [self.weight], "weight_decay": weight_decay}]

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(self.param_groups[0]["lr"] / 0.5)
            super().step(closure)

    trainings = side_by_side(Model, 0, 0.0, {"noting": lambda groups: Noting(groups, lr=0.5)}, schedule, steps)
    take_turns(trainings, [(torch.ones(1), torch.ones(1))] * steps)
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_follow_their_closed_forms(name: str) -> None:
    assert learning_rates(name, 30) == pytest.approx([CLOSED_FORMS[name](n) for n in range(30)], rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_defined_for_the_shortest_trainings(name: str) -> None:
    for steps in (1, 2):
        assert all(0 < rate <= 1 for rate in learning_rates(name, steps))


def test_the_default_run_has_every_optimizer_and_every_schedule() -> None:
    assert len(set(DEFAULT)) == len(DEFAULT)
    for task in TASKS:
        assert Combination(task, *SHARED) in DEFAULT
    for task in SMALL:
        assert {each.optimizer for each in DEFAULT if (each.task, each.schedule) == (task, "cosine")} == set(RECIPES)
        assert {each.schedule for each in DEFAULT if (each.task, each.optimizer) == (task, "adamw")} == set(SCHEDULES)
    assert all(set(recipe.rates) == set(TASKS) for recipe in RECIPES.values())
    assert {recipe.decay for recipe in RECIPES.values()} == {DECOUPLED, L2}
    assert len(units()) == len({unit.name for unit in units()}) == 3 * len(DEFAULT)
    assert {each.task for each in DEFAULT_OF_WEIGHTS} == set(TASKS)
    assert DEFAULT_OF_WEIGHTS[0].rate * RECIPES["adamw"].rates["characters"].lr == pytest.approx(3e-4)


@pytest.mark.parametrize(("task", "samples"), [("digits", 1797), ("diabetes", 442)])
def test_folds_are_disjoint_and_complete(task: str, samples: int) -> None:
    problem = SMALL[task]()
    assert sorted(torch.cat([held_out for _, held_out in problem.parts]).tolist()) == list(range(samples))
    for train, held_out in problem.parts:
        assert sorted(torch.cat([train, held_out]).tolist()) == list(range(samples))
    assert len(problem.parts) == problem.folds == FOLDS


def test_digits_folds_have_equal_shares_of_each_class() -> None:
    problem = digits()
    counts = torch.stack([problem.targets[0][held_out].bincount() for _, held_out in problem.parts])
    assert (counts.amax(0) - counts.amin(0)).max() <= 1


def test_batches_are_drawn_from_a_folds_training_part() -> None:
    problem = copy.copy(diabetes())
    numbers = torch.arange(442.0).expand(FOLDS, -1)[..., None]
    problem.inputs = problem.targets = numbers
    seen: list[set[float]] = [set() for _ in range(FOLDS)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        inputs, targets = problem.batch(generator)
        assert torch.equal(inputs, targets)
        for fold, values in enumerate(inputs[..., 0].int().tolist()):
            seen[fold] |= set(values)
    assert seen == [set(train.tolist()) for train, _ in problem.parts]


def test_diabetes_is_standardised_with_the_training_part_only() -> None:
    problem = diabetes()
    raw, progress = load_diabetes(return_X_y=True, scaled=False)
    for fold, (train, _) in enumerate(problem.parts):
        for values, source in ((problem.inputs[fold], raw), (problem.targets[fold], progress[:, None])):
            own = source[train.numpy()]
            expected = (source - own.mean(0)) / own.std(0)
            assert np.allclose(values.numpy(), expected, atol=1e-5)
            assert values[train].mean(0).abs().max() < 1e-5
            assert values.mean(0).abs().max() > 1e-3, "all of the data would have the mean 0"


@pytest.mark.parametrize("task", SMALL)
def test_perceptrons_learn_as_each_would_alone(task: str) -> None:
    problem = SMALL[task]()
    torch.manual_seed(0)
    model: Any = problem.make_model()
    inputs, targets = problem.batch(torch.Generator().manual_seed(0))
    model.loss(inputs, targets).backward()
    for fold in range(FOLDS):
        layers: list[nn.Module] = []
        for matrix, bias in zip(model.matrices, model.biases, strict=True):
            layers.append(nn.Linear(*matrix.shape[1:]))
            layers[-1].load_state_dict({"weight": matrix[fold].T, "bias": bias[fold, 0]})
            layers.append(nn.ReLU())
        alone = nn.Sequential(*layers[:-1])
        problem.criterion(alone(inputs[fold]), targets[fold]).backward()
        for i, (matrix, bias) in enumerate(zip(model.matrices, model.biases, strict=True)):
            torch.testing.assert_close(matrix.grad[fold].T, layers[2 * i].weight.grad)
            torch.testing.assert_close(bias.grad[fold, 0], layers[2 * i].bias.grad)
    others = inputs.clone()
    others[1:] += 1
    gradients = [param.grad[0].clone() for param in model.parameters()]
    model.zero_grad()
    model.loss(others, targets).backward()
    for param, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(param.grad[0], gradient), "a fold's gradient is of its data alone"
        assert not torch.equal(param.grad[1], gradient)


@pytest.mark.parametrize("task", SMALL)
def test_no_block_of_8_bit_states_has_values_of_two_folds(task: str) -> None:
    model = SMALL[task]().make_model()
    optimizer = RECIPES["adamw"].make([{"params": [*model.parameters()]}], 1e-3, STATES[INT8])
    sum(param.sum() for param in model.parameters()).backward()
    optimizer.step()
    coded = [param for param, state in optimizer.state.items() if "exp_avg_scale" in state]
    assert len(coded) >= 2, "the main matrices"
    assert all(param.numel() // FOLDS % BLOCK == 0 for param in coded)


def test_scores_are_those_of_scikit_learn() -> None:
    problem = digits()
    torch.manual_seed(0)
    model: Any = problem.make_model()
    with torch.no_grad():
        scores = problem.scores(model)
        _, labels = load_digits(return_X_y=True)
        for fold, (_, held_out) in enumerate(problem.parts):
            chances = model(problem.inputs)[fold, held_out].double().softmax(1).numpy()
            assert scores["accuracy"][fold] == accuracy_score(labels[held_out.numpy()], chances.argmax(1))
            assert scores["loss"][fold] == pytest.approx(log_loss(labels[held_out.numpy()], chances), rel=1e-5)
        problem = diabetes()
        model = problem.make_model()
        scores = problem.scores(model)
        for fold, (_, held_out) in enumerate(problem.parts):
            found, wanted = model(problem.inputs)[fold, held_out].numpy(), problem.targets[fold, held_out].numpy()
            assert scores["MSE"][fold] == pytest.approx(mean_squared_error(wanted, found), rel=1e-5)
            assert scores["R^2"][fold] == pytest.approx(r2_score(wanted, found), rel=1e-4)


@pytest.mark.parametrize(("task", "optimizer"), [("characters", "adamw"), *itertools.product(SMALL, RECIPES)])
def test_only_the_format_of_states_differs(task: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, batches, schedules and options: without the formats, trainings are equal to the bit."""
    for state in (BF16, INT8):
        monkeypatch.setitem(STATES, state, {})
    states = measure_one(Combination(task, optimizer, "warm-up"), steps=3)["states"]
    assert states[AS_TORCH] == states[BF16] == states[INT8]
    assert len(set(states[AS_TORCH]["curve"]["losses"])) == 3


@pytest.mark.parametrize("task", TASKS)
def test_formats_begin_alike_and_seeds_do_not(task: str) -> None:
    records = list(measure(Combination(task, *SHARED), seeds=2, steps=3).values())
    losses = [{state: found["curve"]["losses"] for state, found in record["states"].items()} for record in records]
    for of_seed in losses:
        assert list(of_seed) == [AS_TORCH, BF16, INT8]
        assert len({each[0] for each in of_seed.values()}) == 1, "equal weights and equal batches"
        assert len({each[-1] for each in of_seed.values()}) > 1, "states of another format"
    assert losses[0][AS_TORCH][0] != losses[1][AS_TORCH][0]
    for state, bytes_a_parameter in ((AS_TORCH, 8), (BF16, 4), (INT8, 2.03)):
        found = records[0]["states"][state]
        assert bytes_a_parameter <= found["bytes"] < bytes_a_parameter + 0.2
        assert (found["narrow"] > 0.97) is (state != AS_TORCH)


@pytest.mark.parametrize(("task", "metric", "least"), [("digits", "accuracy", 0.8), ("diabetes", "R^2", 0.4)])
@pytest.mark.parametrize("optimizer", RECIPES)
def test_recipes_learn(task: str, metric: str, least: float, optimizer: str) -> None:
    """By chance the accuracy is 0.1 and R^2 is 0."""
    record = measure_one(Combination(task, optimizer, "cosine"), steps=60)
    for found in record["states"].values():
        assert found["scores"][metric] > least
        assert found["curve"]["losses"][-1] < 0.8 * found["curve"]["losses"][0]


def test_decay_can_be_left_out() -> None:
    records = [measure_one(Combination("diabetes", "adamw", "cosine", decay), steps=20) for decay in (True, False)]
    assert [(record["decay"], record["weight_decay"]) for record in records] == [("decoupled", 10.0), ("none", 0.0)]
    with_decay, without = (record["states"][AS_TORCH]["scores"]["MSE"] for record in records)
    assert with_decay != without
    assert [row.decay for row in compare(records)] == ["decoupled 10", "decoupled 10", "none", "none"]


def test_curves_are_thinned_to_means_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_units, "CURVE_POINTS", 4)
    thinned = quality_units._thinned([float(n) for n in range(10)], folds=2)
    assert thinned == {"steps": [3, 6, 9, 10], "losses": [0.5, 2.0, 3.5, 4.5]}


def test_held_out_data_is_scored_on_the_way() -> None:
    found = measure_one(Combination("diabetes", *SHARED), steps=10)["states"][INT8]
    assert [check["step"] for check in found["held_out"]] == [2, 4, 6, 8, 10]
    last = found["held_out"][-1]["scores"]
    assert all(len(values) == FOLDS for values in last.values())
    assert found["scores"] == {name: pytest.approx(np.mean(values)) for name, values in last.items()}
