"""Which arrays of a compiled program are the model's weights, which are a cache: of all its results, from what is known
of its arguments and of what it returns.

What is sliced, copied, converted or computed from weights alone still is weights, and so of a cache; a cache that is
updated stays one. What is made of anything else besides is an activation. And where the bytes of the main memory go, by
these kinds.
"""

import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from starflow_jax.codec.wan_vae import Cache
from starflow_jax.nn.cache import KVCache
from starflow_jax.planning.program_text import Computation, Instruction, Module, Shape, leaves

WEIGHTS, CACHE, ACTIVATION, CONSTANT = "weights", "cache", "activation", "constant"
CACHES = (KVCache, Cache)
# Where bytes of the main memory go. Weights: read, and where they are copied or sliced written as well. A cache is read
# by what only computes with it; written by updates, and by copies of it or of a part of it, whose reading counts there.
PARTS = ("weights", "cache_read", "cache_written", "activations")

Kinds = tuple[str, ...]  # of a result, one for each array in it (`leaves`); "" where nothing is known

_SLICES = {"dynamic-slice", "slice"}  # not a gather, whose rows others choose
_UPDATES = {"dynamic-update-slice", "scatter"}
_EACH = {"opt-barrier", "sort", "all-gather", "all-reduce", "all-to-all", "collective-permute"}  # array by array
_SAME_ARRAY = {"bitcast", "copy", "copy-start", "copy-done", "convert", "reshape", "transpose"}


@dataclass(frozen=True)
class Contents:
    """What a program is given and returns: the kinds of arguments, by the names that its text has for them, and of
    results, in order. In training weights are all that belongs to them: averages and the optimizer's moments, too."""

    arguments: Mapping[str, str] = field(default_factory=dict)
    results: Kinds = ()


UNKNOWN = Contents()


def contents_of(function: Any, args: tuple, keywords: dict[str, Any], results: Any, weights: Any) -> Contents:
    """Of a jitted function's call, all in shapes. weights: a pytree, whose very leaves are among the arguments."""
    known = {id(leaf) for leaf in jax.tree.leaves(weights)}
    named: dict[str, str] = {}
    for name, value in inspect.signature(function).bind(*args, **keywords).arguments.items():
        for path, leaf, cached in _with_caches(value):
            kind = CACHE if cached else WEIGHTS if id(leaf) in known else ""
            if kind:
                named[name + jax.tree_util.keystr(path)] = kind
    return Contents(named, tuple(CACHE if cached else "" for *_, cached in _with_caches(results)))


def _with_caches(tree: Any) -> Iterable[tuple[tuple, Any, bool]]:
    """(path, leaf, whether it is a part of a cache) of each leaf."""
    for path, part in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, CACHES))[0]:
        for inner, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
            yield (*path, *inner), leaf, isinstance(part, CACHES)


