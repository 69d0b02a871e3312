"""Weights in int8 with a float scale for each output channel, or in int4 with one for each group of inputs of each
channel; and products with them.

Nothing is scaled back as a whole. A product takes the int8 values, which XLA converts to its dtype on their way in, and
its result is multiplied by the scale of each output channel; int4 values are multiplied by theirs on their way in.
"""

import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.kernels.int8 import rounded, scales

GROUP = 32  # inputs of a channel that share a scale in int4
LOWEST, HIGHEST = -8, 7  # in int4
SHARES = (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's largest value: what LOWEST may stand for


class Quantized(flax.struct.PyTreeNode):
    """q * scale along the axis that scale lacks; of int4 (in, *features) with scales (groups, *features), each group of
    consecutive inputs times its scale."""

    q: jax.Array  # int8 or int4
    scale: jax.Array  # float32; of int4 bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape


def quantize(x: jax.Array, axis: int) -> Quantized:
    """x rounded to int8, with one scale for all that lies along `axis`; zeros stay zeros."""
    # Without a barrier XLA would make one float32 copy of all of x, for its largest values and for the rounding.
    x, scale = lax.optimization_barrier((x, scales(x, axis)))
    return Quantized(rounded(x, scale), scale.squeeze(axis))


def quantize_in_groups(x: jax.Array) -> Quantized:
    """(in, *features) rounded to int4, GROUP inputs of a feature by one scale (fewer where GROUP does not divide their
    number): of those by SHARES the one with the least squared error. A scale has the sign that makes the value of the
    largest magnitude negative, of which int4 has one more. Zeros stay zeros."""
    size = math.gcd(x.shape[0], GROUP)
    grouped = x.astype(jnp.float32).reshape(-1, size, *x.shape[1:])
    largest = jnp.take_along_axis(grouped, jnp.argmax(jnp.abs(grouped), axis=1, keepdims=True), axis=1)

    def rounded_by(share: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(squared error, values, scale)."""
        # Rounded to bfloat16 before it divides, so that it is the scale that multiplies.
        scale = jnp.where(largest == 0, 1, largest * share / LOWEST).astype(jnp.bfloat16).astype(jnp.float32)
        q = jnp.clip(jnp.round(grouped / scale), LOWEST, HIGHEST)
        return jnp.sum((q * scale - grouped) ** 2, axis=1, keepdims=True), q, scale

    best = rounded_by(SHARES[0])
    for share in SHARES[1:]:
        found = rounded_by(share)
        best = jax.tree.map(partial(jnp.where, found[0] < best[0]), found, best)
    _, q, scale = best
    return Quantized(q.reshape(x.shape).astype(jnp.int4), scale.squeeze(1).astype(jnp.bfloat16))


def scaled_product(inputs: jax.Array, kernel: Quantized) -> jax.Array:
    """(..., in) @ (in, *features), the values in the dtype of the inputs; summed, and scaled by a channel's scale, in
    float32 at least."""
    dtype = inputs.dtype
    if kernel.scale.ndim == kernel.q.ndim:
        grouped = kernel.q.reshape(kernel.scale.shape[0], -1, *kernel.shape[1:]).astype(dtype)
        scaled = (grouped * kernel.scale[:, None].astype(dtype)).reshape(kernel.shape)
        return lax.dot_general(inputs, scaled, (((inputs.ndim - 1,), (0,)), ((), ())),
                               preferred_element_type=jnp.promote_types(dtype, jnp.float32))
    return lax.dot_general(inputs, kernel.q.astype(dtype), (((inputs.ndim - 1,), (0,)), ((), ())),
                           preferred_element_type=jnp.promote_types(dtype, jnp.float32)) * kernel.scale
