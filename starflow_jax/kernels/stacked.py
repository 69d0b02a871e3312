"""Keys or values of one layer of a stack of layers. The stack stays whole, where it is: a kernel that can takes the
layer from it as it reads, and nothing is copied."""

from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.kernels.int8 import Int8Slots, Slots


class Stacked(flax.struct.PyTreeNode):
    """stack_LBPGD[layer], not yet taken."""

    stack_LBPGD: Slots
    layer: jax.Array  # int32

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, P, G, D)."""
        return self.stack_LBPGD.shape[1:]


Cached: TypeAlias = Slots | Stacked


def taken(part: Cached) -> Slots:
    """The layer's own, a copy of it where it was a part of a stack."""
    if not isinstance(part, Stacked):
        return part
    return jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, part.layer, keepdims=False), part.stack_LBPGD)


def first_slots(part: Cached, count: int) -> Slots:
    """The layer's first slots; of a stack, no others are touched."""
    if not isinstance(part, Stacked):
        return jax.tree.map(lambda array, axis: lax.slice_in_dim(array, 0, count, axis=axis), part, _slots_axis(part))

    def cut(array: jax.Array, axis: int) -> jax.Array:
        sizes = list(array.shape)
        sizes[0], sizes[axis] = 1, count
        return lax.dynamic_slice(array, (part.layer, *[jnp.int32(0)] * (array.ndim - 1)), sizes)[0]

    return jax.tree.map(cut, part.stack_LBPGD, _slots_axis(part.stack_LBPGD))


def _slots_axis(part: Slots) -> Any:
    """Of each array of keys or values the axis of the slots."""
    return Int8Slots(-3, -1) if isinstance(part, Int8Slots) else -3  # type: ignore[arg-type]
