"""Keys or values of one layer of a stack of layers. The stack stays whole, where it is: a kernel that can takes the
layer from it as it reads, and nothing is copied."""

from typing import TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.kernels.int8 import Slots


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
    stack = part.stack_LBPGD if isinstance(part, Stacked) else jax.tree.map(lambda one: one[None], part)
    layer = part.layer if isinstance(part, Stacked) else jnp.int32(0)

    def cut(array: jax.Array, slots_axis: int) -> jax.Array:
        sizes = list(array.shape)
        sizes[0], sizes[slots_axis] = 1, count
        return lax.dynamic_slice(array, (layer, *[jnp.int32(0)] * (array.ndim - 1)), sizes)[0]

    if isinstance(stack, jax.Array):
        return cut(stack, -3)
    return stack.replace(q_BPGD=cut(stack.q_BPGD, -3), scale_BG1P=cut(stack.scale_BG1P, -1))