class ArrayKinds:
    """The kinds of all results of a computation, known from its arguments (`made_of`) and from its use (`used_as`)."""

    def __init__(self, module: Module, contents: Contents) -> None:
        self.module, self.contents = module, contents
        self.made_of = functools.cache(self._made_of)
        self.used_as = functools.cache(self._used_as)

    def of_entry(self) -> tuple[tuple[Kinds, ...], Kinds]:
        """The kinds of the entry computation's arguments and of its result."""
        entry = self.module.computations[self.module.entry]
        arguments = [self._argument(entry.parameters[number]) for number in sorted(entry.parameters)]
        count = _size(entry.root.shape)
        results = list(self.contents.results if len(self.contents.results) == count else count * ("",))
        for at, number in self.module.aliases.items():
            if not results[at] and arguments[number] in (WEIGHTS, CACHE):
                results[at] = arguments[number]
        return tuple((kind,) for kind in arguments), tuple(results)

    def _argument(self, parameter: Instruction) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', parameter.attributes)
        return self.contents.arguments.get(re.sub(r"\\(.)", r"\1", found[1]) if found else "", ACTIVATION)

    def of(self, name: str, arguments: tuple[Kinds, ...], result: Kinds) -> dict[str, Kinds]:
        """Of each result in a computation: what it is made of, and where that says no more, what it is used as."""
        made, used = self.made_of(name, arguments), self.used_as(name, result)
        return {part: tuple(kind if kind in (WEIGHTS, CACHE) else use or ACTIVATION
                            for kind, use in zip(made[part], used[part])) for part in made}

    def _made_of(self, name: str, arguments: tuple[Kinds, ...]) -> dict[str, Kinds]:
        computation, found = self.module.computations[name], dict[str, Kinds]()
        for instruction in computation.instructions.values():
            found[instruction.name] = self._result(computation, instruction, arguments, found)
        return found

    def _result(self, computation: Computation, instruction: Instruction, arguments: tuple[Kinds, ...],
                found: dict[str, Kinds]) -> Kinds:
        kind = instruction.kind
        operands: list[Kinds] = [found[name] for name in instruction.operands]
        count = _size(instruction.shape)
        if kind == "parameter":
            return arguments[int(instruction.literal)]
        if kind == "tuple":
            return sum(operands, ())
        if kind == "get-tuple-element":
            begin, end = _element(computation, instruction)
            return operands[0][begin:end]
        if kind == "while":
            return self._loop(instruction, operands[0])
        if kind in ("fusion", "call", "async"):
            made = self._root(instruction.called("calls") or instruction.called("to_apply"), tuple(operands))
            # What is started has its operands and the context beside its result.
            return made if len(made) == count else (_join(made),) * count
        if kind == "conditional":
            ends = [self._root([branch], (given,)) for branch, given in zip(branches(instruction), operands[1:])]
            return tuple(map(_join, zip(*ends)))
        if kind.endswith(("-done", "-update")) and len(operands[0]) != count:
            begin = 0 if kind == "copy-done" else _size(_first(computation[instruction.operands[0]].shape))
            return operands[0][begin:begin + count]
        if kind in _EACH and len(sum(operands, ())) == count:
            return sum(operands, ())
        if kind in _SLICES:
            return operands[0][:1] * count
        if kind in _UPDATES:
            update = operands[-1 if kind == "scatter" else 1]
            return (CACHE if operands[0][0] == CACHE else _join((*operands[0], *update)),) * count
        return (_mixed(computation, instruction, operands),) * count

    def _root(self, called: list[str], operands: tuple[Kinds, ...]) -> Kinds:
        return self.made_of(called[0], operands)[self.module.computations[called[0]].root.name]

    def _loop(self, loop: Instruction, state: Kinds) -> Kinds:
        """What each part of the state is at any trip: what it is at first and what it then is made of."""
        while (after := tuple(map(_join, zip(state, self._root(loop.called("body"), (state,)))))) != state:
            state = after
        return state

    def _used_as(self, name: str, result: Kinds) -> dict[str, Kinds]:
        """result: what the computation's root is used as."""
        computation = self.module.computations[name]
        found = {part: [""] * _size(instruction.shape) for part, instruction in computation.instructions.items()}
        found[computation.root.name] = list(result)
        for instruction in reversed(computation.instructions.values()):
            use = tuple(found[instruction.name])
            if instruction.kind == "while" and any(use):
                use = self._used_loop(instruction, use)
                found[instruction.name] = list(use)
            if any(use):
                for operand, begin, kinds in self._operands_use(computation, instruction, use):
                    for at, kind in enumerate(kinds, begin):
                        found[operand][at] = found[operand][at] or kind
        return {part: tuple(kinds) for part, kinds in found.items()}

    def _used_loop(self, loop: Instruction, state: Kinds) -> Kinds:
        while (before := _first_known(state, self._parameters_use(loop.called("body")[0], state, 1)[0])) != state:
            state = before
        return state

    def _parameters_use(self, name: str, result: Kinds, count: int) -> list[Kinds]:
        parameters, used = self.module.computations[name].parameters, self.used_as(name, result)
        return [used[parameters[number].name] if number in parameters else () for number in range(count)]

    def _operands_use(self, computation: Computation, instruction: Instruction, use: Kinds
                      ) -> Iterable[tuple[str, int, Kinds]]:
        """(operand, its first array that this is about, what they are used as)."""
        kind, operands = instruction.kind, instruction.operands
        if kind == "tuple":
            begin = 0
            for name in operands:
                count = _size(computation[name].shape)
                yield name, 0, use[begin:begin + count]
                begin += count
        elif kind == "get-tuple-element":
            yield operands[0], _element(computation, instruction)[0], use
        elif kind in ("while", "opt-barrier") and len(operands) == 1:
            yield operands[0], 0, use
        elif kind in ("fusion", "call"):
            called = (instruction.called("calls") or instruction.called("to_apply"))[0]
            yield from zip(operands, len(operands) * [0], self._parameters_use(called, use, len(operands)))
        elif kind == "conditional":
            for branch, name in zip(branches(instruction), operands[1:]):
                yield name, 0, self._parameters_use(branch, use, 1)[0]
        elif instruction.opcode in _SAME_ARRAY | _UPDATES:
            yield operands[0], 0, use[:1]


