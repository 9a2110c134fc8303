"""Tensors of every layout that a torch tensor can have, placed into larger storages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

SHAPES = st.one_of(
    st.lists(st.integers(0, 8), max_size=3).map(tuple),
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
)


@dataclass(frozen=True)
class Layout:
    """How the elements of a shape lie in memory.

    Attributes:
        order: the dimensions, from the outermost to the innermost.
        gaps: for each of them, in that order, every how many elements one is used.
        offset: elements before the first one.
        expanded: dimensions of stride 0.
    """

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    offset: int = 0
    expanded: frozenset[int] = frozenset()

    def extent(self, shape: Sequence[int]) -> int:
        """The elements of storage that it takes."""
        return self.offset + math.prod(size * gap for size, gap in zip(self._sizes(shape), self.gaps, strict=True))

    def view(self, storage: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A tensor of that shape in the first `extent(shape)` elements of a 1-dimensional storage."""
        sizes = [size * gap for size, gap in zip(self._sizes(shape), self.gaps, strict=True)]
        dense = storage[self.offset : self.extent(shape)].view(sizes)
        with_gaps = dense[tuple(slice(None, None, gap) for gap in self.gaps)]
        return with_gaps.permute([self.order.index(dim) for dim in range(len(shape))]).expand(tuple(shape))

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        return [1 if dim in self.expanded else shape[dim] for dim in self.order]


@st.composite
def layouts(draw: st.DrawFn, dims: int, expanded: bool = False) -> Layout:
    """Any layout of that many dimensions; only of gradients, `expanded` ones."""
    return Layout(
        order=tuple(draw(st.permutations(range(dims)))),
        gaps=tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=dims, max_size=dims))),
        offset=draw(st.integers(0, 9)),
        expanded=draw(st.frozensets(st.integers(0, dims - 1))) if expanded and dims else frozenset(),
    )
