"""Pictures of what was measured of steps: speed-ups, throughput, memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fused_opt.bench.implementations import implementations
from fused_opt.bench.measure import Estimate, Spread
from fused_opt.bench.pictures import COLOURS, ROW, WIDTH, Picture, in_words, label_rows, ratio_panels, ticks_at, write
from fused_opt.bench.speed_plan import AS_TORCH, INT8, QUICK_CONFIGURATIONS, TORCH, Job
from fused_opt.bench.speed_row import OURS, Row, Skipped

_RATIOS = (
    "To the right of the line ours is faster, to the left slower; the scale is logarithmic. Thin lines: 95 % confidence intervals of the "
    "medians of the rounds' ratios."
)
_SIZES = {10**exponent: f"{10 ** (exponent % 3)} {unit}B" for exponent, unit in zip(range(3, 13), "kkkMMMGGGT", strict=True)}


def pictures(rows: Sequence[Row | Skipped]) -> list[Picture]:
    """Those that there is something for."""
    in_torch = [row for row in rows if isinstance(row, Row) and row.job.against == TORCH and row.others]
    plain = [row for row in in_torch if _everyday(row.job)]
    drawn = [
        _speed_ups(
            "speed-ups",
            "Speed-up over torch",
            [row for row in plain if _headlined(row.job)],
            columns=2,
        ),
        _packages([row for row in rows if row.job.against != TORCH]),
        _roofline(plain),
        _memory([row for row in rows if isinstance(row, Row)]),
        _speed_ups(
            "speed-ups-more",
            "Speed-up over torch: other layouts, threads, options and states",
            [row for row in in_torch if not (_everyday(row.job) and _headlined(row.job))],
            columns=1,
        ),
    ]
    return [picture for picture in drawn if picture]


def _everyday(job: Job) -> bool:
    return job.layout == "contiguous" and not job.threads and not job.isa


def _headlined(job: Job) -> bool:
    """Whether it belongs to the first picture, whose panels have a bar for most workloads."""
    return (job.state == AS_TORCH and job.configuration in QUICK_CONFIGURATIONS) or (job.state, job.configuration) == (INT8, "adamw")


def optimizer_name(job: Job) -> str:
    """In words, with its options and our states."""
    options = [name if value is True else f"{name} {value}" for name, value in job.case.options.items()]
    states = {AS_TORCH: [], INT8: ["8-bit states"]}.get(job.state, [f"{job.state} states"])
    return ", ".join([job.case.optimizer, *options, *states])


def _values_name(job: Job) -> str:
    """What differs between rows of an optimizer."""
    words = [job.workload.name]
    if job.dtype != "float32":
        words.append(job.dtype)
    if job.layout != "contiguous":
        words.append(job.layout)
    if job.threads:
        words.append("1 thread" if job.threads == 1 else f"{job.threads} threads")
    if job.isa:
        words.append(job.isa)
    return " ".join(words)


def _speed_ups(name: str, title: str, rows: Sequence[Row], columns: int) -> Picture | None:
    panels: dict[str, dict[str, Estimate | str]] = {}
    for row in rows:
        estimate = "ours is wrong" if OURS in row.wrong else row.speed_ups[row.fastest]
        panels.setdefault(optimizer_name(row.job), {})[_values_name(row.job)] = estimate
    caption = f"A step's time with torch's fastest right implementation over that with ours. {_RATIOS}"
    return ratio_panels(name, title, caption, panels, min(columns, len(panels))) if panels else None


def _packages(rows: Sequence[Row | Skipped]) -> Picture | None:
    """A panel for each optimizer and workload."""
    panels: dict[str, dict[str, Estimate | str]] = {}
    for row in rows:
        name = f"{row.job.case.optimizer}, {_values_name(row.job)}"
        panels.setdefault(name, {})[row.job.against.replace("compiled", "torch compiled")] = (
            "not measured" if isinstance(row, Skipped) else "wrong" if row.wrong else row.speed_ups[row.job.against]
        )
    if not panels:
        return None
    caption = (
        f"A step's time with each over that with ours, both with states of the nearest format. {_RATIOS} The table says why what is not "
        "measured is not."
    )
    return ratio_panels("packages", "Speed-up over other packages", caption, panels, min(2, len(panels)))


def _roofline(rows: Sequence[Row]) -> Picture | None:
    if not rows:
        return None
    limits = Spread.of(values) if (values := [limit for row in rows for limit in row.limits]) else None
    fastest = [(row.step_bytes[row.fastest], row.gb_per_s(row.fastest)) for row in rows]
    ours = [(row.step_bytes[OURS], row.gb_per_s()) for row in rows]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        for theirs, own in zip(fastest, ours, strict=True):
            axes.plot(*zip(theirs, own, strict=True), color=COLOURS["grid"], linewidth=1)
        axes.plot(*zip(*fastest, strict=True), "D", color=COLOURS["theirs"], markersize=4, label="torch's fastest")
        axes.plot(*zip(*ours, strict=True), "o", color=COLOURS["ours"], markersize=5, label="ours")
        if limits:
            axes.axhspan(limits.low, limits.high, color=COLOURS["third"], alpha=0.2, linewidth=0)
            axes.axhline(limits.median, color=COLOURS["third"], linewidth=1.2, label=f"streaming limit, {limits.median:.1f} GB/s")
        _name_workloads(axes, rows)
        axes.set_xlabel("bytes that a step reads and writes")
        axes.set_ylabel("GB/s")
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        sizes = [size for size, _ in (*ours, *fastest)]
        ticks_at(axes, [size for size in _SIZES if min(sizes) / 10 < size < max(sizes) * 10], lambda size: _SIZES[round(size)])
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
        axes.grid()
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.4, borderaxespad=0.1)

    caption = (
        "Throughput of a step by its size, of every optimizer in float32 and 16 bits; pairs are joined. Large steps cannot be faster than "
        "the memory: the line is what this machine streams, with the quartiles of the rounds. Small ones lie above it, because caches "
        "serve them, or below, because starting a step takes longer than it."
    )
    alt = in_words({f"{row.job}": f"{row.gb_per_s():.1f} GB/s" for row in rows})
    limit = f"Streaming limit {limits.median:.1f} GB/s. " if limits else ""
    return Picture.drawn("roofline", "Throughput, and the memory's limit", caption, f"{limit}Ours: {alt}", 3.6, draw)


def _name_workloads(axes: Axes, rows: Sequence[Row]) -> None:
    """Above the axes: each over a line from its smallest step to its largest, in as many lines as it takes that none covers another."""
    sizes: dict[str, list[int]] = {}
    for row in rows:
        sizes.setdefault(row.job.workload.name, []).extend((row.step_bytes[OURS], row.step_bytes[row.fastest]))
    ends: list[float] = []  # of what is in each line, as a power of ten
    for name, found in sorted(sizes.items(), key=lambda item: min(item[1])):
        low, high = math.log10(min(found)), math.log10(max(found))
        middle, half = (low + high) / 2, max(high - low, 0.1 * len(name) + 0.05) / 2
        line = next((i for i, end in enumerate(ends) if end < middle - half), len(ends))
        ends[line : line + 1] = [middle + half]
        y = 1.03 + 0.075 * line
        across = axes.get_xaxis_transform()
        axes.plot([min(found), max(found)], [y, y], transform=across, clip_on=False, color=COLOURS["muted"], linewidth=1)
        axes.text(10**middle, y + 0.01, name, transform=across, ha="center", fontsize=8.5, color=COLOURS["muted"])


def _memory(rows: Iterable[Row]) -> Picture | None:
    """A panel for each optimizer whose implementations differ."""
    found: dict[str, dict[str, tuple[int, float]]] = {}  # the size of the workload decides: on small tensors 8-bit states are fp32
    for row in rows:
        if row.job.dtype != "float32" or not _everyday(row.job):
            continue
        panel = found.setdefault(optimizer_name(row.job).partition(", 8-bit")[0].partition(", bfloat16")[0], {})
        for name in (OURS, *row.others):
            who = _who(name, row.job)
            panel[who] = max((row.job.workload.elements, row.bytes_a_value(name)), panel.get(who, (0, 0.0)))
    panels = {
        title: dict(sorted(((who, size) for who, (_, size) in panel.items()), key=lambda pair: pair[1]))
        for title, panel in found.items()
        if len({round(size, 2) for _, size in panel.values()}) > 1
    }
    return _memory_bars(panels) if panels else None


def _who(name: str, job: Job) -> str:
    known = implementations().get(name)  # not one of a package that only the measuring machine had
    if known and known.package == "torch":
        return "torch"
    if name == OURS and job.state != AS_TORCH:
        return f"{OURS} {'8-bit' if job.state == INT8 else job.state}"
    return name


def _memory_bars(panels: Mapping[str, Mapping[str, float]]) -> Picture:
    most = max(size for panel in panels.values() for size in panel.values())
    heights = list(map(len, panels.values()))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)
        for axes, (title, panel) in zip(grid[:, 0], panels.items(), strict=True):
            axes.set_title(title)
            for y, (who, size) in enumerate(panel.items()):
                axes.barh(y, size, height=0.72, color=COLOURS["ours" if who.startswith(OURS) else "theirs" if who == "torch" else "rest"])
                write(axes, size, y, f"{size:.2f}")
            label_rows(axes, list(panel))
            axes.set_xlim(0, most * (1 + 0.6 / WIDTH))
        grid[-1, 0].set_xlabel("bytes a parameter")

    caption = "The size of all states by the number of parameters, which are float32, on the largest workload that each was measured on."
    alt = "; ".join(f"{title}: {in_words({who: f'{size:.2f}' for who, size in panel.items()})}" for title, panel in panels.items())
    return Picture.drawn("memory", "Memory of the states", caption, alt, ROW * sum(heights) + 0.4 * len(panels) + 0.3, draw)
