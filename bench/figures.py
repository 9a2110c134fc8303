"""The README's figures, from the committed results: `python -m fused_opt.bench.figures --write` puts them there, a test compares them.

A figure stands between two comments, which the README's readers do not see: `<!-- figure NAME -->1.2<!-- / -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fused_opt.bench import speed_measure, stability
from fused_opt.bench.implementations import implementations
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
        }

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
        return f"{row.speed_ups[row.fastest].median:.2f}"

    def _speed_ups(self) -> str:
        """The table, with the limits of the confidence intervals."""
        header = ["workload", *(name for name, *_ in COLUMNS)]
        lines = [header, ["---"] * len(header)]
        for label, workload, dtype in LINES:
            cells = []
            for _, configuration, state in COLUMNS:
                job = Job(WORKLOADS[workload], dtype, "contiguous", configuration, state)
                cells.append(self._ratio(self._rows[job]) if job in self._rows else "")
            lines.append([label, *cells])
        return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def _packages(self) -> str:
        """Other packages' AdamW: a line each."""
        lines = [["implementation", "`gpt2`", "`resnet50`", "`mlp`", "state bytes"], ["---"] * 5]
        for name, implementation in implementations().items():
            found = {
                row.job.workload.name: row for row in self._rows.values() if row.job.against == name and row.job.configuration == "adamw"
            }
            if found:
                cells = [self._ratio(found[workload]) if workload in found else "" for workload in ("gpt2", "resnet50", "mlp")]
                row = next(iter(found.values()))
                version = self._results.machine["packages"].get(implementation.package, "")
                largest = max(found.values(), key=lambda row: row.job.workload.elements)
                lines.append(
                    [
                        f"{'torch ' if row.job.against == 'compiled' else ''}{name} {version}".strip(),
                        *cells,
                        f"{largest.bytes_a_value(name):.2f}",
                    ]
                )
        return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def _share(self, workload: str, configuration: str) -> str:
        share = self._row(workload, configuration).share()
        if share is None:
            raise KeyError(f"{workload} {configuration}")
        return f"{share.median:.0%}"

    def _layout(self, layout: str) -> str:
        """The time of AdamW on resnet50 in that layout by that of a contiguous one, in the same rounds."""
        row = self._row("resnet50", "adamw", layout=layout)
        return f"{1 / row.speed_ups[CONTIGUOUS].median:.2f}"

    def _stability(self) -> str:
        (sheet,) = stability.sheets(self._results.part(stability.PART))
        return sheet.notes[0]


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
