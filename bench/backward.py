"""Steps inside of backward against the normal loop: the time of a whole training step, and what memory the process needs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

import fused_opt
from fused_opt.arguments import whole_number, writable_file
from fused_opt.backward import step_in_backward
from fused_opt.bench import machine
from fused_opt.bench.end_to_end import TASKS, measure_task
from fused_opt.bench.end_to_end_row import TrainingRow, from_record, in_words
from fused_opt.bench.implementations import Implementation
from fused_opt.bench.measure import Estimate, paired_ratios
from fused_opt.bench.sheet import BAD, STRONG, Cell, Sheet, to_rich
from fused_opt.bench.suite import Record

HELP = "time of a training step and peak memory with steps inside of backward, against the normal loop"


def in_backward(name: str) -> str:
    """What the variant of an optimizer is called."""
    return f"{name}, in backward"


# Each optimizer, then the same in backward.
VARIANTS = (
    Implementation("AdamW", "fused_opt", {"AdamW": "fused_opt:AdamW"}),
    Implementation(in_backward("AdamW"), "fused_opt", {"AdamW": "fused_opt.bench.backward:adamw"}),
    Implementation("AdamW8bit", "fused_opt", {"AdamW": "fused_opt:AdamW8bit"}),
    Implementation(in_backward("AdamW8bit"), "fused_opt", {"AdamW": "fused_opt.bench.backward:adamw8bit"}),
)


def adamw(params: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """AdamW that steps in backward."""
    return _hooked(fused_opt.AdamW(params, **options))


def adamw8bit(params: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """AdamW8bit that steps in backward."""
    return _hooked(fused_opt.AdamW8bit(params, **options))


def _hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    step_in_backward([param for group in optimizer.param_groups for param in group["params"]], optimizer)
    return optimizer


def mistakes(rows: Sequence[TrainingRow]) -> list[str]:
    """What failed, and losses that are not, to the last bit, those of the normal loop; a sentence each."""
    found = [f"{row.optimizer} failed: {row.failure}." for row in rows if row.failure]
    for normal, ours in _pairs(rows):
        if normal.losses != ours.losses:
            found.append(
                f"{ours.optimizer} is WRONG: its loss went from {ours.losses[0]!r} to {ours.losses[1]!r}, not to {normal.losses[1]!r}."
            )
    return found


def sheet(record: Record) -> Sheet:
    """A line for each variant."""
    rows = from_record(record)
    title = f"Steps inside of backward: {record['model']}, {in_words(record['threads'])}"
    result = Sheet(title, ["optimizer"], ["step ms", "over normal", "peak MB", "less MB", "loss"])
    compared = {ours.optimizer: (normal, ours) for normal, ours in _pairs(rows)}
    for row in rows:
        result.add(row.optimizer, *_cells(row, compared.get(row.optimizer)))
    result.notes = [
        *([f"Skipped: {record['skipped']}."] if record["skipped"] else []),
        *mistakes(rows),
        f"{record['model']}: {record['parameters']:,} parameters, whose gradients are {record['parameters'] * 4 / 1e6:,.0f} MB, "
        f"{record['tokens']:,} tokens in a step.",
        "step: median of whole steps (forward, backward, optimizer); over normal: how many times as long the normal loop took in the same "
        "round, median and its 95% interval; peak: resident memory of the whole process, with Python and torch, and less: than the normal "
        "loop; loss: in nats on held-out text, after the last step, which must be the normal loop's to the bit. Everybody trains in a "
        "process of its own, in turns, from equal weights and on equal batches.",
        "glibc keeps freed tensors of up to 32 MB; with MALLOC_MMAP_THRESHOLD_=4000000 in the environment it gives them back, and the peak "
        f"is that of what is in use. Here it was {os.environ.get('MALLOC_MMAP_THRESHOLD_', 'not set')}.",
    ]
    return result


def _pairs(rows: Sequence[TrainingRow]) -> list[tuple[TrainingRow, TrainingRow]]:
    """The normal loop and ours, of the optimizers of which both were measured."""
    known = {row.optimizer: row for row in rows if not row.failure}
    return [(row, known[in_backward(name)]) for name, row in known.items() if in_backward(name) in known]


def _cells(row: TrainingRow, pair: tuple[TrainingRow, TrainingRow] | None) -> list[Cell | str]:
    if row.failure:
        return [Cell("failed", BAD)]
    over, less = "", ""
    if pair is not None:
        normal, ours = pair
        ratio = Estimate.of(paired_ratios(normal.seconds, ours.seconds))
        over = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        if normal.peak_bytes is not None and ours.peak_bytes is not None:
            less = f"{(normal.peak_bytes - ours.peak_bytes) / 1e6:,.0f}"
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
    wrong = pair is not None and pair[0].losses != pair[1].losses
    return [f"{1e3 * row.step.median:.1f}", Cell(over, STRONG), peak, less, Cell(f"{row.losses[1]:.4f}", BAD if wrong else "")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--model", choices=[task.name for task in TASKS], default=TASKS[-1].name, help="what is trained (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=whole_number(1, 1024), default=torch.get_num_threads(), metavar="N", help="torch's (default: %(default)s)"
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write what was measured to FILE")


def run(args: argparse.Namespace) -> int:
    """Returns: 0; 1 if somebody failed or has other losses than the normal loop; 2 if nothing could be measured."""
    (task,) = (task for task in TASKS if task.name == args.model)
    record = measure_task(task, VARIANTS, args.threads, task.effort, lambda share: None)
    Console().print(to_rich([sheet(record)]))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.describe(), **record}, indent=1) + "\n")
    if record["skipped"]:
        return 2
    return int(bool(mistakes(from_record(record))))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line `argv` (default: this process's). Returns as `run`."""
    parser = argparse.ArgumentParser(prog="python -m fused_opt.bench.backward", description=HELP)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
