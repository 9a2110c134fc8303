"""One page with everything that was measured, which needs no network, and its pictures as files."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fused_opt.bench import (
    conformance,
    end_to_end_row,
    passes,
    picture_speed,
    picture_training,
    quality_report,
    quality_units,
    report_headline,
    speed_blocks,
    speed_measure,
    stability,
)
from fused_opt.bench.pictures import COLOURS, Picture
from fused_opt.bench.sheet import BAD, Sheet
from fused_opt.bench.suite import Results

PAGE, RESULTS = "index.html", "results.json"
_TEMPLATE = "report.html"
OPEN_ROWS = 20  # fit on a screen

# part -> title, and what it is about
_PARTS = {
    speed_measure.PART: ("Steps", "What optimizer.step() takes, on tensors with the shapes of real models."),
    speed_blocks.PART: ("Blockwise quantization", "float32 values to 8-bit codes with a scale for each block, and back."),
    passes.PART: (
        "One pass over memory",
        "A step that clips, regularises, masks, averages or keeps weights in 16 bits, beside what a user of torch writes for it.",
    ),
    end_to_end_row.PART: ("Whole training steps", "What a faster optimizer is worth beside a model's forward and backward pass."),
    quality_units.PART: ("Quality of trained models", "What states in fewer bits do to a training, beside what another seed does."),
    conformance.PART: (
        "Conformance",
        "How far every implementation is from torch's formulas in float64, and which options it keeps, refuses or ignores.",
    ),
    stability.PART: ("Stability", "How far two runs agree: a difference smaller than that means nothing."),
    "packages": ("Other packages", "What was there to compare with."),
}


@dataclass
class Section:
    """Of the page.

    Attributes:
        name: in its address.
        title, about: its heading and the sentence below.
        pictures, sheets: what it shows.
    """

    name: str
    title: str
    about: str
    pictures: list[Picture] = field(default_factory=list)
    sheets: Sequence[Sheet] = ()

    def shows(self, sheet: Sheet) -> bool:
        """Whether a table is open from the start: the first one, and short ones with something bad in them."""
        return sheet is self.sheets[0] or (len(sheet.rows) <= OPEN_ROWS and any(cell.mark == BAD for row in sheet.rows for cell in row))

    @property
    def shared_notes(self) -> list[str]:
        """Those of more than one table, which need to be told once only."""
        times = Counter(note for sheet in self.sheets for note in sheet.notes)
        return [note for note, count in times.items() if count > 1]


def write(results: Results, sheets_by_part: Mapping[str, Sequence[Sheet]], folder: Path) -> None:
    """The page, its pictures and the results, as files in `folder`, over those of the same names. The same results make the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(results)
    sections = [
        Section(re.sub(r"\W+", "-", part), *_PARTS.get(part, (part.capitalize(), "")), pictures.get(part, []), sheets)
        for part, sheets in sheets_by_part.items()
    ]
    for picture in (picture for section in sections for picture in section.pictures):
        (folder / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    (folder / PAGE).write_text(_page(results, sections), encoding="utf-8")
    dataclasses.replace(results, path=folder / RESULTS).write()


def _pictures(results: Results) -> dict[str, list[Picture]]:
    """By the part that they belong to."""
    step = picture_training.step_picture(results.part(end_to_end_row.PART))
    return {
        speed_measure.PART: picture_speed.pictures(speed_measure.rows(results.part(speed_measure.PART))),
        end_to_end_row.PART: [step] if step else [],
        quality_units.PART: picture_training.loss_pictures(quality_report.curves(results.part(quality_units.PART))),
    }


def _page(results: Results, sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return (
        environment.get_template(_TEMPLATE).render(
            claims=report_headline.claims(results),
            warning=results.load_warning,
            sections=sections,
            machine=_machine(results),
            colours=COLOURS,
            results_file=RESULTS,
        )
        + "\n"
    )


def _machine(results: Results) -> dict[str, str]:
    """What the results depend on, in words. Packages have their own table."""
    named = {
        "cpu": "CPU",
        "fused_opt": "fused_opt",
        "torch": "torch",
        "python": "Python",
        "isa": "instruction set",
        "why": "chosen because",
    }
    about: dict[str, Any] = {**results.machine, **results.settings}
    if "full" in about:
        about["run"] = "full" if about.pop("full") else "quick"
    return {named.get(key, key): str(value) for key, value in about.items() if not isinstance(value, Mapping)}


def _code(text: str) -> Markup:
    """What stands between backticks becomes code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
