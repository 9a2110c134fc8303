"""The README's figures, from the committed results: `python -m fused_opt.bench.figures --write` puts them there, a test compares them.

A figure stands between two comments, which the README's readers do not see: `<!-- figure NAME -->1.2<!-- / -->`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fused_opt.bench import conformance, conformance_report, passes, passes_report, quality_report, quality_units, speed_measure, stability
from fused_opt.bench.implementations import implementations
from fused_opt.bench.memory_table import Figure
from fused_opt.bench.report import RESULTS
from fused_opt.bench.speed_plan import AS_TORCH, INT8, Job
from fused_opt.bench.speed_row import CONTIGUOUS, OURS, Row
from fused_opt.bench.suite import Results
from fused_opt.bench.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
README, COMMITTED = ROOT / "README.md", ROOT / "bench" / "results" / RESULTS
FIGURE = re.compile(r"(<!-- figure ([\w-]+) -->)(.*?)(<!-- / -->)", re.DOTALL)


# The columns of the README's table, and its lines: what they are called, a workload, a dtype.
COLUMNS = (
    ("AdamW", "adamw", AS_TORCH),
    ("SGD, momentum", "sgd-momentum", AS_TORCH),
    ("RMSprop", "rmsprop", AS_TORCH),
    ("AdamW8bit", "adamw", INT8),
)
LINES = (
    ("`gpt2`: GPT-2 small: 148 tensors, 124M values", "gpt2", "float32"),
    ("`gpt2` in bfloat16", "gpt2", "bfloat16"),
    ("`gpt2` in float16", "gpt2", "float16"),
    ("`resnet50`: ResNet-50: 161 tensors, 25.6M", "resnet50", "float32"),
    ("`lora`: rank-8 adapters of a 7B model: 256 tensors, 8.4M", "lora", "float32"),
    ("`mlp`: 8 layers of 256 x 256: 16 tensors, 526K", "mlp", "float32"),
    ("`single`: 1 tensor, 65,536", "single", "float32"),
    ("`rl`: policy and value networks: 12 tensors, 11,404", "rl", "float32"),
    ("`tiny`: 1000 tensors of 64 (their 8-bit states are fp32)", "tiny", "float32"),
)

PEER_WORKLOADS = ("gpt2", "mlp")


class Figures:
    """What the README says of a run."""

    def __init__(self, results: Results) -> None:
        self._results = results
        found = speed_measure.rows(results.part(speed_measure.PART))
        self._rows = {row.job: row for row in found if isinstance(row, Row)}
        self._known: dict[str, Callable[[], str]] = {
            "machine": self._machine,
            "speed-ups": self._speed_ups,
            "packages": self._packages,
            "share-of-limit": lambda: self._share("gpt2", "adamw"),
            "permuted": lambda: self._layout("permuted"),
            "other-grad": lambda: self._layout("other-grad"),
            "one-thread": lambda: self._ratio(self._row("mlp", "adamw", state=INT8, threads=1)),
            "state-bytes": lambda: f"{self._row('gpt2', 'adamw', state=INT8).bytes_a_value(OURS):.2f}",
            "stability": self._stability,
            "quality": self._quality,
            "conformance": self._conformance,
        }
        for name, figure in passes_report.figures(results.part(passes.PART)).items():
            self._known[name] = partial(_written_out, figure)

    def __getitem__(self, name: str) -> str:
        """Raises KeyError if there is no such figure, or the run did not measure it."""
        return self._known[name]()

    def _row(self, workload: str, configuration: str, **others: Any) -> Row:
        job = {"dtype": "float32", "layout": "contiguous", **others}
        return self._rows[Job(WORKLOADS[workload], configuration=configuration, **job)]

    def _machine(self) -> str:
        about = self._results.machine
        threads = self._results.settings["threads"]
        return f"{about['cores']} cores of an {about['cpu']} with {about['isa']}, {threads} threads, torch {about['torch']}"

    @staticmethod
    def _ratio(row: Row) -> str:
        wrong = OURS in row.wrong or row.fastest in row.wrong
        return f"{row.speed_ups[row.fastest].median:.2f}{' (wrong)' if wrong else ''}"

    def _speed_ups(self) -> str:
        """The table of medians."""
        header = ["workload", *(name for name, *_ in COLUMNS)]
        lines = [header, ["---"] * len(header)]
        for label, workload, dtype in LINES:
            cells = []
            for _, configuration, state in COLUMNS:
                job = Job(WORKLOADS[workload], dtype, "contiguous", configuration, state)
                cells.append(self._ratio(self._rows[job]) if job in self._rows else "")
            lines.append([label, *cells])
        return _table(lines)

    def _packages(self) -> str:
        """Other packages' AdamW: a line each."""
        lines = [["implementation", *(f"`{workload}`" for workload in PEER_WORKLOADS), "state bytes"]]
        lines.append(["---"] * len(lines[0]))
        for name in implementations():
            rows = [row for row in self._rows.values() if (row.job.against, row.job.configuration) == (name, "adamw")]
            found = {row.job.workload.name: row for row in rows}
            if found:
                cells = [self._ratio(found[workload]) if workload in found else "" for workload in PEER_WORKLOADS]
                largest = max(rows, key=lambda row: row.job.workload.elements)
                lines.append([self._full_name(name), *cells, f"{largest.bytes_a_value(name):.2f}"])
        return _table(lines)

    def _share(self, workload: str, configuration: str) -> str:
        share = self._row(workload, configuration).share()
        if share is None:
            raise KeyError(f"{workload} {configuration}")
        return f"{share.median:.0%}"

    def _layout(self, layout: str) -> str:
        """The time of AdamW on resnet50 in that layout by that of a contiguous one, in the same rounds."""
        row = self._row("resnet50", "adamw", layout=layout)
        return f"{1 / row.speed_ups[CONTIGUOUS].median:.2f}"

    def _quality(self) -> str:
        """Of the training that all tasks share, each task's first metric."""
        found: dict[str, quality_report.Comparison] = {}
        for row in quality_report.compare(self._results.part(quality_units.PART).values()):
            if (row.optimizer, row.schedule) == quality_units.SHARED:
                found.setdefault(row.task, row)
        parts = []
        for task, row in found.items():
            exact, coded = (statistics.mean(row.values[state]) for state in (AS_TORCH, INT8))
            parts.append(f"{task}: {row.metric} {exact:.4f} in fp32 and {coded:.4f} in 8 bits (seeds differ by {row.seeds_spread:.4f})")
        return f"{'; '.join(parts)}."

    def _conformance(self) -> str:
        """A line for each implementation that could be used, with the number of checks that each verdict met."""
        columns: dict[str, Sequence[str]] = {"as torch": (conformance_report.EQUAL, conformance_report.CLOSE_TO)}
        columns |= {word: (word,) for word in ("coarse", "refused", "ignored", "differs", "failed", "crashed")}
        header = ["implementation", *columns]
        lines = [header, ["---"] * len(header)]
        for name, record in self._results.part(conformance.PART).items():
            each = conformance_report.Conformance.from_record(name, record)
            words = [verdict.word for verdict in each.verdicts.values()]
            if not each.unusable:
                counts = (sum(word in wanted for word in words) for wanted in columns.values())
                lines.append([self._full_name(name), *(str(count) if count else "" for count in counts)])
        return _table(lines)

    def _full_name(self, name: str) -> str:
        implementation = implementations()[name]
        torchs = "torch " if implementation.package == "torch" else ""
        return f"{torchs}{name} {self._results.machine['packages'].get(implementation.package, '')}".strip()

    def _stability(self) -> str:
        (sheet,) = stability.sheets(self._results.part(stability.PART))
        return sheet.notes[0]


def _written_out(figure: Figure) -> str:
    """A text as it is; a table, whose lines these are, below a line under its header."""
    found = figure()
    return found if isinstance(found, str) else _table([found[0], ["---"] * len(found[0]), *found[1:]])


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown's, on lines of its own."""
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def written(text: str, figures: Figures) -> str:
    """`text` with every figure as it should be."""
    return FIGURE.sub(lambda found: f"{found[1]}{figures[found[2]]}{found[4]}", text)


def main(arguments: Sequence[str]) -> int:
    """Compare the README with the committed results, or write its figures anew.

    Returns:
        The exit status: 1 if a figure differs and was not written.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the figures into the README")
    args = parser.parse_args(arguments)
    text = README.read_text()
    right = written(text, Figures(Results.read(COMMITTED)))
    if args.write:
        README.write_text(right)
    elif text != right:
        print("README.md has other figures than bench/results; run: python -m fused_opt.bench.figures --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
