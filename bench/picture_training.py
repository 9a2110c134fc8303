"""Pictures of what was measured of trainings: time of a step, loss curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fused_opt.bench import end_to_end_row
from fused_opt.bench.end_to_end_row import OURS, OURS_8BIT, TrainingRow
from fused_opt.bench.pictures import COLOURS, ROW, WIDTH, Picture, in_words, label_rows, write
from fused_opt.bench.quality_report import Curve
from fused_opt.bench.speed_plan import AS_TORCH, BF16, INT8
from fused_opt.bench.suite import Record

_STATES = {AS_TORCH: ("theirs", "-", "float32 states"), BF16: ("third", (0, (4, 2)), "bfloat16"), INT8: ("ours", (0, (1.5, 1.5)), "8-bit")}


def step_picture(records: Mapping[str, Record]) -> Picture | None:
    """A panel for each model, whose bars are split into the optimizer's time and the rest's. `records` are those of the part "training"."""
    panels: dict[str, list[TrainingRow]] = {}
    for record in records.values():
        for row in end_to_end_row.from_record(record):
            if not row.failure:
                threads = f"{row.threads} thread{'s'[: row.threads != 1]}"
                title = f"{row.model}: {row.parameters / 1e6:.3g}M parameters, {threads}"
                panels.setdefault(title, []).append(row)
    if not panels:
        return None
    heights = list(map(len, panels.values()))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, (title, rows) in zip(grid[:, 0], panels.items(), strict=True):
            axes.set_title(title)
            ends = [1e3 * (_rest(row) + row.optimizer_step.median) for row in rows]
            for y, (row, end) in enumerate(zip(rows, ends, strict=True)):
                rest = 1e3 * _rest(row)
                axes.barh(y, rest, height=0.72, color=COLOURS["rest"])
                axes.barh(y, end - rest, left=rest, height=0.72, color=COLOURS["ours" if row.optimizer in (OURS, OURS_8BIT) else "theirs"])
                write(axes, end, y, f"{row.share:.1%}")
            label_rows(axes, [row.optimizer for row in rows])
            axes.set_xlim(0, max(ends) * (1 + 0.65 / (WIDTH - 1.6)))
        grid[-1, 0].set_xlabel("milliseconds a step")

    caption = (
        "A whole training step with AdamW: forward, backward and all else in grey, the optimizer's step in colour, and its share of the "
        "whole. Medians of the rounds."
    )
    alt = "; ".join(f"{title}: {in_words({row.optimizer: _in_words(row) for row in rows})}" for title, rows in panels.items())
    return Picture.drawn("training", "Whole training steps", caption, alt, ROW * sum(heights) + 0.6 * len(panels) + 0.2, draw)


def _rest(row: TrainingRow) -> float:
    """Seconds of a step that are not the optimizer's; of the medians, so that both add up to what the bar shows."""
    return row.step.median - row.optimizer_step.median


def _in_words(row: TrainingRow) -> str:
    return f"{1e3 * row.step.median:.1f} ms, of which the optimizer takes {row.share:.1%}"


def loss_pictures(curves: Sequence[Curve]) -> list[Picture]:
    """One with the first training of each task, and one for each task with its others."""
    trainings: dict[str, dict[str, list[Curve]]] = {}
    for curve in curves:
        trainings.setdefault(curve.task, {}).setdefault(f"{curve.optimizer}, {curve.schedule}", []).append(curve)
    first = {f"{task}, {name}": found for task, panels in trainings.items() for name, found in list(panels.items())[:1]}
    pictures = [_loss_picture("loss-curves", "Loss curves", first, 1)] if first else []
    for task, panels in trainings.items():
        if others := dict(list(panels.items())[1:]):
            pictures.append(_loss_picture(f"loss-curves-{task}", f"Loss curves: {task}, other optimizers and schedules", others, 2))
    return pictures


def _loss_picture(name: str, title: str, panels: Mapping[str, Sequence[Curve]], columns: int) -> Picture:
    """A panel for each training, with a line for each format of states. With several columns all panels have the same scale."""
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=columns > 1)
        handles = {}
        for i, axes in enumerate(grid.flat):
            if i >= len(panels):
                axes.remove()
                continue
            panel, curves = list(panels.items())[i]
            axes.set_title(panel)
            for curve in curves:
                colour, dashes, label = _STATES[curve.state]
                width = 2.6 if curve.state == AS_TORCH else 1.2
                axes.fill_between(curve.steps, curve.low, curve.high, color=COLOURS[colour], alpha=0.2, linewidth=0)
                handles[label] = axes.plot(curve.steps, curve.mean, color=COLOURS[colour], linestyle=dashes, linewidth=width)[0]
            _loss_axis(axes, curves)
            axes.tick_params(labelbottom=i + columns >= len(panels))
            if i + columns >= len(panels):
                axes.set_xlabel("step")
        figure.supylabel("training loss", fontsize=9.2, color=COLOURS["muted"])
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, handlelength=3)

    caption = (
        "The loss while training: mean over the seeds, and a band from the least to the largest. All formats of states begin with equal "
        "weights and see the same batches. Lines that cannot be told apart are the result."
    )
    alt = "; ".join(
        f"{panel}: {in_words({_STATES[curve.state][2]: f'from {curve.mean[0]:.3g} to {curve.mean[-1]:.3g}' for curve in curves})}"
        for panel, curves in panels.items()
    )
    return Picture.drawn(name, title, caption, alt, (1.5 if columns == 1 else 1.2) * lines + 0.6, draw)


def _loss_axis(axes: Axes, curves: Sequence[Curve]) -> None:
    """Logarithmic where the losses fall by more than a factor of 10."""
    losses = [loss for curve in curves for loss in curve.mean if math.isfinite(loss) and loss > 0]
    if losses and max(losses) > 10 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid()
