"""The README's figures are those of the committed results."""

from __future__ import annotations

import re

import pytest

from fused_opt.bench import figures
from fused_opt.bench.figures import COMMITTED, FIGURE, README, Figures, written
from fused_opt.bench.suite import Results

# Numbers with a point that are no measurements: versions, and arguments of examples are in code.
VERSION = re.compile(r"(?:torch|Triton|Python|Apache-)\s?\d[\d.]*(?: to \d[\d.]*)?|torch==[\d.]+")


def test_every_figure_is_that_of_the_committed_results() -> None:
    text = README.read_text()
    names = [name for _, name, *_ in FIGURE.findall(text)]
    assert {"speed-ups", "packages", "conformance", "quality", "stability", "machine"} <= set(names)
    assert text == written(text, Figures(Results.read(COMMITTED))), "run: python -m fused_opt.bench.figures --write"


def test_no_figure_stands_outside_of_the_comments() -> None:
    """Decimal numbers and percentages in the text are measurements."""
    text = FIGURE.sub("", README.read_text())
    text = re.sub(r"```.*?```|`[^`]*`|\(https?:[^)]*\)", "", text, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+|\d+ ?%", VERSION.sub("", text)) == []


def test_a_figure_that_differs_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    changed = FIGURE.sub(lambda found: f"{found[1]}0.77{found[4]}", text, count=1)
    assert changed != text
    readme = figures.Path(str(tmp_path)) / "README.md"
    readme.write_text(changed)
    monkeypatch.setattr(figures, "README", readme)
    assert figures.main([]) == 1
    assert "--write" in capsys.readouterr().err
    assert figures.main(["--write"]) == 0
    assert readme.read_text() == text
    assert figures.main([]) == 0


def test_a_figure_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(KeyError):
        written("<!-- figure speed-of-light -->1<!-- / -->", Figures(Results.read(COMMITTED)))
    with pytest.raises(KeyError):
        written("<!-- figure permuted -->1<!-- / -->", Figures(Results({}, {})))


def test_the_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README.read_text())
    assert len(pictures) == 2
    assert all((README.parent / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
