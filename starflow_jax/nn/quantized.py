"""Weights in int8 with a float scale for each output channel, and products with them.

Nothing is scaled back as a whole: a product takes the int8 values, which XLA converts to its dtype on their way in, and
its result is multiplied by the scale of each output channel.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.kernels.int8 import rounded, scales


class Quantized(flax.struct.PyTreeNode):
    """q * scale along the axis that scale lacks."""

    q: jax.Array  # int8
    scale: jax.Array  # float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape


def quantize(x: jax.Array, axis: int) -> Quantized:
    """x rounded to int8, with one scale for all that lies along `axis`; zeros stay zeros."""
    # Without a barrier XLA would make one float32 copy of all of x, for its largest values and for the rounding.
    x, scale = lax.optimization_barrier((x, scales(x, axis)))
    return Quantized(rounded(x, scale), scale.squeeze(axis))


def scaled_product(inputs: jax.Array, kernel: Quantized) -> jax.Array:
    """(..., in) @ (in, *features), int8 values in the dtype of the inputs; summed and scaled in float32 at least."""
    dtype = inputs.dtype
    return lax.dot_general(inputs, kernel.q.astype(dtype), (((inputs.ndim - 1,), (0,)), ((), ())),
                           preferred_element_type=jnp.promote_types(dtype, jnp.float32)) * kernel.scale
