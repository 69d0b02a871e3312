"""What one run of a compiled program costs a device: operations, bytes of its memory, bytes over the links.

Counted from the optimised program's text. The compiler's own `cost_analysis()` counts a loop's body once; here it
counts as often as it runs. A Pallas kernel counts as it declares (`pl.CostEstimate`). Where the bytes go follows from
the kinds of the arrays (array_kinds.py).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from starflow_jax.kernels.pallas_tpu import CACHED
from starflow_jax.planning.array_kinds import (
    PARTS,
    UNKNOWN,
    ArrayKinds,
    Contents,
    Kinds,
    as_declared,
    branches,
    parts_of,
)
from starflow_jax.planning.loop_trips import trips, value_of
from starflow_jax.planning.program_text import HBM, Array, Computation, Instruction, Module, leaves, parse

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
        "replica-id", "add-dependency", "domain"}
SLICES = {"dynamic-slice", "slice", "gather"}
SAME_ELEMENTS = {"bitcast", "copy", "convert", "reshape", "transpose"}  # a slice of the result is one of the operand
TRANSCENDENTAL = {"exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "sqrt", "rsqrt",
                  "cbrt", "power", "sine", "cosine", "tan", "atan2", "erf", "acos", "acosh", "asin", "asinh", "atanh",
                  "cosh", "sinh"}
ELEMENTWISE = {"add", "subtract", "multiply", "divide", "remainder", "maximum", "minimum", "compare", "select", "and",
               "or", "xor", "not", "negate", "abs", "sign", "floor", "ceil", "clamp", "convert", "is-finite",
               "round-nearest-afz", "round-nearest-even", "shift-left", "shift-right-logical",
               "shift-right-arithmetic", "real", "imag", "complex", "popcnt", "clz", "reduce-precision"}

@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device and one run. flops: 2 for each multiply-add of products, and what kernels declare."""

    flops: float = 0.0
    elementwise: float = 0.0  # arithmetic outside products, one for each element
    transcendentals: float = 0.0  # exponentials, logarithms, roots, ..., one for each element
    hbm_bytes: float = 0.0  # read from and written to the main memory
    hbm_parts: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))  # the same
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)  # sent over the links, by kind
    collectives: float = 0.0  # how many run

    def __add__(self, other: "Cost") -> "Cost":
        return _combine(lambda a, b: a + b, self, other)

    def times(self, count: float) -> "Cost":
        return _combine(lambda a, _: a * count, self, self)


def count(compiled: Any, unknown_trips: float = 1, filled: float = 1, contents: Contents = UNKNOWN) -> Cost:
    """The cost of a compiled program (`jax.jit(f).lower(...).compile()`), or of its text.

    A loop without a number of trips in it (a solver's) counts `unknown_trips` times; of a conditional the costliest
    branch counts; of a kernel that declares nothing, its operands and results as bytes, and no operations. Attention to
    a cache declares that it is full, and reads what is filled: that share of it counts. Without `contents` all
    bytes are those of activations.
    """
    module = parse(compiled if isinstance(compiled, str) else compiled.as_text())
    kinds = ArrayKinds(module, contents)
    return _Counter(module, unknown_trips, filled, kinds).run(module.entry, (), *kinds.of_entry())


def _combine(function, a: Cost, b: Cost) -> Cost:
    def of(x: Any, y: Any) -> Any:
        if isinstance(x, dict):
            return {key: function(x.get(key, 0.0), y.get(key, 0.0)) for key in dict.fromkeys((*x, *y))}
        return function(x, y)

    return Cost(**{name: of(getattr(a, name), getattr(b, name)) for name in vars(a)})


def _costliest(costs: list[Cost]) -> Cost:
    """Of each figure the largest; where the bytes go, of the one with most of them."""
    largest = functools.reduce(functools.partial(_combine, max), costs)
    return dataclasses.replace(largest, hbm_parts=max(costs, key=lambda cost: cost.hbm_bytes).hbm_parts)


