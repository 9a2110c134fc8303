"""What `fused-opt quality` trains: models that a minute is enough for, on data that is shipped with CPython and with scikit-learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from fused_opt.bench.char_model import CharModel, Corpus
from fused_opt.bench.training import Batch

FOLDS = 5
BATCH = 32  # of each fold
CHARACTERS_BATCH = 16  # texts

HIGHER_IS_BETTER = ("accuracy", "R^2")  # all other metrics are losses

Scores = dict[str, list[float]]  # metric -> its value on each fold's held-out data


class Problem(Protocol):
    """Data, and the model that is to learn it."""

    @property
    def folds(self) -> int:
        """That are trained at once; a model's loss is the sum of theirs."""

    def make_model(self) -> nn.Module:
        """A new one, with `loss(inputs, targets)` and `param_groups(weight_decay)`; torch's global generator decides its weights."""

    def batch(self, generator: torch.Generator) -> Batch:
        """What `loss` takes, from the training data."""

    def scores(self, model: Any) -> Scores:
        """What the model makes of the held-out data."""


class Characters:
    """The demo's transformer on its text, nine tenths to train with and the last tenth held out."""

    folds = 1

    def __init__(self) -> None:
        self._corpus = Corpus()

    def make_model(self) -> nn.Module:
        """See `Problem`."""
        return CharModel(len(self._corpus.vocabulary))

    def batch(self, generator: torch.Generator) -> Batch:
        """See `Problem`."""
        return self._corpus.batch(CHARACTERS_BATCH, generator)

    def scores(self, model: Any) -> Scores:
        """See `Problem`."""
        return {"loss": [model.loss(*self._corpus.held_out_windows()).item()]}


class Perceptrons(nn.Module):
    """A perceptron with ReLU for each fold, all in the same tensors; (folds, n, widths[0]) in, (folds, n, widths[-1]) out.

    The loss is the sum of theirs, so that the gradient of each is its own: each is trained as if it were alone, but five take 1.6 ms a step
    and not 3.5. Each fold's part of a matrix that is large enough for 8-bit states is a multiple of 256 values, so that no block has values
    of two folds.

    Args:
        folds: how many.
        widths: of the inputs, of each hidden layer, of the outputs.
        criterion: `cross_entropy` or `mse_loss`.
    """

    def __init__(self, folds: int, widths: Sequence[int], criterion: Callable[..., Tensor]) -> None:
        super().__init__()
        self._criterion = criterion
        layers = list(itertools.pairwise(widths))
        self.matrices = nn.ParameterList([_uniform((folds, inputs, outputs), inputs) for inputs, outputs in layers])
        self.biases = nn.ParameterList([_uniform((folds, 1, outputs), inputs) for inputs, outputs in layers])

    def forward(self, x: Tensor, folds: slice = slice(None)) -> Tensor:
        """`x` has as many folds as are asked for."""
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            x = torch.baddbmm(bias[folds], x.relu() if i else x, matrix[folds])
        return x

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the folds' mean losses, a scalar; `targets` has the shape (folds, n) or that of the outputs."""
        return self._criterion(self(inputs).flatten(0, 1), targets.flatten(0, 1), reduction="sum") / targets.shape[1]

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer: the matrices, decayed; the biases, not decayed."""
        return [{"params": [*self.matrices], "weight_decay": weight_decay}, {"params": [*self.biases], "weight_decay": 0.0}]


def _uniform(shape: tuple[int, ...], inputs: int) -> nn.Parameter:
    """As torch.nn.Linear draws them."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(inputs))


