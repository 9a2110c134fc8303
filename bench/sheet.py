"""A table as data: what the terminal, the report's page and its files show is written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

STRONG, BAD = "strong", "bad"
_STYLES = {STRONG: "bold", BAD: "red"}


@dataclass(frozen=True)
class Cell:
    """A text, and how it stands out: "", `STRONG` or `BAD`."""

    text: str
    mark: str = ""


@dataclass
class Sheet:
    """A table.

    Attributes:
        title: of the table.
        labels: names of its first columns, which hold words.
        values: names of the others, which hold numbers.
        rows: a cell for each column; a row that is shorter ends early.
        notes: how to read it, a sentence or two each.
        sections: indices of rows after which a line is drawn.
    """

    title: str
    labels: Sequence[str]
    values: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add(self, *cells: Cell | str, end_section: bool = False) -> None:
        """Append a row."""
        if end_section:
            self.sections.add(len(self.rows))
        self.rows.append([Cell(cell) if isinstance(cell, str) else cell for cell in cells])


def to_rich(sheets: Sequence[Sheet]) -> Group:
    """For a terminal: the tables, and below them all notes, each once."""
    shown: list[Table] = []
    for sheet in sheets:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=sheet.title, title_justify="left")
        for name in sheet.labels:
            table.add_column(name, no_wrap=True)
        for name in sheet.values:
            table.add_column(name, justify="right", no_wrap=True)
        for i, row in enumerate(sheet.rows):
            table.add_row(*map(_styled, row), end_section=i in sheet.sections)
        shown.append(table)
    notes = dict.fromkeys(escape(note) for sheet in sheets for note in sheet.notes)
    return Group(*shown, *notes)


def _styled(cell: Cell) -> str:
    text = escape(cell.text)
    return f"[{_STYLES[cell.mark]}]{text}[/]" if cell.mark else text