class _Counter:
    def __init__(self, module: Module, unknown_trips: float, filled: float, kinds: ArrayKinds):
        self.module, self.unknown_trips, self.filled, self.kinds = module, unknown_trips, filled, kinds
        self.seen: dict[tuple, Cost] = {}

    def run(self, name: str, arguments: tuple, given: tuple[Kinds, ...], result: Kinds) -> Cost:
        """The cost of a computation outside fusions. arguments: what is known of its parameters (loop_trips.py); given,
        result: their kinds and those of what it returns (array_kinds.py)."""
        key = name, arguments, given, result
        if key not in self.seen:
            computation, kinds = self.module.computations[name], self.kinds.of(name, given, result)
            total = Cost()
            for instruction in computation.instructions.values():
                total += self._instruction(computation, instruction, arguments, kinds)
            self.seen[key] = total
        return self.seen[key]

    def _instruction(self, computation: Computation, instruction: Instruction, arguments: tuple,
                     kinds: dict[str, Kinds]) -> Cost:
        kind, result = instruction.kind, kinds[instruction.name]
        if kind == "while":
            number, state = trips(self.module, computation, instruction, arguments)
            body, test = (instruction.called(name)[0] for name in ("body", "condition"))
            cost = self.run(body, (state,), (result,), result) + self.run(test, (state,), (result,), ("",))
            return cost.times(self.unknown_trips if number is None else number)
        if kind in ("conditional", "call", "async"):
            values = tuple(value_of(self.module, computation, name, arguments) for name in instruction.operands)
            given = tuple(kinds[name] for name in instruction.operands)
        if kind == "conditional":
            return _costliest([self.run(branch, (value,), (of_value,), result)
                               for branch, value, of_value in zip(branches(instruction), values[1:], given[1:])])
        if kind in ("call", "async"):
            called = (instruction.called("to_apply") or instruction.called("calls"))[0]
            size = len(self.module.computations[called].root.arrays)
            return self.run(called, values, given, result if kind == "call" else ("",) * size)
        return self._arithmetic(computation, instruction) + self._traffic(computation, instruction, kinds)

    def _arithmetic(self, computation: Computation, instruction: Instruction, fused: bool = False) -> Cost:
        """Operations and what goes over the links: of a fusion, of all that is in it."""
        opcode = instruction.kind
        if opcode == "fusion":
            inside = self.module.computations[instruction.called("calls")[0]]
            return sum((self._arithmetic(inside, part, fused=True) for part in inside.instructions.values()), Cost())
        if opcode in ("dot", "convolution"):
            product = _dot_flops if opcode == "dot" else _convolution_flops
            return Cost(flops=product(instruction, *(computation[name].arrays[0] for name in instruction.operands)))
        if opcode == "custom-call":
            return _custom_call(computation, instruction, self.filled)
        if opcode in ("reduce", "reduce-window"):
            values = len(instruction.operands) // 2
            size = sum(computation[name].arrays[0].elements for name in instruction.operands[:values])
            return Cost(elementwise=max(size - sum(a.elements for a in instruction.arrays), 0))
        if opcode in TRANSCENDENTAL:
            return Cost(transcendentals=instruction.arrays[0].elements)
        if opcode in ELEMENTWISE:
            return Cost(elementwise=instruction.arrays[0].elements)
        if sent := _sent_bytes(computation, instruction, opcode, self.module.devices, fused):
            return Cost(collective_bytes=sent, collectives=1)
        return Cost()

    def _traffic(self, computation: Computation, instruction: Instruction, kinds: dict[str, Kinds]) -> Cost:
        """Bytes of the main memory that an instruction outside fusions reads and writes."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")) or _is_call(instruction, "AllocateBuffer"):
            return Cost()
        declared = _declared(instruction, self.filled)
        operands = [computation[name] for name in instruction.operands]
        results, first = list(_result(instruction)), _before_result(instruction)
        reads, written = [1.0] * len(operands), [1.0] * len(results)
        if declared is None:
            reads, written = self._shares(instruction, operands)
        read = [(kind, share * _in_hbm(array)) for share, operand in zip(reads, operands)
                for kind, array in zip(kinds[operand.name], operand.arrays)]
        made = [(kind, share * _in_hbm(array))
                for kind, share, array in zip(kinds[instruction.name][first:], written, results)]
        parts = parts_of(read, made)
        if declared is not None:
            parts = as_declared(parts, declared.hbm_bytes, self.filled)
        return Cost(hbm_bytes=sum(parts.values()), hbm_parts=parts)

    def _shares(self, instruction: Instruction, operands: list[Instruction]) -> tuple[list[float], list[float]]:
        """Of each operand the share that is read, of each resulting array the share that is written."""
        reads, written = [1.0] * len(operands), [1.0] * len(list(_result(instruction)))
        if instruction.kind == "fusion":
            inside = self.module.computations[instruction.called("calls")[0]]
            reads = [self._read(inside, inside.parameters[index].name) for index in range(len(operands))]
            written = self._written(inside, inside.root)
        elif instruction.kind in SLICES:
            reads[0] = _share(instruction, operands[0])
        elif instruction.kind in ("dynamic-update-slice", "scatter"):
            update = operands[1 if instruction.kind == "dynamic-update-slice" else len(operands) - 1]
            written = [_share(update, operands[0])]
            reads[0] = 0.0 if instruction.kind == "dynamic-update-slice" else written[0]  # a scatter adds to it
        return reads, written

    def _read(self, inside: Computation, name: str) -> float:
        """The share of a value in a fusion that those who use it read: less than 1 where all of them take slices."""
        return min(1.0, sum(self._use(inside, user, name) for user in inside.users[name]))

    def _use(self, inside: Computation, user: Instruction, name: str) -> float:
        at = [index for index, operand in enumerate(user.operands) if operand == name]
        if user.opcode in SLICES and at == [0]:
            return _share(user, inside[name])
        if user.opcode == "dynamic-update-slice" and at == [0]:
            return 0.0 if user.name in _ends(inside) else self._read(inside, user.name)
        if user.opcode in SAME_ELEMENTS and user is not inside.root:
            return self._read(inside, user.name)
        if user.opcode == "tuple" or _continues(inside, user):
            return 0.0  # the value only passes through
        if user.opcode == "fusion":
            within = self.module.computations[user.called("calls")[0]]
            if user is not inside.root and all(_rearranged(within, within.parameters[index].name) for index in at):
                return self._read(inside, user.name)
            return sum(self._read(within, within.parameters[index].name) for index in at)
        return 1.0

    def _written(self, inside: Computation, instruction: Instruction) -> list[float]:
        """The share of each array of a fusion's result that is written: an update in place writes the update."""
        if instruction.opcode == "tuple":
            return [share for name in instruction.operands for share in self._written(inside, inside[name])]
        if instruction.opcode == "parameter" or _continues(inside, instruction):
            return [0.0] * len(instruction.arrays)
        if instruction.opcode == "bitcast":
            return self._written(inside, inside[instruction.operands[0]])
        if instruction.opcode == "fusion":
            within = self.module.computations[instruction.called("calls")[0]]
            return self._written(within, within.root)
        if instruction.opcode == "dynamic-update-slice":
            return [_share(inside[instruction.operands[1]], instruction)]
        shares = [1.0] * len(instruction.arrays)
        return [0.0, *shares[1:]] if _is_call(instruction, "AsyncCollectiveStart") else shares  # [0]: its operand


