"""The report's page and pictures, from results that were made up."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from fused_opt.bench import picture_speed, picture_training, report, report_headline, speed_measure
from fused_opt.bench.coded_sample import CodedErrors
from fused_opt.bench.machine import TOLERATED_LOAD
from fused_opt.bench.measure import Estimate
from fused_opt.bench.pictures import COLOURS, LONGEST, Picture, ratio_panels
from fused_opt.bench.quality_report import Curve
from fused_opt.bench.sheet import BAD, STRONG, Cell, Sheet
from fused_opt.bench.speed_plan import AS_TORCH, INT8, TORCH, Job
from fused_opt.bench.speed_row import FOR_LOOP, FUSED, OURS, PLAIN, Row, Skipped
from fused_opt.bench.suite import Record, Results
from fused_opt.bench.workloads import WORKLOADS

HOSTILE = "</td><script>alert('$1$ & $2$')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "br", "hr", "img", "input", "link"}
ROUNDS = [1.0, 1.1, 0.9]  # times what a step takes


def row(workload: str, configuration: str, times: Mapping[str, float], state: str = AS_TORCH, against: str = TORCH, **others: Any) -> Row:
    """Ours takes a millisecond a step; `times` of others: how many times as long."""
    job = Job(WORKLOADS[workload], "float32", "contiguous", configuration, state, against=against)
    factors = {OURS: 1.0, **times}
    sizes = {name: job.workload.elements * (2 if name == OURS and state == INT8 else 8) for name in factors}
    values: dict[str, Any] = {
        "samples": {name: [1e-3 * factor * share for share in ROUNDS] for name, factor in factors.items()},
        "limits": [12.0, 13.0, 11.0] if workload == "gpt2" else [],
        "errors": dict.fromkeys(factors, 0.5),
        "left_out": [],
        "first_seconds": dict.fromkeys(factors, 2e-3),
        "peak_bytes": dict.fromkeys(factors),
        "state_bytes": sizes,
        "step_bytes": {name: 2 * size + 12 * job.workload.elements for name, size in sizes.items()},
        "coded": {OURS: CodedErrors(0.5, 0.5)} if state == INT8 else {},
        "detours": {OURS: 0.01} if state == INT8 else {},
    }
    return Row(job, **{**values, **others})


def speed_rows() -> list[Row | Skipped]:
    return [
        row("rl", "adamw", {FUSED: 3.0, FOR_LOOP: 9.0}),
        row("gpt2", "adamw", {FUSED: 1.25, FOR_LOOP: 5.0}),
        row("gpt2", "rmsprop", {FOR_LOOP: 4.0}),
        row("gpt2", "adamw", {FUSED: 1.5, PLAIN: 1.2}, INT8),
        row("gpt2", "adam", {FUSED: 0.8}),
        row("gpt2", "adamw", {"bitsandbytes": 6.0}, against="bitsandbytes"),
        Skipped(Job(WORKLOADS["gpt2"], "float32", "contiguous", "adamw", against="apex"), "not installed"),
    ]


def training(seconds: Mapping[str, float]) -> Record:
    trained = {
        name: {
            "failure": "",
            "seconds": [each * share for share in ROUNDS],
            "optimizer_seconds": [0.25 * share for share in ROUNDS],
            "first_seconds": 2.0,
            "losses": [4.0, 2.0],
            "peak_bytes": None,
        }
        for name, each in seconds.items()
    }
    return {"model": "demo", "threads": 1, "tokens": 64, "parameters": 2_000_000, "skipped": "", "trained": trained}


def trained(schedule: str, seed: int) -> Record:
    def state(loss: float) -> Record:
        return {"scores": {"loss": loss}, "curve": {"steps": [5, 10], "losses": [2.0, loss]}, "bytes": 8.0, "narrow": 1.0}

    key = {"task": "digits", "optimizer": "adamw", "schedule": schedule, "decay": "none", "weight_decay": 0.0, "seed": seed, "steps": 10}
    return {**key, "states": {AS_TORCH: state(0.1 + 0.02 * seed), INT8: state(0.105 + 0.02 * seed)}}


def checked(package: str, *ignored: str) -> Record:
    """Of SGD, right but for options that it ignores."""

    def check(option: str) -> Record:
        deviation = {"steps": 1, "ulp_max": 0.0, "ulp_mean": 0.0, "relative": 0.0, "relative_worst": 0.0, "excess": 0.0}
        about = {"optimizer": "SGD", "option": option, "dtype": "float32", "crash": "", "error": "", "left_out": ""}
        verdict = {"as_torch": option not in ignored, "as_without": option in ignored, "effect": 1.0}
        return {**about, **verdict, "deviations": [deviation], "keeps_gradients": True, "state_bytes": 4.0}

    checks = [check(option) for option in ("momentum", "nesterov", "dampening")]
    return {"package": package, "version": "1", "state": AS_TORCH, "note": "", "failure": "", "checks": checks}


def results(rows: Sequence[Row | Skipped], **parts: dict[str, Record]) -> Results:
    about = {"cpu": "a CPU", "cores": 2, "torch": "2.13", "python": "3.11", "fused_opt": "0.1", "isa": "avx2", "why": "so", "packages": {}}
    speed = {str(each.job): each.to_record() for each in rows}
    return Results(about, {"full": True, "threads": 2}, {speed_measure.PART: speed, **parts}, {speed_measure.PART: {"first": 0.01}})


def everything() -> Results:
    return results(
        speed_rows(),
        training={"demo": training({"torch": 1.0, "torch fused": 0.5, "ours": 0.4})},
        conformance={"ours": checked("fused_opt"), "fused": checked("torch", "nesterov"), "a peer": checked("peer", "nesterov")},
        quality={f"{schedule} {seed}": trained(schedule, seed) for schedule in ("cosine", "step") for seed in range(2)},
    )


def sheets() -> dict[str, list[Sheet]]:
    speed = Sheet("A table", ["workload", "optimizer"], ["ms", "speed-up"], notes=["shared: read `it` so", "only here"])
    speed.add("rl", "adamw", "0.123", Cell("1.5", STRONG), end_section=True)
    speed.add("gpt2", "sgd", Cell("skipped", BAD))
    names = "training", "quality", "conformance", "stability", "packages", "of a plug-in"
    return {
        "speed": [speed, Sheet("Another table", ["a"], ["b"], [[Cell("x"), Cell("7.5")]], ["shared: read `it` so"])],
        **{name: [Sheet(f"The table of {name}", ["a"], [], [[Cell(f"of {name}")]])] for name in names},
        "blocks": [Sheet(HOSTILE, [HOSTILE], [HOSTILE], [[Cell(HOSTILE), Cell(HOSTILE, BAD)]], [f"`{HOSTILE}`"])],
    }


class Page(HTMLParser):
    """Elements with their attributes, and text; fails on tags that do not match."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def attributes(self, *names: str) -> list[str]:
        return [value for _, attributes in self.elements for name, value in attributes.items() if name in names and value is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "report"
    report.write(everything(), sheets(), path)
    return path


@pytest.fixture(scope="module")
def content(folder: Path) -> str:
    return (folder / report.PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(content: str) -> Page:
    return Page(content)


def test_page_is_one_document_whose_links_lead_somewhere(page: Page, folder: Path) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags[0] == "html"
    assert page.elements[0][1]["lang"] == "en"
    assert all(tags.count(tag) == 1 for tag in ("title", "h1", "main", "nav"))
    names = page.attributes("id")
    assert len(names) == len(set(names)), "ids are unique, those within pictures too"
    assert not any(re.search(r"\s", name) for name in names)
    links = page.attributes("href", "xlink:href", "aria-labelledby")
    within = {link.removeprefix("#") for link in links if link.startswith("#")}
    assert within
    assert within <= set(names)
    assert {name for link in page.attributes("clip-path") for name in re.findall(r"url\(#(.*?)\)", link)} <= set(names)
    files = {link for tag, attributes in page.elements if tag == "a" and not (link := attributes["href"] or "").startswith("#")}
    assert report.RESULTS in files
    assert all((folder / name).is_file() for name in files)


def test_page_loads_nothing(page: Page, content: str) -> None:
    assert not {tag for tag, _ in page.elements} & {"link", "script", "img", "iframe", "object", "embed", "base", "image", "video", "audio"}
    assert not page.attributes("src", "srcset", "data", "poster", "background")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "@import" not in content
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", content))
    assert {address.split('"')[0] for address in re.findall(r"https?://[^>\s]*", content)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_all_tables_and_notes_are_there(page: Page, content: str) -> None:
    tags = [tag for tag, _ in page.elements]
    tables = [sheet for of_part in sheets().values() for sheet in of_part]
    assert tags.count("table") == tags.count("caption") == len(tables)
    for sheet in tables:
        texts = [sheet.title, *sheet.labels, *sheet.values, *(cell.text for row in sheet.rows for cell in row), *sheet.notes]
        assert all(text.replace("`", "") in page.text for text in texts)
    assert page.text.count("shared: read it so") == 1, "a note of two tables is told once"
    assert "read <code>it</code> so" in content
    assert '<td class="number strong">1.5</td>' in content
    assert '<td class="number bad">skipped</td>' in content
    shown = [attributes for tag, attributes in page.elements if tag == "details"]
    assert len(shown) == len(tables)
    assert sum("open" in attributes for attributes in shown) == len(sheets()), "the first of each part"
    heads, cells = ([tag for tag, _ in page.elements].count(tag) for tag in ("th", "td"))
    assert heads == sum(len(sheet.labels) + len(sheet.values) + len(sheet.rows) for sheet in tables)
    assert cells == sum((len(sheet.labels) + len(sheet.values) - 1) * len(sheet.rows) for sheet in tables), "short rows are filled up"


def test_short_tables_with_something_bad_are_open() -> None:
    first, good, bad, long = (Sheet(name, ["a"], []) for name in ("first", "good", "bad", "long"))
    good.add("fine")
    bad.add(Cell("wrong", BAD))
    for _ in range(report.OPEN_ROWS + 1):
        long.add(Cell("wrong", BAD))
    section = report.Section("name", "", "", sheets=[first, good, bad, long])
    assert [section.shows(sheet) for sheet in section.sheets] == [True, False, True, False]


def test_hostile_names_are_text(page: Page, tmp_path: Path) -> None:
    assert page.text.count(HOSTILE) == 6 + 1, "title twice, two heads, two cells; the note"
    label = "<b>$1$ & $2$</b>"
    drawn = ratio_panels("p", HOSTILE, HOSTILE, {label: {label: Estimate(2.0, 1.5, 2.5)}}, 1)
    for svg in (drawn.svg, drawn.inline):
        assert letters(svg).count(label) == 2, "of the panel and of the bar, no formulas"
    made = results([])
    made.machine = {**made.machine, "cpu": HOSTILE}
    report.write(made, {}, tmp_path)
    hostile = Page((tmp_path / report.PAGE).read_text(encoding="utf-8"))
    assert hostile.text.count(HOSTILE) == 3, "title, introduction, machine"
    assert not {"script", "img"} & {tag for tag, _ in hostile.elements}


def letters(svg: str) -> list[str | None]:
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


PICTURES = ["speed-ups", "speed-ups-more", "packages", "roofline", "memory", "training", "loss-curves", "loss-curves-digits"]


def test_pictures_are_svg_and_png(folder: Path, page: Page) -> None:
    assert {path.stem for path in folder.iterdir() if path.suffix in (".svg", ".png")} == set(PICTURES)
    for name in PICTURES:
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert any(letters(svg)), "letters, not outlines"
        png = (folder / f"{name}.png").read_bytes()
        assert len(png) < 80_000
        with Image.open(io.BytesIO(png)) as image:
            assert image.format == "PNG"
            assert (image.mode, image.width) == ("P", 900)
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    figures = [attributes for tag, attributes in page.elements if attributes.get("role") == "img"]
    assert len(figures) == len(PICTURES)
    assert all(figure["aria-label"] for figure in figures)


def test_pictures_in_the_page_take_its_colours(content: str) -> None:
    style = content[content.index("<style>") : content.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for name, colour in COLOURS.items():
        assert f"--{name}: {colour};" in light
        assert re.search(rf"--{name}: (?!{colour})#\w{{6}};", dark), f"{name} is another one on black"
    pictures = re.findall(r"<svg.*?</svg>", content, re.DOTALL)
    assert len(pictures) == len(PICTURES)
    for picture in pictures:
        assert "var(--ink, " in picture
        assert "var(--font, " in picture
        assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", picture)), "no colour of its own"
        assert "width=" not in picture[: picture.index(">")]


def contrast(one: str, other: str) -> float:
    """As the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        shares = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(content: str, scheme: int) -> None:
    style = content[content.index("<style>") : content.index("</style>")].split("@media (prefers-color-scheme: dark)")[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", style))
    for name, paper in (("ink", "paper"), ("ink", "stripe"), ("muted", "paper"), ("muted", "stripe"), ("bad", "paper"), ("link", "paper")):
        assert contrast(colours[name], colours[paper]) >= 4.5, f"{name} on {paper}: letters"
    assert contrast(colours["ink"], colours["bad-paper"]) >= 4.5
    for name in ("ours", "theirs", "third"):
        assert contrast(colours[name], colours["paper"]) >= 3, f"{name}: lines and bars"


def test_the_same_results_make_the_same_files(tmp_path: Path) -> None:
    made = results([row("rl", "adamw", {FUSED: 3.0})], quality={str(seed): trained("cosine", seed) for seed in range(2)})
    for name in ("first", "second"):
        report.write(made, sheets(), tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert {"index.html", "results.json", "speed-ups.svg", "speed-ups.png", "loss-curves.svg"} <= set(files)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert Results.read(tmp_path / "first" / report.RESULTS).records == made.records


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    report.write(results([]), {}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {report.PAGE, report.RESULTS}
    page = Page((tmp_path / report.PAGE).read_text(encoding="utf-8"))
    assert not {"svg", "table", "strong"} & {tag for tag, _ in page.elements}
    assert "a CPU" in page.text
    only_skipped = speed_rows()[-1:]
    assert [picture.name for picture in picture_speed.pictures(only_skipped)] == ["packages"]
    assert "not measured" in picture_speed.pictures(only_skipped)[0].alt
    failed = training({"torch": 1.0})
    failed["trained"]["torch"] = {"failure": "crashed: SIGSEGV"}
    assert picture_training.step_picture({"demo": failed}) is None
    assert not report_headline.claims(results(only_skipped, training={"demo": failed}))


def test_a_busy_machine_is_told(tmp_path: Path, page: Page) -> None:
    assert "Do not trust" not in page.text
    made = results([])
    made.loads = {speed_measure.PART: {"first": None, "second": TOLERATED_LOAD + 0.1}}
    report.write(made, {}, tmp_path)
    text = Page((tmp_path / report.PAGE).read_text(encoding="utf-8")).text
    assert "Do not trust these times: other programs took up to 20% of the CPU" in text


def claims(*rows: Row | Skipped, **parts: dict[str, Record]) -> dict[str, str]:
    return {claim.what: claim.figure for claim in report_headline.claims(results(rows, **parts))}


def test_headline_follows_the_records(page: Page) -> None:
    found = {claim.what: claim for claim in report_headline.claims(everything())}
    assert found["speed of AdamW over torch"].figure == "1.25\u00d7 to 3.00\u00d7"
    assert "on gpt2 1.25 (95 %: 1.25 to 1.25), on rl 3.00" in found["speed of AdamW over torch"].details
    assert found["speed of RMSprop over torch"].figure == "4.00\u00d7"
    assert found["a parameter for AdamW's 8-bit states, instead of 8.00"].figure == "2.00 bytes"
    assert "by +0.0050; another seed by 0.0141" in found["a parameter for AdamW's 8-bit states, instead of 8.00"].details
    assert found["speed of whole training steps with AdamW, over torch's default"].figure == "2.50\u00d7"
    options = found["options and ways of use in which ours computes what torch does"]
    assert options.figure == "3 of 3"
    assert "Other packages: 2 of 3, with 1 ignored silently." in options.details
    assert len(found) == report_headline.MOST
    for claim in found.values():
        assert all(text in page.text for text in (claim.figure, claim.what, claim.details))


def test_headline_changes_with_a_record() -> None:
    speed = "speed of AdamW over torch"
    assert claims(row("rl", "adamw", {FUSED: 3.0}))[speed] == "3.00\u00d7"
    assert claims(row("rl", "adamw", {FUSED: 2.5}))[speed] == "2.50\u00d7"
    wrong = row("rl", "adamw", {FUSED: 2.5, FOR_LOOP: 5.0}, errors={OURS: 0.5, FUSED: 1e6, FOR_LOOP: 0.5})
    assert claims(wrong)[speed] == "5.00\u00d7", "who is wrong does not count"
    assert not claims(row("rl", "adamw", {FUSED: 2.5}, errors={OURS: 1e6, FUSED: 0.5})), "nor does ours"
    assert not claims(row("rl", "adamw", {"bitsandbytes": 2.5}, against="bitsandbytes"))
    elements = WORKLOADS["gpt2"].elements
    coded = row("gpt2", "adamw", {FUSED: 1.5, PLAIN: 1.2}, INT8)
    other = dataclasses.replace(coded, state_bytes={**coded.state_bytes, OURS: 3 * elements})
    assert "3.00 bytes" in claims(other).values()
    assert list(claims(conformance={"ours": checked("fused_opt", "nesterov", "dampening")}).values()) == ["1 of 3"]


def test_bars_say_what_was_measured() -> None:
    panels: dict[str, Mapping[str, Estimate | str]] = {"AdamW": {"rl": Estimate(3.0, 2.5, 12.34), "mlp": "not measured"}}
    drawn = ratio_panels("name", "title", "caption", panels, 1)
    assert drawn.alt == "AdamW: rl 3.00 (2.50 to 12.3), mlp not measured"
    assert {"AdamW", "rl", "3.00", "mlp", "not measured"} <= set(letters(drawn.svg))


def test_long_names_leave_room_for_bars() -> None:
    name = 3 * "a very long name "
    drawn = ratio_panels("name", "", "", {"": {name: Estimate(2.0, 1.5, 2.5)}}, 1)
    assert name in drawn.alt
    (label,) = [text for text in letters(drawn.svg) if text and text.startswith("a very")]
    assert label.endswith("...")
    assert len(label) <= LONGEST


def bars(picture: Picture, colour: str) -> int:
    return picture.svg.count(f"fill: {COLOURS[colour]}")


def test_slower_is_another_colour() -> None:
    faster, slower = (ratio_panels("name", "", "", {"": {"rl": Estimate(median, 0.4, 2.6)}}, 1) for median in (2.5, 0.5))
    assert (bars(faster, "ours"), bars(faster, "theirs")) == (1, 0)
    assert (bars(slower, "ours"), bars(slower, "theirs")) == (0, 1)


def test_wrong_results_of_ours_have_no_bar() -> None:
    (drawn, *_) = picture_speed.pictures([row("rl", "adamw", {FUSED: 2.0}, errors={OURS: 1e6, FUSED: 0.5})])
    assert drawn.alt == "AdamW: rl ours is wrong"
    assert bars(drawn, "ours") == 0


def test_losses_that_are_no_numbers_are_drawn_as_far_as_they_are() -> None:
    nan = float("nan")
    curves = [Curve("digits", "adamw", "cosine", INT8, [1, 2, 3], [2.0, 0.1, nan], [1.9, 0.1, nan], [2.1, 0.1, nan])]
    (drawn,) = picture_training.loss_pictures(curves)
    assert "digits, adamw, cosine: 8-bit from 2 to nan" in drawn.alt