@dataclass
class CrossValidation:
    """Perceptrons, each of which is scored on the fold that it was not trained with.

    Attributes:
        inputs: of each fold, for all samples: (folds, n, features).
        targets: (folds, n, ...), as `criterion` takes them.
        parts: of each fold: indices of the samples to train with, and of those held out.
        hidden: widths of the hidden layers.
        outputs: width of the last one.
        criterion: the loss.
        metrics: held-out outputs and targets of a fold -> values by name.
    """

    inputs: Tensor
    targets: Tensor
    parts: list[tuple[Tensor, Tensor]]
    hidden: tuple[int, ...]
    outputs: int
    criterion: Callable[..., Tensor]
    metrics: Callable[[Tensor, Tensor], dict[str, float]]

    @property
    def folds(self) -> int:
        """See `Problem`."""
        return len(self.parts)

    def make_model(self) -> nn.Module:
        """See `Problem`."""
        return Perceptrons(self.folds, (self.inputs.shape[2], *self.hidden, self.outputs), self.criterion)

    def batch(self, generator: torch.Generator) -> Batch:
        """See `Problem`."""
        drawn = torch.stack([part[torch.randint(len(part), (BATCH,), generator=generator)] for part, _ in self.parts])
        folds = torch.arange(self.folds)[:, None]
        return self.inputs[folds, drawn], self.targets[folds, drawn]

    def scores(self, model: Any) -> Scores:
        """See `Problem`."""
        found = []
        for fold, (_, held_out) in enumerate(self.parts):
            outputs = model(self.inputs[fold, held_out][None], slice(fold, fold + 1))[0]
            found.append(self.metrics(outputs, self.targets[fold, held_out]))
        return {name: [metrics[name] for metrics in found] for name in found[0]}


def _parts(splitter: Any, inputs: Any, targets: Any) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor(train), torch.tensor(held_out)) for train, held_out in splitter.split(inputs, targets)]


# The folds are the same for all seeds, which decide weights and batches: so that the spread between seeds is not one of data.


def digits() -> CrossValidation:
    """Classifiers of 1797 images of 8 x 8 pixels."""
    images, labels = load_digits(return_X_y=True)
    return CrossValidation(
        inputs=(torch.tensor(images, dtype=torch.float32) / 16).expand(FOLDS, -1, -1),
        targets=torch.tensor(labels).expand(FOLDS, -1),
        parts=_parts(StratifiedKFold(FOLDS, shuffle=True, random_state=0), images, labels),
        hidden=(128, 128),
        outputs=10,
        criterion=functional.cross_entropy,
        metrics=_of_classes,
    )


def _of_classes(logits: Tensor, labels: Tensor) -> dict[str, float]:
    right = (logits.argmax(1) == labels).double().mean().item()
    return {"loss": functional.cross_entropy(logits, labels).item(), "accuracy": right}


def diabetes() -> CrossValidation:
    """How far the disease of 442 patients went in a year, from ten measurements; both are standardised with a fold's training data."""
    measured, progress = load_diabetes(return_X_y=True, scaled=False)
    parts = _parts(KFold(FOLDS, shuffle=True, random_state=0), measured, progress)
    return CrossValidation(
        inputs=torch.stack([_standardised(measured, train) for train, _ in parts]),
        targets=torch.stack([_standardised(progress[:, None], train) for train, _ in parts]),
        parts=parts,
        hidden=(128, 128),
        outputs=1,
        criterion=functional.mse_loss,
        metrics=_of_numbers,
    )


def _standardised(values: Any, train: Tensor) -> Tensor:
    """Columns of numpy's `values`, so that the rows `train` have the mean 0 and the variance 1."""
    return torch.tensor(StandardScaler().fit(values[train.numpy()]).transform(values), dtype=torch.float32)


def _of_numbers(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    error = functional.mse_loss(outputs, targets)
    return {"MSE": error.item(), "R^2": (1 - error / targets.var(correction=0)).item()}


@dataclass(frozen=True)
class Task:
    """A problem and how long it is trained.

    Attributes:
        make: the problem.
        steps: of a training, unless something else is asked for.
        seconds: about how long a step takes, for the progress bar.
        checks: how often a training is scored on the way; the transformer only at its end, which takes as long as 40 steps.
        about: what it is, and the units of its metrics.
    """

    make: Callable[[], Problem]
    steps: int
    seconds: float
    checks: int
    about: str


TASKS = {
    "characters": Task(
        Characters,
        steps=500,
        seconds=0.035,
        checks=1,
        about="A transformer on CPython's documentation, 16 texts of 64 characters a step; loss in nats a character, on held-out text",
    ),
    "digits": Task(
        digits,
        steps=400,
        seconds=0.0015,
        checks=5,
        about=f"Perceptrons on scikit-learn's digits, {BATCH} a step; loss in nats, means of {FOLDS}-fold cross-validation",
    ),
    "diabetes": Task(
        diabetes,
        steps=300,
        seconds=0.0015,
        checks=5,
        about=f"Perceptrons on scikit-learn's diabetes, {BATCH} a step; targets are standardised, means of {FOLDS}-fold cross-validation",
    ),
}