def _rearranged(inside: Computation, name: str) -> bool:
    """Whether a fusion does nothing with a value but give it another layout."""
    users = inside.users[name]
    return bool(users) and all(user.opcode in SAME_ELEMENTS and (user is inside.root or _rearranged(inside, user.name))
                               for user in users)


def _ends(inside: Computation) -> set[str]:
    """The instructions whose results leave a fusion."""
    names, found = [inside.root.name], set()
    while names:
        name = names.pop()
        found.add(name)
        if inside[name].opcode in ("tuple", "bitcast"):
            names += inside[name].operands
    return found


def _is_call(instruction: Instruction, target: str) -> bool:
    return instruction.opcode == "custom-call" and f'custom_call_target="{target}' in instruction.attributes


def _continues(inside: Computation, instruction: Instruction) -> bool:
    """Whether this is a further part of a collective that is split over several fusions, on TPUs, to overlap with them.

    All parts have the whole collective's shape and a chain_id; it is counted at its start.
    """
    if "chain_id=" in instruction.attributes:
        return not any(_is_call(user, "AsyncCollectiveStart") for user in inside.users[instruction.name])
    return _is_call(instruction, "AsyncCollectiveDone")


def _share(part: Instruction, whole: Instruction) -> float:
    return min(1.0, sum(array.elements for array in _result(part)) / max(whole.arrays[0].elements, 1))


def _in_hbm(*arrays: Array) -> float:
    return sum(array.bytes for array in arrays if array.space == HBM)


def _result(instruction: Instruction) -> Iterator[Array]:
    """The arrays that an instruction makes; that of a `-start` also has its operands and semaphores in its shape."""
    shape = instruction.shape
    if _has_operands(instruction):
        shape = shape[0 if instruction.opcode == "copy-start" else 1]  # type: ignore[index]
    return leaves(shape)


def _before_result(instruction: Instruction) -> int:
    """How many arrays its shape has before those that an instruction makes."""
    if not _has_operands(instruction) or instruction.opcode == "copy-start":
        return 0
    return len(list(leaves(instruction.shape[0])))  # type: ignore[index]


def _has_operands(instruction: Instruction) -> bool:
    return (instruction.opcode.endswith("-start") and isinstance(instruction.shape, tuple)
            and instruction.opcode != "all-reduce-start")


