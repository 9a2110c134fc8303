"""Reads disassembled kernels: what moves whole tiles, how many instructions that takes and how wide its accesses to memory are."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """How a disassembly is written.

    Attributes:
        label: a line that can be branched to; group 1 is its name.
        instruction: a line with an instruction; group 1 is the instruction.
        branch: an instruction that goes to the label in group 1.
        always: a branch, or an exit, that every thread takes.
        exit: the end of a thread.
        access: an access to global memory; group 1 begins like "load" or "store", group 2 says the width.
        widths: bytes of each width, by the parts of group 2 between dots; the first that is here counts, else 4.
        slow_path: an instruction that leaves the usual path and comes back.
        not_counted: instructions that take no turn of the vector units.
        special: instructions of the units for roots and reciprocals.
    """

    label: re.Pattern[str]
    instruction: re.Pattern[str]
    branch: re.Pattern[str]
    always: re.Pattern[str]
    exit: re.Pattern[str]
    access: re.Pattern[str]
    widths: dict[str, int]
    slow_path: re.Pattern[str]
    not_counted: re.Pattern[str]
    special: re.Pattern[str]

    def width(self, line: str) -> int:
        """Bytes of an access to global memory; 0 of other instructions."""
        access = self.access.match(line)
        return next((self.widths[part] for part in access[2].split(".") if part in self.widths), 4) if access else 0


NEVER = re.compile(r"(?!)")

# As nvdisasm prints it. IEEE roots and divisions call a function for operands at the ends of the range, zeros included.
SASS = Dialect(
    label=re.compile(r"^(\.L_x_\d+):"),
    instruction=re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;"),
    branch=re.compile(r"^(?:@\S+ )?BRA\b.*`\((\.L_x_\d+)\)"),
    always=re.compile(r"^(BRA `|EXIT)"),
    exit=re.compile(r"^EXIT"),
    access=re.compile(r"^(?:@\S+ )?(LD|ST)G?\.(\S*)"),
    widths={"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32},
    slow_path=re.compile(r"CALL\S* `\(\$"),
    not_counted=NEVER,
    special=re.compile(r"^(?:@\S+ )?MUFU\b"),
)

# As LLVM prints it. Scalar instructions go to a unit of their own, beside the vector instructions of another wave. s_cbranch_execz only
# saves time where no lane of a wave would do anything.
AMDGCN = Dialect(
    label=re.compile(r"^(\.LBB\d+_\d+):"),
    instruction=re.compile(r"^\t([a-z][^;]*?)\s*(?:;.*)?$"),
    branch=re.compile(r"^s_(?:branch|cbranch_(?:scc|vcc|execnz)\w*) (\.LBB\d+_\d+)"),
    always=re.compile(r"^(s_branch|s_endpgm)"),
    exit=re.compile(r"^s_endpgm"),
    access=re.compile(r"^(?:buffer|global|flat)_(load|store)_([a-z0-9]+)"),
    widths={
        **dict.fromkeys(("ubyte", "sbyte", "byte"), 1),
        **dict.fromkeys(("ushort", "sshort", "short"), 2),
        "dwordx2": 8,
        "dwordx3": 12,
        "dwordx4": 16,
    },
    slow_path=NEVER,
    not_counted=re.compile(r"^s_"),
    special=re.compile(r"^v_(rcp|rsq|sqrt)_"),
)


@dataclass(frozen=True)
class Path:
    """What a thread executes to do its share of a tile, where nothing is out of the ordinary.

    Attributes:
        instructions: their number.
        special: of these, those of the units for roots and reciprocals.
        loads, stores: width in bytes -> accesses to global memory.
    """

    instructions: int
    special: int
    loads: Counter[int]
    stores: Counter[int]

    @classmethod
    def of(cls, lines: Sequence[str], dialect: Dialect) -> Path:
        if calls := [line for line in lines if dialect.slow_path.search(line)]:
            raise ValueError(f"a slow path lies on the usual one: {calls}")
        counted = [line for line in lines if not dialect.not_counted.match(line)]
        loads: Counter[int] = Counter()
        stores: Counter[int] = Counter()
        for line in counted:
            if access := dialect.access.match(line):
                (stores if access[1].lower().startswith("st") else loads)[dialect.width(line)] += 1
        return cls(len(counted), sum(bool(dialect.special.match(line)) for line in counted), loads, stores)

    @property
    def bytes(self) -> int:
        """Loaded and stored by a thread."""
        return sum(width * count for width, count in (self.loads + self.stores).items())

    @property
    def mean_width(self) -> float:
        """Of the accesses, in bytes."""
        return self.bytes / max((self.loads + self.stores).total(), 1)


@dataclass
class _Block:
    """Instructions that are executed one after the other, and which blocks can come next."""

    lines: list[str]
    next: list[int]


def main_path(text: str, dialect: Dialect) -> Path:
    """A round of the main loop or, without such a loop, the whole kernel for a whole tile. Its accesses are wider than a tail's."""
    blocks = _blocks(text, dialect)
    loops = [Path.of([line for block in body for line in block.lines], dialect) for body in _innermost(blocks)]
    moving = [loop for loop in loops if loop.loads and loop.stores]
    if moving:
        return max(moving, key=lambda loop: (loop.mean_width, loop.bytes))
    widths = [max((dialect.width(line) for line in block.lines), default=0) for block in blocks]
    widest = widths.index(max(widths))
    ends = [number for number, block in enumerate(blocks) if any(map(dialect.exit.match, block.lines[-1:]))]
    until, after = _shortest(blocks, 0, [widest]), _shortest(blocks, widest, ends)
    return Path.of([line for number in [*until, *after[1:]] for line in blocks[number].lines], dialect)


