"""Reads the text of a compiled program (HLO): what one device does, the bodies of loops as often as they run.

A module is a list of computations, a computation a list of instructions in their order:

    %name = f32[8,128]{1,0:T(8,128)S(1)} opcode(%operand, ...), attribute=..., backend_config={...}

Layouts matter only for the memory space: on TPU S(1) is the memory on the chip, and no S is the large one (HBM).
"""

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_NAMES = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation|called_computations)=\{?%([\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')

BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


class Array(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    space: int  # of memory; 0 is the device's large one

    @property
    def size(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = BITS[self.dtype] if self.dtype in BITS else int(digits[0]) if digits else 32
        return (self.size * bits + 7) // 8


class Instruction(NamedTuple):
    """One line."""

    name: str
    result: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # all that follows the operands
    root: bool

    def called(self) -> list[str]:
        """The computations that a fusion, a call or a conditional runs."""
        names = _CALLED.findall(self.attributes)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return names + (_NAMES.findall(branches[1]) if branches else [])

    def attribute(self, name: str) -> str | None:
        """`name=word` or `name={...}` among the attributes."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.>-]+))", self.attributes)
        return None if found is None else found[1] if found[1] is not None else found[2]


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a result's type, "(f32[8]{0}, s32[])" or "f32[8]"."""
    out = []
    for dtype, shape, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        out.append(Array(dtype, tuple(int(n) for n in shape.split(",") if n), int(space[1]) if space else 0))
    return tuple(out)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    # The type of a result has parentheses too, but no word right before one.
    opcode = _OPCODE.search(line, head.end() - 1) if head else None
    if head is None or opcode is None:
        return None
    end = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : end]
    # Of constants and parameters the inside is a value or a number.
    operands = (inside,) if opcode[1] in ("constant", "parameter") else tuple(_NAMES.findall(inside))
    return Instruction(
        head[1], arrays(line[head.end() : opcode.start()]), opcode[1], operands, line[end + 1 :], "ROOT " in line[:7]
    )


class Module(NamedTuple):
    """See `parse`."""

    computations: dict[str, dict[str, Instruction]]  # by name, in their order
    entry: str
    partitions: int

    def root(self, computation: str) -> Instruction:
        body = self.computations[computation]
        return next((i for i in reversed(body.values()) if i.root), list(body.values())[-1])


@functools.lru_cache(maxsize=2)
def parse(text: str) -> Module:
    """The module of a compiled program's text, `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _HEADER.match(line) if line and not line.startswith((" ", "HloModule")) else None
            if head:
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # which ends the metadata of a Pallas kernel
            current = None
        else:
            instruction = _instruction(line)
            if instruction:
                current[instruction.name] = instruction
    found = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Module(computations, entry, int(found[1]) if found else 1)


def _constant(module: Module, computation: str, name: str, depth: int = 8) -> int | None:
    """The integer that a value is known to be, through copies and conversions."""
    for _ in range(depth):
        i = module.computations[computation].get(name)
        if i is None:
            return None
        if i.opcode == "constant":
            return int(i.operands[0]) if re.fullmatch(r"-?\d+", i.operands[0]) else None
        if i.opcode not in ("copy", "convert", "bitcast", "copy-done", "copy-start") or not i.operands:
            return None
        name = i.operands[0]
    return None


def _trips(module: Module, computation: str, loop: Instruction) -> int:
    """How often a while loop's body runs: what the compiler says, or the bound that its condition compares with; 1
    where neither is known."""
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = loop.attribute("condition") or ""
    initial = module.computations[computation].get(loop.operands[0]) if loop.operands else None

    def value(where: str, name: str, given: tuple[str, ...]) -> int | None:
        """A number in the condition, itself or the loop's initial one; `given`: a fusion's operands."""
        i = module.computations[where].get(name)
        if i is None:
            return None
        if i.opcode == "parameter" and given:
            return value(condition, given[int(i.operands[0])], ())
        if i.opcode in ("copy", "convert", "bitcast"):
            return value(where, i.operands[0], given)
        if i.opcode == "get-tuple-element" and initial is not None and initial.opcode == "tuple":
            (index,) = map(int, re.findall(r"index=(\d+)", i.attributes)[:1])
            return _constant(module, computation, initial.operands[index])
        return _constant(module, where, name)

    def compare(where: str, given: tuple[str, ...]) -> int | None:
        for i in module.computations[where].values():
            if i.opcode == "compare" and i.attribute("direction") in ("LT", "LE", "GT", "GE", "NE"):
                ends = [value(where, name, given) for name in i.operands[:2]]
                known = [e for e in ends if e is not None]
                if len(known) == 2:
                    return abs(known[1] - known[0]) + (i.attribute("direction") in ("LE", "GE"))
                # Where one is known it is the bound, unless it is the 0 that loops start from.
                return next((e for e in ends if e), None)
            if i.opcode == "fusion":
                for called in i.called():
                    found = compare(called, i.operands)
                    if found is not None:
                        return found
        return None

    found = compare(condition, ()) if condition in module.computations else None
    return 1 if found is None else max(found, 0)


def executions(text: str, fused: bool = True) -> dict[str, int]:
    """How often each computation runs in one call of the program: loops by their trips, branches once each.

    fused: with the insides of fusions.
    """
    module = parse(text)
    times: dict[str, int] = {}
    stack = [(module.entry, 1)]
    while stack:
        name, n = stack.pop()
        if name not in module.computations:
            continue
        times[name] = times.get(name, 0) + n
        for i in module.computations[name].values():
            if i.opcode == "while":
                trips = _trips(module, name, i)
                stack.append((i.attribute("body") or "", n * trips))
                stack.append((i.attribute("condition") or "", n * (trips + 1)))
            elif i.opcode in ("call", "conditional", "async-start") or (fused and i.opcode == "fusion"):
                stack += [(called, n) for called in i.called()]
    return times


def walk(text: str, fused: bool = True) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, how often it runs)."""
    module = parse(text)
    for name, n in executions(text, fused).items():
        for i in module.computations[name].values():
            yield name, i, n


def cycles(text: str) -> float:
    """The compiler's estimate of a TPU's clock cycles: blind to collectives, to waiting and to Pallas kernels."""
    total = 0
    for _, i, n in walk(text, fused=False):
        found = _CYCLES.search(i.attributes)
        total += n * int(found[1]) if found else 0
    return float(total)
