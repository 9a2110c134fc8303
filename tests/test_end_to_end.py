"""Whole training steps: what is measured, what is said of those that fail or do not train, and the model in the size of GPT-2."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fused_opt.bench import end_to_end, machine
from fused_opt.bench.char_model import DEMO, GPT2, GPT2_VOCABULARY, CharModel, Size
from fused_opt.bench.end_to_end import OPTIMIZERS, TASKS, Task, measure_task, units
from fused_opt.bench.end_to_end_row import FUSED, OURS, OURS_8BIT, TORCH, TrainingRow, from_record, sheets
from fused_opt.bench.implementations import Implementation
from fused_opt.bench.measure import Effort
from fused_opt.bench.sheet import BAD, Cell, to_rich
from fused_opt.bench.suite import Record, Results, Unit
from fused_opt.bench.worker import WorkerError
from fused_opt.bench.workloads import WORKLOADS

ROUNDS = 3
EFFORT = Effort(budget=1, least=ROUNDS, most=ROUNDS)
# The widths of its matrices are such that the fused steps of torch and ours have the same bits.
SMALL = Task("small", Size(width=64, layers=1, heads=2, context=8), vocabulary=128, batch=4, length=8, lead_in=1, effort=EFFORT)


def made_by(name: str) -> Implementation:
    return Implementation(name.lower(), "torch", {"AdamW": f"worker_programs:{name}"})


def ours() -> Implementation:
    (found,) = (each for each in OPTIMIZERS if each.name == OURS)
    return found


class Inside:
    """A worker that is no process of its own."""

    def __init__(self, threads: int) -> None:
        self.session: dict[str, Any] = {}

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(self.session, *args)
        except Exception as error:
            raise WorkerError(str(error)) from error

    def close(self) -> None:
        self.session.clear()

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> Iterator[None]:
    monkeypatch.setattr(end_to_end, "Worker", Inside)
    threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    gc.enable()


def written_and_read(record: Record, path: Path) -> Record:
    """As the suite keeps it."""
    results = Results({}, {}, path=path)
    results.keep(Unit("training", "small", lambda on_share: record), record, None, 1.0)
    (found,) = Results.read(path).part("training").values()
    return found


def shown(record: Record) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(to_rich(sheets({"small": record})))
    return " ".join(capture.get().split())


@pytest.mark.slow
def test_processes_train_in_turns_and_one_may_crash(tmp_path: Path) -> None:
    shares: list[float] = []
    record = measure_task(SMALL, [made_by("Crashes"), ours()], 1, EFFORT, shares.append)
    crashed, right = from_record(written_and_read(record, tmp_path / "results.json"))
    assert crashed.failure.startswith("crashed: SIGSEGV")
    assert not right.failure
    assert not right.wrong
    assert len(right.seconds) == len(right.optimizer_seconds) == ROUNDS
    assert 0 < right.share < 1
    assert right.first_seconds > 0
    assert right.threads == 1
    assert right.peak_bytes is None or 1e8 < right.peak_bytes < 2e9
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.usefixtures("inside")
def test_everybody_trains_alike_or_is_called_wrong(tmp_path: Path) -> None:
    record = measure_task(SMALL, [*OPTIMIZERS, made_by("Lazy"), made_by("refuse")], 1, EFFORT, lambda share: None)
    rows = {row.optimizer: row for row in from_record(written_and_read(record, tmp_path / "results.json"))}
    assert list(rows) == [TORCH, FUSED, OURS, OURS_8BIT, "lazy", "refuse"]
    assert rows["refuse"].failure == "needs a GPU"
    assert [name for name, row in rows.items() if row.wrong] == ["lazy"]
    trained = [row for row in rows.values() if not row.failure]
    assert len({row.losses[0] for row in trained}) == 1, "they begin with equal weights"
    assert rows[OURS].losses == rows[FUSED].losses, "equal batches, equal bits"
    assert rows["lazy"].losses[0] == rows["lazy"].losses[1] > rows[OURS].losses[1]
    assert {tuple(row.rivals) for row in trained} == {(TORCH, FUSED)}

    text = shown(record)
    loss = f"{rows['lazy'].losses[0]:.4g}"
    assert f"small, 1 thread, lazy, is WRONG: its loss went from {loss} to {loss}, the others' to {rows[OURS].losses[1]:.4g}." in text
    assert "small, 1 thread, refuse, failed: needs a GPU." in text
    parameters = sum(param.numel() for param in CharModel(128, SMALL.size).parameters())
    assert f"small: {parameters:,} parameters, 32 tokens in a step." in text


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 4_000_000_000)
    monkeypatch.delattr(end_to_end, "Worker")
    record = measure_task(TASKS[1], OPTIMIZERS, 2, EFFORT, lambda share: None)
    assert from_record(record) == []
    assert "gpt2, 2 threads, skipped: 4 processes need 12.0 GB of memory, 4.0 GB are available; end other programs." in shown(record)


def of_losses(**losses: float | None) -> dict[str, TrainingRow]:
    """Rows of optimizers that end with these losses (as JSON has them), and begin with 5."""
    some = {"failure": "", "seconds": [1.0], "optimizer_seconds": [0.5], "first_seconds": 1.0, "peak_bytes": None}
    trained = {name.replace("_", " "): {**some, "losses": [5.0, loss]} for name, loss in losses.items()}
    about = {"model": "small", "threads": 1, "tokens": 8, "parameters": 1, "skipped": ""}
    return {row.optimizer: row for row in from_record({**about, "trained": trained})}


@pytest.mark.parametrize(
    ("losses", "wrong"),
    [
        ({"torch": 3.0, "torch_fused": 3.0, "ours": 3.05}, []),
        ({"torch": 3.0, "torch_fused": 3.0, "ours": 3.2}, [OURS]),
        ({"torch": 3.0, "torch_fused": 3.0, "ours": 2.0}, [OURS]),
        ({"torch": 3.0, "torch_fused": None, "ours": 3.0}, [FUSED]),  # not a finite number
        ({"torch": None, "ours": None}, [TORCH, OURS]),
        ({"torch": 5.0, "ours": 5.0}, [TORCH, OURS]),  # nobody has learnt
    ],
)
def test_what_is_wrong(losses: dict[str, float | None], wrong: list[str]) -> None:
    rows = of_losses(**losses)
    assert [name for name, row in rows.items() if row.wrong] == wrong
    assert all(set(row.rivals) == {TORCH, FUSED} & set(rows) - set(wrong) for row in rows.values())


def test_figures_of_a_row() -> None:
    times = {TORCH: [8.0, 9.0, 4.0], FUSED: [2.0, 3.0, 3.0]}
    row = TrainingRow("demo", OURS, 2, 1024, 10, "", [2.0, 3.0, 4.0], [1.0, 1.0, 1.0], 5.0, (4.0, 3.0), 300_000_000, 3.0, times)
    assert (row.step.median, row.optimizer_step.median, row.tokens_per_second) == (3.0, 1.0, 1024 / 3)
    assert row.share == pytest.approx(1 / 3)
    over_torch, over_fused = row.speed_up(TORCH), row.speed_up(FUSED)
    assert over_torch
    assert over_fused
    assert (over_torch.low, over_torch.median, over_torch.high) == (1.0, 3.0, 4.0)
    assert over_fused.median == 1.0
    assert row.speed_up("foreach") is None
    assert TrainingRow("demo", TORCH, 2, 1024, 10, seconds=[1.0], rivals=times).speed_up(TORCH) is None


def test_sheet() -> None:
    some = {"failure": "", "optimizer_seconds": [0.01, 0.01], "first_seconds": 0.3, "losses": [5.0, 3.0]}
    trained = {
        TORCH: {**some, "seconds": [0.2, 0.2], "peak_bytes": 400_000_000},
        OURS: {**some, "seconds": [0.1, 0.1], "peak_bytes": None},
        OURS_8BIT: {"failure": "no [8] bits"},
    }
    record = {"model": "demo", "threads": 2, "tokens": 1024, "parameters": 1000, "skipped": "", "trained": trained}
    (sheet,) = sheets({"demo 2 threads": record})
    columns = [*sheet.labels, *sheet.values]
    rows = [dict(zip(columns, row, strict=False)) for row in sheet.rows]
    assert [row["optimizer"].text for row in rows] == [TORCH, OURS, OURS_8BIT]
    assert {name: cell.text for name, cell in rows[1].items()} == {
        "model": "demo",
        "threads": "2",
        "optimizer": OURS,
        "step ms": "100.0",
        "tokens/s": "10,240",
        "optimizer ms": "10.00",
        "share": "10.0%",
        "over torch": "2.00 (2.00 to 2.00)",
        "over torch fused": "",
        "first ms": "300",
        "peak MB": "-",
        "loss": "3.0000",
    }
    assert rows[0]["peak MB"].text == "400"
    assert rows[2]["step ms"] == Cell("failed", BAD)
    assert sheet.notes[0] == "demo, 2 threads, ours 8-bit, failed: no [8] bits."
    assert "no [8] bits" in shown(record)
    assert sheet.sections == {2}
    assert sheets({}) == []


def test_units_measure_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def measure(task: Task, optimizers: Any, threads: int, effort: Effort, on_share: Any) -> Record:
        asked.append((task.name, threads, effort.most))
        return {}

    monkeypatch.setattr(end_to_end, "measure_task", measure)
    found = [*units(2, full=True), *units(1, full=False)]
    assert [unit.name for unit in found] == ["demo 2 threads", "gpt2 2 threads", "demo 1 thread"]
    assert {unit.part for unit in found} == {"training"}
    for unit in found:
        assert unit.measure(lambda share: None) == {}
    assert asked == [("demo", 2, 60), ("gpt2", 2, 8), ("demo", 1, 20)]


def test_model_in_the_size_of_gpt2() -> None:
    with torch.device("meta"):
        model = CharModel(GPT2_VOCABULARY, GPT2)
        texts = torch.zeros(2, GPT2.context, dtype=torch.int64)
    published = WORKLOADS["gpt2"]
    shapes = sorted(sorted(param.shape) for param in model.parameters())  # matrices may be transposed
    assert shapes == sorted(map(sorted, published.shapes))
    assert TASKS[1].parameters() == published.elements == 124_439_808
    assert model(texts).shape == (2, GPT2.context, GPT2_VOCABULARY)
    assert model.head.weight is model.token.weight


def test_sizes_of_models() -> None:
    torch.manual_seed(0)
    default = CharModel(100)
    torch.manual_seed(0)
    demo = CharModel(100, DEMO)
    assert all(torch.equal(a, b) for a, b in zip(default.parameters(), demo.parameters(), strict=True))
    tied = CharModel(100, Size(width=64, layers=1, heads=2, context=8, tied=True))
    groups = tied.param_groups(0.1)
    params = [param for group in groups for param in group["params"]]
    assert len({id(param) for param in params}) == len(params) == len(list(tied.parameters()))
    written = tied.continue_from(torch.tensor([1, 2, 3]), 10, seed=0)  # more than its context
    assert written.shape == (13,)
    inputs, targets = torch.randint(100, (2, 8)), torch.randint(100, (2, 8))
    loss = tied.loss(inputs, targets)
    assert math.isclose(loss.item(), math.log(100), rel_tol=0.2)
