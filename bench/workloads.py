"""The workloads of the benchmark as data: the parameter shapes of real models, generated from their architecture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A model, as far as an optimizer sees it.

    Attributes:
        name: what the command line calls it.
        description: one line.
        shapes: of the parameters, in the model's order.
    """

    name: str
    description: str
    shapes: tuple[Shape, ...]

    @property
    def tensors(self) -> int:
        """Number of parameters' tensors."""
        return len(self.shapes)

    @property
    def elements(self) -> int:
        """Number of elements in all tensors together."""
        return sum(map(math.prod, self.shapes))


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _network(*widths: int) -> list[Shape]:
    """A multilayer perceptron."""
    return [shape for layer in itertools.pairwise(widths) for shape in _linear(*layer)]


def _gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """Radford et al., 2019. The output layer shares wte; weights are (inputs, outputs), as in the original."""

    def conv1d(inputs: int, outputs: int) -> list[Shape]:
        return [(inputs, outputs), (outputs,)]

    attention = [*_norm(width), *conv1d(width, 3 * width), *conv1d(width, width)]
    mlp = [*_norm(width), *conv1d(width, 4 * width), *conv1d(4 * width, width)]
    return [(vocabulary, width), (context, width), *layers * (attention + mlp), *_norm(width)]


def _resnet50(classes: int = 1000) -> list[Shape]:
    """He et al., 2015, as in torchvision; every convolution is followed by a batch normalisation."""

    def conv(inputs: int, outputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), *_norm(outputs)]

    shapes = conv(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(blocks):
            shapes += [*conv(inputs, width, 1), *conv(width, width, 3), *conv(width, outputs, 1)]
            if block == 0:  # the shortcut has to change the number of channels
                shapes += conv(inputs, outputs, 1)
            inputs = outputs
    return [*shapes, *_linear(inputs, classes)]


def _lora(width: int = 4096, layers: int = 32, rank: int = 8) -> list[Shape]:
    """Hu et al., 2021: matrices A and B for the query, key, value and output projections of each layer."""
    adapter: list[Shape] = [(rank, width), (width, rank)]
    return layers * 4 * adapter


def _workload(name: str, description: str, shapes: Iterable[Shape]) -> Workload:
    return Workload(name, description, tuple(shapes))


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _workload("rl", "policy and value network of a control task", [*_network(17, 64, 64, 6), *_network(17, 64, 64, 6)]),
        _workload("tiny", "1000 tensors of 64 elements", 1000 * [(64,)]),
        _workload("single", "one tensor of 65,536 elements", [(65_536,)]),
        _workload("mlp", "8 linear layers of 256 x 256", 8 * _linear(256, 256)),
        _workload("lora", "rank-8 adapters of a model shaped like Llama 7B", _lora()),
        _workload("resnet50", "ResNet-50", _resnet50()),
        _workload("gpt2", "GPT-2 small", _gpt2()),
        _workload("large", "one tensor of 64M elements", [(64 * 2**20,)]),
    )
}

# The published sizes of the models, against a slip in the code above.
