"""From PTX text to instructions. Knows the grammar, but no instruction."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx.errors import UnsupportedPtxError


@dataclass(frozen=True)
class Register:
    name: str
    bits: int  # 1 for a predicate


@dataclass(frozen=True)
class Not:
    """A predicate, negated."""

    register: Register


@dataclass(frozen=True)
class Immediate:
    value: int  # of a floating-point literal its bits
    bits: int | None  # of a floating-point literal


@dataclass(frozen=True)
class Symbol:
    """A special register, shared memory, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Sink:
    """`_`: what is written there is not needed."""


@dataclass(frozen=True)
class Vector:
    """Registers for the parts of a value, or a pair of predicates."""

    items: tuple[Register | Immediate | Sink, ...]


Operand = Register | Not | Immediate | Symbol | Address | Sink | Vector


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers
    operands: tuple[Operand, ...]
    guard: Register | Not | None  # run where this predicate is true
    text: str

    def refuse(self, why: str) -> UnsupportedPtxError:
        return UnsupportedPtxError(f"{self.text}: {why}")


@dataclass
class Program:
    name: str
    parameters: dict[str, str]  # name and type, in order
    threads: int  # in a block
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # number of the instruction that follows


SHARED = "global_smem"  # Triton's only array in shared memory

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr\s+\.global)?(?:\s+\.align\s+\d+)?\s+([\w$]+)")
_BLOCK = re.compile(r"\.reqntid\s+(\d+)(?:\s*,\s*1\s*,\s*1)?(?:\s*\.maxnreg\s+\d+)?")
_PREAMBLE = re.compile(  # .global: strings that no instruction names, or its symbol is refused
    r"\.(?:version [\d.]+|target \w+|address_size 64|extern \.shared \.align 16 \.b8 " + SHARED + r"\[\];|global \.align \d+ \.b8 [^;]*;)"
)
# A statement ends at a semicolon, but a brace opens or closes a scope if it stands at the start of one; a label ends at its colon.
_STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|(\.(?:loc|file)\b[^\n]*)|([^;]*;))")
_REGISTERS = re.compile(r"\.reg\s+\.([a-z]+)(\d*)\s+(.*);", re.DOTALL)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*(.*);", re.DOTALL)
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+)\s*(?:,|$)")
_INTEGER = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0([fFdD])([0-9a-fA-F]+)")


def parse(text: str) -> Program:
    """The only kernel of a module."""
    text = _COMMENT.sub("", text)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise UnsupportedPtxError(f"a module of {len(entries)} kernels instead of one")
    entry = entries[0]
    rest = _PREAMBLE.sub("", text[: entry.start()]).strip()
    if rest:
        raise UnsupportedPtxError(f"before the kernel: {rest}")
    block = _BLOCK.fullmatch(entry[3].strip())
    if not block:
        raise UnsupportedPtxError(f"instead of a number of threads in a block: {entry[3].strip()}")
    program = Program(entry[1], _parameters(entry[2]), int(block[1]))
    _Body(program).read(text, entry.end())
    return program


def _parameters(text: str) -> dict[str, str]:
    parameters = {}
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.fullmatch(declaration)
        if not match:
            raise UnsupportedPtxError(f"parameter {declaration}")
        parameters[match[2]] = match[1]
    return parameters


class _Body:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.registers: dict[str, Register] = {}
        self.ranges: dict[str, int] = {}  # prefix of numbered registers, and their bits

    def read(self, text: str, position: int) -> None:
        depth = 1
        while depth:
            match = _STATEMENT.match(text, position)
            if not match:
                raise UnsupportedPtxError("the kernel does not end")
            position = match.end()
            brace, label, _, statement = match.groups()
            if brace:
                depth += 1 if brace == "{" else -1
            elif label:
                if label in self.program.labels:
                    raise UnsupportedPtxError(f"label {label} stands twice")
                self.program.labels[label] = len(self.program.instructions)
            elif statement:
                self._statement(statement.strip())

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif not text.startswith(".pragma"):  # for ptxas: loops not to unroll, bytes of a load that are not needed
            match = _INSTRUCTION.fullmatch(text)
            if not match:
                raise UnsupportedPtxError(f"not an instruction: {text}")
            negated, name, opcode, operands = match.groups()
            guard = self._predicate(name, bool(negated)) if name else None
            self.program.instructions.append(Instruction(opcode, tuple(self._operands(operands)), guard, " ".join(text.split())))

    def _declare(self, text: str) -> None:
        match = _REGISTERS.fullmatch(text)
        if not match:
            raise UnsupportedPtxError(text)
        bits = 1 if match[1] == "pred" else int(match[2])
        for name in match[3].split(","):
            prefix, bracket, _ = name.strip().partition("<")
            known = self.ranges if bracket else {n: r.bits for n, r in self.registers.items()}
            if known.get(prefix, bits) != bits:  # in another scope
                raise UnsupportedPtxError(f"{text}: {prefix} has {known[prefix]} bits elsewhere")
            if bracket:
                self.ranges[prefix] = bits
            else:
                self.registers[prefix] = Register(prefix, bits)

    def _predicate(self, name: str, negated: bool) -> Register | Not:
        register = self._find(name)
        if register is None or register.bits != 1:
            raise UnsupportedPtxError(f"{name} is no predicate")
        return Not(register) if negated else register

    def _find(self, name: str) -> Register | None:
        if name not in self.registers:
            bits = self.ranges.get(name.rstrip("0123456789"))
            if bits is None:
                return None
            self.registers[name] = Register(name, bits)
        return self.registers[name]

    def _operands(self, text: str) -> list[Operand]:
        operands, position = [], 0
        while position < len(text):
            match = _OPERAND.match(text, position)
            if not match:
                raise UnsupportedPtxError(f"operands {text}")
            operands.append(self._operand(match[1].strip()))
            position = match.end()
        return operands

    def _operand(self, text: str) -> Operand:
        if "|" in text:
            found = [self._find(name) for name in text.split("|")]
            predicates = tuple(register for register in found if register is not None and register.bits == 1)
            if len(predicates) != len(found):
                raise UnsupportedPtxError(f"operand {text}")
            return Vector(predicates)
        if text[0] == "{":
            items = tuple(self._operand(item.strip()) for item in text[1:-1].split(","))
            plain = tuple(item for item in items if isinstance(item, Register | Immediate | Sink))
            if len(plain) != len(items):
                raise UnsupportedPtxError(f"vector {text}")
            return Vector(plain)
        if text[0] == "[":
            base_text, _, offset = text[1:-1].partition("+")
            base = self._operand(base_text.strip())
            if not isinstance(base, Register | Symbol | Immediate):
                raise UnsupportedPtxError(f"address {text}")
            return Address(base, int(offset or "0", 0))
        if text[0] == "!":
            return self._predicate(text[1:], negated=True)
        return self._scalar(text)

    def _scalar(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if _INTEGER.fullmatch(text):
            return Immediate(int(text.rstrip("U"), 0), None)
        if match := _FLOAT.fullmatch(text):
            return Immediate(int(match[2], 16), {"f": 32, "d": 64}[match[1].lower()])
        register = self._find(text)
        if register is not None:
            return register
        if re.fullmatch(r"[%\w$.]+", text):
            return Symbol(text)
        raise UnsupportedPtxError(f"operand {text}")
