"""What follows from `conformance`: a verdict for each option, by rule, and tables of them.

The rules, in their order:

- crashed: the process died, or took too long. refused: an error of a kind in `REFUSALS` was raised. failed: another one.
- ignored: the result with the option has the same bits as without, although the option changes torch's by more than `MATTERS`, and
  although the result without is right (equal, close or coarse).
- equal: the bits of torch's for-loop in that dtype, or as far from the exact result (torch's for-loop in float64) as those, up to
  `ROUNDING` times, in 2-norms, after each number of steps compared, for each tensor by itself. Half a unit in the last place is always
  allowed. Measured: 1.4 at the most for fused, foreach and ours; 4.7 at the least for what loses updates or reads gradients in the wrong
  order (in bfloat16, which hides what is smaller than its rounding; in float32 76,000 for whatever differs).
- close: if not equal, off by `CLOSE` of the way that the tensor went at the most, after each number of steps. The share depends on the
  format of states, and is a third of what any option changes at the most: the formula is torch's, and its numbers are coarser.
- coarse: states of fewer bits make it worse than that, but not the first step, before which there are none. What shows only after
  the first step cannot be judged.
- differs: another formula, or wrong numbers; without a state of fewer bits, or farther off than the same steps backwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fused_opt.bench.conformance import SHOWN
from fused_opt.bench.conformance_checks import CHECKS, DTYPES, FEW_STEPS, STEPS, TURN, WAYS
from fused_opt.bench.sheet import BAD, STRONG, Cell, Sheet
from fused_opt.bench.speed_plan import AS_TORCH, BF16, INT8
from fused_opt.bench.suite import Record

EQUAL, CLOSE_TO, COARSE, IGNORED, DIFFERS = "equal", "close", "coarse", "ignored", "differs"
REFUSED, FAILED, CRASHED, LEFT_OUT = "refused", "failed", "crashed", "left out"
RIGHT = (EQUAL, CLOSE_TO, COARSE)
MARKS = {IGNORED: BAD, DIFFERS: BAD, FAILED: BAD, CRASHED: BAD}

REFUSALS = ("TypeError", "ValueError", "NotImplementedError")
MATTERS = 0.01
ROUNDING = 2.0
BACKWARDS = 2.0
CLOSE = {AS_TORCH: 0.001, BF16: 0.02, INT8: 0.1}

# Of errors in tables, in characters; and of options with the same error.
WIDTH, MOST = 72, 2

_HOW_TO_READ = [
    "Cells: float32/bfloat16, or one word for both. Compared with torch's for-loop in float64 after "
    f"{', '.join(map(str, STEPS))} steps; ways of use, from {next(iter(WAYS))} on, after {' and '.join(map(str, FEW_STEPS))}.",
    f"equal: torch's for-loop in that dtype is as far from that, up to {ROUNDING:g} times, tensor by tensor. close: off by a share of the "
    f"way up to {', '.join(f'{share:.1%} (states {state})' for state, share in CLOSE.items())}. coarse: off by more, but not in the first "
    "step: for lack of bits in its states.",
    "ignored: with the option the same bits as without. differs: another formula, or wrong numbers. refused: it raised an error.",
    f"Learning rates are doubled after step {TURN}; a late gradient is there from the next step on; a checkpoint goes through torch.save "
    "and torch.load. keeps gradients: whether they are the same after a step as before.",
    "All are given torch's values of all hyperparameters. Code that packages give to torch.compile themselves runs uncompiled.",
]
_HOW_TO_READ_DEVIATIONS = [
    "ULP: distance from the correctly rounded exact result in units of the last place. off: |p - exact| / |exact - start| in 2-norms, the "
    "share of the way gone. bytes: of states, for each value of a large tensor.",
]


@dataclass(frozen=True)
class Deviation:
    """Of all parameters, after some steps, from torch's for-loop in float64.

    Attributes:
        steps: taken.
        ulp_max, ulp_mean: distances in ULP of the dtype from the correctly rounded exact result.
        relative: the distance from the exact result as a share of the way from the start to there, in 2-norms.
        relative_worst: the same, of the tensor where it is largest.
        excess: the distance over that of torch's for-loop in the same dtype, of the tensor where that is largest.
    """

    steps: int
    ulp_max: float
    ulp_mean: float
    relative: float
    relative_worst: float
    excess: float

    @classmethod
    def from_record(cls, record: Record) -> Deviation:
        """JSON has no infinity."""
        numbers = {name: math.inf if value is None else float(value) for name, value in record.items() if name != "steps"}
        return cls(record["steps"], **numbers)


@dataclass(frozen=True)
class Verdict:
    """On an option.

    Attributes:
        optimizer, option, dtype: what was checked.
        word: see the module.
        error: what it raised, how it died, or why it was left out; otherwise "".
        deviations: if it ran, after each of the check's steps.
        state_bytes: of a parameter's value; None if it was not measured.
        keeps_gradients: whether a step leaves them alone.
    """

    optimizer: str
    option: str
    dtype: str
    word: str
    error: str = ""
    deviations: tuple[Deviation, ...] = ()
    state_bytes: float | None = None
    keeps_gradients: bool = True


@dataclass(frozen=True)
class Conformance:
    """Of an implementation.

    Attributes:
        name, package, version: its.
        failure: why nothing was checked, or "".
        note: on what was checked, or "".
        verdicts: (optimizer, option, dtype) -> verdict.
    """

    name: str
    package: str
    version: str
    failure: str
    note: str
    verdicts: dict[tuple[str, str, str], Verdict] = field(default_factory=dict)

    @classmethod
    def from_record(cls, name: str, record: Record) -> Conformance:
        """What `conformance.measure` gave."""
        result = cls(name, *(record[key] for key in ("package", "version", "failure", "note")))
        for check in record["checks"]:
            optimizer, option, dtype = (check[key] for key in ("optimizer", "option", "dtype"))
            without = result.verdicts.get((optimizer, CHECKS[optimizer, option].without, dtype))
            result.verdicts[optimizer, option, dtype] = _judge(check, record["state"], without)
        return result

    @property
    def unusable(self) -> str:
        """Why nothing could be checked, or ""."""
        errors = [verdict.error for verdict in self.verdicts.values()]
        return self.failure or (errors[0] if errors and all(errors) else "")


def _judge(check: Record, state: str, without: Verdict | None) -> Verdict:
    about = check["optimizer"], check["option"], check["dtype"]
    for word, why in ((LEFT_OUT, check.get("left_out")), (CRASHED, check.get("crash"))):
        if why:
            return Verdict(*about, word, why)
    if error := check.get("error"):
        return Verdict(*about, REFUSED if error.partition(":")[0] in REFUSALS else FAILED, error)
    deviations = tuple(map(Deviation.from_record, check["deviations"]))
    changes = check["effect"] is None or check["effect"] > MATTERS
    was_right = without is not None and without.word in RIGHT
    if check["as_without"] and changes and was_right:
        word = IGNORED
    elif check["as_torch"] or all(each.excess <= ROUNDING for each in deviations):
        word = EQUAL
    elif all(_is_close(each, state) for each in deviations):
        word = CLOSE_TO
    elif state != AS_TORCH and _is_close(deviations[0], AS_TORCH) and all(each.relative_worst < BACKWARDS for each in deviations):
        word = COARSE
    else:
        word = DIFFERS
    return Verdict(*about, word, "", deviations, check["state_bytes"], check["keeps_gradients"])


def _is_close(deviation: Deviation, state: str) -> bool:
    return deviation.excess <= ROUNDING or deviation.relative_worst <= CLOSE[state]


def sheets(records: Mapping[str, Record]) -> list[Sheet]:
    """For each optimizer its options, a table for torch's and our implementations and one for others; how far parameters are from the exact
    ones; what is not as in torch; who was there."""
    if not records:
        return []
    everybody = [Conformance.from_record(*each) for each in records.items()]
    usable = [each for each in everybody if not each.unusable]
    found = []
    for optimizer in dict.fromkeys(name for name, _ in CHECKS):
        for ours, title in ((True, "torch's and ours"), (False, "other packages")):
            group = [each for each in usable if (each.package in ("torch", "fused_opt")) == ours and _offers(each, optimizer)]
            if group:
                found.append(_options(f"{optimizer}: {title}", optimizer, group))
    found += [sheet for sheet in (_deviations(usable), _remarks(usable)) if sheet.rows]
    return [*found, _everybody(everybody)]


def _offers(conformance: Conformance, optimizer: str) -> bool:
    return any(name == optimizer for name, _, _ in conformance.verdicts)


def _options(title: str, optimizer: str, group: Sequence[Conformance]) -> Sheet:
    result = Sheet(title, ["option"], [each.name for each in group], notes=[*_HOW_TO_READ, *(each.note for each in group if each.note)])
    for name, option in CHECKS:
        if name == optimizer:
            result.add(option, *(_words(each, optimizer, option) for each in group))
    result.add("keeps gradients", *(_kept(each, optimizer) for each in group))
    return result


def _words(conformance: Conformance, optimizer: str, option: str) -> Cell:
    found = [conformance.verdicts.get((optimizer, option, dtype)) for dtype in DTYPES]
    words = [verdict.word for verdict in found if verdict]
    return Cell("/".join(dict.fromkeys(words)) or "-", next((MARKS[word] for word in words if word in MARKS), ""))


def _kept(conformance: Conformance, optimizer: str) -> str:
    kept: dict[str, bool] = {}
    for (name, _, dtype), verdict in conformance.verdicts.items():
        if name == optimizer and verdict.deviations:
            kept[dtype] = kept.get(dtype, True) and verdict.keeps_gradients
    return "/".join(dict.fromkeys("yes" if each else "no" for each in kept.values())) or "-"


def _deviations(usable: Sequence[Conformance]) -> Sheet:
    columns = [f"{steps}: {what}" for steps in STEPS for what in ("ULP max", "mean", "off")]
    result = Sheet("How far parameters are from the exact ones", ["optimizer", "implementation", "dtype"], [*columns, "bytes"])
    for optimizer, option in SHOWN:
        what = f"{optimizer}, lr={CHECKS[optimizer, option].case.options['lr']:g}" + (f", {option}" if option == "momentum" else "")
        for each in usable:
            for dtype in DTYPES:
                verdict = each.verdicts.get((optimizer, option, dtype))
                if verdict and verdict.deviations and verdict.state_bytes is not None:
                    cells = [cell for deviation in verdict.deviations for cell in _deviation(deviation)]
                    result.add(what, each.name, dtype, *cells, f"{verdict.state_bytes:.2f}")
        result.sections.add(len(result.rows) - 1)
    result.notes = _HOW_TO_READ_DEVIATIONS
    return result


def _deviation(deviation: Deviation) -> list[str]:
    largest = f"{deviation.ulp_max:.0f}" if deviation.ulp_max < 1e6 else f"{deviation.ulp_max:.1e}"
    mean = f"{deviation.ulp_mean:.2f}" if deviation.ulp_mean < 1e4 else f"{deviation.ulp_mean:.1e}"
    return [largest, mean, f"{deviation.relative:.1e}"]


def _remarks(usable: Sequence[Conformance]) -> Sheet:
    """A line for everything of an implementation that is not right, with the options that met it."""
    result = Sheet("Not as in torch", ["implementation", "what", "options", "how"], [])
    for each in usable:
        met: dict[tuple[str, str], list[Verdict]] = {}
        for verdict in each.verdicts.values():
            if verdict.word not in RIGHT:
                met.setdefault((verdict.word, _shortened(verdict.error)), []).append(verdict)
        for (word, error), verdicts in met.items():
            names = list(dict.fromkeys(f"{verdict.optimizer} {verdict.option}" for verdict in verdicts))
            options = ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")
            result.add(each.name, Cell(word, MARKS.get(word, "")), options, error or _distance(verdicts))
    return result


def _distance(verdicts: Sequence[Verdict]) -> str:
    """Of the tensor and after the steps where it is largest, in words."""
    shares = [max(each.relative_worst for each in verdict.deviations) for verdict in verdicts]
    return f"off by {' to '.join(dict.fromkeys(f'{share:.0%}' for share in (min(shares), max(shares))))} of the way"


def _shortened(error: str) -> str:
    error = re.sub(r"\b\w+\.__init__\(\) got an ", "", error)
    return error if len(error) <= WIDTH else f"{error[: WIDTH - 3]}..."


def _everybody(everybody: Sequence[Conformance]) -> Sheet:
    result = Sheet("Implementations", ["implementation", "version", "used"], [])
    for each in everybody:
        result.add(each.name, each.version or "-", Cell(f"no: {_shortened(each.unusable)}", STRONG) if each.unusable else "yes")
    return result