def _dot_flops(instruction: Instruction, left: Array, right: Array) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    summed = math.prod(left.dims[int(dim)] for dim in contracted[1].split(",") if dim) if contracted else 1
    return 2.0 * instruction.arrays[0].elements * summed


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> float:
    """2 for each product of two elements that are there: those with padding and between dilated ones are none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.attributes[:200]!r}")
    spatial = sorted(label for label in labels[2] if label.isdigit())
    window = _window(instruction.attributes, len(spatial))
    out = instruction.arrays[0]
    pairs = math.prod(
        _window_pairs(left.dims[labels[1].index(label)], right.dims[labels[2].index(label)],
                      out.dims[labels[3].index(label)], *window[axis])
        for axis, label in enumerate(spatial))
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = left.dims[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    # The kernel's input features are already those of one feature group.
    return 2.0 * batch * right.dims[labels[2].index("i")] * right.dims[labels[2].index("o")] * pairs


class _Axis(NamedTuple):
    stride: int
    pad: int
    lhs_dilate: int
    rhs_dilate: int


def _window(attributes: str, axes: int) -> list[_Axis]:
    """window={size=1x4 stride=1x2 pad=0_0x3_3 lhs_dilate=1x2 rhs_dilate=1x1}, what is not there being 1 and 0."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in text[1].split()) if text else {}

    def numbers(field: str, default: int) -> list[int]:
        return [int(part.split("_")[0]) for part in fields[field].split("x")] if field in fields else axes * [default]

    return [_Axis(*axis) for axis in zip(numbers("stride", 1), numbers("pad", 0), numbers("lhs_dilate", 1),
                                         numbers("rhs_dilate", 1))]


@functools.lru_cache
def _window_pairs(size: int, kernel: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """How many pairs (position in the result, position in the kernel) meet an element of the input."""
    few, many = sorted(((out, stride), (kernel, rhs_dilate)))
    positions = np.arange(many[0]) * many[1] - pad
    total = 0
    for index in range(few[0]):
        at = positions + index * few[1]
        total += int(((at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)).sum())
    return total


def _declared(instruction: Instruction, filled: float) -> Cost | None:
    """The cost that a Pallas kernel declares; of attention to a cache, of its filled share."""
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes)
    if instruction.opcode != "custom-call" or estimate is None:
        return None
    numbers = {name: float(value) for name, value in re.findall(r'"(\w+)":"?(\d+)', estimate[1])}
    whole = Cost(flops=numbers.get("flops", 0.0), transcendentals=numbers.get("transcendentals", 0.0),
                 hbm_bytes=numbers.get("bytes_accessed", 0.0))
    return whole.times(filled) if CACHED in instruction.attributes else whole


def _custom_call(computation: Computation, instruction: Instruction, filled: float) -> Cost:
    """Kernels that declare their cost, and cuBLAS's products."""
    if declared := _declared(instruction, filled):
        return dataclasses.replace(declared, hbm_bytes=0.0)
    if not _is_call(instruction, "__cublas$"):
        return Cost()
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    left = computation[instruction.operands[0]].arrays[0]
    summed = [left.dims[int(dim)] for dim in re.findall(r"\d+", contracted[1])] if contracted else []
    return Cost(flops=2.0 * instruction.arrays[0].elements * math.prod(summed))


def _sent_bytes(computation: Computation, instruction: Instruction, kind: str, devices: int, fused: bool
                ) -> dict[str, float]:
    """What a device sends in a collective among n, by the ring's formulas; {} for other instructions."""
    if fused and _continues(computation, instruction):
        return {}
    n = _group_size(instruction.attributes, devices)
    if fused and kind == "all-reduce" and _only_sliced(computation, instruction):
        kind = "reduce-scatter"  # TPUs have it as a fusion of an all-reduce and each one's slice
    factors = {"all-gather": n - 1, "reduce-scatter": (n - 1) / n, "all-reduce": 2 * (n - 1) / n,
               "all-to-all": (n - 1) / n, "ragged-all-to-all": (n - 1) / n, "collective-permute": 1,
               "collective-broadcast": 1}
    if kind not in factors:
        return {}
    return {kind: factors[kind] * sum(a.bytes for name in instruction.operands for a in computation[name].arrays)}


def _only_sliced(computation: Computation, instruction: Instruction) -> bool:
    users = computation.users[instruction.name]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in SAME_ELEMENTS | {"get-tuple-element"}
                                           and _only_sliced(computation, user)) for user in users)


def _group_size(attributes: str, devices: int) -> int:
    """replica_groups as {{0,1},{2,3}}, as [groups,size]<=..., as mesh['a'=2,'b'=4] {'a'}; {} or none: all devices."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])  # 'a':(1)2 is a part of an axis
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices
