"""A compiled program's text (optimised HLO, of any backend) as computations, instructions and shapes.

As much of the text's grammar as the count of operations and bytes needs (program_cost.py): jax has no parser of its
own.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# A layout as TPUs have it: {1,0:T(8,128)(2,1)S(1)} is minor to major, tiles, memory space.
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^{}]*)\})?")
_BETWEEN = re.compile(r"(?:\s|,|/\*[^*]*\*/)*")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (?=[\w(])")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_PARENTHESIS = re.compile(r"[()]")
_NAME = re.compile(r"%([\w.-]+)")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)")
_BITS = re.compile(r"[a-z]+(\d+)")

HBM = 0  # of the memory spaces: the device's main memory; others are VMEM, semaphores, the host's memory


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of an array: bytes as laid out, padding of tiles included."""

    dtype: str
    dims: tuple[int, ...]
    bytes: float
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.dims)


Shape = Array | tuple["Shape", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`. Of a constant and a parameter `literal` has what is in brackets."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def kind(self) -> str:
        """The opcode; of an operation that is started here and ends with a `-done`, that operation's."""
        return self.opcode.removesuffix("-start")

    @property
    def arrays(self) -> list[Array]:
        return list(leaves(self.shape))

    def called(self, attribute: str) -> list[str]:
        """The names of computations in an attribute such as `calls=%a` or `branch_computations={%a, %b}`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.-]+)", self.attributes)
        return _NAME.findall(found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Computation:
    instructions: dict[str, Instruction]
    root: Instruction

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each one's result."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """entry: the name of the computation that runs; devices: those that run it together; aliases: of results that are
    written where an argument was, that argument's number."""

    computations: dict[str, Computation]
    entry: str
    devices: int
    aliases: dict[int, int] = dataclasses.field(default_factory=dict)


def parse(text: str) -> Module:
    """Raises ValueError for what is not the text of a compiled program."""
    computations: dict[str, Computation] = {}
    found: dict[str, Instruction] = {}
    entry, name, root = "", "", None
    for line in text.splitlines():
        if line == "}":
            computations[name] = Computation(found, root or list(found.values())[-1])
            found, root = {}, None
        elif start := _INSTRUCTION.match(line):
            instruction = _instruction(line, start)
            found[instruction.name] = instruction
            root = instruction if start[1] else root
        elif head := _COMPUTATION.match(line):
            name, entry = head[2], head[2] if head[1] else entry
    if not entry:
        raise ValueError(f"not the text of a compiled program: {text[:60]!r}")
    header = text[: text.index("\n")]
    counts = [re.search(rf"{field}=(\d+)", header) for field in ("num_partitions", "replica_count")]
    aliases = {int(at or 0): int(number) for at, number in _ALIAS.findall(header)}
    return Module(computations, entry, math.prod(int(count[1]) for count in counts if count), aliases)


def leaves(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, in order."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


def _instruction(line: str, start: re.Match) -> Instruction:
    shape, end = _shape(line, start.end())
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"no instruction: {line[:200]!r}")
    depth = 1
    for bracket in _PARENTHESIS.finditer(line, opcode.end()):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            break
    inside = line[opcode.end():bracket.start()]
    literal = inside if opcode[1] in ("constant", "parameter") else ""
    operands = () if literal else tuple(_NAME.findall(inside))
    return Instruction(start[2], shape, opcode[1], operands, literal, line[bracket.end():])


def _shape(text: str, at: int) -> tuple[Shape, int]:
    """The shape that starts there and where it ends."""
    if text[at] != "(":
        match = _ARRAY.match(text, at)
        if match is None:
            raise ValueError(f"no shape: {text[at:at + 80]!r}")
        return _array(*match.groups()), match.end()
    parts, at = [], at + 1
    while text[at := _end(_BETWEEN, text, at)] != ")":
        part, at = _shape(text, at)
        parts.append(part)
    return tuple(parts), at + 1


def _end(pattern: re.Pattern, text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


@functools.lru_cache(maxsize=10_000)
def _array(dtype: str, dims: str, layout: str | None) -> Array:
    sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
    order, _, details = (layout or "").partition(":")
    minor_first = [sizes[int(dim)] for dim in order.split(",") if dim] or list(sizes[::-1])
    if tile := re.match(r"T\((\d+(?:,\d+)*)\)", details):
        tiled = [int(size) for size in reversed(tile[1].split(","))]
        minor_first += [1] * (len(tiled) - len(minor_first))
        minor_first[: len(tiled)] = [-(-size // unit) * unit for size, unit in zip(minor_first, tiled)]
    space = re.search(r"S\((\d+)\)", details)
    return Array(dtype, sizes, math.prod(minor_first) * _bits(dtype) / 8, int(space[1]) if space else HBM)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = _BITS.match(dtype)  # f32, bf16, s4, f8e4m3fn; a token and an opaque value have no size
    return int(match[1]) if match else 0