def parts_of(read: list[tuple[str, float]], made: list[tuple[str, float]]) -> dict[str, float]:
    """(kind, bytes) of what an instruction reads and writes, by PARTS."""
    writes_cache = any(kind == CACHE and size for kind, size in made)
    cache_read = "cache_written" if writes_cache else "cache_read"
    parts = dict.fromkeys(PARTS, 0.0)
    for kind, size in read:
        parts["weights" if kind == WEIGHTS else cache_read if kind == CACHE else "activations"] += size
    for kind, size in made:
        parts["weights" if kind == WEIGHTS else "cache_written" if kind == CACHE else "activations"] += size
    return parts


def as_declared(parts: dict[str, float], declared: float, filled: float) -> dict[str, float]:
    """What a kernel declares in all, by PARTS: activations whole, the rest in proportion, as a kernel that is given all
    layers of weights or of a cache reads but one."""
    activations = min(declared, filled * parts["activations"])
    stacked = sum(size for name, size in parts.items() if name != "activations")
    if not stacked:
        return parts | {"activations": declared}
    share = (declared - activations) / stacked
    return {name: activations if name == "activations" else share * size for name, size in parts.items()}


def _size(shape: Shape) -> int:
    return sum(1 for _ in leaves(shape))


def _first(shape: Shape) -> Shape:
    return shape[0] if isinstance(shape, tuple) else shape


def _element(computation: Computation, instruction: Instruction) -> tuple[int, int]:
    """Which arrays of its operand a get-tuple-element takes."""
    shape, at = computation[instruction.operands[0]].shape, re.search(r"index=(\d+)", instruction.attributes)
    assert at is not None and isinstance(shape, tuple), instruction
    begin = sum(map(_size, shape[:int(at[1])]))
    return begin, begin + _size(shape[int(at[1])])


def branches(instruction: Instruction) -> list[str]:
    """The computations of a conditional."""
    return instruction.called("branch_computations") or [
        *instruction.called("true_computation"), *instruction.called("false_computation")]


def _join(kinds: Iterable[str]) -> str:
    """The kind of what is made of, or at one time or another is, all of these."""
    found = {kind for kind in kinds if kind != CONSTANT}
    return found.pop() if len(found) == 1 else ACTIVATION if found else CONSTANT


def _first_known(first: Kinds, second: Kinds) -> Kinds:
    return tuple(one or other for one, other in zip(first, second))


def _mixed(computation: Computation, instruction: Instruction, operands: list[Kinds]) -> str:
    """Of what is computed element by element, multiplied or summed: numbers, such as an index, say nothing."""
    arrays = [kind for name, kinds in zip(instruction.operands, operands)
              for kind, array in zip(kinds, computation[name].arrays) if array.elements > 1]
    return _join(arrays or sum(operands, ()))
