"""How often the loops of a compiled program run: from the whole numbers that its text fixes."""

import dataclasses
import re
from typing import Any

from starflow_jax.planning.program_text import Array, Computation, Instruction, Module

_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
_SAME_NUMBER = {"bitcast", "copy", "convert", "reshape", "opt-barrier"}


@dataclasses.dataclass(frozen=True)
class _Item:
    """Element `at` of a loop's state, plus a number."""

    at: int
    plus: int = 0


@dataclasses.dataclass(frozen=True)
class _Compare:
    direction: str
    left: Any
    right: Any


# What is known of a result: an int, an _Item, a _Compare, a tuple of such (of a tuple), None: nothing.
Value = Any


def trips(module: Module, computation: Computation, loop: Instruction, arguments: tuple[Value, ...]
          ) -> tuple[int | None, Value]:
    """How often the body of a `while` runs, None where the text doesn't fix it; and what of its state is fixed.

    arguments: what is known of the surrounding computation's parameters.
    """
    body, condition = (module.computations[loop.called(name)[0]] for name in ("body", "condition"))
    single = isinstance(loop.shape, Array)
    size = 1 if isinstance(loop.shape, Array) else len(loop.shape)
    state: Value = _Item(0) if single else tuple(_Item(at) for at in range(size))

    def items(value: Value) -> tuple[Value, ...]:
        return (value,) if single else value if isinstance(value, tuple) else (None,) * size

    start = items(value_of(module, computation, loop.operands[0], arguments))
    after = items(value_of(module, body, body.root.name, (state,)))
    fixed = tuple(begin if then == item else None for begin, then, item in zip(start, after, items(state)))
    fixed_state = fixed[0] if single else fixed
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1]), fixed_state
    test = value_of(module, condition, condition.root.name, (state,))
    return _until(test, start, after, fixed), fixed_state


def value_of(module: Module, computation: Computation, name: str, arguments: tuple[Value, ...]) -> Value:
    """What the text fixes of a result, given what is known of the computation's parameters."""
    instruction = computation[name]
    opcode, operands = instruction.opcode, instruction.operands

    def of(operand: str) -> Value:
        return value_of(module, computation, operand, arguments)

    if opcode == "parameter":
        return dict(enumerate(arguments)).get(int(instruction.literal))
    if opcode == "tuple":
        return tuple(of(operand) for operand in operands)
    if opcode == "get-tuple-element":
        whole, at = of(operands[0]), re.search(r"index=(\d+)", instruction.attributes)
        return whole[int(at[1])] if at and isinstance(whole, tuple) else None
    if any(array.elements != 1 for array in instruction.arrays) and opcode != "opt-barrier":
        return None
    if opcode in _SAME_NUMBER:
        return of(operands[0])
    if opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if opcode == "fusion":
        inside = module.computations[instruction.called("calls")[0]]
        return value_of(module, inside, inside.root.name, tuple(map(of, operands)))
    if opcode == "add":
        return _sum(*map(of, operands))
    if opcode == "compare" and (direction := re.search(r"direction=(\w+)", instruction.attributes)):
        return _Compare(direction[1], *map(of, operands))
    return None


def _sum(left: Value, right: Value) -> Value:
    if isinstance(right, _Item):
        left, right = right, left
    if isinstance(left, _Item) and isinstance(right, int):
        return _Item(left.at, left.plus + right)
    return left + right if isinstance(left, int) and isinstance(right, int) else None


def _until(test: Value, start: tuple, after: tuple, fixed: tuple) -> int | None:
    """Trips of a loop that counts by a fixed step and runs while `test` holds, a comparison with a fixed number."""
    if not isinstance(test, _Compare):
        return None
    left, right = (fixed[side.at] + side.plus if isinstance(side, _Item) and isinstance(fixed[side.at], int) else side
                   for side in (test.left, test.right))
    direction = test.direction
    if isinstance(right, _Item):
        left, right, direction = right, left, _MIRRORED.get(direction, "")
    if not (isinstance(left, _Item) and isinstance(right, int)):
        return None
    begin, then = start[left.at], after[left.at]
    if not (isinstance(begin, int) and isinstance(then, _Item) and then.at == left.at):
        return None
    distance, step = right - begin - left.plus, then.plus
    if direction in ("GT", "GE"):
        distance, step = -distance, -step
    if direction not in _MIRRORED or step <= 0:
        return None
    return max(0, -(-(distance + (direction in ("LE", "GE"))) // step))
