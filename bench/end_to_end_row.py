"""What whole training steps took: rows and their table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fused_opt.bench.measure import Estimate, Spread, paired_ratios
from fused_opt.bench.sheet import BAD, STRONG, Cell, Sheet
from fused_opt.bench.suite import Record

PART = "training"
TORCH, FUSED, OURS, OURS_8BIT = "torch", "torch fused", "ours", "ours 8-bit"
RIVALS = (TORCH, FUSED)

# How far a loss may be from the others', as a share of what was learnt. Seen: 0.0001 with 8-bit states, 1 where steps do nothing.
TOLERATED = 0.05


@dataclass(frozen=True)
class TrainingRow:
    """A model trained by an optimizer.

    Attributes:
        model: its name.
        optimizer: its name, one of those above in a run of the suite.
        threads: torch's.
        tokens: in a step.
        parameters: number of values in them.
        failure: why it was not measured, in words, or "". If there is one, what follows is empty or NaN.
        seconds: of whole steps (zero_grad, forward, backward, optimizer.step), by rounds.
        optimizer_seconds: the part inside of optimizer.step, by rounds.
        first_seconds: of the first step, in which states are made.
        losses: in nats a token on held-out text, before the first step and after the last.
        peak_bytes: of resident memory of the whole process; None where the system does not tell.
        expected_loss: the middle one of the losses with all optimizers, after the last step.
        rivals: `RIVALS` that were measured and are right -> their `seconds`.
    """

    model: str
    optimizer: str
    threads: int
    tokens: int
    parameters: int
    failure: str = ""
    seconds: Sequence[float] = ()
    optimizer_seconds: Sequence[float] = ()
    first_seconds: float = math.nan
    losses: tuple[float, float] = (math.nan, math.nan)
    peak_bytes: int | None = None
    expected_loss: float = math.nan
    rivals: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @cached_property
    def step(self) -> Spread:
        """Seconds of a whole step."""
        return Spread.of(self.seconds)

    @cached_property
    def optimizer_step(self) -> Spread:
        """Seconds in optimizer.step."""
        return Spread.of(self.optimizer_seconds)

    @property
    def tokens_per_second(self) -> float:
        """By the median of the steps."""
        return self.tokens / self.step.median

    @cached_property
    def share(self) -> float:
        """Of a step that is the optimizer's, 0 to 1: the median of the rounds."""
        return statistics.median(own / whole for own, whole in zip(self.optimizer_seconds, self.seconds, strict=True))

    def speed_up(self, over: str) -> Estimate | None:
        """How many times as long as ours a rival's whole step took, in the same round; None if there is none to compare with."""
        if over == self.optimizer or over not in self.rivals or self.failure:
            return None
        return Estimate.of(paired_ratios(self.rivals[over], self.seconds))

    @property
    def wrong(self) -> str:
        """What is wrong with the losses, in words, or "": it did not learn, or not what the others did."""
        if self.failure:
            return ""
        first, last = self.losses
        learnt = first - self.expected_loss
        if last < first and abs(last - self.expected_loss) <= TOLERATED * learnt:
            return ""
        return f"its loss went from {first:.4g} to {last:.4g}, the others' to {self.expected_loss:.4g}"


def from_record(record: Record) -> list[TrainingRow]:
    """A row for each optimizer; none if the model was skipped."""
    about = {name: record[name] for name in ("model", "threads", "tokens", "parameters")}
    trained: Mapping[str, Record] = record["trained"]
    losses = {name: tuple(map(_number, each["losses"])) for name, each in trained.items() if not each["failure"]}
    finite = [last for _, last in losses.values() if math.isfinite(last)]
    expected = statistics.median_low(finite) if finite else math.nan

    def row(name: str, rivals: Mapping[str, Sequence[float]]) -> TrainingRow:
        each = trained[name]
        if each["failure"]:
            return TrainingRow(**about, optimizer=name, failure=each["failure"])
        return TrainingRow(**{**about, **each, "optimizer": name, "losses": losses[name]}, expected_loss=expected, rivals=rivals)

    rivals = {name: trained[name]["seconds"] for name in RIVALS if name in losses and not row(name, {}).wrong}
    return [row(name, rivals) for name in trained]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def sheets(records: Mapping[str, Record]) -> list[Sheet]:
    """One table, with a line for each model and optimizer; none if there are no records."""
    if not records:
        return []
    sheet = Sheet(
        "Whole training steps, AdamW",
        ["model", "threads", "optimizer"],
        ["step ms", "tokens/s", "optimizer ms", "share", *(f"over {rival}" for rival in RIVALS), "first ms", "peak MB", "loss"],
    )
    exceptions, models = [], {}
    for record in records.values():
        name = f"{record['model']}, {in_words(record['threads'])}"
        models[record["model"]] = f"{record['model']}: {record['parameters']:,} parameters, {record['tokens']:,} tokens in a step."
        if record["skipped"]:
            sheet.add(record["model"], str(record["threads"]), Cell("skipped", BAD), end_section=True)
            exceptions.append(f"{name}, skipped: {record['skipped']}.")
        rows = from_record(record)
        for row in rows:
            sheet.add(row.model, str(row.threads), row.optimizer, *_cells(row), end_section=row is rows[-1])
            if row.failure:
                exceptions.append(f"{name}, {row.optimizer}, failed: {row.failure}.")
            elif row.wrong:
                exceptions.append(f"{name}, {row.optimizer}, is WRONG: {row.wrong}.")
    sheet.notes = [
        *exceptions,
        *models.values(),
        "step, optimizer: medians; share: of the step that is the optimizer's; over: how many times as long as this one the whole step of "
        "that one took, median of the rounds and its 95% interval; first: the first step, in which the states are made; peak: resident "
        "memory of the whole process, with Python and torch; loss: in nats on held-out text, after the last step.",
        f"{TORCH}: torch.optim.AdamW without options, which is the for-loop on a CPU. Everybody trains in a process of its own, step by "
        "step in turns, from equal weights and on equal batches.",
        "The optimizer's time does not depend on the number of tokens, the rest of a step does: with more tokens in a step its share is "
        "smaller, and so is what a faster one gains.",
    ]
    return [sheet]


def _cells(row: TrainingRow) -> list[Cell | str]:
    if row.failure:
        return [Cell("failed", BAD)]
    speed_ups = (row.speed_up(rival) for rival in RIVALS)
    return [
        f"{1e3 * row.step.median:.1f}",
        f"{row.tokens_per_second:,.0f}",
        f"{1e3 * row.optimizer_step.median:.2f}",
        f"{row.share:.1%}",
        *(Cell(f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})", STRONG) if found else "" for found in speed_ups),
        f"{1e3 * row.first_seconds:.0f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
        Cell(f"{row.losses[1]:.4f}", BAD if row.wrong else ""),
    ]


def in_words(threads: int) -> str:
    """Such as "2 threads"."""
    return f"{threads} thread{'s'[: threads != 1]}"
