"""How far every implementation is from torch's formulas, and which options it ignores: running the checks, and comparing.

Each implementation steps the same tensors with the same gradients in a process of its own, once for each of `conformance_checks.CHECKS` and
dtypes. Its parameters are compared with those of torch's for-loop in float64, which is exact for this purpose, with those of torch's
for-loop in the same dtype, and with its own without the option. `conformance_report` says what follows from that.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import math
import time
from collections.abc import Collection, Sequence
from functools import cache, partial

import torch

from fused_opt.bench import measure as timing
from fused_opt.bench.conformance_checks import CHECKS, DEFAULTS, DTYPES, MOMENTUM, SHAPES, Key, Result, bytes_a_value, problem, run
from fused_opt.bench.implementations import Implementation, implementations
from fused_opt.bench.rounding import correctly_rounded
from fused_opt.bench.suite import OnShare, Record, Unit
from fused_opt.bench.ulp import bits_equal, distance
from fused_opt.bench.worker import Session, Worker, WorkerError

PART = "conformance"

# Seconds that a check may take: long enough for a package to compile its code when it is first used. After so many for all of an
# implementation's, the rest is left out.
LIMIT, BUDGET = 300.0, 90.0

# Checks whose deviations and sizes of states have a table of their own.
SHOWN: tuple[Key, ...] = (("AdamW", DEFAULTS), ("SGD", MOMENTUM), ("RMSprop", DEFAULTS))

# For an implementation that must be compiled again for each check, which takes 3 to 10 s.
COMPILED: tuple[Key, ...] = (*SHOWN, ("AdamW", "weight_decay"), ("AdamW", "lr assigned"), ("SGD", DEFAULTS), ("SGD", "nesterov"))


def units(names: Collection[str] | None = None) -> list[Unit]:
    """One for each implementation: all, or those of these names."""
    chosen = [each for name, each in implementations().items() if names is None or name in names]
    return [Unit(PART, each.name, partial(measure, each), 0.1 if each.missing else 40.0 if each.compiled else 10.0) for each in chosen]


def measure(
    implementation: Implementation,
    on_share: OnShare,
    keys: Collection[Key] = tuple(CHECKS),
    dtypes: Collection[str] = tuple(DTYPES),
    limit: float = LIMIT,
) -> Record:
    """What an implementation does in each of the checks `keys`; a check must come after the one that it is compared with.

    `limit`: seconds that each may take.
    """
    record = {name: getattr(implementation, name) for name in ("package", "version", "state")}
    record |= {"note": "", "failure": implementation.missing, "checks": []}
    if record["failure"]:
        return record
    if implementation.compiled:
        keys, dtypes = [key for key in COMPILED if key in keys], ["float32"]
        record["note"] = f"{implementation.name}: in float32 only, and a few options only, because each is compiled."
    work = [(key, dtype) for dtype in dtypes for key in keys if implementation.offers(CHECKS[key].case)]
    found: dict[tuple[Key, str], Result] = {}
    with _Runs(implementation, limit) as runs, timing.threads(1):
        record["failure"] = runs.failure
        for n, (key, dtype) in enumerate([] if runs.failure else work):
            on_share(n / len(work))
            about = {"optimizer": key[0], "option": key[1], "dtype": dtype}
            record["checks"].append({**about, **_check(runs, key, dtype, found)})
    return record


def _check(runs: _Runs, key: Key, dtype: str, found: dict[tuple[Key, str], Result]) -> Record:
    """Run a check, add its result to those `found` before, and compare it with the one without; or say why not."""
    if runs.spent > BUDGET:
        return {"left_out": f"the checks before took {runs.spent:.0f} s"}
    try:
        answer = runs.call(key, dtype)
    except WorkerError as error:
        return {"crash": str(error)}
    if isinstance(answer, str):
        return {"error": answer}
    found[key, dtype], size = answer
    return {**_compare(key, dtype, found[key, dtype], found.get(((key[0], CHECKS[key].without), dtype))), "state_bytes": size}


class _Runs:
    """Runs an implementation in a process of its own, and in another one when that has died.

    Attributes:
        failure: why nothing can be run, or "".
        spent: seconds in all.
    """

    def __init__(self, implementation: Implementation, limit: float) -> None:
        self._implementation, self._limit = implementation, limit
        self._worker: Worker | None = None
        self.failure = ""
        self.spent = 0.0

    def call(self, key: Key, dtype: str) -> tuple[Result, float | None] | str:
        """The result, and for some checks the bytes of states for each value; or the error that the implementation raised.

        Raises:
            WorkerError: it did none of that.
        """
        start = time.monotonic()
        try:
            worker = self._worker or self._begin()
            answer = worker.call(_run_there, self._implementation, key, dtype)
        except WorkerError:
            self._end()
            raise
        finally:
            self.spent += time.monotonic() - start
        return answer if isinstance(answer, str) else torch.load(io.BytesIO(answer), weights_only=False)

    def _begin(self) -> Worker:
        self._worker = Worker(1, self._limit)
        self._worker.call(_import, self._implementation)
        return self._worker

    def _end(self) -> None:
        if self._worker:
            self._worker.close()
        self._worker = None

    def __enter__(self) -> _Runs:
        try:
            self._begin()
        except WorkerError as error:
            self.failure = str(error)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()


def _import(session: Session, implementation: Implementation) -> None:
    for name in implementation.classes.values():
        module, _, attribute = name.partition(":")
        getattr(importlib.import_module(module), attribute)
    if not implementation.compiled:
        # torchao compiles each step's formula for each shape, dtype and option: 4 to 13 s each, 20 minutes in all.
        torch.compiler.set_stance("force_eager")


def _run_there(session: Session, implementation: Implementation, key: Key, dtype: str) -> bytes | str:
    """Bytes, because tensors would be sent by shared memory, which is gone with the process."""
    if implementation.compiled:
        torch.compiler.reset()  # after 8 optimizers it would give up compiling
    case, file = CHECKS[key].case, io.BytesIO()
    try:
        result = run(implementation.make, CHECKS[key], *problem(DTYPES[dtype]))
        plain = dataclasses.replace(implementation, compiled=False)
        torch.save((result, bytes_a_value(plain.make, case, DTYPES[dtype]) if key in SHOWN else None), file)
    except Exception as error:  # whatever another package does
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return file.getvalue()


@cache
def reference(key: Key, dtype: str, exact: bool) -> Result:
    """torch's for-loop on the values of `dtype`, computing in that or, if `exact`, in float64."""
    start, grads = problem(DTYPES[dtype])
    if exact:
        start, grads = [value.double() for value in start], [[grad.double() for grad in each] for each in grads]
    return run(implementations()["for-loop"].make, CHECKS[key], start, grads)


