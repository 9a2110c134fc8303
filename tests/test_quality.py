"""`fused-opt quality`: what it trains, that only the format of states differs, and how differences are judged."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score
from torch import nn

import fused_opt
from fused_opt import cli
from fused_opt.bench import quality_report, quality_units
from fused_opt.bench.char_model import Corpus
from fused_opt.bench.quality_recipes import DECOUPLED, L2, RECIPES
from fused_opt.bench.quality_report import Comparison, compare
from fused_opt.bench.quality_tasks import FOLDS, TASKS, diabetes, digits
from fused_opt.bench.quality_units import DEFAULT, DEFAULT_OF_WEIGHTS, FORMATS, SHARED, Combination, units
from fused_opt.bench.quality_weights import Format
from fused_opt.bench.sheet import BAD
from fused_opt.bench.speed_plan import AS_TORCH, BF16, INT8, STATES
from fused_opt.bench.training import SCHEDULES, side_by_side, take_turns

BLOCK = 256
SMALL = {"digits": digits, "diabetes": diabetes}


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes most of the time of short trainings."""
    windows = Corpus.held_out_windows
    monkeypatch.setattr(Corpus, "held_out_windows", lambda corpus: [part[:10] for part in windows(corpus)])


def measure(combination: Combination, seeds: int = 1, steps: int = 2, compared: Sequence[Format] = FORMATS) -> dict[str, dict[str, Any]]:
    return {unit.name: unit.measure(lambda share: None) for unit in units([combination], seeds, steps, compared)}


def measure_one(combination: Combination, steps: int = 2, compared: Sequence[Format] = FORMATS) -> dict[str, Any]:
    (record,) = measure(combination, steps=steps, compared=compared).values()
    return record


def command(*arguments: str, file: Path | None = None, status: int = 0) -> dict[str, Any]:
    """The records that it wrote."""
    assert cli.main(["quality", *arguments, *(["--json", str(file)] if file else [])]) == status
    return json.loads(file.read_text())["records"][quality_units.PART] if file and file.exists() else {}


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


def record(
    seed: int, scores: Mapping[str, float | None], optimizer: str = "adamw", schedule: str = "cosine", **more: Any
) -> dict[str, Any]:
    """Of a seed, with one metric."""
    metric = more.pop("metric", "loss")
    curve = {"steps": [2, 4], "losses": [1.0 + seed, 0.5]}
    states = {state: {"scores": {metric: score}, "bytes": 2.0, "narrow": 0.9, "curve": curve} for state, score in scores.items()}
    of_run = {"task": "digits", "decay": "L2", "weight_decay": 0.1, "lr": 0.1, "steps": 4, "folds": 5, "parameters": 1, **more}
    return {**of_run, "optimizer": optimizer, "schedule": schedule, "seed": seed, "states": states}


def of_seeds(exact: Sequence[float], coded: Sequence[float | None], **more: Any) -> dict[str, dict[str, Any]]:
    pairs = enumerate(zip(exact, coded, strict=True))
    return {f"seed {seed}": record(seed, {AS_TORCH: a, INT8: b}, **more) for seed, (a, b) in pairs}


@pytest.mark.parametrize(
    ("coded", "metric", "verdict"),
    [
        ([1.1, 2.1, 3.1], "loss", ""),
        ([2.1, 3.1, 4.1], "loss", "loss with adamw, L2 0.1, cosine: +1.1000, worse"),
        ([0.0, 0.5, 2.0], "loss", "-1.1667, better"),
        ([2.1, 3.1, 4.1], "accuracy", "+1.1000, better"),
        ([1.0, None, 3.0], "loss", "+nan, diverged"),
    ],
)
def test_a_difference_is_judged_by_the_seeds_spread(coded: list[float | None], metric: str, verdict: str) -> None:
    records = of_seeds([1.0, 2.0, 3.0], coded, metric=metric)
    (comparison,) = compare(records.values())
    assert comparison.seeds_spread == 1
    assert comparison.within(INT8) is not bool(verdict)
    (sheet,) = quality_report.sheets(records)
    (row,) = sheet.rows
    assert [cell.text for cell in row[3:6]] == [metric, "2.0000", "1.0000"]
    assert (row[-1].text, row[-1].mark) == (("NO", BAD) if verdict else ("yes", ""))
    named = [note for note in sheet.notes if "by more than another seed does, in 1 of 1 lines" in note]
    assert len(named) == bool(verdict)
    assert all(verdict in note for note in named)


def test_one_seed_decides_nothing() -> None:
    (sheet,) = quality_report.sheets(of_seeds([1.0], [9.0]))
    assert sheet.rows[0][-1].text == "?"
    assert not any("another seed does" in note for note in sheet.notes if "int8 states" in note)


def test_a_comparison_knows_its_differences() -> None:
    comparison = Comparison("task", "adamw", "none", "cosine", "loss", {AS_TORCH: [1.0, 2.0], BF16: [1.5, 2.0], INT8: [1.0, 3.0]})
    assert comparison.formats == [BF16, INT8]
    assert comparison.differences(BF16) == [0.5, 0.0]
    assert comparison.change(INT8) == 0.5


def test_8_bit_states_that_do_not_step_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    step = fused_opt.AdamW.step
    monkeypatch.setattr(fused_opt.AdamW, "step", lambda self: None if self.defaults.get("state_dtype") == "int8" else step(self))
    records = measure(Combination("digits", *SHARED), seeds=2, steps=30)
    for comparison in compare(records.values()):
        assert comparison.within(BF16)
        assert not comparison.within(INT8)
        assert comparison.outside(INT8).endswith("worse")
    (sheet,) = quality_report.sheets(records)
    assert any("int8 states changed by more than another seed does, in 2 of 2 lines" in note for note in sheet.notes)


