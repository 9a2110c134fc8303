"""`fused-opt quality`: how differences are judged, and the command."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import fused_opt
from fused_opt import cli
from fused_opt.bench import quality_report, quality_units
from fused_opt.bench.quality_report import Comparison, compare
from fused_opt.bench.quality_units import SHARED, Combination, units
from fused_opt.bench.sheet import BAD
from fused_opt.bench.speed_plan import AS_TORCH, BF16, INT8
from quality_runs import command, measure

pytestmark = pytest.mark.usefixtures("little_text")


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