def effect(key: Key, dtype: str) -> float:
    """How far the option changes torch's exact result: the largest relative difference of any tensor at any of the steps compared."""
    start = _start(dtype)
    pairs = zip(reference(key, dtype, True).params, reference((key[0], CHECKS[key].without), dtype, True).params, strict=False)
    changes = [(_parts(with_it - without), _parts(with_it - start)) for with_it, without in pairs]
    return max(_ratio(change, way) for each in changes for change, way in zip(*each, strict=True))


def _compare(key: Key, dtype: str, found: Result, without: Result | None) -> Record:
    """What `conformance_report.Verdict` needs."""
    exact, torchs = reference(key, dtype, True), reference(key, dtype, False)
    return {
        "deviations": [
            {"steps": steps, **_deviation(own, right, theirs, _start(dtype))}
            for steps, own, right, theirs in zip(CHECKS[key].steps, found.params, exact.params, torchs.params, strict=True)
        ],
        "as_torch": _same(found, torchs),
        "as_without": without is not None and _same(found, without),
        "effect": effect(key, dtype),
        "keeps_gradients": found.keeps_gradients,
    }


def _same(a: Result, b: Result) -> bool:
    """After those steps that both have."""
    return all(bits_equal(x, y) for x, y in zip(a.params, b.params, strict=False))


def _deviation(found: torch.Tensor, exact: torch.Tensor, torchs: torch.Tensor, start: torch.Tensor) -> Record:
    """What `conformance_report.Deviation` needs."""
    rounded = exact.float() if found.dtype == torch.float32 else correctly_rounded(exact, found.dtype)
    ulps = distance(found, rounded).double()
    error, torchs_error, way = found.double() - exact, torchs.double() - exact, exact - start
    half_ulp = torch.finfo(found.dtype).eps / 2
    allowed = [torch.maximum(each.norm(), half_ulp * right.norm()) for each, right in zip(_parts(torchs_error), _parts(exact), strict=True)]
    return {
        "ulp_max": float(ulps.max()),
        "ulp_mean": _rounded(float(ulps.mean())),
        "relative": _ratio(error, way),
        "relative_worst": max(map(_ratio, _parts(error), _parts(way))),
        "excess": max(map(_ratio, _parts(error), allowed)),
    }


def _start(dtype: str) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in problem(DTYPES[dtype])[0]]).double()


def _parts(row: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(row, [math.prod(shape) for shape in SHAPES])


def _ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of 2-norms. 0 if a is zero, otherwise infinity if b is or if one is NaN."""
    return 0.0 if not a.any() else _rounded(float((a.norm() / b.norm()).nan_to_num(nan=math.inf, posinf=math.inf)))


def _rounded(number: float) -> float:
    """To what is worth being kept in a file."""
    return float(f"{number:.4g}")