def test_curves_are_of_all_trainings_the_shared_one_first() -> None:
    records = {
        f"{optimizer} {decay} {schedule} {seed}": record(seed, {AS_TORCH: 1.0, INT8: 2.0}, optimizer, schedule, decay=decay)
        for optimizer, schedule, decay in (("adamw", "cosine", "L2"), ("adamw", "cosine", "none"), (*SHARED, "L2"))
        for seed in range(3)
    }
    found = quality_report.curves(records)
    names = ("adamw", "warm-up"), ("adamw", "cosine"), ("adamw without decay", "cosine")
    expected = [("digits", *name, state) for name in names for state in (AS_TORCH, INT8)]
    assert [(curve.task, curve.optimizer, curve.schedule, curve.state) for curve in found] == expected
    for curve in found:
        assert (curve.steps, curve.mean, curve.low, curve.high) == ([2, 4], [2.0, 0.5], [1.0, 0.5], [3.0, 0.5])


def test_the_command_reports_and_keeps_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = command("characters", "diabetes", "--optimizer", "adamw", "--steps", "3", "--seeds", "2", file=tmp_path / "quality.json")
    assert list(records) == [f"{task} adamw warm-up seed {seed}" for task in ("characters", "diabetes") for seed in range(2)]
    for each in records.values():
        assert set(each["states"]) == {AS_TORCH, BF16, INT8}
        assert (each["steps"], each["optimizer"], each["schedule"]) == (3, "adamw", "warm-up")
    printed = capsys.readouterr().out
    assert "Trained models: characters" in printed
    assert "Trained models: diabetes" in printed
    first, second = (records[f"diabetes adamw warm-up seed {seed}"]["states"][AS_TORCH]["scores"]["MSE"] for seed in range(2))
    assert f" {(first + second) / 2:.4f}  {abs(first - second) / math.sqrt(2):.4f} " in printed
    assert len(quality_report.sheets(records)) == 2, "from the file alone"
    assert len(quality_report.curves(records)) == 6


def test_what_is_trained_can_be_selected(tmp_path: Path) -> None:
    selection = ["--optimizer", "adam", "rmsprop", "--schedule", "step", "--decay", "none", "default", "--state", "int8"]
    records = command("diabetes", *selection, "--steps", "1", "--seeds", "2", file=tmp_path / "quality.json")
    names = [f"diabetes {name}{decay} step" for name in ("adam", "rmsprop") for decay in (" without decay", "")]
    assert list(records) == [f"{name} seed {seed}" for name in names for seed in range(2)]
    assert all(set(each["states"]) == {AS_TORCH, INT8} for each in records.values())


def test_a_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "quality.json"
    arguments = ("diabetes", "--optimizer", "adamw", "--steps", "2")
    real, calls = quality_units._measure, []

    def interrupted_at(count: int) -> None:
        def measure(combination: Combination, seed: int, *rest: Any) -> Any:
            calls.append(seed)
            if len(calls) > count:
                raise KeyboardInterrupt
            return real(combination, seed, *rest)

        calls.clear()
        monkeypatch.setattr(quality_units, "_measure", measure)

    interrupted_at(1)
    first = command(*arguments, "--seeds", "2", file=file, status=130)
    assert [each["seed"] for each in first.values()] == [0]
    printed = capsys.readouterr().out
    assert "1 of 2 are measured" in printed
    assert "Trained models: diabetes" in printed
    interrupted_at(9)
    second = command(*arguments, "--seeds", "3", "--resume", file=file)
    assert calls == [1, 2]
    assert [each["seed"] for each in second.values()] == [0, 1, 2]
    assert second.items() >= first.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume",), "--resume needs the file.*--json FILE"),
        (("--schedule", "sawtooth"), "sawtooth.*constant, step, exponential, linear, cosine, warm-up"),
        (("--decay", "some"), "some.*default, none"),
        (("--state", AS_TORCH), f"{AS_TORCH}.*bfloat16, int8"),
        (("--weights", "truncated"), "truncated.*nearest, stochastic, kahan, split, master"),
        (("--rate", "0"), "'0' is no factor.*greater than 0"),
        (("--optimizer", "lion"), "lion.*adamw, adam, rmsprop, sgd-momentum"),
        (("--seeds", "1"), "1 is out of range.*from 2"),
        (("imagenet",), "imagenet.*characters, digits, diabetes"),
        (("--json", "missing/quality.json"), "there is no folder 'missing'"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = cli.main(["quality", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_run_with_other_steps_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "quality.json"
    before = command("diabetes", "--optimizer", "adamw", "--steps", "1", "--seeds", "2", file=file)
    after = command("diabetes", "--optimizer", "adamw", "--steps", "2", "--seeds", "2", "--resume", file=file, status=2)
    assert after == before
    assert "cannot be resumed: its steps" in capsys.readouterr().err


@pytest.mark.usefixtures("without_the_extension")
def test_without_the_extension_there_is_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    command(status=2)
    why = "8-bit states need the extension, and FUSED_OPT_BACKEND=torch"
    assert why in capsys.readouterr().err
    (unit,) = units()
    records = {unit.name: unit.measure(lambda share: None)}
    (sheet,) = quality_report.sheets(records)
    assert why in sheet.rows[0][0].text
    assert quality_report.curves(records) == []
