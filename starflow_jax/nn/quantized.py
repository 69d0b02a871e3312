"""Weights in int8 with a float scale for each output channel, and dense layers that take such a kernel.

Nothing is scaled back as a whole: a product takes the int8 values, which XLA converts to its dtype on their way in, and
its result is multiplied by the scale of each output channel.
"""

from typing import Any

import flax.linen as nn
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


class Dense(nn.Dense):
    """nn.Dense whose kernel may be Quantized along its input axis."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return _product(self, inputs) if _is_quantized(self) else super().__call__(inputs)


class DenseGeneral(nn.DenseGeneral):
    """nn.DenseGeneral over the last axis, whose kernel may be Quantized along its input axis."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return _product(self, inputs) if _is_quantized(self) else super().__call__(inputs)


def _is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer.get_variable("params", "kernel"), Quantized)


def _product(layer: Dense | DenseGeneral, inputs: jax.Array) -> jax.Array:
    """(..., *features) in the layer's dtype; summed, scaled and shifted in float32 at least."""
    kernel: Any = layer.get_variable("params", "kernel")
    dtype = jnp.dtype(layer.dtype)
    out = lax.dot_general(inputs.astype(dtype), kernel.q.astype(dtype), (((inputs.ndim - 1,), (0,)), ((), ())),
                          preferred_element_type=jnp.promote_types(dtype, jnp.float32)) * kernel.scale
    return (out + layer.get_variable("params", "bias") if layer.use_bias else out).astype(dtype)
