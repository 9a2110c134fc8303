"""The measurement of memory and time of steps in backward."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_opt.bench import backward, end_to_end
from fused_opt.bench.char_model import Size
from fused_opt.bench.end_to_end import Task
from fused_opt.bench.measure import Effort


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


class Inside:
    """A worker that is no process of its own."""

    def __init__(self, threads: int) -> None:
        self.session: dict[str, Any] = {}

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.session, *args)

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *exception: object) -> None:
        self.session.clear()


def test_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    effort = Effort(budget=1, least=2, most=2)
    small = Task("small", Size(width=16, layers=1, heads=2, context=8), vocabulary=128, batch=4, length=8, lead_in=0, effort=effort)
    monkeypatch.setattr(end_to_end, "Worker", Inside)
    monkeypatch.setattr(backward, "TASKS", (small,))
    with torch.random.fork_rng(devices=[]):
        try:
            status = backward.main(["--model", "small", "--threads", "1", "--json", str(tmp_path / "found.json")])
        finally:
            gc.enable()
    assert status == 0
    trained = json.loads((tmp_path / "found.json").read_text())["trained"]
    assert list(trained) == ["AdamW", "AdamW, in backward", "AdamW8bit", "AdamW8bit, in backward"]
    for name in ("AdamW", "AdamW8bit"):
        assert trained[f"{name}, in backward"]["losses"] == trained[name]["losses"]
        assert trained[name]["losses"][1] < trained[name]["losses"][0]
        assert len(trained[name]["seconds"]) == 2
    assert "WRONG" not in capsys.readouterr().out


def test_what_the_measurement_finds_wrong() -> None:
    some = {"failure": "", "seconds": [0.2, 0.2], "optimizer_seconds": [0.1, 0.1], "first_seconds": 1.0}
    trained = {
        "AdamW": {**some, "losses": [5.0, 3.0], "peak_bytes": 500_000_000},
        "AdamW, in backward": {**some, "losses": [5.0, 3.5], "seconds": [0.1, 0.1], "peak_bytes": 400_000_000},
        "AdamW8bit": {"failure": "no [8] bits"},
    }
    record = {"model": "small", "threads": 2, "tokens": 8, "parameters": 1_000_000, "skipped": "", "trained": trained}
    sheet = backward.sheet(record)
    assert [[cell.text for cell in row] for row in sheet.rows] == [
        ["AdamW", "200.0", "", "500", "", "3.0000"],
        ["AdamW, in backward", "100.0", "2.00 (2.00 to 2.00)", "400", "100", "3.5000"],
        ["AdamW8bit", "failed"],
    ]
    assert sheet.notes[:2] == [
        "AdamW8bit failed: no [8] bits.",
        "AdamW, in backward is WRONG: its loss went from 5.0 to 3.5, not to 3.0.",
    ]
    assert backward.sheet({**record, "trained": {}, "skipped": "too little memory"}).notes[0] == "Skipped: too little memory."
