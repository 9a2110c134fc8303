"""Pictures of the report: one style for all, as PNG, as SVG, and as SVG within a page, where it takes the page's colours and font."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image  # matplotlib depends on it

from fused_opt.bench.measure import Estimate

# On white. In a page each is a CSS variable of this name, which has another value on black. Every two of the four in the middle differ in
# lightness, too, for those who do not see the hues; against white all have a contrast of 3 or more.
COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d8dee4",
    "paper": "#ffffff",
    "ours": "#0067a5",
    "theirs": "#c75a0a",
    "third": "#007f5f",
    "fourth": "#8b3f8f",
    "rest": "#a3acb6",
}
_PAGE_FONT = "font"  # the CSS variable with the page's

# Inches. On a telephone 360 px wide a picture is shrunk to 328 px, and its letters to 9.
WIDTH = 4.5
ROW = 0.2  # of a bar and the space around it
LONGEST = 36  # letters of a bar's label: half of the width
_DOTS = 200  # an inch of a PNG, twice as many as most screens show
_FONT = "DejaVu Sans"  # comes with matplotlib, and is wider than what browsers take: where it fits, theirs do

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": [_FONT],
    "font.size": 9.2,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.2,
    "xtick.labelsize": 9.2,
    "ytick.labelsize": 9.2,
    "legend.fontsize": 9.2,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.facecolor": COLOURS["paper"],
    "figure.facecolor": COLOURS["paper"],
    "savefig.facecolor": COLOURS["paper"],
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.h_pad": 0.05,
    "text.parse_math": False,  # names may have dollars
    "svg.fonttype": "none",  # letters stay letters
}


@dataclass(frozen=True)
class Picture:
    """A picture that has been drawn.

    Attributes:
        name: of its files, without the ending.
        title: what it shows.
        caption: how to read it, a sentence or two.
        alt: its content in words, for who cannot see it.
        svg: a file's content, with colours of its own.
        png: a file's content.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes

    @classmethod
    def drawn(cls, name: str, title: str, caption: str, alt: str, height: float, draw: Callable[[Figure], None]) -> Picture:
        """`draw` draws on an empty figure `WIDTH` inches wide and `height` inches high. The same calls make the same bytes."""
        with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
            figure = Figure(figsize=(WIDTH, height), dpi=_DOTS, layout="constrained")
            draw(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # it has found its places; it would look for them again for each file
            svg, png = io.StringIO(), io.BytesIO()
            figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            figure.savefig(png, format="png", metadata={"Software": None})
            png = _smaller(png)
        content = re.sub(r"<!DOCTYPE.*?>\n", "", svg.getvalue(), flags=re.DOTALL)
        # Hundredths of a point are enough, and a third of the bytes less. Only within tags: what is between them is text.
        content = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), content)
        return cls(name, title, caption, alt, content, png.getvalue())

    @property
    def inline(self) -> str:
        """The SVG as a part of a page: its colours and font are variables, its names are no other picture's, its width is the page's."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
        used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
        svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{self.name}-{found[1]}"' if found[1] in used else "", svg)
        svg = re.sub(r'(url\(|href=")#', rf"\1#{self.name}-", svg)
        svg = re.sub(rf"'{_FONT}'[^;\"]*", f"var(--{_PAGE_FONT}, sans-serif)", svg)
        for name, colour in COLOURS.items():
            svg = svg.replace(colour, f"var(--{name}, {colour})")
        return svg


def _smaller(png: io.BytesIO) -> io.BytesIO:
    """With a palette, which takes a third of the bytes, and which no eye tells from it."""
    smaller = io.BytesIO()
    Image.open(png).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(smaller, format="png", optimize=True)
    return smaller


def ratio(value: float) -> str:
    """Three digits."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def in_words(values: Mapping[str, str]) -> str:
    """Of a picture's alternative text."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


# What is drawn: a ratio, or why there is none.
Ratios = Mapping[str, Estimate | str]


# Of a logarithmic scale, from dense to sparse.
_MANTISSAS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
_TICKS = (
    [mantissa * 10.0**n for n in range(-3, 5) for mantissa in _MANTISSAS],
    [2.0**n for n in range(-10, 15)],
    [mantissa * 10.0**n for n in range(-3, 5) for mantissa in (1, 3)],
    [10.0**n for n in range(-2, 4)],
)


def ratio_panels(name: str, title: str, caption: str, panels: Mapping[str, Ratios], columns: int) -> Picture:
    """Bars of ratios from the line at 1, on a logarithmic scale, with their confidence intervals.

    Args:
        name, title, caption: of the picture.
        panels: title of a panel -> label of a bar -> its ratio.
        columns: of panels. With several, all panels have the same labels, which stand once in each row of panels.
    """
    shared = list(dict.fromkeys(label for ratios in panels.values() for label in ratios)) if columns > 1 else []
    rows = [list(panels.items())[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len(shared or ratios) for _, ratios in row) for row in rows]
    found = [each for ratios in panels.values() for each in ratios.values() if isinstance(each, Estimate)]
    low, high = min((each.low for each in found), default=1.0), max((each.high for each in found), default=1.0)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for i, axes in enumerate(grid.flat):
            if i >= len(panels):
                axes.remove()
                continue
            row, column = divmod(i, columns)
            panel, ratios = rows[row][column]
            axes.set_title(panel)
            _ratio_axis(axes, low, high, columns)
            _ratio_bars(axes, ratios, shared or list(ratios))
            axes.tick_params(labelleft=column == 0, labelbottom=i + columns >= len(panels))

    alt = "; ".join(f"{panel}: {in_words({label: _in_words(each) for label, each in ratios.items()})}" for panel, ratios in panels.items())
    return Picture.drawn(name, title, caption, alt, ROW * sum(heights) + 0.35 * len(rows) + 0.25, draw)


def _ratio_axis(axes: Axes, low: float, high: float, columns: int) -> None:
    low, high = min(low, 0.9) / 1.05, max(high, 1.5)
    end = high * (high / low) ** (0.16 * columns)  # room for the values
    axes.set_xscale("log")
    axes.set_xlim(low, end)
    ticks = ([value for value in values if low <= value <= high] for values in _TICKS)
    ticks_at(axes, next(found for found in ticks if len(found) <= 6), "{:g}".format)


def _ratio_bars(axes: Axes, ratios: Ratios, labels: Sequence[str]) -> None:
    label_rows(axes, labels)
    axes.axvline(1, color=COLOURS["muted"], linewidth=1)
    for label, each in ratios.items():
        y = labels.index(label)
        if isinstance(each, str):
            write(axes, 1, y, each, color=COLOURS["muted"])
            continue
        axes.barh(y, each.median - 1, left=1, height=0.72, color=COLOURS["ours" if each.median >= 1 else "theirs"])
        interval = [[each.median - each.low], [each.high - each.median]]
        axes.errorbar(each.median, y, xerr=interval, color=COLOURS["ink"], elinewidth=0.9, capsize=1.8, capthick=0.9)
        axes.text(1, y, ratio(each.median), transform=axes.get_yaxis_transform(), ha="right", va="center_baseline")


def _in_words(each: Estimate | str) -> str:
    return each if isinstance(each, str) else f"{ratio(each.median)} ({ratio(each.low)} to {ratio(each.high)})"


# For all that draw:


def write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Beside the end of a bar; `x` and `y` are the end's, in the data's units."""
    axes.annotate(text, (x, y), (3, 0), textcoords="offset points", va="center_baseline", fontsize=8.8, **style)


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """The first on top, no ticks but words, lines only across."""
    axes.set_yticks(range(len(labels)), [label if len(label) <= LONGEST else f"{label[: LONGEST - 3]}..." for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def ticks_at(axes: Axes, values: Iterable[float], form: Callable[[float], str]) -> None:
    """Of the x axis: there and nowhere else; `form` makes their labels."""
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: form(value)))
