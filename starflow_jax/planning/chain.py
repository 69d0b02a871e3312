"""Programs that follow one another, compiled from shapes alone."""

import math
from typing import Any

import jax

from starflow_jax.planning.array_kinds import contents_of
from starflow_jax.planning.program import Program


class Chain:
    """Programs compiled one after the other, each for the shapes, dtypes and shardings that those before it give."""

    def __init__(self, resident: dict[str, Any], weights: Any) -> None:
        self.programs: list[Program] = []
        self.resident = resident  # what stays on the devices while they run, in shapes
        self.weights = weights  # the model's, those too that are on the devices as an argument alone

    def run(self, name: str, function: Any, *args: Any, times: float = 1, updates: float | None = None,
            filled: float = 1, options: dict[str, Any] | None = None, **keywords: Any) -> Any:
        """What the function, a jitted one, returns, in shapes. times, updates, filled: as a Program has them."""
        lowered = function.lower(*args, **keywords)
        compiled = lowered.compile(compiler_options=options)
        self.programs.append(Program(name, compiled, times, updates, filled,
                                     self._held_with((args, keywords)), lowered,
                                     contents_of(function, args, keywords, lowered.out_info, self.weights)))
        return jax.tree.map(lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
                            lowered.out_info, compiled.output_shardings)

    def _held_with(self, arguments: Any) -> int:
        """Bytes a device of what is resident and of a program's arguments, also those that it makes no use of."""
        leaves = {id(leaf): leaf for leaf in jax.tree.leaves((self.resident, arguments)) if hasattr(leaf, "sharding")}
        return sum(map(_bytes_per_device, leaves.values()))


def _bytes_per_device(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