def _blocks(text: str, dialect: Dialect) -> list[_Block]:
    """Of the kernel and the functions after it; without those that are for slow paths only, which a conditional branch skips."""
    cut: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := dialect.label.match(line):
            if cut[-1]:
                cut.append([])
            labels[label[1]] = len(cut) - 1
        elif instruction := dialect.instruction.match(line):
            cut[-1].append(instruction[1])
            if dialect.branch.match(instruction[1]) or dialect.always.match(instruction[1]):
                cut.append([])
    blocks = []
    for number, lines in enumerate(cut):
        last = lines[-1] if lines else ""
        target = dialect.branch.match(last)
        following = [] if dialect.always.match(last) or number + 1 == len(cut) else [number + 1]
        blocks.append(_Block(lines, following + ([labels[target[1]]] if target and target[1] in labels else [])))
    slow = {
        number + 1
        for number, (block, following) in enumerate(itertools.pairwise(blocks))
        if len(block.next) == 2
        and any(map(dialect.slow_path.search, following.lines))
        and not any(map(dialect.access.match, following.lines))
    }
    for number, block in enumerate(blocks):
        block.lines = [] if number in slow else block.lines
        block.next = [each for each in block.next if each not in slow]
    return blocks


def _innermost(blocks: Sequence[_Block]) -> Iterator[Sequence[_Block]]:
    """Each loop that contains no other: from a block to the last branch back to it."""
    ends: dict[int, int] = {}
    for number, block in enumerate(blocks):
        # Code may also branch back from where it was put out of the way.
        ends.update({target: number for target in block.next if target <= number and _shortest(blocks, target, [number])})
    for start, end in ends.items():
        if not any(start < other <= end for other in ends):
            yield blocks[start : end + 1]


def _shortest(blocks: Sequence[_Block], start: int, goals: Sequence[int]) -> list[int]:
    """The blocks with the fewest instructions from `start` to any of `goals`; none if there is no way."""
    queue = [(0, [start])]
    seen: set[int] = set()
    while queue:
        length, path = heapq.heappop(queue)
        if path[-1] in goals:
            return path
        if path[-1] not in seen:
            seen.add(path[-1])
            for each in blocks[path[-1]].next:
                heapq.heappush(queue, (length + len(blocks[path[-1]].lines), [*path, each]))
    return []
